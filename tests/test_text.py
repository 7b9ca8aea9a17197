# SPDX-License-Identifier: MIT
"""What deepseek_v3.py says about itself is true, and the file stays as readable as it promises.

Shape comments are executed: the model runs at sizes of which no two agree, and behind each statement
with a comment such as `# (B, T, H, N)` the tensor assigned is compared with it. What training and
decoding execute is traced, and has to stand in sections 1-9. Style is ruff's (.ruff.toml).
"""

import ast
import collections
import contextlib
import dataclasses
import importlib.util
import io
import itertools
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import equation_map
import pytest
import torch

import deepseek_v3

MAX_LINES_EXECUTED = 950  # of the functions and class headers that training and decoding run
MAX_LINES_OF_MODEL = 1250  # from the ruler of part 1 to that of part 10, blank lines included
MAX_LINES_OF_FILE = 3300  # so that it does not grow unseen
MAX_CODE_LINES = 40  # of a function
MAX_CODE_LINES_OF_FORWARD = 25

PATH = Path(deepseek_v3.__file__)
SOURCE = PATH.read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
DOCSTRING = ast.get_docstring(TREE)
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign)
RETURNED = "return"  # in place of a variable's name

def comments_of(source):
    """{line: comment without its `# `}."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}

COMMENTS = comments_of(SOURCE)

def assert_none(problems):
    if problems:
        pytest.fail("\n".join(map(str, problems)), pytrace=False)

# ---- Shape comments ------------------------------------------------------------------------------

LETTERS = set("B T S D H N R V C Q F E G K k vocab num_labels".split())
SHAPE = r"\((?:[^()]|\([^()]*\))*\)"

@dataclasses.dataclass(frozen=True)
class Claim:
    """A comment on an assignment or return: a shape for each tensor, its axes in LETTERS."""

    text: str
    lines: range
    targets: tuple  # of the assignment, or RETURNED
    shapes: tuple

    def __str__(self):
        return f"line {self.lines.start}: # {self.text}"

    def holds(self, actual, sizes):
        """Whether shapes are as claimed; `B or 1` is either, and a tensor that is absent is None."""
        pairs = [pair for pair in zip(self.shapes, actual, strict=True) if pair[1] is not None]
        axes = [axis for claimed, shape in pairs for axis in zip(claimed, shape, strict=False)]
        ranks = all(len(claimed) == len(shape) for claimed, shape in pairs)
        return ranks and all(size in [evaluate(n, sizes) for n in axis.split(" or ")] for axis, size in axes)

def evaluate(axis, sizes):
    """The size of `N + R`, `2*D`, `T-k` or `E/G`, the last a whole number."""
    return eval(axis.replace("/", "//"), {}, sizes)

def parse_shapes(comment):
    """`(B, T), (B or 1, R) Eq. 7` -> [["B", "T"], ["B or 1", "R"]]; None if it has another form."""
    match = re.match(f"{SHAPE}(, {SHAPE})*", comment)
    inner = [text[1:-1] for text in re.findall(SHAPE, match[0])] if match else []
    shapes = [[axis.strip() for axis in text.split(",") if axis.strip()] for text in inner]
    try:
        for axis in itertools.chain(*shapes):
            evaluate(axis.replace(" or ", "+"), dict.fromkeys(LETTERS, 1))
    except (SyntaxError, NameError):
        return None
    return shapes or None

def read_claims(source):
    """The claims of a source, and what is wrong with comments that look like claims and are not."""
    tree, comments, claims, malformed = ast.parse(source), comments_of(source), [], []
    nodes = [n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)]
    for node in {node.lineno: node for node in nodes if isinstance(node, ast.stmt)}.values():
        lines = range(node.lineno, node.body[0].lineno if hasattr(node, "body") else node.end_lineno + 1)
        for text in [comments[n] for n in lines if comments.get(n, "").startswith("(")]:
            shapes, where = parse_shapes(text), f"line {node.lineno}: # {text}"
            if isinstance(node, (*ASSIGNMENTS, ast.Return)):
                value, *_ = getattr(node, "targets", [getattr(node, "target", node.value)])
                parts = getattr(value, "elts", [value])
                targets = RETURNED if isinstance(node, ast.Return) else tuple(map(ast.unparse, parts))
                if shapes and len(shapes) <= len(parts):
                    claims.append(Claim(text, lines, targets, tuple(map(tuple, shapes))))
                else:
                    malformed.append(f"{where} — is not {len(parts)} tuple(s) of {sorted(LETTERS)}")
            elif shapes:
                malformed.append(f"{where} — stands on no assignment or return")
    return claims, malformed

class ShapeCheck:
    """Watches a module's functions run; its claims end up `held`, `wrong` or `unexecuted`."""

    def __init__(self, module):
        self.file = module.__file__
        self.claims, self.malformed = read_claims(Path(self.file).read_text(encoding="utf-8"))
        self.held, self.wrong = set(), {}

    @property
    def unexecuted(self):
        return [claim for claim in self.claims if claim not in self.held | self.wrong.keys()]

    @contextlib.contextmanager
    def watching(self, bindings):
        """Check claims inside the block; `bindings`: each {letter: size} that a call may be in."""

        def enter(frame, _event, _arg):
            code = frame.f_code
            inside = code.co_filename == self.file and not code.co_name.startswith("<")
            return WatchedCall(self, code, bindings) if inside else None

        before = sys.gettrace()
        sys.settrace(enter)
        try:
            yield
        finally:
            sys.settrace(before)

