"""Training: data, schedule, exact resumption, several processes, and what a run leaves behind."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import deepseek_v3
from deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM

ROOT = Path(deepseek_v3.__file__).parent
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "q_lora_rank": None,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 8, "n_group": 2,
    "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "rope_theta": 1e4,
    "num_nextn_predict_layers": 1,
}  # fmt: skip

@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        lines = (f"def f{j}(x):\n    return x * {j} + {i}\n\n" for j in range(i, i + 12))
        (folder / f"{i:02d}.py").write_text("".join(lines))
    return folder

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.json"
    path.write_text(json.dumps(SMALL))
    return path

@pytest.fixture(scope="module")
def words(text, small):
    """The command line of a small run, to which a test adds --out and more."""
    sizes = "--vocab-size 270 --batch 4 --length 16 --steps 6 --save-every 2 --eval-every 3"
    return ["train", "--data", str(text), "--config", str(small), *sizes.split(), "--device", "cpu"]

@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """That run as it is, to compare others with."""
    run = trainer(words, "--out", tmp_path_factory.mktemp("runs") / "whole")
    run.run()
    return run

def trainer(words, *more):
    return deepseek_v3.Trainer(deepseek_v3.parser().parse_args([*words, *map(str, more)]))

def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]

def losses(out):
    return [(line["step"], line["loss"], line["grad_norm"], line["max_violation"]) for line in metrics(out)]

def test_the_tokenizer_writes_any_text_and_begins_with_the_two_special_tokens(text):
    tokenizer = deepseek_v3.train_tokenizer(sorted(text.iterdir()), 300)
    strange = "def café():\n\treturn '\U0001f40d' \x00 \r\n"
    ids = tokenizer.encode(strange).ids
    assert tokenizer.decode(ids) == strange and ids[0] == 0 and min(ids[1:]) > 1
    assert (tokenizer.token_to_id(deepseek_v3.BOS), tokenizer.token_to_id(deepseek_v3.EOS)) == (0, 1)

def corpus(tokens, T=4, seed=0):
    return deepseek_v3.Corpus(np.array(tokens, np.uint16), 0, T, seed)

def test_a_step_has_windows_of_its_own_and_none_is_held_out():
    """They follow from seed and step alone, so that a resumed run goes on as it would have."""
    data, other = corpus(range(2, 402)), corpus(range(2, 402), seed=1)
    batches = [data.batch(step, 8)["input_ids"] for step in range(100)]
    assert torch.equal(data.batch(3, 8)["input_ids"], batches[3])
    assert not torch.equal(batches[3], batches[4]) and not torch.equal(batches[3], other.batch(3, 8)["input_ids"])
    seen, held_out = torch.cat(batches), data.read(data.held_out())["input_ids"]
    assert (seen.diff(dim=1) == 1).all()  # of text as it stands
    first, last = held_out[0, 0], held_out.max()
    assert seen.max() < first and last == 401 and len(held_out) == 7  # each scores three more of 20 tokens
    assert len(seen.unique()) > 0.95 * (first - 2)

def test_no_document_is_asked_to_predict_the_next_one():
    data = corpus([0, 5, 6, 1] * 60)
    batch = data.batch(0, 8)
    assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(batch["input_ids"] == 0, -100))

def test_too_short_a_corpus_is_refused():
    with pytest.raises(ValueError, match="corpus of 30 tokens is too short"):
        corpus(range(30))

def test_tokens_are_two_bytes_until_the_vocabulary_needs_four():
    assert deepseek_v3.token_dtype(65536) is np.uint16 and deepseek_v3.token_dtype(65537) is np.uint32

def test_the_learning_rate_follows_the_report():
    rate = [deepseek_v3.learning_rate_factor(p, 0.02) for p in (0, 0.01, 0.5, 12.15 / 14.8, 0.97, 0.995)]
    assert rate == pytest.approx([0, 0.5, 1, 0.55, 0.1, 7.3e-6 / 2.2e-4], abs=1e-3)

def test_a_run_logs_what_the_contract_names_and_leaves_a_checkpoint(words, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    deepseek_v3.main([*words, "--out", str(out)])
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "4096"
    lines = metrics(out)
    named = {"step", "loss", "main_loss", "mtp_loss", "balance_loss", "max_violation", "lr", "grad_norm"}
    assert all(named | {"tokens_per_second"} <= line.keys() for line in lines)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert ["val_loss" in line for line in lines] == [False, False, True] * 2
    assert lines[0]["loss"] == pytest.approx(
        lines[0]["main_loss"] + 0.3 * lines[0]["mtp_loss"] + 1e-4 * lines[0]["balance_loss"], rel=1e-5
    )
    assert f"python deepseek_v3.py generate {out}" in capsys.readouterr().out
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = tokenizer("def f1(x):", return_tensors="pt").input_ids
    ours = DeepseekV3ForCausalLM.from_pretrained(out)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "def f1(x):" and ids[0, 0] == 0
    deepseek_v3.main(["generate", str(out), "def", "--max-new-tokens", "5"])
    assert capsys.readouterr().out.startswith("def")

def test_another_seed_is_another_run(words, whole, tmp_path):
    """The same seed is the same one, or no run below could be compared with `whole`."""
    assert trainer(words, "--out", tmp_path, "--seed", 1).train_step()["loss"] != losses(whole.out)[0][1]

def test_every_saved_state_resumes_with_the_same_weights_bias_and_losses(words, whole, tmp_path):
    for stop in (1, 5):
        first = trainer(words, "--out", tmp_path / str(stop), "--save-every", 1)
        lines = [first.train_step() for _ in range(stop)]
        deepseek_v3.save_state(first)
        first.train_step()  # lost: nothing saved it
        (tmp_path / str(stop) / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        second = trainer(words, "--out", tmp_path / str(stop), "--resume")
        assert second.step == stop
        second.run()
        assert losses(tmp_path / str(stop)) == losses(whole.out)
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(tensor, second.model.state_dict()[name]), name

def test_accumulating_parts_of_a_batch_changes_nothing(words, whole, tmp_path):
    trainer(words, "--out", tmp_path, "--accumulate", 4).run()
    np.testing.assert_allclose(losses(whole.out), losses(tmp_path), rtol=1e-4)

def test_two_processes_train_the_same_model_and_one_goes_on_from_their_state(words, whole, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, str(ROOT / "deepseek_v3.py"), *words, "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    both = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("Next:") == 1
    np.testing.assert_allclose(losses(whole.out), losses(tmp_path), rtol=1e-4)
    one = DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    resumed = trainer(words, "--out", tmp_path, "--resume")
    assert resumed.step == 6
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name

def test_only_the_last_whole_states_are_kept_and_resumed_from(words, tmp_path):
    trainer(words, "--out", tmp_path, "--save-every", 1).run()
    states = sorted(path.name for path in (tmp_path / "states").iterdir())
    assert states == ["step-00000005", "step-00000006"]
    (tmp_path / "states/step-00000009.tmp").mkdir()  # a half-written one
    assert trainer(words, "--out", tmp_path, "--resume").step == 6
    with pytest.raises(ValueError, match="holds tokens.bin, states, .*: --resume goes on with a run, --overwrite"):
        trainer(words, "--out", tmp_path)
    assert trainer(words, "--out", tmp_path, "--overwrite").step == 0
    assert metrics(tmp_path) == [] and not (tmp_path / "states").exists()

def test_another_run_is_not_resumed(words, whole, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(SMALL | {"intermediate_size": 64}))
    changes = {"seed": (5, 0), "batch": (8, 4), "length": (8, 16), "intermediate_size": (64, 48)}
    for name, (now, then) in changes.items():
        change = ("--config", other) if name == "intermediate_size" else (f"--{name}", now)
        with pytest.raises(ValueError, match=f"--resume: {name} is {now}, but was {then}"):
            trainer(words, "--out", whole.out, "--resume", *change)

def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(words, tmp_path):
    run = trainer(words, "--out", tmp_path)
    run.train_step(), run.train_step()
    deepseek_v3.save_state(run)
    with torch.no_grad():
        run.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="step 3: the loss is nan"):
        run.run()
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["step-00000002"]

def test_a_python_without_its_sources_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(deepseek_v3.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="came without its sources, give --data"):
        deepseek_v3.corpus_files(None)

def test_ctrl_c_in_the_middle_of_a_step_saves_a_whole_one(words, whole, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    calls = iter(range(3))

    def interrupted(optimizer, step=torch.optim.AdamW.step):
        if next(calls, None) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(SystemExit, match="stopped at step 3; the same command with --resume"):
        deepseek_v3.main([*words, "--out", str(tmp_path / "stopped"), "--save-every", "100"])
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is before
    trainer(words, "--out", tmp_path / "stopped", "--resume").run()
    assert losses(tmp_path / "stopped") == losses(whole.out)

@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_a_classification_head_is_fine_tuned_from_a_causal_checkpoint(tmp_path, head):
    torch.manual_seed(0)
    causal = DeepseekV3ForCausalLM(DeepseekV3Config(**SMALL | {"vocab_size": 50}))
    causal.save_pretrained(tmp_path)
    kind = getattr(deepseek_v3, f"DeepseekV3For{head}")
    with pytest.warns(UserWarning, match="score.weight: not in the checkpoint, newly initialised"):
        model = kind.from_pretrained(tmp_path, num_labels=2, num_nextn_predict_layers=0)
    assert torch.equal(model.model.embed_tokens.weight, causal.model.embed_tokens.weight)
    tokens = torch.randint(0, 50, (16, 8))
    labels = (tokens[:, -1] < 25).long() if head[0] == "S" else (tokens < 25).long()
    optimizer, losses = torch.optim.AdamW(model.train().parameters(), 1e-2), []
    for _ in range(20):
        out = model(tokens, labels=labels)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_router_bias()
        losses.append(out.main_loss.item())
    assert losses[-1] < 0.3 * losses[0]
