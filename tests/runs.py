"""What test_training.py runs: commands in its own process, and programs that need two threads or processes.

python tests/runs.py threads|processes WORDS FOLDER: WORDS is the command line of `train` as JSON.
"""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import deepseek_v3
from deepseek_v3 import DeepseekV3ForCausalLM

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "q_lora_rank": None,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 8, "n_group": 2,
    "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "rope_theta": 1e4,
    "num_nextn_predict_layers": 1,
}  # fmt: skip

# Chat templates that use what transformers adds to Jinja.
TEMPLATES = {
    "loops": "{% for m in messages * 3 %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ loop.index }}"
    "{{ m.content }}{% if loop.index > 2 %}{% break %}{% endif %}\n{% endfor %}",
    "generation": "{% for m in messages %}\n  {% generation %}\n {{ m.content }}{% set x = 1 %}\n"
    "{% endgeneration %}\n{% endfor %}[{{ x }}]{{ eos_token }}",
    "time": "{{ strftime_now('%d %B %Y') }}",
    "json": "{{ {'b': '<é>', 'a': [1]} | tojson }}{{ messages | tojson(indent=2) }}{{ messages | tojson(False, 4) }}"
    "{{ messages | tojson(separators=(',', ':'), ensure_ascii=True, sort_keys=True) }}",
    "names": "{{ bos_token }}{{ pad_token is defined }}{{ tools is none }}{{ documents is none }}"
    "{{ add_generation_prompt }}",
}

def call(*words):
    """Exit status, what a command prints, and its lines on stderr but progress bars."""
    said, errors, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        try:
            deepseek_v3.main([*map(str, words)])
        except SystemExit as stop:
            status = stop.code
    lines = errors.getvalue().replace("\r", "\n").splitlines()
    return status, said.getvalue(), [line for line in lines if line.strip() and "|" not in line]

def trainer(words, *more):
    return deepseek_v3.Trainer(deepseek_v3.parser().parse_args([*words, *map(str, more)]))

def replaced(words, **options):
    """The command line with other values for some of its options, or (None) without them."""
    for name, value in options.items():
        place = words.index(f"--{name}")
        words = [*words[:place], *([] if value is None else [f"--{name}", str(value)]), *words[place + 2 :]]
    return words

def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]

def losses(out):
    return [(line["step"], line["loss"], line["grad_norm"], line["max_violation"]) for line in metrics(out)]

def weighed(line, balance=1e-4):
    """λ of a step."""
    return (line["loss"] - line["main_loss"] - balance * line["balance_loss"]) / line["mtp_loss"]

def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

def same(model, other):
    """Whether two models hold the same numbers."""
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())

def numbers(said):
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d.,]*", said)]

@torch.no_grad()
def measured(out, files, T):
    """Nats and scored tokens of each window of T tokens of the files, and their bytes."""
    import transformers

    model, tokenizer = DeepseekV3ForCausalLM.from_pretrained(out), transformers.AutoTokenizer.from_pretrained(out)
    encode = partial(tokenizer, add_special_tokens=False, split_special_tokens=True)
    ids, found = [i for file in files for i in (0, *encode(file.read_text()).input_ids, 1)], []
    for start in range(0, len(ids) - 1, T - 1):
        row = torch.tensor(ids[start : start + T])
        nats, scored = -model(row[None]).logits[0, :-1].log_softmax(-1), row[1:] != 0
        found.append((float(nats.gather(-1, row[1:, None])[scored].sum()), int(scored.sum())))
    return np.array(found).T, sum(file.stat().st_size for file in files)

class NoDoubles(TorchDispatchMode):
    """As on Apple's GPUs: nothing is made in float64."""

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        made = [x for x in (out if isinstance(out, list | tuple) else [out]) if isinstance(x, torch.Tensor)]
        assert all(x.dtype != torch.float64 for x in made), function
        return out

# ---- Programs ----

# Threads that wait without spinning: other work on the machine slows these down least.
ENVIRONMENT = os.environ | {"OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
ENVIRONMENT |= {"PYTHONPATH": str(Path(deepseek_v3.__file__).parent)}

def program(name, words, folder, threads):
    """What a program of this file prints last, as JSON."""
    command = [sys.executable, "-W", "ignore", __file__, name, json.dumps(words), str(folder)]
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])

def gradients(run):
    """Gradients of a run's next step, and held-out losses before it."""
    seen, score = {}, run.evaluate()

    def look(*_):
        for name, parameter in run.model.named_parameters():
            seen[name] = getattr(parameter.grad, "full_tensor", lambda parameter=parameter: parameter.grad)().clone()

    run.optimizer.register_step_pre_hook(look)
    run.train_step()
    return seen, score

def threads(words, folder):
    """Whether runs of 40 steps on two threads are equal: stopped and resumed, recomputed, accumulated twice."""
    torch.set_num_threads(2)

    def train(out, steps, *more):
        run = trainer(words, "--out", folder / out, *more)
        return run, [run.train_step()["loss"] for _ in range(steps)]

    whole, first = train("a", 40)
    run, part = train("b", 20)
    deepseek_v3.save_state(run)
    again, rest = train("b", 20, "--resume")
    accumulated = [train(out, 12, "--accumulate", 2)[1] for out in "cd"]
    recomputed = train("e", 12, "--recompute")[1]
    equal = [first == part + rest, same(whole.model, again.model), first[:12] == recomputed]
    return [*equal, accumulated[0] == accumulated[1]]

def processes(words, folder):
    """Exit statuses of two processes that save their gradients, and of two that are interrupted."""
    log = folder / "stopped/metrics.jsonl"

    def learn():
        run = trainer(words, "--out", folder / "2")
        seen, score = gradients(run)
        if run.rank == 0:
            save_file({name: tensor.contiguous() for name, tensor in seen.items()}, folder / "2.safetensors")
            (folder / "2.json").write_text(json.dumps(score))

    def interrupted():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        deepseek_v3.main([*words, "--out", str(folder / "stopped"), "--steps", "400", "--save-every", "100"])

    def child(work, port, rank):
        os.environ |= dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        status = 1
        try:
            work()
            status = 0
        except SystemExit as stop:  # "stopped at step …" is said by the first process alone
            status = 2 if torch.distributed.is_initialized() or "stopped" not in str(stop.code) else 5
        finally:
            os._exit(status)

    found = []
    for work in (learn, interrupted):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        children = [pid for rank in "01" if (pid := os.fork()) or child(work, port, rank)]
        while work is interrupted and not (log.exists() and log.read_text().count("\n") > 2):
            time.sleep(0.01)
        for pid in children if work is interrupted else ():
            os.kill(pid, signal.SIGINT)
            time.sleep(0.03)
        found.append([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
    return found

if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen, given, place = sys.argv[1:]
    print(json.dumps({"threads": threads, "processes": processes}[chosen](json.loads(given), Path(place))))
