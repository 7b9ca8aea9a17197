"""How many small faults in the model's code the tests notice: mutation testing with mutmut's operators.

    pip install mutmut==3.8.1              # a developer's tool, in no requirements.txt
    python tests/mutate.py                 # a fixed random sample; --sample 0 takes all

mutmut's own runner passes over decorated functions and class bodies, which hold the bias update, the
softmax scale and the config. So its operators are applied here to every node of the sections below,
and each mutant is tested in a fork of a process that has imported torch already. A mutant counts as
killed if a test fails or takes too long; tests that never enter its function are not run.
"""

import argparse
import collections
import contextlib
import functools
import importlib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

import libcst as cst
import pytest
from libcst.metadata import MetadataWrapper, PositionProvider, WhitespaceInclusivePositionProvider
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).resolve().parent.parent
FILE = "deepseek_v3.py"

# What is mutated: sections 1 to 9, and of the sections behind them the parts by these names.
LAST_SECTION = "# ---- 10."
BEHIND = "Sampling stop_ids slots_of_depth config_values check_config check_field check_yarn quantise".split()

# Arguments that say where a tensor lies, or ask for a check or an order that means nothing: a mutant of
# one computes the same on a CPU, and is left out.
SILENT_ARGUMENTS = {"device", "strict", "sorted", "stable"}

# Whose tests run, fast ones only: a slow test that would kill one more mutant is not counted.
TESTS = "config moe attention mtp heads generate fp8 published devices transformers drafting bad_input"
TESTS += " numbers"
SLOW = 2.0  # seconds of a test beyond which it is left out
BUDGET = 10  # seconds of the tests that a mutant meets first, the nearest
PATIENCE = 300  # seconds for one mutant
SAMPLE = 650
NOTHING_RUN = 5  # pytest's exit status
LIBRARIES = "torch numpy safetensors tokenizers transformers tqdm huggingface_hub sympy".split()
THINNED = {  # files with one test for many shapes: those that are run, by words of their names
    "test_transformers": ["usual", "looked_at", "every_module", "epsilon", "tables", "pad_id", "classif"],
    "test_published": ["scale", "cache", "yarn", "absorbing", "factor", "mscale"],
    "test_devices": ["every_hop", "made_where", "experts_that_are_hit", "never_asks"],
    "test_drafting": ["residual"],
}

class Mutant(NamedTuple):
    line: int
    where: str  # its class and function
    operator: str
    before: str
    after: str
    changed: str  # the whole file

def keyword(argument):
    return argument.keyword.value if argument.keyword else ""

def lost(call, mutant):
    """Arguments of a call that its mutant has no more, or with another value."""
    return [argument for argument in call.args if not any(argument is kept for kept in mutant.args)]

class Mutants(cst.CSTVisitor):
    """All mutants of a source, in `found`; annotations, decorators and what errors say are left out."""

    METADATA_DEPENDENCIES = (PositionProvider, WhitespaceInclusivePositionProvider)

    def __init__(self, source):
        self.source, self.found, self.within = source, [], []
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.end = source[: source.index(LAST_SECTION)].count("\n") + 1

    def offset(self, position):
        return self.starts[position.line - 1] + position.column

    def on_visit(self, node):
        if isinstance(node, cst.Annotation | cst.Decorator | cst.Raise):
            return False
        if isinstance(node, cst.Call) and getattr(node.func, "value", "") in ("len", "isinstance"):
            return False  # as mutmut does
        if isinstance(node, cst.Arg) and keyword(node) in SILENT_ARGUMENTS:
            return False
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self.within.append(node.name.value)
        line = getattr(self.get_metadata(PositionProvider, node, None), "start", None)
        if line and (line.line < self.end or self.within and self.within[0] in BEHIND):
            for kind, operator in mutation_operators:
                for mutant in operator(node) if isinstance(node, kind) else ():
                    self.add(line.line, operator.__name__.removeprefix("operator_"), node, mutant)
        return True

    def on_leave(self, node):
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self.within.pop()

    def add(self, line, operator, node, mutant):
        if operator == "string" and " " in node.value:  # what an error says
            return
        if operator == "arg_removal" and any(keyword(a) in SILENT_ARGUMENTS for a in lost(node, mutant)):
            return
        span = self.get_metadata(WhitespaceInclusivePositionProvider, node)
        start, end = self.offset(span.start), self.offset(span.end)
        code = cst.Module([]).code_for_node
        changed = self.source[:start] + code(mutant) + self.source[end:]
        before, after = code(node).strip(), code(mutant).strip()
        self.found.append(Mutant(line, ".".join(self.within), operator, before, after, changed))

