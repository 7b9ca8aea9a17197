"""Kills, interrupts and full disks at moments that nobody chose: what was saved stays whole."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import build, tokens

import deepseek_v3

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

# A process that forks: its children are killed, and start without importing anything.
HEAD = """
import json, os, random, resource, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import deepseek_v3
folder, rng = Path(sys.argv[1]), random.Random(0)

def forked(work, changes=None):
    # Run work in a child, killed before so many changes to the file system.
    child = os.fork()
    if child == 0:
        sys.stdout, status = open(os.devnull, "w"), 1
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
"""

def run(script, *args):
    """What a script prints last, as JSON; and what it says on stderr."""
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    command = [sys.executable, "-c", HEAD + script, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr

CONFIG = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=None, kv_lora_rank=8)
CONFIG |= dict(qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, intermediate_size=16, n_group=1, topk_group=1)
CONFIG |= dict(moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1)
FLAGS = "--vocab-size 260 --batch 2 --length 8 --steps 24 --save-every 2 --eval-every 24 --device cpu"

TRAINING = """
words = ["train", "--data", str(folder / "text.txt"), "--config", str(folder / "config.json"), *sys.argv[2].split()]

def train(out, *more):
    stderr, log = os.dup(2), open(folder / f"{out}.log", "w")
    os.dup2(log.fileno(), 2)
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
"""

def test_a_run_killed_again_and_again_ends_like_one_that_was_not(tmp_path):
    """At moments when a file is written, renamed or removed; up to twelve times."""
    (tmp_path / "text.txt").write_text("".join(f"line {i} of {i * i}, and so on\n" for i in range(300)))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (steps, status, same, killed_said, full, said), _ = run(TRAINING, tmp_path, FLAGS)
    assert status == 0 and same, killed_said
    assert steps == sorted(steps) and len(steps) > 6 and len(set(steps)) > 4, steps
    assert full == 2 and "Traceback" not in said and said.splitlines()[-1].startswith("deepseek_v3.py:"), said
    assert ".tmp: cannot be written, older states are kept" in said and not list(tmp_path.glob("full/states/*"))

def test_ctrl_c_ends_generation_with_the_line(tmp_path):
    (tmp_path / "text.txt").write_text("some text, some more text\n" * 99)
    tokenizer = deepseek_v3.train_tokenizer([tmp_path / "text.txt"], 258)
    build(vocab_size=258, eos_token_id=None).save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    command = [sys.executable, deepseek_v3.__file__, "generate", tmp_path, "so", "--max-new-tokens", "1000000"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    # Where the tests run in the background, interrupts are ignored, and children inherit that.
    running = subprocess.Popen(command, **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    begun = running.stdout.read(6)  # the prompt, and something behind it
    running.send_signal(signal.SIGINT)
    rest, errors = running.communicate(timeout=30)
    assert running.returncode == 130 and begun.startswith(b"so")
    assert not errors and rest.endswith(b"\n") and not rest.endswith(b"\n\n")

@pytest.mark.parametrize("interrupted", [True, False])
def test_generate_gives_each_module_its_own_mode_back(interrupted):
    """And a bound that is never reached takes no memory."""
    model, before = build().train(), signal.signal(signal.SIGINT, signal.default_int_handler)
    model.model.layers[0].eval()
    model.model.layers[1].mlp.eval()
    modes = [module.training for module in model.modules()]

    def streamer(token):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) if interrupted else contextlib.nullcontext():
        given = dict(max_new_tokens=10**15, streamer=streamer) if interrupted else dict(max_new_tokens=2)
        model.generate(tokens(1, 2), eos_token_id=-1, **given)
    signal.signal(signal.SIGINT, before)
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    assert not any(module._forward_hooks for module in model.modules())