class WatchedCall:
    """Trace function of one call. One binding has to explain all claims that the call executes."""

    def __init__(self, check, code, bindings):
        lines = {line for _, _, line in code.co_lines()}
        self.check, self.running = check, []
        self.claims = [claim for claim in check.claims if claim.lines.start in lines]
        self.bindings = collections.defaultdict(lambda: bindings)

    def __call__(self, frame, event, arg):
        over = event == "return" or not any(frame.f_lineno in claim.lines for claim in self.running)
        for claim in self.running if over and event != "exception" else []:
            self.compare(claim, frame, arg)
        self.running = [] if over or event == "exception" else self.running
        if event == "line" and not self.running:
            self.running = [claim for claim in self.claims if frame.f_lineno in claim.lines]
        return self

    def compare(self, claim, frame, returned):
        if claim.targets == RETURNED:
            values = returned if isinstance(returned, tuple) else [returned]
        else:
            values = [eval(name.lstrip("*"), frame.f_globals, frame.f_locals) for name in claim.targets]
        claimed, others = values[: len(claim.shapes)], values[len(claim.shapes) :]
        actual = [None if value is None else tuple(getattr(value, "shape", "?")) for value in claimed]
        # A local named like a letter says what the letter is, until it changes (a loop's k).
        known = {n: v for n, v in frame.f_locals.items() if n in LETTERS and type(v) is int}
        candidates = self.bindings[tuple(known.items())]
        fitting = [b for b in candidates if known.items() <= b.items() and claim.holds(actual, b)]
        if fitting and not any(isinstance(value, torch.Tensor) for value in others):
            self.bindings[tuple(known.items())] = fitting
            self.check.held |= set() if None in actual else {claim}
        else:
            sizes = f"T, S, k, F is one of {[tuple(b[letter] for letter in 'TSkF') for b in candidates]}"
            said = f"{claim} — is {', '.join(map(str, actual))} where {sizes} {known or ''}"
            self.check.wrong.setdefault(claim, said)

SIZES = dict(B=5, D=28, H=3, N=21, R=16, V=17, C=31, Q=22, E=42, G=6, K=11, vocab=101, num_labels=23)
DENSE, EXPERT = 29, 20  # the two F
TOKENS = 10
HELD_EXPANDING, HELD_ABSORBING = 2, 4  # cached tokens behind which 10 new ones take either path

def bindings(*T_and_S, depths=(0,)):
    """{letter: size} for each (T, S), each F, and each MTP depth k; 0 is the main model."""
    every = itertools.product(T_and_S, depths, (DENSE, EXPERT))
    return [SIZES | {"T": T, "S": S, "k": k, "F": width} for (T, S), k, width in every]

def distinct_config():
    """Every mechanism, at sizes that tell all axes apart; dense, MoE and two MTP layers."""
    s = SIZES
    sizes = dict(vocab_size=s["vocab"], num_labels=s["num_labels"], hidden_size=s["D"], eos_token_id=None)
    heads = dict(num_attention_heads=s["H"], qk_nope_head_dim=s["N"], v_head_dim=s["V"], q_lora_rank=s["Q"])
    heads |= dict(qk_rope_head_dim=s["R"], kv_lora_rank=s["C"], rope_scaling=dict(deepseek_v3.YARN_V3))
    experts = dict(n_routed_experts=s["E"], num_experts_per_tok=s["K"], n_group=s["G"], topk_group=2)
    layers = dict(num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=2)
    widths = dict(intermediate_size=DENSE, moe_intermediate_size=EXPERT, n_shared_experts=1)
    return deepseek_v3.DeepseekV3Config(**(sizes | heads | experts | layers | widths))

