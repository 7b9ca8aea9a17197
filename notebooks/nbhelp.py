"""What the notebooks share: figures, predictions, exercises that answer, one small trained model."""

import copy
import os
import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import deepseek_v3 as ds
from nbtiny import batches, explore, show, stdlib_corpus, tiny_config, token_strip, train, trained_tiny  # noqa: F401
from nbtiny import COLORS, FAST, HATCHES, LINES  # noqa: F401

TODO = type("Todo", (), {"__repr__": lambda self: "TODO"})()

def setup(seed=0):
    """Threads, seed, figure style; says which file the notebook teaches from."""
    torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count())))
    torch.manual_seed(seed)
    style = {"font.size": 10, "axes.titlesize": 11, "figure.constrained_layout.use": True}
    style |= {"xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9, "legend.frameon": False}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "image.cmap": "cividis"}
    plt.rcParams.update(style | {"axes.prop_cycle": plt.cycler(color=COLORS)})
    print("teaching from", os.path.relpath(ds.__file__))

def predict(question, guess, actual, unit=""):
    """Compare a guess, None for none, with what was measured; numbers or words."""
    number = isinstance(actual, int | float) and not isinstance(actual, bool)
    said = [f"{x:,.4g}" if isinstance(x, float) else f"{x:,}" if number else str(x) for x in (actual, guess or 0)]
    line = f"{question}\n  actual {said[0]} {unit}".rstrip()
    if guess is None:
        print(line + "   (type your guess in place of None and run this cell again)")
    elif number and actual and guess and abs(guess / actual - 1) > 0.01:
        factor = guess / actual
        verdict = f"{factor:.3g}× too high" if factor > 1 else f"{1 / factor:.3g}× too low"
        verdict = verdict if factor > 0 else "wrong sign"
        print(f"{line} · you {said[1]} · {verdict}")
    else:
        same = abs(guess - actual) <= 0.01 * abs(actual) if number else str(guess).lower() == str(actual).lower()
        print(f"{line} · you {guess} · {'right' if same else 'not so'}")

def answers(id):
    """Hint, solution and known wrong turns of an exercise; written once, in tests/."""
    name = f"exercise_solutions_{int(id.split('.')[0]):02}.py"
    found = runpy.run_path(str(Path(ds.__file__).parent / "tests" / name))
    return [found[part][id] for part in ("HINT", "SOLUTION", "WRONG")]

def hint(id):
    """A push in the right direction."""
    print(answers(id)[0])

def solution(id):
    """The solution, and the mistakes that are usually made."""
    _, source, wrong = answers(id)
    print(source.strip(), "\n\nUsual wrong turns:", *(w.strip().split("\n")[0].lstrip("# ") for w in wrong), sep="\n- ")

def defined(source, name, space):
    space = dict(space)
    exec(source, space)
    return space[name]

def difference(found, want, tol):
    """What is wrong with `found`, in words, or None; NaN is wrong too."""
    if isinstance(want, tuple | list):
        if not isinstance(found, tuple | list) or len(found) != len(want):
            return f"must return {len(want)} values"
        return next(filter(None, (difference(f, w, tol) for f, w in zip(found, want, strict=True))), None)
    if isinstance(want, str):
        return None if found == want else f"{found!r} is not it"
    try:
        found, want = (torch.as_tensor(x).detach().double() for x in (found, want))
    except (TypeError, ValueError, RuntimeError):
        return f"returned {type(found).__name__} {str(found)[:40]}; a {type(want).__name__} is asked for"
    if found.shape != want.shape:
        return f"shape {tuple(found.shape)}, must be {tuple(want.shape)}"
    gap = torch.where(found == want, 0.0, (found - want).abs())
    worst = gap.max().item() if gap.numel() else 0.0
    if worst <= tol * max(1.0, want[want.isfinite()].abs().max().item() if want.isfinite().any() else 1.0):
        return None
    return f"{found.item():,.10g} is not it" if found.ndim == 0 else f"off by up to {worst:.3g}"

def outcome(function, case):
    try:
        return function(*copy.deepcopy(case)), None
    except Exception as error:
        return None, f"raised {type(error).__name__}: {error}"

def check(id, function, *cases, like=None, tol=1e-5):
    """○ not done, ✓ right, ✗ wrong and why; each case is a tuple of arguments. Never raises.

    Right is what `like` returns, else what the solution returns, to `tol` of the largest number.
    """
    _, source, wrong = answers(id)
    name, space = function.__name__, function.__globals__
    want = [(like or defined(source, name, space))(*copy.deepcopy(case)) for case in cases]
    found = [outcome(function, case) for case in cases]
    if any(value is TODO for value, _ in found):
        return print(f'○ {id} {name}: yours to write; nb.hint("{id}") helps, nb.solution("{id}") shows it')
    problems = [error or difference(value, w, tol) for (value, error), w in zip(found, want, strict=True)]
    if not any(problems):
        return print(f"✓ {id} {name}: right in {len(cases)} cases")
    case = next(i for i, problem in enumerate(problems) if problem)
    reason = f"✗ {id} {name}, case {case + 1} of {len(cases)}: {problems[case]}"
    for turn in wrong:  # did somebody else take the same wrong turn?
        theirs = [outcome(defined(turn, name, space), case) for case in cases]
        pairs = zip(found, theirs, strict=True)
        if all(e == error and (e or not difference(v, t, tol)) for (v, e), (t, error) in pairs):
            reason += "; " + turn.strip().split("\n")[0].lstrip("# ")
            break
    print(reason)
