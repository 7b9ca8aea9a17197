"""Answers of notebook 09: hint, solution, and usual wrong turns, whose first line says what went wrong."""

HINT = {
    "9.1": "A stack's name has '.mlp.experts.'; split it at the last dot and put the expert's number between, '.weight' behind.",
    "9.2": "The MTP layer is number L, counted from 0, so it stands behind layers 0 to L - 1.",
    "9.3": "Keep the device and what is left of it; where a part does not fit, the next device starts with all its room.",
}

SOLUTION = {
    "9.1": '''
def my_names(parameter, E):
    if ".mlp.experts." not in parameter:
        return [parameter]
    head, leaf = parameter.rsplit(".", 1)
    return [f"{head}.{e}.{leaf}.weight" for e in range(E)]
''',
    "9.2": '''
def my_copies(L):
    layer = f"model.layers.{L}"
    head = (f"{layer}.shared_head.head.weight", "lm_head.weight")
    return [(f"{layer}.embed_tokens.weight", "model.embed_tokens.weight"), head]
''',
    "9.3": '''
def my_split(sizes, room):
    device, left, plan = 0, room, []
    for size in sizes:
        if size > left:
            device, left = device + 1, room
        plan.append(device)
        left -= size
    return torch.tensor(plan)
''',
}

WRONG = {
    "9.1": [
        '''
# the checkpoint has a tensor for each expert, not a stack
def my_names(parameter, E):
    return [parameter]
''',
        '''
# the shared expert is no stack: its name has shared_experts, and stays
def my_names(parameter, E):
    if "experts." not in parameter:
        return [parameter]
    head, leaf = parameter.removesuffix(".weight").rsplit(".", 1)
    return [f"{head}.{e}.{leaf}.weight" for e in range(E)]
''',
        '''
# a checkpoint's names end in .weight
def my_names(parameter, E):
    if ".mlp.experts." not in parameter:
        return [parameter]
    head, leaf = parameter.rsplit(".", 1)
    return [f"{head}.{e}.{leaf}" for e in range(E)]
''',
    ],
    "9.2": [
        '''
# layers count from 0: the MTP layer is number L, not L - 1
def my_copies(L):
    layer = f"model.layers.{L - 1}"
    head = (f"{layer}.shared_head.head.weight", "lm_head.weight")
    return [(f"{layer}.embed_tokens.weight", "model.embed_tokens.weight"), head]
''',
        '''
# the norm of shared_head is the module's own; the copy is its head
def my_copies(L):
    layer = f"model.layers.{L}"
    head = (f"{layer}.shared_head.norm.weight", "model.norm.weight")
    return [(f"{layer}.embed_tokens.weight", "model.embed_tokens.weight"), head]
''',
    ],
    "9.3": [
        '''
# that splits by the number of parts, not by their bytes
def my_split(sizes, room):
    devices = -(-sum(sizes) // room)
    return torch.arange(len(sizes)) * devices // len(sizes)
''',
        '''
# a part may not go back to an earlier device: layers run in order
def my_split(sizes, room):
    left, plan = [room] * len(sizes), []
    for size in sizes:
        device = next(i for i, free in enumerate(left) if size <= free)
        left[device] -= size
        plan.append(device)
    return torch.tensor(plan)
''',
        '''
# a part that fills the device exactly does fit
def my_split(sizes, room):
    device, left, plan = 0, room, []
    for size in sizes:
        if size >= left:
            device, left = device + 1, room
        plan.append(device)
        left -= size
    return torch.tensor(plan)
''',
    ],
}
