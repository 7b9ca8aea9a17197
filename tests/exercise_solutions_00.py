"""Answers of notebook 00: hint, solution, and usual wrong turns, whose first line says what went wrong."""

HINT = {
    "0.1": "q_b_proj is q_rank by heads·(nope + rope); kv_a_proj_with_mqa is D by kv_rank + rope; o_proj reads heads·v channels. A norm has as many weights as channels.",
    "0.2": "(chosen + shared) experts of 3·D·width weights each, and a router of D weights per expert.",
}

SOLUTION = {
    "0.1": '''
def attention_parameters(D, heads, q_rank, kv_rank, nope, rope, v):
    query = D * q_rank + q_rank + q_rank * heads * (nope + rope)
    latent = D * (kv_rank + rope) + kv_rank + kv_rank * heads * (nope + v)
    return query + latent + heads * v * D
''',
    "0.2": '''
def active_in_moe(D, width, routed, shared, chosen):
    return (chosen + shared) * 3 * D * width + routed * D
''',
}

WRONG = {
    "0.1": [
        '''
# o_proj reads all heads' values, heads · v channels, not D
def attention_parameters(D, heads, q_rank, kv_rank, nope, rope, v):
    query = D * q_rank + q_rank + q_rank * heads * (nope + rope)
    latent = D * (kv_rank + rope) + kv_rank + kv_rank * heads * (nope + v)
    return query + latent + D * D
''',
        '''
# the shared rotary key comes out of kv_a_proj_with_mqa too
def attention_parameters(D, heads, q_rank, kv_rank, nope, rope, v):
    query = D * q_rank + q_rank + q_rank * heads * (nope + rope)
    latent = D * kv_rank + kv_rank + kv_rank * heads * (nope + v)
    return query + latent + heads * v * D
''',
        '''
# both latents have a norm with weights of its own
def attention_parameters(D, heads, q_rank, kv_rank, nope, rope, v):
    query = D * q_rank + q_rank * heads * (nope + rope)
    latent = D * (kv_rank + rope) + kv_rank * heads * (nope + v)
    return query + latent + heads * v * D
''',
    ],
    "0.2": [
        '''
# the shared expert works for every token
def active_in_moe(D, width, routed, shared, chosen):
    return chosen * 3 * D * width + routed * D
''',
        '''
# the router scores all experts, not only the chosen ones
def active_in_moe(D, width, routed, shared, chosen):
    return (chosen + shared) * 3 * D * width + chosen * D
''',
        '''
# SwiGLU has three matrices: gate, up, down
def active_in_moe(D, width, routed, shared, chosen):
    return (chosen + shared) * 2 * D * width + routed * D
''',
    ],
}