@pytest.fixture(scope="module")
def shape_check():
    """The claims of deepseek_v3.py after every scene in which the model is watched."""
    check = ShapeCheck(deepseek_v3)
    play(check, distinct_config())
    return check

def play(check, config):
    """Build, attend, train, generate and classify; a new claim may need a new scene here."""
    B, T, random = SIZES["B"], TOKENS, torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (B, T + HELD_ABSORBING), generator=random)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # one padded token: masks exist
    first, first_mask = ids[:, :T], mask[:, :T]
    with check.watching(bindings((T, T))):
        model = deepseek_v3.DeepseekV3ForCausalLM(config)
        model.eval()(first, output_attentions=True)
    for past, form in ((HELD_EXPANDING, "attend_fused"), (HELD_ABSORBING, "attend_absorbed")):
        assert model.model.layers[0].self_attn.form(T, past + T, False).__name__ == form
        cache = model(ids[:, :past], mask[:, :past], use_cache=True).past_key_values
        new, both = ids[:, past : past + T], mask[:, : past + T]
        with check.watching(bindings((T, past + T))):
            model.train()(new, both, past_key_values=cache, labels=new)
            cache.crop(past)
            model(new, past_key_values=cache, output_attentions=True)
    packed = torch.arange(T)[None] % 4
    wide = torch.ones(B, 1, T, T, dtype=torch.bool).tril()
    with check.watching(bindings((T, T), (T - 1, T - 1), (T - 2, T - 2), depths=(1, 2))):
        model(first, first_mask, labels=first, num_items_in_batch=7).loss.backward()
        model.update_router_bias()
        model(first, position_ids=packed, labels=first)
        model(first, wide, labels=first)
    with check.watching(bindings((T, T), (1, T + 1), (1, T + 2))):
        sampling = dict(do_sample=True, top_k=7, top_p=0.9, generator=random)
        model.generate(first, first_mask, max_new_tokens=3, **sampling)
    # A step of three tokens, and what the MTP modules see of the prompt and of up to four rows.
    steps = range(1, 5)
    every = [(n, n) for n in (*steps, T, T + 1)] + [(n, T + m) for n in steps for m in range(9)]
    with check.watching(bindings(*every)):
        model.generate(first, first_mask, max_new_tokens=6, use_mtp=True, **sampling)
    with check.watching(bindings((T, T))):
        classes = first % config.num_labels
        tokens = deepseek_v3.DeepseekV3ForTokenClassification(config)
        tokens(first, first_mask, labels=classes)
        sequences = deepseek_v3.DeepseekV3ForSequenceClassification(config)
        sequences(first, first_mask, labels=classes[:, 0])

def test_shape_comments_are_well_formed_and_true(shape_check):
    assert shape_check.claims
    assert_none(shape_check.malformed + list(shape_check.wrong.values()))

def test_shape_comments_are_executed(shape_check):
    assert_none([f"{claim} — never executed, or always None" for claim in shape_check.unexecuted])

@pytest.mark.parametrize("past", [HELD_EXPANDING, HELD_ABSORBING])
@pytest.mark.parametrize("width", [DENSE, EXPERT])
def test_no_two_axes_are_of_one_size(shape_check, past, width):
    """Else a claim could be right by chance: T beside S, or N + R beside C."""
    sizes = SIZES | {"T": TOKENS, "S": TOKENS + past, "k": 1, "F": width}
    claimed = {axis for claim in shape_check.claims for shape in claim.shapes for axis in shape}
    axes = {part.replace(" ", "") for axis in claimed for part in axis.split(" or ")}
    values = collections.defaultdict(list)
    for axis in sorted(axes | LETTERS - {"k"}):
        values[evaluate(axis, sizes)].append(axis)
    assert_none([f"{names} are all {size}" for size, names in values.items() if len(names) > 1])

SPECIMEN = """
import torch
def function(rows):
    right, scalar = torch.zeros(5, 10), torch.tensor(0)  # (B, T), ()
    turned = torch.zeros(10, 5)  # (B, T) Eq. 1
    rows = torch.zeros(rows, 9)  # (T or 1, T)
    fewer = torch.zeros(8)  # (T)
    if rows is None:
        idle = right  # (B, T)
    unknown = right  # (B, tokens)
    print(end="")  # (B, T)
    return right  # (B, T)
def other():
    return torch.zeros(5, 10), torch.zeros(10)  # (B, T), (B)
"""

