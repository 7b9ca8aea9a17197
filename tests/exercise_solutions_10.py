"""Answers of notebook 10: hint, solution, and usual wrong turns, whose first line says what went wrong."""

HINT = {
    "10.1": "Warm-up: as many forwards as there are ranks behind this one, but no more than n. Then pairs. Then what is left.",
    "10.2": "Table 2 of the report: (PP/2 - 1)(F&B + B - 3W). Both ends work, so PP counts half.",
    "10.3": "6 per weight that is multiplied, and 3 for each layer, head, channel of score or value, and token of the context.",
}

SOLUTION = {
    "10.1": '''
def order_1f1b(rank, PP, n):
    warm_up = min(PP - 1 - rank, n)
    return ["F"] * warm_up + ["F", "B"] * (n - warm_up) + ["B"] * warm_up
''',
    "10.2": '''
def dualpipe_bubble(PP, F, B, W, pair):
    return (PP / 2 - 1) * (pair + B - 3 * W)
''',
    "10.3": '''
def training_flops(active, embedding, layers, heads, d_qk, d_v, T):
    return 6 * (active - embedding) + 3 * layers * heads * (d_qk + d_v) * T
''',
}

WRONG = {
    "10.1": [
        '''
# the warm-up counts the ranks in front; it must count those behind
def order_1f1b(rank, PP, n):
    warm_up = min(rank, n)
    return ["F"] * warm_up + ["F", "B"] * (n - warm_up) + ["B"] * warm_up
''',
        '''
# one forward too many in the warm-up: one more micro-batch must be kept in memory
def order_1f1b(rank, PP, n):
    warm_up = min(PP - rank, n)
    return ["F"] * warm_up + ["F", "B"] * (n - warm_up) + ["B"] * warm_up
''',
        '''
# no warm-up: the ranks behind have nothing to do
def order_1f1b(rank, PP, n):
    return ["F", "B"] * n
''',
        '''
# with fewer micro-batches than ranks the warm-up must stop at n
def order_1f1b(rank, PP, n):
    warm_up = PP - 1 - rank
    return ["F"] * warm_up + ["F", "B"] * (n - warm_up) + ["B"] * warm_up
''',
    ],
    "10.2": [
        '''
# that is the classical pipeline, which is filled from one end
def dualpipe_bubble(PP, F, B, W, pair):
    return (PP - 1) * (F + B)
''',
        '''
# filled from both ends: PP counts half
def dualpipe_bubble(PP, F, B, W, pair):
    return (PP - 1) * (pair + B - 3 * W)
''',
        '''
# an overlapped pair is not F + B: its own time counts
def dualpipe_bubble(PP, F, B, W, pair):
    return (PP / 2 - 1) * (F + B + B - 3 * W)
''',
    ],
    "10.3": [
        '''
# the embedding is looked up, not multiplied
def training_flops(active, embedding, layers, heads, d_qk, d_v, T):
    return 6 * active + 3 * layers * heads * (d_qk + d_v) * T
''',
        '''
# a causal token sees half the sequence on average
def training_flops(active, embedding, layers, heads, d_qk, d_v, T):
    return 6 * (active - embedding) + 6 * layers * heads * (d_qk + d_v) * T
''',
        '''
# backward costs twice as much as forward, so that 2 FLOPs per weight become 6
def training_flops(active, embedding, layers, heads, d_qk, d_v, T):
    return 2 * (active - embedding) + layers * heads * (d_qk + d_v) * T
''',
    ],
}
