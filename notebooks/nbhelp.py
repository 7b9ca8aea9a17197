"""What the notebooks share: figures, predictions, exercises that answer, one small trained model."""

import copy
import math
import os
import re
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

SAME = {  # a predicted word: what counts as the same
    "yes": "y|true|it does|always", "no": "n|false|it does not|never", "none": "nothing|nobody|zero|no one",
    "more": "more often|higher|greater|larger|better", "less": "less often|lower|fewer|smaller|worse",
    "multiplied": "multiply|multiplication|times|multiplied by it|×|*", "divided": "divide|division|divided by it|/",
    "slower": "slow|it is slower|slower than plain", "padding": "pad|a pad|pads|the padding|padding token",
}
POWERS = {"k": 1e3, "thousand": 1e3, "m": 1e6, "million": 1e6, "b": 1e9, "bn": 1e9, "g": 1e9, "billion": 1e9}
POWERS |= {"t": 1e12, "trillion": 1e12, "": 1.0, "%": 1.0, "×": 1.0, "x": 1.0}
COUNTS = "zero one two three four five six seven eight nine ten eleven twelve".split()

def as_number(guess):
    """3, "3", "70k", "1.2e3", "70,272", "1/4", "four", "about 4 million" as a number; None if it is not one."""
    if isinstance(guess, str):
        words = guess.strip().lower().replace("_", "").removeprefix("about ").removeprefix("~").removesuffix("bytes")
        if words.strip() in COUNTS:
            return float(COUNTS.index(words.strip()))
        words = re.sub(r"(?<=\d),(?=\d{3})", "", words).replace("−", "-")
        found = re.fullmatch(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)(?:/(\d+))?\s*([a-z%×]*)", words.strip())
        if not found or found[3] not in POWERS or found[2] and not int(found[2]):
            return None
        return float(found[1]) / int(found[2] or 1) * POWERS[found[3]]
    try:
        return float(guess)
    except Exception:  # a list, a complex number, a tensor of several
        return None

def as_word(guess):
    """A word or one of its synonyms, in any case, as the word."""
    word = " ".join(str(guess).lower().strip(" .!?'\"\n").split())
    return next((first for first, rest in SAME.items() if word in rest.split("|")), word)

def tell(actual):
    return f"{actual:,.4g}" if isinstance(actual, float) else f"{actual:,}" if isinstance(actual, int) else str(actual)

def predict(question, guess, actual, unit=""):
    """Compare a guess with what was measured, numbers or words; hidden until there is one, or "show"."""
    try:
        print(question, compared(guess, actual, unit), sep="\n  ")
    except Exception as error:
        print(question, f"your guess cannot be read ({type(error).__name__}); type a number or a word", sep="\n  ")

def compared(guess, actual, unit):
    said = guess.strip() if isinstance(guess, str) else guess
    if said is None or said is TODO or said == "":
        return 'hidden: type your guess, or "show", in place of None and run this cell again'
    line = f"actual {tell(actual)} {unit}".rstrip()
    if isinstance(said, str) and said.lower() == "show":
        return line
    if isinstance(actual, bool) or not isinstance(actual, int | float):
        return f"{line} · you {said} · {'right' if as_word(said) == as_word(actual) else 'not so'}"
    number = as_number(said)
    if number is None or not math.isfinite(number):
        return f'{str(said)[:40]!r} is not a number: type one, such as 3, 70_000, "70k" or "1.2e3", or "show"'
    line += f" · you {guess if isinstance(guess, str) else tell(guess)} · "
    if abs(number - actual) <= max(0.01 * abs(actual), 1e-9):
        return line + "right"
    if not number or not actual:
        return line + "not so"
    factor = number / actual
    if factor < 0:
        return line + "wrong sign"
    return line + (f"{factor:.3g}× too high" if factor > 1 else f"{1 / factor:.3g}× too low")

def answers(id):
    """Hint, solution and known wrong turns of an exercise; a cleared set has them in notebooks/.answers."""
    name = f"exercise_solutions_{int(str(id).split('.')[0]):02}.py"
    places = [Path(ds.__file__).parent / "tests" / name, Path(__file__).resolve().parent / ".answers" / name]
    found = runpy.run_path(str(next(filter(Path.is_file, places))))
    return [found[part][str(id)] for part in ("HINT", "SOLUTION", "WRONG")]

def unanswered(id):
    """Why there is nothing to say about an exercise, or None."""
    try:
        return answers(id) and None
    except StopIteration:
        return f"exercise {id}: its answers are not here; the whole repository has them, in tests/"
    except Exception:
        return f"no exercise {str(id)[:20]!r} is known; the ids look like \"2.1\""

def hint(id):
    """A push in the right direction."""
    print(unanswered(id) or answers(id)[0])

def solution(id):
    """The solution, and the mistakes that are usually made."""
    if unanswered(id):
        return print(unanswered(id))
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
    if (lost := int((found.isnan() & ~want.isnan()).sum())):
        return f"{lost} of {found.numel()} numbers are NaN: something was divided by 0, or -inf taken from -inf"
    gap = torch.where((found == want) | (found.isnan() & want.isnan()), 0.0, (found - want).abs())
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
    try:
        print(unanswered(id) or judged(id, function, cases, like, tol))
    except Exception as error:
        print(f"✗ {id}: this answer cannot be compared ({type(error).__name__}: {error})")

def judged(id, function, cases, like, tol):
    _, source, wrong = answers(id)
    name = re.findall(r"^def (\w+)", source, re.M)[-1]
    if not callable(function):
        return f"✗ {id} {name}: a function is asked for, this is {str(function)[:40]!r}"
    space = getattr(function, "__globals__", {"torch": torch, "math": math, "F": torch.nn.functional})
    want = [(like or defined(source, name, space))(*copy.deepcopy(case)) for case in cases]
    found = [outcome(function, case) for case in cases]
    if any(value is TODO for value, _ in found):
        return f'○ {id} {name}: yours to write; nb.hint("{id}") helps, nb.solution("{id}") shows it'
    problems = [error or difference(value, w, tol) for (value, error), w in zip(found, want, strict=True)]
    if not any(problems):
        return f"✓ {id} {name}: right in {len(cases)} cases"
    case = next(i for i, problem in enumerate(problems) if problem)
    reason = f"✗ {id} {name}, case {case + 1} of {len(cases)}: {problems[case]}"
    for turn in wrong:  # did somebody else take the same wrong turn?
        theirs = [outcome(defined(turn, name, space), case) for case in cases]
        pairs = zip(found, theirs, strict=True)
        if all(e == error and (e or not difference(v, t, tol)) for (v, e), (t, error) in pairs):
            return reason + "; " + turn.strip().split("\n")[0].lstrip("# ")
    return reason