def test_checker_finds_what_it_should(tmp_path):
    (tmp_path / "specimen.py").write_text(SPECIMEN)
    spec = importlib.util.spec_from_file_location("specimen", tmp_path / "specimen.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    check = ShapeCheck(module)
    with check.watching(bindings((10, 10), (9, 9), (8, 8))):
        module.function(1), module.other()
    # Line 6 fits no binding that fits line 4; line 7 fits one of its own, line 5 none.
    assert [claim.lines.start for claim in check.claims if claim in check.held] == [4, 12]
    assert sorted(claim.lines.start for claim in check.wrong) == [5, 6, 7, 14]
    assert [claim.lines.start for claim in check.unexecuted] == [9]
    assert [text.split(":")[0] for text in check.malformed] == ["line 10", "line 11"]

# ---- Equations, tags, reading order --------------------------------------------------------------

def test_every_equation_is_cited_where_it_is_computed():
    missing = equation_map.STATES.keys() - equation_map.where().keys()
    assert_none([f"Eq. {n}: on no statement of a function" for n in sorted(missing)])
    assert equation_map.cited(SOURCE) <= equation_map.STATES.keys(), "the report's section 2 has Eqs. 1–25"

def test_the_readme_names_the_functions_that_compute_the_equations():
    readme = (PATH.parent / "README.md").read_text(encoding="utf-8")
    assert equation_map.table() in readme, "run python tests/equation_map.py --write"

TAG = re.compile(r"NOTE\((?:report|checkpoint|hf)\) [a-z0-9-]+\b")

def test_departures_are_listed_and_tagged():
    listed, tagged = TAG.findall(DOCSTRING), TAG.findall("\n".join(COMMENTS.values()))
    problems = [f"{tag}: listed twice" for tag in set(listed) if listed.count(tag) > 1]
    problems += [f"{tag}: not in the docstring's list" for tag in set(tagged) - set(listed)]
    problems += [f"{tag}: listed, tagged nowhere" for tag in set(listed) - set(tagged)]
    assert_none(problems)
    assert SOURCE.count("NOTE") == len(listed) + len(tagged), "a NOTE that is no tag with a name"

RULERS = [(re.match(r"# ---- (\d+)\. \S", line), n) for n, line in enumerate(LINES, 1)]
START = {int(match[1]): n for match, n in RULERS if match}  # {part: line of its ruler}

def test_parts_are_numbered_as_the_reading_map_says():
    numbers = list(START)
    reading_map = next(part for part in DOCSTRING.split("\n\n") if part.startswith("Reading map"))
    assert numbers == list(range(1, len(numbers) + 1))
    assert numbers == [int(number) for number in re.findall(r"(?<!\S)(\d+) \S", reading_map)]
    assert len(numbers) == sum(line.startswith("# --") for line in LINES), "a ruler has no number"
    pointed = re.findall(r"\b[Ss]ection (\d+)", SOURCE.replace(DOCSTRING, ""))
    assert {int(number) for number in pointed} <= set(numbers), "a section is pointed at, and is not"

# ---- What a reader has to read -------------------------------------------------------------------

def first_line(node):
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])

def span(node):
    return set(range(first_line(node), node.end_lineno + 1))

def header(node):
    """Lines of a class up to its first method."""
    methods = [first_line(child) for child in node.body if isinstance(child, ast.FunctionDef)]
    return set(range(first_line(node), min([*methods, node.end_lineno + 1])))

CHECKS = ("check_", "require", "described")  # of what was given: they stand in section 10

@contextlib.contextmanager
def watched():
    """The functions of deepseek_v3.py that run inside the block."""
    lines, functions = set(), []

    def enter(frame, event, _arg):
        if event == "call" and frame.f_code.co_filename == deepseek_v3.__file__:
            lines.add(frame.f_code.co_firstlineno)

    sys.setprofile(enter)
    try:
        yield functions
    finally:
        sys.setprofile(None)
    for line in lines:  # also of a lambda or a generator, which count for the function around them
        around = [node for node in FUNCTIONS if first_line(node) <= line <= node.end_lineno]
        functions += [max(around, key=first_line)] if around else []

@pytest.fixture(scope="module")
def executed():
    """What building a model, a training step with MTP and balancing, a padded prefill, a cached step run."""
    config, ids = distinct_config(), torch.arange(12).view(2, 6)
    mask = (ids != 0).long()
    with watched() as functions:
        model = deepseek_v3.DeepseekV3ForCausalLM(config).train()
        optimizer = torch.optim.AdamW(model.parameters())
        out = model(ids, labels=ids)
        out.loss.backward()
        optimizer.step()
        model.update_router_bias()
        with torch.no_grad():
            cache = model.eval()(ids, mask, use_cache=True).past_key_values
            model(ids[:, :1], past_key_values=cache)
    assert out.mtp_loss > 0 and out.balance_loss > 0 and cache.length == 7
    return functions

