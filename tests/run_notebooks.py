"""Execute the notebooks in place and keep them comparable.

`python tests/run_notebooks.py --write [names]` executes those whose code changed (`--force`: all), in
notebooks/, and writes them back without timings, widgets and versions. Errors, stderr and absolute
paths are refused. Links to lines of deepseek_v3.py are set to where the linked name is now.
Without --write it only says what would be executed.
"""

import argparse
import ast
import hashlib
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[`([\w.]+)`\]\(\.\./deepseek_v3\.py#L\d+\)")
WIDGET = "application/vnd.jupyter.widget-view+json"


def paths(names=()):
    """All notebooks, or those whose file name begins with one of `names`."""
    found = sorted((ROOT / "notebooks").glob("*.ipynb"))
    return [path for path in found if not names or path.name.startswith(tuple(names))]


def definitions():
    """{name or Class.name: its line in deepseek_v3.py}."""
    lines = {}
    for node in ast.parse((ROOT / "deepseek_v3.py").read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            lines[node.name] = node.lineno
        if isinstance(node, ast.ClassDef):
            inner = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            lines |= {f"{node.name}.{child.name}": child.lineno for child in inner}
    return lines


def link_lines(notebook):
    """Point each link [`name`](../deepseek_v3.py#L1) at the line where `name` is defined."""
    lines = definitions()
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(lambda link: f"[`{link[1]}`](../deepseek_v3.py#L{lines[link[1]]})", cell.source)


def code_hash(notebook):
    """Of all code cells."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def problems(notebook):
    """What must not be in a committed notebook, as lines."""
    found = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            text = str(output)
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"cell {number}: {output.output_type} {text[:300]}")
            if re.search(r"/(home|tmp|root|Users|usr|work)/\w", text):
                found.append(f"cell {number}: an absolute path in its output")
    return found


def normalise(notebook):
    """Drop what differs between two runs of the same notebook."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    code = notebook.metadata.get("code", "")
    notebook.metadata = {"code": code, "kernelspec": kernel, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        kept = {key: cell.metadata[key] for key in ("tags", "jupyter") if cell.metadata.get(key)}
        cell.metadata = nbformat.from_dict(kept)
        if cell.cell_type == "code":
            kept = []
            for output in cell.outputs:
                output.pop("transient", None)
                if kept and "name" in output and output.get("name") == kept[-1].get("name"):
                    kept[-1].text += output.text  # print comes in pieces, cut by the clock
                elif WIDGET not in output.get("data", {}):
                    kept.append(output)
            cell.outputs = kept
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    nbformat.validate(notebook)
    return notebook


def execute(path, write, force):
    """Execute one notebook if need be; True if it is as it must be now."""
    notebook = nbformat.read(path, as_version=4)
    link_lines(notebook)
    fresh = notebook.metadata.get("code") == code_hash(notebook)
    if not write:
        print(f"{path.name}: {'up to date' if fresh else 'its code changed'}")
        return fresh
    if force or not fresh:
        began = time.perf_counter()
        where = {"metadata": {"path": str(path.parent)}}
        try:
            NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
        except Exception as error:
            print(f"{path.name}: {error}")
            return False
        print(f"{path.name}: executed in {time.perf_counter() - began:.0f} s")
        wrong = problems(notebook)
        if wrong:
            print(path.name, *wrong, sep="\n  ")
            return False
        notebook.metadata["code"] = code_hash(notebook)
    nbformat.write(normalise(notebook), path)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="beginnings of file names, such as 01 02")
    parser.add_argument("--write", action="store_true", help="execute and write back")
    parser.add_argument("--force", action="store_true", help="also those whose code did not change")
    options = parser.parse_args()
    os.environ["DSV3_NB_STATIC"] = "1"  # pictures where a live kernel would show widgets
    results = [execute(path, options.write, options.force) for path in paths(options.names)]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
