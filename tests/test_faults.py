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

def killed(*args):
    """What killed.py prints last, as JSON."""
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    command = [sys.executable, HERE / "killed.py", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

CONFIG = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=None, kv_lora_rank=8)
CONFIG |= dict(qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, intermediate_size=16, n_group=1, topk_group=1)
CONFIG |= dict(moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1)
FLAGS = "--vocab-size 260 --batch 2 --length 8 --steps 24 --save-every 2 --eval-every 24 --device cpu"

def test_a_run_killed_again_and_again_ends_like_one_that_was_not(tmp_path):
    """At moments when a file is written, renamed or removed; up to twelve times."""
    (tmp_path / "text.txt").write_text("".join(f"line {i} of {i * i}, and so on\n" for i in range(300)))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    steps, status, same, killed_said, full, said = killed(tmp_path, FLAGS)
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
