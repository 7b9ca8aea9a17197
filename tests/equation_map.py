"""The README's table of where each equation of the report's section 2 is computed.

`python tests/equation_map.py` prints it, `--write` puts it into README.md between its two markers.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- equations -->", "<!-- /equations -->"
STATES = {
    1: "latent of keys and values",
    2: "keys from the latent",
    3: "shared rotary key",
    4: "keys",
    5: "values from the latent",
    6: "query latent",
    7: "content queries",
    8: "rotary queries",
    9: "queries",
    10: "attention",
    11: "attention output",
    12: "shared + routed experts",
    13: "normalised gates",
    14: "gates of the chosen",
    15: "affinity scores",
    16: "biased choice",
    17: "balance loss",
    18: "share of the choices",
    19: "normalised scores",
    20: "mean score",
    21: "MTP input",
    22: "MTP block",
    23: "MTP prediction",
    24: "loss of a depth",
    25: "MTP loss",
}


def cited_lines():
    """{equation: lines of deepseek_v3.py whose code computes it}, read off the trailing comments."""
    found = {}
    for number, line in enumerate((ROOT / "deepseek_v3.py").read_text().splitlines(), 1):
        code, _, comment = line.partition("  # ")
        if not code.strip() or re.match(r"    \w+: ", code):  # config and output fields only mention them
            continue
        for cited in re.findall(r"Eqs?\. ([\d, –-]+)", comment):
            for part in cited.rstrip(", ").split(","):
                first, *last = re.split("[–-]", part.strip())
                for equation in range(int(first), int((last or [first])[0]) + 1):
                    found.setdefault(equation, []).append(number)
    return found


def table():
    """Two columns of equations, each linked to its lines."""
    lines = cited_lines()

    def row(equation):
        links = ", ".join(f"[{n}](deepseek_v3.py#L{n})" for n in lines.get(equation, []))
        return f"| {equation} | {STATES[equation]} | {links} "

    rows = [row(i) + row(i + 13) + "|" if i + 13 in STATES else row(i) + "| | | |" for i in range(1, 14)]
    head = ["| Eq. | states | line | Eq. | states | line |", "| --: | --- | --- | --: | --- | --- |"]
    return "\n".join([BEGIN, *head, *rows, END])


if __name__ == "__main__":
    if "--write" in sys.argv:
        readme = ROOT / "README.md"
        text = re.sub(f"{BEGIN}.*{END}", lambda _: table(), readme.read_text(), flags=re.S)
        readme.write_text(text)
    else:
        print(table())
