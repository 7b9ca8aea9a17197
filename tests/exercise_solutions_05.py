"""Answers of notebook 05: hint, solution, and usual wrong turns, whose first line says what went wrong."""

HINT = {
    "5.1": "For each row: the maximum over the mean, minus 1. Then the mean of the rows.",
    "5.2": "torch.sign of (mean load - load) is -1, 0 or 1: down for busy experts.",
    "5.3": "Count with scores.topk(K); normalise scores over all experts; mean over the tokens of each sequence; multiply; then average.",
}

SOLUTION = {
    "5.1": '''
def maxvio(loads):
    return (loads.amax(-1) / loads.mean(-1) - 1).mean()
''',
    "5.2": '''
def bias_update(bias, load, gamma):
    return bias + gamma * (load.mean() - load).sign()
''',
    "5.3": '''
def sequence_loss(scores, bias, K, alpha):
    T, E = scores.shape[1:]
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(K).indices, 1.0)
    f = chosen.sum(1) * E / (K * T)  # (B, E)
    P = (scores / scores.sum(-1, keepdim=True)).mean(1)  # (B, E)
    return alpha * (f * P).sum(-1).mean()
''',
}

WRONG = {
    "5.1": [
        '''
# the violation is what exceeds the mean: subtract 1
def maxvio(loads):
    return (loads.amax(-1) / loads.mean(-1)).mean()
''',
        '''
# average the layers' violations, do not take the worst one
def maxvio(loads):
    return (loads.amax(-1) / loads.mean(-1) - 1).max()
''',
        '''
# each layer has its own maximum: adding the loads up first lets layers cancel
def maxvio(loads):
    load = loads.sum(0)
    return load.max() / load.mean() - 1
''',
    ],
    "5.2": [
        '''
# the sign is turned around: a busy expert's bias must fall
def bias_update(bias, load, gamma):
    return bias - gamma * (load.mean() - load).sign()
''',
        '''
# the step has a fixed size, it does not grow with the imbalance
def bias_update(bias, load, gamma):
    return bias + gamma * (load.mean() - load) / load.mean()
''',
        '''
# an expert at the mean must not move
def bias_update(bias, load, gamma):
    return bias + gamma * torch.where(load < load.mean(), 1.0, -1.0)
''',
    ],
    "5.3": [
        '''
# f counts the best scores without the bias (Eq. 18)
def sequence_loss(scores, bias, K, alpha):
    T, E = scores.shape[1:]
    chosen = torch.zeros_like(scores).scatter(-1, (scores + bias).topk(K).indices, 1.0)
    f = chosen.sum(1) * E / (K * T)
    P = (scores / scores.sum(-1, keepdim=True)).mean(1)
    return alpha * (f * P).sum(-1).mean()
''',
        '''
# multiply for each sequence first, then average over the batch
def sequence_loss(scores, bias, K, alpha):
    T, E = scores.shape[1:]
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(K).indices, 1.0)
    f = (chosen.sum(1) * E / (K * T)).mean(0)
    P = (scores / scores.sum(-1, keepdim=True)).mean((0, 1))
    return alpha * (f * P).sum()
''',
        '''
# α is missing
def sequence_loss(scores, bias, K, alpha):
    T, E = scores.shape[1:]
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(K).indices, 1.0)
    f = chosen.sum(1) * E / (K * T)
    P = (scores / scores.sum(-1, keepdim=True)).mean(1)
    return (f * P).sum(-1).mean()
''',
        '''
# scores are divided by their sum (Eq. 19), not put through a softmax
def sequence_loss(scores, bias, K, alpha):
    T, E = scores.shape[1:]
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(K).indices, 1.0)
    f = chosen.sum(1) * E / (K * T)
    return alpha * (f * scores.softmax(-1).mean(1)).sum(-1).mean()
''',
    ],
}
