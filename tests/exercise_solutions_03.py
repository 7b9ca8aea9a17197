"""Answers of notebook 03: hint, solution, and usual wrong turns, whose first line says what went wrong."""

HINT = {
    "3.1": "What one token leaves in one layer is one latent and one rotary key; multiply up from there. Not all arguments are needed.",
    "3.2": "Take each head's q_nope into the latent space with its W_UK first; the rotary part is the plain product with the shared k_rope.",
    "3.3": "Set T·S·(N + R + V) + S·C·(N + V) equal to T·S·(2C + R) + T·C·(N + V) and solve for T.",
}

SOLUTION = {
    "3.1": '''
def cache_bytes(tokens, layers, d_c, d_rope, heads, bytes_per_number):
    return tokens * layers * (d_c + d_rope) * bytes_per_number
''',
    "3.2": '''
def absorbed_scores(q_nope, q_rope, c_kv, k_rope, W_UK):
    q_latent = torch.einsum("thn,hnc->htc", q_nope, W_UK)
    return q_latent @ c_kv.T + q_rope.transpose(0, 1) @ k_rope.T
''',
    "3.3": '''
def crossover(S, N, V, C):
    return C * (N + V) * S / (C * (N + V) + S * (2 * C - N - V))
''',
}

WRONG = {
    "3.1": [
        '''
# one latent serves for key and value: no factor 2
def cache_bytes(tokens, layers, d_c, d_rope, heads, bytes_per_number):
    return 2 * tokens * layers * (d_c + d_rope) * bytes_per_number
''',
        '''
# the rotary key is kept too
def cache_bytes(tokens, layers, d_c, d_rope, heads, bytes_per_number):
    return tokens * layers * d_c * bytes_per_number
''',
        '''
# all heads share what is kept
def cache_bytes(tokens, layers, d_c, d_rope, heads, bytes_per_number):
    return tokens * layers * heads * (d_c + d_rope) * bytes_per_number
''',
    ],
    "3.2": [
        '''
# the rotary part of the score is missing
def absorbed_scores(q_nope, q_rope, c_kv, k_rope, W_UK):
    return torch.einsum("thn,hnc->htc", q_nope, W_UK) @ c_kv.T
''',
        '''
# the query meets W_UK from its N side: that was the transpose
def absorbed_scores(q_nope, q_rope, c_kv, k_rope, W_UK):
    q_latent = torch.einsum("thn,hcn->htc", q_nope, W_UK)
    return q_latent @ c_kv.T + q_rope.transpose(0, 1) @ k_rope.T
''',
    ],
    "3.3": [
        '''
# absorbing has a price of its own, T·C·(N + V), which matters while S is short
def crossover(S, N, V, C):
    return C * (N + V) / (2 * C - N - V)
''',
        '''
# both orders multiply the rotary channels: R cancels, N and V do not
def crossover(S, N, V, C):
    return C * (N + V) * S / (C * (N + V) + S * 2 * C)
''',
    ],
}