class Chosen:
    """A pytest plugin: run these tests in this order; on `record`, note what each enters and takes."""

    def __init__(self, order=None, record=None):
        self.order, self.record = order, record

    def pytest_collection_modifyitems(self, items):
        def wanted(item):
            words = THINNED.get(item.path.stem)
            return words is None or any(word in item.nodeid for word in words)

        if self.order is None:
            items[:] = [item for item in items if wanted(item)]
        else:
            by_id = {item.nodeid: item for item in items}
            items[:] = [by_id[name] for name in self.order if name in by_id]

    def note(self, key):
        if self.record is None:
            yield
            return
        entered = set()

        def enter(frame, event, argument):
            if event == "call" and frame.f_code.co_filename.endswith(FILE):
                name = frame.f_code.co_qualname.replace(".<locals>", "")
                if not frame.f_code.co_name[0].isupper():  # a class body is entered on import
                    entered.add(name)

        sys.settrace(enter)
        began = time.perf_counter()
        yield
        sys.settrace(None)
        seen, seconds = self.record.setdefault(key, [set(), 0.0])
        self.record[key] = [seen | entered, seconds + time.perf_counter() - began]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_setup(self, item):  # what a fixture enters counts for all tests of its file
        yield from self.note(item.path.stem)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item):
        yield from self.note(item.nodeid)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_make_collect_report(self, collector):
        yield from self.note(collector.path.stem)

