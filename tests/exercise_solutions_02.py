"""Answers of notebook 02: hint, solution, and usual wrong turns, whose first line says what went wrong."""

HINT = {
    "2.1": "One einsum makes the content keys of all heads. Only k_rope is turned, once; every head gets the same copy beside its own content key.",
    "2.2": "Scores are q_nope·k_nope + q_rope·k_rope over √(N + R); the future is -inf before the softmax.",
    "2.3": "weight.unflatten(0, (H, N + V)) makes heads an axis of their own; then split the rows of each head.",
}

SOLUTION = {
    "2.1": '''
def my_keys(c_kv, k_rope, W_UK, turn):
    k_nope = torch.einsum("tc,hnc->thn", c_kv, W_UK)
    k_rope = turn(k_rope[:, None])
    return torch.cat([k_nope, k_rope.expand(-1, len(W_UK), -1)], -1)
''',
    "2.2": '''
def my_attention(q_nope, q_rope, k_nope, k_rope, v):
    scores = q_nope @ k_nope.transpose(1, 2) + q_rope @ k_rope.T
    scores = scores / math.sqrt(q_nope.shape[-1] + q_rope.shape[-1])
    future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v
''',
    "2.3": '''
def split_kv_b(weight, H, N, V):
    by_head = weight.unflatten(0, (H, N + V))
    return by_head[:, :N], by_head[:, N:]
''',
}

WRONG = {
    "2.1": [
        '''
# RoPE went over the content part as well: only the R extra channels are turned
def my_keys(c_kv, k_rope, W_UK, turn):
    k_nope = torch.einsum("tc,hnc->thn", c_kv, W_UK)
    return torch.cat([turn(k_nope), turn(k_rope[:, None]).expand(-1, len(W_UK), -1)], -1)
''',
        '''
# the rotary key was not turned
def my_keys(c_kv, k_rope, W_UK, turn):
    k_nope = torch.einsum("tc,hnc->thn", c_kv, W_UK)
    return torch.cat([k_nope, k_rope[:, None].expand(-1, len(W_UK), -1)], -1)
''',
        '''
# content comes first, then position
def my_keys(c_kv, k_rope, W_UK, turn):
    k_nope = torch.einsum("tc,hnc->thn", c_kv, W_UK)
    return torch.cat([turn(k_rope[:, None]).expand(-1, len(W_UK), -1), k_nope], -1)
''',
    ],
    "2.2": [
        '''
# the scale is 1/√(N + R): a query is wider than its content part
def my_attention(q_nope, q_rope, k_nope, k_rope, v):
    scores = q_nope @ k_nope.transpose(1, 2) + q_rope @ k_rope.T
    scores = scores / math.sqrt(q_nope.shape[-1])
    future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v
''',
        '''
# a mask of 0 before the softmax still gives the future the weight e⁰
def my_attention(q_nope, q_rope, k_nope, k_rope, v):
    scores = q_nope @ k_nope.transpose(1, 2) + q_rope @ k_rope.T
    scores = scores / math.sqrt(q_nope.shape[-1] + q_rope.shape[-1])
    future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, 0.0).softmax(-1) @ v
''',
        '''
# masked after the softmax, the rows no longer sum to 1
def my_attention(q_nope, q_rope, k_nope, k_rope, v):
    scores = q_nope @ k_nope.transpose(1, 2) + q_rope @ k_rope.T
    scores = scores / math.sqrt(q_nope.shape[-1] + q_rope.shape[-1])
    return scores.softmax(-1).tril() @ v
''',
        '''
# the rotary part of the score is missing
def my_attention(q_nope, q_rope, k_nope, k_rope, v):
    scores = q_nope @ k_nope.transpose(1, 2) / math.sqrt(q_nope.shape[-1] + q_rope.shape[-1])
    future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v
''',
    ],
    "2.3": [
        '''
# the rows go head by head, so cutting the whole axis in two mixes keys of some heads with values of others
def split_kv_b(weight, H, N, V):
    return weight[: H * N].unflatten(0, (H, N)), weight[H * N :].unflatten(0, (H, V))
''',
        '''
# keys come before values in each head
def split_kv_b(weight, H, N, V):
    by_head = weight.unflatten(0, (H, N + V))
    return by_head[:, V:], by_head[:, :V]
''',
    ],
}