def test_training_and_decoding_run_within_the_first_nine_sections(executed):
    model = range(START[1], START[10])
    outside = [f for f in executed if f.lineno not in model and not f.name.startswith(CHECKS)]
    assert_none([f"line {f.lineno}: {f.name} runs, and stands behind section 9" for f in outside])

def test_what_training_and_decoding_run_can_be_read_in_an_afternoon(executed):
    """Functions that run, and headers of the classes that are around them or named in them, counted once."""
    running = [f for f in executed if not f.name.startswith(CHECKS)]
    lines = set().union(*map(span, running))
    named = {node.id for f in running for node in ast.walk(f) if isinstance(node, ast.Name)}
    for node in (node for node in TREE.body if isinstance(node, ast.ClassDef)):
        if node.name in named or span(node) & lines:
            lines |= header(node)
    physical = START[10] - START[1]
    assert len(lines) < MAX_LINES_EXECUTED, f"{len(lines)} lines are executed, of {physical}"
    assert physical < MAX_LINES_OF_MODEL, f"sections 1-9: {physical} lines, {len(lines)} executed"

def test_the_whole_file_is_short():
    assert len(LINES) < MAX_LINES_OF_FILE, f"the file: {len(LINES)} lines"

def test_functions_are_short():
    problems = []
    for node in FUNCTIONS:
        docstring = node.body[0] if ast.get_docstring(node) else None
        silent = set(range(docstring.lineno, docstring.end_lineno + 1)) if docstring else set()
        code = [n for n in span(node) - silent if not re.match(r"\s*(#|$)", LINES[n - 1])]
        most = MAX_CODE_LINES_OF_FORWARD if node.name == "forward" else MAX_CODE_LINES
        if len(code) > most:
            problems.append(f"line {node.lineno} {node.name}: {len(code)} code lines, at most {most}")
    assert_none(problems)

# ---- Interfaces and hygiene ----------------------------------------------------------------------

def test_public_functions_and_methods_are_annotated():
    owners, problems = [TREE, *(node for node in TREE.body if isinstance(node, ast.ClassDef))], []
    functions = [node for owner in owners for node in owner.body if isinstance(node, ast.FunctionDef)]
    for node in [node for node in functions if node.name[0] != "_" or node.name == "__init__"]:
        named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        bare = [a.arg for a in named if a and not a.annotation and a.arg not in ("self", "cls")]
        bare += ["its result"] * (node.returns is None)
        told = f"line {node.lineno} {node.name}: no type of {', '.join(bare)}"
        problems += [told] * (node.lineno < START[12] and bool(bare))
    assert_none(problems)

def test_no_method_is_attached_to_a_class_afterwards():
    classes = {node.name for node in TREE.body if isinstance(node, ast.ClassDef)}
    attached = []
    for node in TREE.body:
        call = node.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
        by_call = call and getattr(call.func, "id", "") == "setattr" and ast.unparse(call.args[0]) in classes
        targets = node.targets if isinstance(node, ast.Assign) else []
        owners = {ast.unparse(target.value) for target in targets if isinstance(target, ast.Attribute)}
        attached += [f"line {node.lineno}: {ast.unparse(node)}"] if by_call or owners & classes else []
    assert_none(attached)

def test_ruff_finds_nothing():
    files = ["deepseek_v3.py", "tests", *sorted(map(str, PATH.parent.glob("notebooks/*.py")))]
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--quiet", "--output-format=concise"]
    run = subprocess.run(command + files, cwd=PATH.parent, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr

IMPORT = """
import contextlib, io, os, random, signal, torch, warnings
def state():
    seeds = torch.get_rng_state().tolist(), random.getstate()
    defaults = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    threads = torch.get_num_threads(), torch.get_num_interop_threads()
    process = dict(os.environ), os.getcwd(), signal.getsignal(signal.SIGINT), list(warnings.filters)
    return seeds, defaults, threads, process, torch.cuda.is_initialized()
before, said = state(), io.StringIO()
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    import deepseek_v3
assert not said.getvalue(), said.getvalue()
changed = [(a, b) for a, b in zip(before, state()) if a != b]
assert not changed, f"differs after the import: {changed}"
"""

def test_importing_prints_and_changes_nothing():
    command, clean = [sys.executable, "-c", IMPORT], {"PATH": os.environ["PATH"]}  # as before this import
    run = subprocess.run(command, cwd=PATH.parent, env=clean, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