def in_a_fork(work, seconds):
    """What `work` returns, JSON, of a fork of this process; None if it takes longer or dies."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2), os.close(out)
        try:
            answer = json.dumps(work())
            with os.fdopen(into, "w") as pipe:
                pipe.write(answer)
        finally:
            os._exit(0)
    os.close(into)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    with os.fdopen(out) as pipe:
        answer = pipe.read()
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.waitpid(child, 0)
    return json.loads(answer) if answer else None

def run_tests(files, plugin, *options):
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", *options]
    return int(pytest.main([*options, *files], plugins=[plugin]))

def record(order=None):
    """Run tests once: seconds and functions of each, and the modules that they import."""
    seen = {}
    failed = run_tests(test_files(), Chosen(order, seen))
    seen = {key: [sorted(entered), seconds] for key, (entered, seconds) in seen.items()}
    return failed, seen, [name for name in sys.modules if name.split(".")[0] in LIBRARIES]

def test_files():
    return [f"tests/test_{n}.py" for n in TESTS.split() if Path(f"tests/test_{n}.py").exists()]

def covering(seen, where, budget):
    """The tests that enter a function, in files: first those that enter little else, then quick ones.

    They take `budget` seconds at most.
    """
    tests = [key for key in seen if "::" in key and seen[key][1] < SLOW]

    def entered(key):
        return {*seen[key][0], *seen[Path(key.split("::")[0]).stem][0]}

    def enters(key):  # a method, or any of a class
        return any(name == where or name.startswith(f"{where}.") for name in entered(key))

    tests = [key for key in tests if enters(key)] or tests  # else a line of the module: all
    files = collections.defaultdict(list)
    for key in sorted(tests, key=lambda key: seen[key][1]):
        files[key.split("::")[0]].append(key)
    breadth = {name: sum(len(entered(key)) for key in files[name]) / len(files[name]) for name in files}
    chosen, seconds = {}, 0.0
    for name in sorted(files, key=breadth.get):
        for key in files[name]:
            seconds += seen[key][1]
            if seconds < budget or "devices" in name:  # broad, but like no other
                chosen.setdefault(name, []).append(key)
    return list(chosen.items())

def survives(groups):
    """Whether no test fails, file by file."""
    return all(run_tests([name], Chosen(keys), "-x") in (0, NOTHING_RUN) for name, keys in groups)

def prepare():
    """What each test enters and takes; and what they import is imported, for the forks to have."""
    seen, order = {}, None
    for _ in range(2):  # a second time those that seem slow: warm, as in a fork
        failed, timed, modules = in_a_fork(functools.partial(record, order), 900)
        assert failed in (0, NOTHING_RUN), "the tests fail without a mutant"
        seen = timed | seen | {key: timed[key] for key in timed if "::" in key}
        for name in modules:
            with contextlib.suppress(Exception):  # an optional part of a library
                importlib.import_module(name)
        order = [key for key in seen if "::" in key and seen[key][1] >= SLOW]
    shutil.rmtree("__pycache__", ignore_errors=True)
    sys.dont_write_bytecode = True
    assert in_a_fork(lambda: survives(covering(seen, "", math.inf)), 900), "a sound file is killed"
    quick = [seconds for key, (_, seconds) in seen.items() if "::" in key and seconds < SLOW]
    print(f"{len(quick)} tests of {sum(quick):.0f} s", flush=True)
    return seen

def absolute(path):
    return Path(path).resolve()

def main():
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--sample", type=int, default=SAMPLE, help="mutants at random; 0: all")
    options.add_argument("--seed", type=int, default=0, help="of the sample")
    options.add_argument("--only", default="", help="only functions and classes with this in their name")
    options.add_argument("--again", type=absolute, help="only what survived in this --log, all tests at once")
    options.add_argument("--log", type=absolute, default=os.devnull, help="file for a line of JSON a mutant")
    options = options.parse_args()

    source = (ROOT / FILE).read_text()
    visitor = Mutants(source)
    MetadataWrapper(cst.parse_module(source)).visit(visitor)
    mutants = [mutant for mutant in visitor.found if options.only in mutant.where]
    if options.again:
        logged = [json.loads(line) for line in options.again.read_text().splitlines()]
        alive = {tuple(one["mutant"]) for one in logged if one["survived"]}
        mutants = [mutant for mutant in mutants if mutant[:5] in alive]
    elif options.sample:
        mutants = random.Random(options.seed).sample(mutants, len(mutants))[: options.sample]
    print(f"{len(mutants)} of {len(visitor.found)} mutants", flush=True)

    folder = Path(tempfile.mkdtemp(prefix="mutants"))
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / FILE, folder)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    seen = prepare()

    def try_all(mutants, budget):
        alive, began = [], time.time()
        for number, mutant in enumerate(mutants, 1):
            Path(FILE).write_text(mutant.changed)
            groups = covering(seen, mutant.where, budget)
            survived = in_a_fork(functools.partial(survives, groups), PATIENCE) is True
            alive += [mutant] if survived else []
            with options.log.open("a") as log:
                print(json.dumps({"mutant": mutant[:5], "survived": survived}), file=log)
            if number % 50 == 0:
                print(f"{number} in {time.time() - began:.0f} s, {len(alive)} survive", flush=True)
        return alive

    alive = mutants if options.again else try_all(mutants, BUDGET)
    alive = try_all(alive, math.inf)  # what the nearest tests let pass meets all of them
    shutil.rmtree(folder)

    for mutant in alive:
        print(f"survives: {mutant.line} {mutant.where}: {mutant.before}  ->  {mutant.after}")
    titles = {i: text for i, text in enumerate(source.splitlines(), 1) if text.startswith("# ---- ")}

    def by_section(some):
        found = (max(i for i in titles if i <= mutant.line) for mutant in some)
        return collections.Counter(titles[i][7:].partition(" —")[0].strip("- ") for i in found)

    tried, left = by_section(mutants), by_section(alive)
    for title in tried:
        print(f"{tried[title]:5} mutants {left[title]:4} survive {title}")
    killed = len(mutants) - len(alive)
    print(f"{killed} of {len(mutants)} killed: {killed / max(1, len(mutants)):.1%}", end="; ")
    print("of those that survive, some compute the same")

if __name__ == "__main__":
    main()
