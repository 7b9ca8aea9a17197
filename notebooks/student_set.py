"""`python notebooks/student_set.py FOLDER` writes a set for students: notebooks without outputs, and what they need.

The answers, by which `nb.check` judges, go to notebooks/.answers, a folder that file browsers do not show.
"""

import argparse
import shutil
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent

def write(folder):
    """Write the set into a new or empty folder -> the notebooks' paths."""
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SystemExit(f"{folder} is not an empty folder: name a new one")
    answers = folder / "notebooks" / ".answers"
    answers.mkdir(parents=True)
    for source in (HERE.parent / "tests").glob("exercise_solutions_*.py"):
        shutil.copy(source, answers)
    shutil.copy(HERE.parent / "deepseek_v3.py", folder)
    shutil.copy(HERE.parent / "requirements.txt", folder)
    for source in [*HERE.glob("nb*.py"), *HERE.glob("*.png")]:
        shutil.copy(source, folder / "notebooks")
    written = []
    for source in sorted(HERE.glob("*.ipynb")):
        notebook = nbformat.read(source, as_version=4)
        notebook.metadata.pop("code", None)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        written.append(folder / "notebooks" / source.name)
        nbformat.write(notebook, written[-1])
    return written

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a new folder")
    told = write(parser.parse_args().folder)
    print(f"{len(told)} notebooks in {told[0].parent}")
