"""Answers of notebook 08: hint, solution, and usual wrong turns, whose first line says what went wrong."""

HINT = {
    "8.1": "Multiply the mask by torch.arange(T): the largest entry of a row stands at its last real token.",
    "8.2": "Start with torch.full((length,), -100) and write each word's class at its start.",
    "8.3": "B A must be zero, but not because both are: a zero B has a gradient as long as A is not zero.",
}

SOLUTION = {
    "8.1": '''
def last_real(mask):
    return (mask * torch.arange(mask.shape[1])).argmax(-1)
''',
    "8.2": '''
def word_labels(words, length):
    labels = torch.full((length,), -100)
    for start, end, kind in words:
        labels[start] = kind
    return labels
''',
    "8.3": '''
def lora_start(weight, noise):
    return noise, torch.zeros(weight.shape[0], noise.shape[0])
''',
}

WRONG = {
    "8.1": [
        '''
# the last column is padding when rows are padded on the right
def last_real(mask):
    return torch.full((len(mask),), mask.shape[1] - 1)
''',
        '''
# counting the real tokens finds the last one only when padding is on the right
def last_real(mask):
    return mask.sum(-1) - 1
''',
        '''
# that is the first real token; it has seen nothing
def last_real(mask):
    return mask.argmax(-1)
''',
    ],
    "8.2": [
        '''
# 0 is a class: tokens that are not scored have -100
def word_labels(words, length):
    labels = torch.zeros(length, dtype=torch.long)
    for start, end, kind in words:
        labels[start] = kind
    return labels
''',
        '''
# only the first token of a word is scored
def word_labels(words, length):
    labels = torch.full((length,), -100)
    for start, end, kind in words:
        labels[start:end] = kind
    return labels
''',
        '''
# classifiers' labels are not shifted
def word_labels(words, length):
    labels = torch.full((length,), -100)
    for start, end, kind in words:
        labels[max(start - 1, 0)] = kind
    return labels
''',
    ],
    "8.3": [
        '''
# both zero: the start is right, but neither ever gets a gradient
def lora_start(weight, noise):
    return torch.zeros_like(noise), torch.zeros(weight.shape[0], noise.shape[0])
''',
        '''
# both random: the model no longer starts as it was
def lora_start(weight, noise):
    return noise, noise[:, :1].T.expand(weight.shape[0], -1)
''',
        '''
# A is (rank, in) and B is (out, rank): the product B A has the shape of the weight
def lora_start(weight, noise):
    return noise.T, torch.zeros(noise.shape[0], weight.shape[0])
''',
    ],
}
