"""Answers of notebook 01: hint, solution, and usual wrong turns, whose first line says what went wrong."""

HINT = {
    "1.1": "x[:, 0::2] are the first channels of all pairs, x[:, 1::2] the second; torch.stack(..., -1).flatten(-2) interleaves again.",
    "1.2": "A ramp that is 0 up to floor(low) and 1 from ceil(high) on, clamped; it weighs inv_freq / s, the rest weighs inv_freq.",
    "1.3": "m = 0.1 * mscale * ln(factor) + 1, once for the query and once for the key.",
}

SOLUTION = {
    "1.1": '''
def my_rope(x, angle):
    even, odd = x[:, 0::2], x[:, 1::2]
    c, s = angle.cos(), angle.sin()
    return torch.stack([even * c - odd * s, even * s + odd * c], -1).flatten(-2)
''',
    "1.2": '''
def yarn_inv_freq(inv_freq, low, high, s):
    low, high = math.floor(low), math.ceil(high)
    slowed = ((torch.arange(len(inv_freq)) - low) / (high - low)).clamp(0, 1)
    return inv_freq * (1 - slowed) + inv_freq / s * slowed
''',
    "1.3": '''
def softmax_scale(d_nope, d_rope, factor, mscale):
    m = 0.1 * mscale * math.log(factor) + 1
    return (d_nope + d_rope) ** -0.5 * m**2
''',
}

WRONG = {
    "1.1": [
        '''
# is it (even, odd) pairs, or first half / second half?
def my_rope(x, angle):
    first, second = x.chunk(2, -1)
    c, s = angle.cos(), angle.sin()
    return torch.cat([first * c - second * s, first * s + second * c], -1)
''',
        '''
# that turns the other way: the sine's sign is swapped
def my_rope(x, angle):
    even, odd = x[:, 0::2], x[:, 1::2]
    c, s = angle.cos(), angle.sin()
    return torch.stack([even * c + odd * s, odd * c - even * s], -1).flatten(-2)
''',
        '''
# the pairs are right, but their two halves were not put back next to each other
def my_rope(x, angle):
    even, odd = x[:, 0::2], x[:, 1::2]
    c, s = angle.cos(), angle.sin()
    return torch.cat([even * c - odd * s, even * s + odd * c], -1)
''',
    ],
    "1.2": [
        '''
# the ramp runs the wrong way: fast pairs must stay, slow pairs must be slowed
def yarn_inv_freq(inv_freq, low, high, s):
    low, high = math.floor(low), math.ceil(high)
    kept = ((torch.arange(len(inv_freq)) - low) / (high - low)).clamp(0, 1)
    return inv_freq * kept + inv_freq / s * (1 - kept)
''',
        '''
# low is rounded down and high up, to whole pairs
def yarn_inv_freq(inv_freq, low, high, s):
    slowed = ((torch.arange(len(inv_freq)) - low) / (high - low)).clamp(0, 1)
    return inv_freq * (1 - slowed) + inv_freq / s * slowed
''',
        '''
# without a clamp the ramp runs on beyond 0 and 1
def yarn_inv_freq(inv_freq, low, high, s):
    low, high = math.floor(low), math.ceil(high)
    slowed = (torch.arange(len(inv_freq)) - low) / (high - low)
    return inv_freq * (1 - slowed) + inv_freq / s * slowed
''',
    ],
    "1.3": [
        '''
# the temperature counts twice, once for the query and once for the key
def softmax_scale(d_nope, d_rope, factor, mscale):
    return (d_nope + d_rope) ** -0.5 * (0.1 * mscale * math.log(factor) + 1)
''',
        '''
# a query is d_nope + d_rope wide
def softmax_scale(d_nope, d_rope, factor, mscale):
    return d_nope**-0.5 * (0.1 * mscale * math.log(factor) + 1) ** 2
''',
        '''
# the temperature sharpens: multiply by it
def softmax_scale(d_nope, d_rope, factor, mscale):
    return (d_nope + d_rope) ** -0.5 / (0.1 * mscale * math.log(factor) + 1) ** 2
''',
    ],
}
