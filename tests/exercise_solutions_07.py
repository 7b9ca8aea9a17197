"""Answers of notebook 07: hint, solution, and usual wrong turns, whose first line says what went wrong."""

HINT = {
    "7.1": "unflatten both axes into (blocks, 128); the scale is the largest magnitude of a block over 448.",
    "7.2": "repeat_interleave(128) on both axes of the scale, cut to the shape of the codes, then multiply.",
    "7.3": "Loop over the chunks of 128 channels: (a_chunk @ w_chunk.T) * a_scale[:, c, None] * w_scale[:, c] spread over 128 columns.",
}

SOLUTION = {
    "7.1": '''
def my_quantise(weight):
    blocks = weight.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))  # (a, 128, b, 128)
    scale = blocks.abs().amax((1, 3)) / 448
    scale = torch.where(scale == 0, 1.0, scale)
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.flatten(2).flatten(0, 1), scale
''',
    "7.2": '''
def my_dequantise(codes, scale):
    rows, columns = codes.shape
    return codes.float() * scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
''',
    "7.3": '''
def my_matmul(a, a_scale, w, w_scale):
    total = torch.zeros(len(a), len(w))
    for c in range(a_scale.shape[1]):
        part = slice(128 * c, 128 * c + 128)
        both = a_scale[:, c, None] * w_scale[:, c].repeat_interleave(128)
        total = total + (a[:, part] @ w[:, part].T) * both
    return total
''',
}

WRONG = {
    "7.1": [
        '''
# the scale is upside down: it must multiply what is stored, so it is the largest / 448
def my_quantise(weight):
    blocks = weight.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    scale = 448 / blocks.abs().amax((1, 3))
    scale = torch.where(scale.isinf(), 1.0, scale)
    return (blocks * scale[:, None, :, None]).to(torch.float8_e4m3fn).flatten(2).flatten(0, 1), scale
''',
        '''
# a block of zeros got the scale 0: it must be 1, or others divide by 0
def my_quantise(weight):
    blocks = weight.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).nan_to_num(0).to(torch.float8_e4m3fn)
    return codes.flatten(2).flatten(0, 1), scale
''',
        '''
# the largest must be taken of magnitudes: a block's largest may be negative
def my_quantise(weight):
    blocks = weight.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    scale = blocks.amax((1, 3)) / 448
    scale = torch.where(scale == 0, 1.0, scale)
    codes = (blocks / scale[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.flatten(2).flatten(0, 1), scale
''',
    ],
    "7.2": [
        '''
# the block is 128 wide, not rows // scale rows: 576 rows in 5 blocks are not blocks of 115
def my_dequantise(codes, scale):
    (rows, columns), (a, b) = codes.shape, scale.shape
    row = (torch.arange(rows) // (rows // a)).clamp(max=a - 1)
    column = (torch.arange(columns) // (columns // b)).clamp(max=b - 1)
    return codes.float() * scale[row][:, column]
''',
        '''
# in spite of its name, weight_scale_inv multiplies
def my_dequantise(codes, scale):
    rows, columns = codes.shape
    return codes.float() / scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
''',
        '''
# repeat lays copies of the grid side by side; each scale must be repeated 128 times in place
def my_dequantise(codes, scale):
    rows, columns = codes.shape
    return codes.float() * scale.repeat(128, 128)[:rows, :columns]
''',
    ],
    "7.3": [
        '''
# the scales change every 128 channels, so they must be applied before the chunks are added up
def my_matmul(a, a_scale, w, w_scale):
    both = a_scale.mean(1)[:, None] * w_scale.mean(1).repeat_interleave(128)
    return (a @ w.T) * both
''',
        '''
# the scale of the weights was left out
def my_matmul(a, a_scale, w, w_scale):
    total = torch.zeros(len(a), len(w))
    for c in range(a_scale.shape[1]):
        part = slice(128 * c, 128 * c + 128)
        total = total + (a[:, part] @ w[:, part].T) * a_scale[:, c, None]
    return total
''',
        '''
# each scale of w covers 128 rows of it in a row: repeat_interleave, not repeat
def my_matmul(a, a_scale, w, w_scale):
    total = torch.zeros(len(a), len(w))
    for c in range(a_scale.shape[1]):
        part = slice(128 * c, 128 * c + 128)
        total = total + (a[:, part] @ w[:, part].T) * a_scale[:, c, None] * w_scale[:, c].repeat(128)
    return total
''',
    ],
}
