"""Free labels: what Python's own tokenize calls each byte of a source."""

import importlib
import inspect
import io
import keyword
import tokenize

import torch

CLASSES = ["indent", "space", "newline", "keyword", "name", "number", "string", "comment", "operator"]

def byte_classes(source):
    """tokenize's class of each byte of a Python source, as indices into CLASSES."""
    lines = source.splitlines(True)
    kinds = [["space"] * len(line) for line in lines]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        kind = {"OP": "operator", "NL": "newline"}.get(name, name.lower())
        kind = "keyword" if keyword.iskeyword(token.string) else "string" if "STRING" in name else kind
        (first, start), (last, end) = token.start, token.end
        for row in range(first, min(last, len(lines)) + 1) if kind in CLASSES else ():
            left, right = start if row == first else 0, end if row == last else len(lines[row - 1])
            kinds[row - 1][left:right] = [kind] * (min(right, len(lines[row - 1])) - left)
    found = []
    for line, row in zip(lines, kinds, strict=True):
        margin = len(line) - len(line.lstrip(" \t"))
        row[:margin] = ["indent" if kind == "space" else kind for kind in row[:margin]]
        for character, kind in zip(line, row, strict=True):
            found += [CLASSES.index(kind)] * len(character.encode())
    return found

def labelled(*modules):
    """All bytes of these standard modules, and the class of each: two tensors (N)."""
    sources = [inspect.getsource(importlib.import_module(module)) for module in modules]
    data, classes = bytearray("".join(sources).encode()), [c for source in sources for c in byte_classes(source)]
    return torch.tensor(data, dtype=torch.long), torch.tensor(classes)
