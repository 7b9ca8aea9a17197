"""A run killed at up to twelve moments, for test_faults.py: python tests/killed.py FOLDER FLAGS.

The process forks: its children are killed, and start without importing anything.
"""

import json
import os
import random
import resource
import signal
import sys
from pathlib import Path

import torch

import deepseek_v3

torch.set_num_threads(1)
folder, rng = Path(sys.argv[1]), random.Random(0)

def forked(work, changes=None):
    """Run work in a child, killed before so many changes to the file system."""
    child = os.fork()
    if child == 0:
        status = 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            if changes is not None:
                kill_at(changes)
            work()
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None

def kill_at(changes):
    left = [changes]

    def hook(event, args):
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)

words = ["train", "--data", str(folder / "text.txt"), "--config", str(folder / "config.json"), *sys.argv[2].split()]

def train(out, *more):
    stderr, log = os.dup(2), os.open(folder / f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 2)
    deepseek_v3.main([*words, "--out", str(folder / out), *more])
    os.dup2(stderr, 2)

def full():
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    train("full", "--resume")

def lines(out):
    text = (folder / out / "metrics.jsonl").read_text().splitlines()
    return [[line[name] for name in ("step", "loss", "grad_norm", "max_violation")] for line in map(json.loads, text)]

train("whole")  # here, so that whatever is imported late is there for the children
steps, status = [], None
while status is None:
    changes = rng.randrange(1, 40) if len(steps) < 12 else None
    status = forked(lambda: train("killed", "--resume"), changes=changes)
    states = sorted((folder / "killed/states").glob("step-????????"))
    steps.append(int(states[-1].name[5:]) if states else 0)
said = [(folder / "killed.log").read_text()[-2000:], forked(full), (folder / "full.log").read_text()]
print(json.dumps([steps, status, lines("killed") == lines("whole"), *said]))
