"""Answers of notebook 04: hint, solution, and usual wrong turns, whose first line says what went wrong."""

HINT = {
    "4.2": "unflatten(-1, (groups, -1)), topk(2) and sum give the groups' scores; masked_fill with -math.inf, then topk and sort.",
    "4.1": "scores.gather(-1, indices), divided by their sum in each row. The bias has done its work already.",
    "4.3": "Loop over the experts; (indices == e).nonzero(as_tuple=True) gives the rows and their slots. The factor is for routed experts.",
}

SOLUTION = {
    "4.2": '''
def choose(biased, groups, keep, K):
    grouped = biased.unflatten(-1, (groups, -1))  # (T, G, E/G)
    best = grouped.topk(2).values.sum(-1).topk(keep).indices
    outside = torch.ones(grouped.shape[:2], dtype=torch.bool).scatter(-1, best, False)
    reachable = grouped.masked_fill(outside[..., None], -math.inf).flatten(-2)
    return reachable.topk(K).indices.sort().values
''',
    "4.1": '''
def gates(scores, bias, indices, scaling):
    weights = scores.gather(-1, indices)
    return weights / weights.sum(-1, keepdim=True) * scaling
''',
    "4.3": '''
def mixture(x, indices, gates, experts, shared, scaling):
    out = x @ shared.T
    for e in range(len(experts)):
        row, slot = (indices == e).nonzero(as_tuple=True)
        out[row] += scaling * gates[row, slot, None] * (x[row] @ experts[e].T)
    return out
''',
}

WRONG = {
    "4.2": [
        '''
# 0 is not out of reach when biased scores are negative: fill with -math.inf
def choose(biased, groups, keep, K):
    grouped = biased.unflatten(-1, (groups, -1))
    best = grouped.topk(2).values.sum(-1).topk(keep).indices
    outside = torch.ones(grouped.shape[:2], dtype=torch.bool).scatter(-1, best, False)
    return grouped.masked_fill(outside[..., None], 0.0).flatten(-2).topk(K).indices.sort().values
''',
        '''
# a group's score is the sum of its two best, not its best one
def choose(biased, groups, keep, K):
    grouped = biased.unflatten(-1, (groups, -1))
    best = grouped.amax(-1).topk(keep).indices
    outside = torch.ones(grouped.shape[:2], dtype=torch.bool).scatter(-1, best, False)
    return grouped.masked_fill(outside[..., None], -math.inf).flatten(-2).topk(K).indices.sort().values
''',
        '''
# a group's score is the sum of its two best, not of all its experts
def choose(biased, groups, keep, K):
    grouped = biased.unflatten(-1, (groups, -1))
    best = grouped.sum(-1).topk(keep).indices
    outside = torch.ones(grouped.shape[:2], dtype=torch.bool).scatter(-1, best, False)
    return grouped.masked_fill(outside[..., None], -math.inf).flatten(-2).topk(K).indices.sort().values
''',
        '''
# the groups are not limited at all
def choose(biased, groups, keep, K):
    return biased.topk(K).indices.sort().values
''',
    ],
    "4.1": [
        '''
# weights come from s, not from s + b: the bias only chooses
def gates(scores, bias, indices, scaling):
    weights = (scores + bias).gather(-1, indices)
    return weights / weights.sum(-1, keepdim=True) * scaling
''',
        '''
# the sum runs over the chosen experts, not over all
def gates(scores, bias, indices, scaling):
    return (scores / scores.sum(-1, keepdim=True)).gather(-1, indices) * scaling
''',
        '''
# a softmax is not it: sigmoid scores are divided by their sum
def gates(scores, bias, indices, scaling):
    return scores.gather(-1, indices).softmax(-1) * scaling
''',
        '''
# the weights are not normalised
def gates(scores, bias, indices, scaling):
    return scores.gather(-1, indices) * scaling
''',
    ],
    "4.3": [
        '''
# the factor is for the routed experts, not for the shared one
def mixture(x, indices, gates, experts, shared, scaling):
    out = x @ shared.T
    for e in range(len(experts)):
        row, slot = (indices == e).nonzero(as_tuple=True)
        out[row] += gates[row, slot, None] * (x[row] @ experts[e].T)
    return scaling * out
''',
        '''
# the shared expert is missing
def mixture(x, indices, gates, experts, shared, scaling):
    out = torch.zeros_like(x)
    for e in range(len(experts)):
        row, slot = (indices == e).nonzero(as_tuple=True)
        out[row] += scaling * gates[row, slot, None] * (x[row] @ experts[e].T)
    return out
''',
        '''
# a gate belongs to a slot of its token: look it up by (row, slot)
def mixture(x, indices, gates, experts, shared, scaling):
    out = x @ shared.T
    for e in range(len(experts)):
        row, slot = (indices == e).nonzero(as_tuple=True)
        out[row] += scaling * gates[row, 0, None] * (x[row] @ experts[e].T)
    return out
''',
    ],
}
