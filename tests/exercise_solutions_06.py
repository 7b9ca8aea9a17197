"""Answers of notebook 06: hint, solution, and usual wrong turns, whose first line says what went wrong."""

HINT = {
    "6.1": "Row i: state i, embedding i + k, target i + k + 1. The last target is token T - 1, so there are T - k - 1 rows.",
    "6.2": "At depth k, row i is scored on tokens[i + k + 1]; the last row has no target. Mean over rows, then over depths.",
    "6.3": "Take the argmax of each row. Walk along the drafts while they agree; the row behind the last that agrees gives one more.",
}

SOLUTION = {
    "6.1": '''
def my_rows(hidden, embeds, tokens, k):
    rows = len(tokens) - k - 1
    return hidden[:rows], embeds[k : k + rows], tokens[k + 1 :]
''',
    "6.2": '''
def my_mtp_loss(logits, tokens, lam):
    losses = [F.cross_entropy(rows[:-1], tokens[k + 1 :]) for k, rows in enumerate(logits, 1)]
    return lam * sum(losses) / len(losses)
''',
    "6.3": '''
def my_verify(drafts, logits):
    choices = logits.argmax(-1)
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == choices[accepted]:
        accepted += 1
    return choices[: accepted + 1]
''',
}

WRONG = {
    "6.1": [
        '''
# the embedding is that of the next token, not of the row's own: shift by k, not k - 1
def my_rows(hidden, embeds, tokens, k):
    rows = len(tokens) - k - 1
    return hidden[:rows], embeds[k - 1 : k - 1 + rows], tokens[k + 1 :]
''',
        '''
# the target is the token whose embedding was given: it must be one further
def my_rows(hidden, embeds, tokens, k):
    rows = len(tokens) - k - 1
    return hidden[:rows], embeds[k : k + rows], tokens[k : k + rows]
''',
        '''
# the state stays at row i; it is the embedding that moves ahead
def my_rows(hidden, embeds, tokens, k):
    rows = len(tokens) - k - 1
    return hidden[-rows:], embeds[k : k + rows], tokens[k + 1 :]
''',
        '''
# the last row has an input but no target
def my_rows(hidden, embeds, tokens, k):
    rows = len(tokens) - k
    return hidden[:rows], embeds[k:], tokens[k:]
''',
    ],
    "6.2": [
        '''
# the sum over depths must be divided by D
def my_mtp_loss(logits, tokens, lam):
    return lam * sum(F.cross_entropy(rows[:-1], tokens[k + 1 :]) for k, rows in enumerate(logits, 1))
''',
        '''
# that is Eq. 24's division by T; asked for is the mean over the targets there are
def my_mtp_loss(logits, tokens, lam):
    losses = [F.cross_entropy(rows[:-1], tokens[k + 1 :], reduction="sum") for k, rows in enumerate(logits, 1)]
    return lam * sum(losses) / len(losses) / len(tokens)
''',
        '''
# row i of depth k is scored on token i + k + 1, not i + k: that one it was given
def my_mtp_loss(logits, tokens, lam):
    losses = [F.cross_entropy(rows, tokens[k:]) for k, rows in enumerate(logits, 1)]
    return lam * sum(losses) / len(losses)
''',
        '''
# λ is missing
def my_mtp_loss(logits, tokens, lam):
    losses = [F.cross_entropy(rows[:-1], tokens[k + 1 :]) for k, rows in enumerate(logits, 1)]
    return sum(losses) / len(losses)
''',
    ],
    "6.3": [
        '''
# drafts behind the first mismatch were made from a token that does not stand: they fall too
def my_verify(drafts, logits):
    choices = logits.argmax(-1)
    agree = torch.tensor(drafts) == choices[:-1]
    return torch.cat([choices[:-1][agree], choices[-1:]])
''',
        '''
# the mismatched draft itself must not stand
def my_verify(drafts, logits):
    choices = logits.argmax(-1)
    agree = (torch.tensor(drafts) == choices[:-1]).long().cumprod(0).sum()
    return torch.cat([torch.tensor(drafts)[: agree + 1], choices[agree + 1 : agree + 2]])
''',
        '''
# behind the accepted drafts the model's own choice comes for free
def my_verify(drafts, logits):
    choices = logits.argmax(-1)
    agree = (torch.tensor(drafts) == choices[:-1]).long().cumprod(0).sum()
    return choices[:agree]
''',
    ],
}
