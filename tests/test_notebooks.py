"""The notebooks as committed: their form, their outputs, and their exercises done right and wrong.

An exercise needs only the setup cell, so that all its known answers run here in well under a second:
the stub as it stands, the solution, and each known wrong turn. Whole notebooks run in .ci/run.
"""

import ast
import contextlib
import io
import re
import subprocess
import sys

import nbformat
import pytest
import torch
from run_notebooks import ROOT, code_hash, definitions, link_lines, paths, problems

import deepseek_v3 as ds

ALL = paths()
NAMES = "00_map 01_rope_yarn 02_mla 03_cache_absorption 04_routing 05_balance 06_mtp 07_fp8 08_heads".split()
NAMES += ["09_real_weights", "10_systems"]

@pytest.fixture(params=ALL, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)

def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]

def exercises(notebook):
    """[(id, code cell)]."""
    tagged = [(tag, cell) for cell in code_cells(notebook) for tag in cell.metadata.get("tags", [])]
    found = [(tag[3:], cell) for tag, cell in tagged if tag[:3] == "ex-"]
    assert all("exercise" in cell.metadata.tags for _, cell in found)
    return found

def printed(cell):
    return "".join(output.get("text", "") for output in cell.get("outputs", []))

def test_they_are_executed_in_order_without_error(notebook):
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert problems(notebook) == []
    assert notebook.metadata.code == code_hash(notebook), "run python tests/run_notebooks.py --write"
    assert set(notebook.metadata) == {"code", "kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}

def test_their_size(notebook, request):
    path = request.node.callspec.params["notebook"]
    assert path.stat().st_size < 1_000_000
    assert len(notebook.cells) <= 50
    pictures = [o for cell in code_cells(notebook) for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) <= 6
    for cell in code_cells(notebook):
        assert len(cell.source.splitlines()) <= 15, cell.source
        assert max(map(len, cell.source.splitlines())) <= 115, cell.source
        assert "set_grad_enabled" not in cell.source and "plt." not in cell.source, "figures are drawn in nbplots.py"

def test_their_skeleton(notebook, request):
    stem = request.node.callspec.params["notebook"].stem
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    headings = [line for text in texts for line in text.splitlines() if line.startswith("#")]
    assert re.match(rf"# {stem[:2]} · ", headings[0])
    assert headings[-1] == "## Key points"
    for part in ("You will be able to", "Before this", "Time", "Equations", "Code"):
        assert f"**{part}**" in texts[0] + texts[1], part
    assert "**If you teach this**" in texts[-1] and "**Next**" in texts[-1]
    setups = [cell for cell in code_cells(notebook) if "setup" in cell.metadata.get("tags", [])]
    first = nbformat.read(ALL[0], as_version=4)
    assert setups == code_cells(notebook)[:1]
    assert setups[0].source == code_cells(first)[0].source
    if stem != "00_map":
        assert any("nb.predict(" in cell.source for cell in code_cells(notebook))
        assert any("Break it" in text for text in texts)
        assert 2 <= len(exercises(notebook)) <= 3

def test_every_picture_is_described(notebook):
    cells = notebook.cells
    for cell, following in zip(cells, [*cells[1:], None], strict=True):
        pictures = [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
        for picture in pictures:
            assert len(picture.metadata["image/png"]["alt"]) >= 40
            assert following.source.startswith("**What to see:**"), cell.source
        for call in ast.walk(ast.parse(cell.source)) if pictures else ():  # measured numbers are formatted in
            alt = call.args[1:] if isinstance(call, ast.Call) and ast.unparse(call.func) == "nb.show" else []
            fixed = [part.value for part in map(ast.walk, alt) for part in part if isinstance(part, ast.Constant)]
            fixed = [text for text in fixed if isinstance(text, str) and "report's" not in text]
            assert not [text for text in fixed if re.search(r"(?<!below )\b\d+\.\d", text)], cell.source

def test_they_fetch_nothing_and_hold_no_scripts(notebook):
    for cell in notebook.cells:
        fetches = r"^\s*[!%]|pip install|urlopen|requests\.|from_pretrained\(\"\w+/"
        assert cell.cell_type == "markdown" or not re.search(fetches, cell.source, re.M)
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
            assert "text/html" not in output.get("data", {})

def test_they_name_things_that_exist(notebook):
    for cell in notebook.cells:
        for name in re.findall(r"\bds\.(\w+)", cell.source):
            assert hasattr(ds, name), name
        for target in re.findall(r"\]\((\w[\w.]+\.ipynb)\)", cell.source):
            assert target.removesuffix(".ipynb") in NAMES, target
    before = [cell.source for cell in notebook.cells]
    link_lines(notebook)
    assert [cell.source for cell in notebook.cells] == before, "run python tests/run_notebooks.py --write"

def test_links_lead_to_definitions():
    lines = (ROOT / "deepseek_v3.py").read_text().splitlines()
    for name, number in definitions().items():
        assert re.search(rf"(def|class) {name.rsplit('.')[-1]}\b", lines[number - 1])

@pytest.mark.skipif([path.stem for path in ALL] != NAMES, reason="the set is not complete")
def test_every_equation_is_asserted_where_the_map_says():
    """The map's table gives a notebook for each equation; one of its cells names it and asserts."""
    read = {path.stem: nbformat.read(path, as_version=4) for path in ALL}
    text = "\n".join(cell.source for cell in read["00_map"].cells)
    rows = re.findall(r"^\| ([\d–, ]+) \|[^|]*\| (.*?) \|$", text, re.M)
    owners = {n: re.findall(r"\((\w+)\.ipynb\)", cells) for numbers, cells in rows for n in spread(numbers)}
    assert sorted(owners) == list(range(1, 26))
    for equation, stems in owners.items():
        for stem in stems:
            asserting = [cell.source for cell in code_cells(read[stem]) if "assert" in cell.source]
            parts = [part for source in asserting for part in re.findall(r"Eqs?\. ([\d–, ]+)", source)]
            named = {n for part in parts for n in spread(part)}
            assert equation in named, (equation, stem)

def spread(numbers):
    """Numbers of "1–3, 5"."""
    found = []
    for part in filter(None, numbers.replace(" ", "").split(",")):
        first, *last = part.strip("–").split("–")
        found += range(int(first), int((last or [first])[0]) + 1)
    return found

@pytest.fixture
def space(notebook, monkeypatch):
    """What the setup cell leaves behind, run in notebooks/ as a kernel would."""
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    before = torch.get_rng_state()
    names = {"__name__": "notebook"}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code_cells(notebook)[0].source, names)
    yield names
    torch.set_rng_state(before)

def verdict(source, space):
    """The last line that an exercise prints."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        exec(source, dict(space))
    return told.getvalue().strip().splitlines()[-1]

def test_exercises_as_they_are_solved_and_wrong(notebook, space):
    for id, cell in exercises(notebook):
        hint, solution, wrong = space["nb"].answers(id)
        assert printed(cell).startswith(f"○ {id}"), "a committed exercise is not done"
        stub, _, checked = cell.source.partition("return nb.TODO\n")
        assert verdict(cell.source, space).startswith(f"○ {id}")
        assert verdict(solution + checked, space).startswith(f"✓ {id}")
        assert wrong and len(hint) > 20
        for turn in wrong:
            reason = turn.strip().splitlines()[0]
            assert reason.startswith("# ") and solution.strip() not in turn
            told = verdict(turn + checked, space)
            assert told.startswith(f"✗ {id}"), told
            assert told.endswith(reason.lstrip("# ")), (told, reason)
        assert "raised KeyError" in verdict(f"{stub}raise KeyError('x')\n{checked}", space)

@pytest.fixture
def nb(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "notebooks"))
    import nbhelp

    return nbhelp

def test_predictions_stay_hidden_until_a_guess(nb, capsys):
    for guess in (None, "", nb.TODO, "no idea", [1, 2], 2j, torch.ones(2), float("nan"), "1/0"):
        nb.predict("bytes", guess, 70_272)
        told = capsys.readouterr().out
        assert told.startswith("bytes\n") and "70,272" not in told, guess
    for guess in ("show", " Show"):
        nb.predict("bytes", guess, 70_272, "B")
        assert capsys.readouterr().out == "bytes\n  actual 70,272 B\n"
    right = (70_272, "70,272", "70_272", "70.3k", "7.03e4", "about 70272", "70 thousand", torch.tensor(70_272))
    for guess in right:
        nb.predict("bytes", guess, 70_272)
        assert "· right" in capsys.readouterr().out, guess
    words = [("Multiply", "multiplied"), ("MORE often", "more"), ("a pad.", "padding"), ("Y", True), ("zero", 0)]
    for guess, actual in words:
        nb.predict("which", guess, actual)
        assert "· right" in capsys.readouterr().out, guess
    for guess, told in ((4_000_000, "you 4,000,000 · 56.9× too high"), (-7, "wrong sign"), (0, "not so")):
        nb.predict("bytes", guess, 70_272)
        assert told in capsys.readouterr().out
    nb.predict("which", "divided", "multiplied")
    assert "not so" in capsys.readouterr().out

def test_committed_predictions_show_no_answer(notebook):
    for cell in code_cells(notebook):
        asked = [line for line in printed(cell).splitlines() if line.startswith("  hidden: type your guess")]
        assert len(asked) >= cell.source.count("nb.predict("), cell.source
        assert "\n  actual " not in printed(cell)

def test_helper_never_raises(nb, monkeypatch, capsys):
    nb.check("5.1", lambda loads: loads.new_tensor(1.5), (torch.tensor([[4.0, 4, 4, 4], [9, 1, 1, 1]]),))
    nb.check("5.1", lambda loads: loads * torch.nan, (torch.ones(1, 4),), like=lambda loads: loads)
    nb.check("5.1", None), nb.check("5.1", print, (torch.ones(1, 4),)), nb.check("99.9", print), nb.hint("x")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("✗ 5.1 maxvio, case 1 of 1: 1.5 is not it") and "4 of 4 numbers are NaN" in lines[1]
    assert "a function is asked for" in lines[2] and "no exercise 'x'" in lines[-1]
    monkeypatch.setattr(nb.Path, "is_file", lambda path: False)
    nb.check("5.1", print), nb.hint("5.1"), nb.solution("5.1")
    assert capsys.readouterr().out.count("its answers are not here") == 3

def test_a_set_for_students(monkeypatch, tmp_path, capsys):
    """No outputs, and its exercises can be judged without tests/."""
    monkeypatch.syspath_prepend(str(ROOT / "notebooks"))
    import student_set

    written = student_set.write(tmp_path / "set")
    assert [path.stem for path in written] == NAMES
    cells = [cell for path in written for cell in code_cells(nbformat.read(path, as_version=4))]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    with pytest.raises(SystemExit, match="not an empty folder"):
        student_set.write(tmp_path / "set")
    program = "import sys; sys.path[:0] = ['.', '..']; import nbhelp as nb; nb.hint('5.1'); nb.check('5.1', print)"
    told = subprocess.run([sys.executable, "-c", program], cwd=written[0].parent, capture_output=True, text=True)
    assert "not here" not in told.stdout and len(told.stdout) > 40, told

def test_differences_in_words(nb):
    want = torch.tensor([1.0, -torch.inf])
    assert nb.difference(want.clone(), want, 1e-6) is None
    assert nb.difference(torch.tensor([torch.nan, -torch.inf]), want, 1e-6) .startswith("1 of 2 numbers are NaN")
    assert nb.difference(torch.ones(1, 2), want, 1e-6) == "shape (1, 2), must be (2,)"
    assert nb.difference(None, want, 1e-6).startswith("returned NoneType")
    assert nb.difference(3, (3, 4), 1e-6) == "must return 2 values"
    assert nb.difference((3, 5), (3, 4), 1e-6) == "5 is not it"
