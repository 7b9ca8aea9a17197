"""The README's table of the functions that compute the equations of the report's section 2.

`python tests/equation_map.py` prints it, `--write` puts it into README.md between its two markers.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- equations -->", "<!-- /equations -->"
STATES = """
latent of keys and values, keys from the latent, shared rotary key, keys, values from the latent,
query latent, content queries, rotary queries, queries, attention, attention output,
shared + routed experts, normalised gates, gates of the chosen, affinity scores, biased choice,
balance loss, share of the choices, normalised scores, mean score,
MTP input, MTP block, MTP prediction, loss of a depth, MTP loss
"""
STATES = dict(enumerate(re.split(r",\s+", STATES.strip()), 1))
COMPUTES = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)

def cited(text):
    """The numbers of `Eq. 7`, `Eqs. 2, 5`, `Eqs. 6–8`: {7}, {2, 5}, {6, 7, 8}."""
    found = set()
    for numbers in re.findall(r"\bEqs?\. (\d+(?:(?:, | and |–|-)\d+)*)", text):
        for part in re.split(r", | and ", numbers):
            first, *last = map(int, re.split("[–-]", part))
            found |= set(range(first, (last or [first])[0] + 1))
    return found

def functions(node, within=""):
    """(qualified name, function) of the functions and methods of a module or class, nested ones left out."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef):
            yield within + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, f"{within}{child.name}.")

def where():
    """{equation: names of functions with a statement that cites it in a comment on one of its lines}."""
    source, found = (ROOT / "deepseek_v3.py").read_text(encoding="utf-8"), {}
    lines = source.splitlines()
    for name, function in functions(ast.parse(source)):
        for node in ast.walk(function):
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if isinstance(node, COMPUTES) and not docstring:
                comments = [line.partition("  # ")[2] for line in lines[node.lineno - 1 : node.end_lineno]]
                for equation in cited("; ".join(comments)):
                    found.setdefault(equation, {})[name] = True
    return {equation: list(names) for equation, names in found.items()}

def table():
    """Two columns of equations, each with the functions that compute it."""
    computed = where()

    def row(i):
        return f"| {i} | {STATES[i]} | {', '.join(f'`{name}`' for name in computed.get(i, []))} "

    rows = [row(i) + (row(i + 13) if i + 13 in STATES else "| | | ") + "|" for i in range(1, 14)]
    head = "| Eq. | states | in [`deepseek_v3.py`](deepseek_v3.py) " * 2 + "|"
    return "\n".join([BEGIN, head, "| --: | --- | --- " * 2 + "|", *rows, END])

if __name__ == "__main__":
    if "--write" in sys.argv:
        readme, old = ROOT / "README.md", re.compile(f"{BEGIN}.*{END}", re.DOTALL)
        text = old.sub(lambda _: table(), readme.read_text(encoding="utf-8"))
        readme.write_text(text, encoding="utf-8")
    else:
        print(table())
