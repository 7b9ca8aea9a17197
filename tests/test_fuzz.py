"""Mutated checkpoints, hundreds from a fixed seed: none may crash, hang, run code or read elsewhere."""

import json
import subprocess
import sys

import fuzz
import pytest

CASES = {"config": 220, "index": 150, "header": 250, "bytes": 100}

@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """{kind: how often each outcome came, and the first of those that must not come}."""
    command = [sys.executable, fuzz.__file__, str(tmp_path_factory.mktemp("fuzz")), json.dumps(CASES)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)

@pytest.mark.parametrize("kind", CASES)
def test_a_mutated_checkpoint_is_refused_or_loads_whole(report, kind):
    counts, wrong = report[kind]
    assert not wrong, "\n\n".join(wrong)
    assert sum(counts.values()) == CASES[kind]
    # Else the mutations would be too wild, or too tame, to get anywhere.
    assert counts["ValueError"] > 0.2 * CASES[kind] and counts["loaded"] > 0.03 * CASES[kind], counts
