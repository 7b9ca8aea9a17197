"""Training: text, data, schedule, exact resumption, several processes, and what a run leaves behind."""

import copy
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from runs import ENVIRONMENT, SMALL, TEMPLATES, NoDoubles, call, contents, gradients, losses, measured, metrics, numbers
from runs import program, replaced, same, trainer, weighed
from safetensors.torch import load_file

import deepseek_v3
from deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM

LITERAL = f"one {deepseek_v3.EOS} two {deepseek_v3.BOS} three\n"

@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        lines = (f"def f{j}(x):\n    return x * {j} + {i}\n\n" for j in range(i, i + 12))
        (folder / f"{i:02d}.py").write_text("".join(lines))
    (folder / "literal.md").write_text(LITERAL)
    (folder / "Русский 中文.txt").write_text("Ещё 中文字符 ü\n" * 5)
    return folder

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.json"
    path.write_text(json.dumps(SMALL))
    return path

@pytest.fixture(scope="module")
def words(text, small):
    """The command line of a small run, to which a test adds --out and more."""
    sizes = "--vocab-size 270 --batch 4 --length 16 --steps 6 --save-every 2 --eval-every 3 --eval-tokens 48"
    return ["train", "--data", str(text), "--config", str(small), *sizes.split(), "--device", "cpu"]

@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """That run as it is, to compare others with; in a folder that needs quotes."""
    out = tmp_path_factory.mktemp("runs") / "a run, ганц 中"
    status, said, errors = call(*words, "--out", out)
    assert (status, errors) == (0, []), errors
    return types.SimpleNamespace(out=out, said=said, model=DeepseekV3ForCausalLM.from_pretrained(out))

# ---- What a token stands for ----

def test_the_tokenizer_writes_any_text_and_begins_with_the_two_special_tokens(text):
    tokenizer = deepseek_v3.train_tokenizer(sorted(text.iterdir()), 300)
    strange = "def café():\n\treturn '\U0001f40d' \x00 \r\n"
    ids = tokenizer.encode(strange).ids
    assert tokenizer.decode(ids) == strange and ids[0] == 0 and min(ids[1:]) > 1
    assert (tokenizer.token_to_id(deepseek_v3.BOS), tokenizer.token_to_id(deepseek_v3.EOS)) == (0, 1)

def test_each_document_stands_between_its_markers_and_a_marker_spelt_in_it_stays_text(text, whole):
    ids, tokenizer = np.fromfile(whole.out / "tokens.bin", np.uint16), deepseek_v3.read_tokenizer(whole.out)
    begins, ends = (np.flatnonzero(ids == marker) for marker in (0, 1))
    assert begins[0] == 0 and list(begins[1:]) == list(ends[:-1] + 1) and ends[-1] == len(ids) - 1
    written = [tokenizer.decode(ids[a:b].tolist()) for a, b in zip(begins, ends, strict=True)]
    assert sorted(written) == sorted(path.read_text() for path in text.iterdir()) and LITERAL in written

def asked(monkeypatch, *words):
    """What the command `generate` asks the model for."""
    seen = {}
    monkeypatch.setattr(DeepseekV3ForCausalLM, "generate", lambda model, ids, **given: seen.update(given, ids=ids))
    assert call("generate", *words)[0] == 0
    return seen | {"ids": seen["ids"][0].tolist()}

@pytest.mark.parametrize("begin", [None, True, False])
def test_inference_begins_as_training_did_and_as_transformers_does(words, whole, tmp_path, monkeypatch, begin):
    """With --from also as the tokenizer's folder says; the chat template writes all of its markers."""
    folder = tmp_path / "model"
    shutil.copytree(whole.out, folder, ignore=shutil.ignore_patterns("states", "*.bin", "run.json", "metrics.jsonl"))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"add_bos_token": begin}
    settings["chat_template"] = "{{ bos_token * 2 }}<u>{{ messages[0].content }}"
    if begin is None:
        del settings["add_bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if begin is False:  # with it, transformers 5 reads tokenizer.json alone
        plain = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
        (folder / "tokenizer.json").write_text(json.dumps(plain))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = theirs("def f").input_ids
    assert asked(monkeypatch, folder, "def f")["ids"] == ids
    assert ids == [0] * (begin is not False) + theirs("def f", add_special_tokens=False).input_ids
    chat = theirs.apply_chat_template([{"role": "user", "content": "def f"}], add_generation_prompt=True).input_ids
    assert asked(monkeypatch, folder, "def f", "--chat")["ids"] == chat and chat.count(0) == 2
    monkeypatch.undo()
    again = replaced(words, **{"config": None, "vocab-size": None})
    assert call(*again, "--from", folder, "--out", tmp_path / "more", "--steps", 1)[0] == 0
    documents = np.fromfile(tmp_path / "more/tokens.bin", np.uint16)
    assert ((documents == 0).sum(), (documents == 1).sum()) == (42 * (begin is not False), 42)

@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_render_as_in_transformers(whole, tmp_path, template):
    shutil.copy(whole.out / "tokenizer.json", tmp_path)
    markers = {"bos_token": deepseek_v3.BOS, "eos_token": {"content": deepseek_v3.EOS, "__type": "AddedToken"}}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATES[template]} | markers
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    chat, theirs = [{"role": "user", "content": "<Hi> é"}], transformers.AutoTokenizer.from_pretrained(tmp_path)
    rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert deepseek_v3.chat_prompt(tmp_path, "<Hi> é") == rendered

@pytest.mark.parametrize("T", [7, 64])
def test_evaluate_scores_each_token_once_and_counts_true_bytes(text, whole, tmp_path, T):
    """Windows cut characters of two and three bytes; documents are short, and ends of text count no byte."""
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/index").write_text("hidden"), (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8")
    for i, name in enumerate(("Русский 中文.txt", "literal.md", "00.py")):
        shutil.copy(text / name, tmp_path / f"{i}.txt")
    (tmp_path / "3.txt").write_text("a")
    status, said, errors = call("evaluate", whole.out, "--data", tmp_path, "--length", T)
    (nats, tokens), size = measured(whole.out, sorted(tmp_path.glob("*.txt")), T)
    loss, error, bits, count, files, left_out = numbers(said)
    assert (status, errors, count, files, left_out) == (0, [], tokens.sum(), 4, 2)
    assert loss == pytest.approx(nats.sum() / tokens.sum(), abs=1e-4)
    assert bits == pytest.approx(nats.sum() / math.log(2) / size, abs=2e-4)
    drawn = np.random.default_rng(0).integers(len(nats), size=(4000, len(nats)))
    spread = (nats[drawn].sum(1) / tokens[drawn].sum(1)).std()
    assert error == pytest.approx(spread, rel=0.15 if T == 7 else 0.4)

def test_what_is_no_number_is_not_printed(whole, tmp_path):
    (tmp_path / "one.txt").write_text("one window"), (tmp_path / "empty.txt").write_text("")
    assert "±" not in call("evaluate", whole.out, "--data", tmp_path / "one.txt")[1]
    status, _, errors = call("evaluate", whole.out, "--data", tmp_path / "empty.txt")
    assert status == 2 and "empty.txt: holds no text" in errors[0]

def test_isolated_documents_are_scored_and_trained_as_if_alone(text, whole, tmp_path):
    files = [text / "Русский 中文.txt", text / "literal.md", text / "07.py"]
    for i, file in enumerate(files):
        shutil.copy(file, tmp_path / f"{i}.txt")
    alone = [numbers(call("evaluate", whole.out, "--data", file)[1]) for file in files]
    both = call("evaluate", whole.out, "--data", tmp_path), call("evaluate", whole.out, "--data", tmp_path, "--isolate")
    packed, isolated = (numbers(said) for _, said, _ in both)
    tokens = [found[-3] for found in alone]
    assert isolated[-3] == packed[-3] == sum(tokens)
    assert isolated[0] == pytest.approx(np.average([found[0] for found in alone], weights=tokens), abs=2e-4)
    assert abs(packed[0] - isolated[0]) > 1e-3
    documents = [[0, 5, 6, 7, 8, 9, 1], [0, 9, 8, 1], [0, 7, 7, 7, 5, 5, 6, 1]]
    rows, model = [deepseek_v3.Corpus(np.array(ids), 0, len(ids), isolate=True, share=1).read([0])
                   for ids in (*documents, sum(documents, []))], whole.model.train()  # fmt: skip
    *each, packed = [model(**row, num_items_in_batch=16) for row in rows]
    model.eval()
    for name in ("main_loss", "mtp_loss"):
        assert getattr(packed, name).item() == pytest.approx(sum(getattr(out, name).item() for out in each), rel=1e-5)

# ---- Windows ----

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

@pytest.mark.parametrize("windows", [2, 5, 60, 10**6])
def test_few_held_out_windows_are_spread_over_all_of_it(windows):
    data = corpus(range(2, 20002))
    some, every = np.array(data.held_out(4 * windows)), data.held_out()
    assert len(some) == min(windows, len(every)) and len({*some}) == len(some) and {*some} <= {*every}
    assert (some[0], some[-1]) == (every[0], every[-1]) and np.ptp(np.diff(some)) <= 3

def test_no_document_is_asked_to_predict_the_next_one_and_its_first_token_is_scored():
    batch = corpus([0, 5, 6, 1] * 60).batch(0, 8)
    assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(batch["input_ids"] == 0, -100))

def test_too_short_a_corpus_is_refused():
    with pytest.raises(ValueError, match="corpus of 79 tokens is too short: 20 x 4 needed"):
        corpus(range(79))
    assert corpus([0, *[5] * 75, 5, 0, 5, 5]).windows == 19  # no document begins where 4 tokens would be left

def test_tokens_are_two_bytes_until_the_vocabulary_needs_four():
    assert deepseek_v3.token_dtype(65536) is np.uint16 and deepseek_v3.token_dtype(65537) is np.uint32

# ---- A run ----

def test_the_learning_rate_follows_the_report():
    rate = [deepseek_v3.learning_rate_factor(p, 0.02) for p in (0, 0.01, 0.5, 12.15 / 14.8, 0.97, 0.995)]
    assert rate == pytest.approx([0, 0.5, 1, 0.55, 0.1, 7.3e-6 / 2.2e-4], abs=1e-3)

def test_a_run_logs_what_the_contract_names_and_leaves_a_checkpoint(text, whole):
    lines = metrics(whole.out)
    named = {"step", "loss", "main_loss", "mtp_loss", "balance_loss", "max_violation", "lr", "grad_norm"}
    assert all(named | {"tokens_per_second"} <= line.keys() for line in lines)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and lines[0]["lr"] > 0
    assert ["val_loss" in line for line in lines] == [False, False, True] * 2
    assert [weighed(line) for line in lines] == pytest.approx([0.3] * 4 + [0.1] * 2, rel=1e-5)  # §4.2
    ids = np.fromfile(whole.out / "tokens.bin", np.uint16)
    assert 0 < lines[2]["val_tokens"] <= 48 < lines[5]["val_tokens"] < len(ids) // 20 + 16
    said = whole.said
    assert f"{lines[5]['val_loss']:.4f} ± {lines[5]['val_standard_error']:.4f}" in said
    spent = re.search(r"\d+ s: data (\d+)%, forward and backward (\d+)%, optimizer (\d+)%, evaluation (\d+)%", said)
    assert 0 < sum(map(int, spent.groups())) <= 101
    *_, command, out, prompt = shlex.split(said[said.index("Next:") :])
    assert command == "generate" and any(prompt in path.read_text() for path in text.iterdir())
    status, answer, _ = call(command, out, prompt, "--max-new-tokens", 5)
    assert status == 0 and answer.startswith(prompt)
    theirs, tokenizer = (kind.from_pretrained(whole.out) for kind in (transformers.AutoModelForCausalLM,
                                                                      transformers.AutoTokenizer))  # fmt: skip
    ids = tokenizer("def f1(x):", return_tensors="pt").input_ids
    torch.testing.assert_close(whole.model(ids).logits, theirs(ids).logits, atol=1e-4, rtol=0)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "def f1(x):" and ids[0, 0] == 0

def test_what_is_saved_is_current_behind_each_state(words, tmp_path, monkeypatch):
    step, seen = deepseek_v3.Trainer.train_step, []

    def train_step(run):
        if run.step:
            seen.append(same(DeepseekV3ForCausalLM.from_pretrained(tmp_path), run.model))
            seen.append(deepseek_v3.read_tokenizer(tmp_path).get_vocab_size() == run.config.vocab_size)
        return step(run)

    monkeypatch.setattr(deepseek_v3.Trainer, "train_step", train_step)
    trainer(words, "--out", tmp_path, "--save-every", 1).run()
    assert seen == [True] * 10

def test_help_groups_its_flags_and_says_what_there_is():
    status, said, _ = call("train", "--help")
    groups = re.findall(r"^(\w.*):$", said, re.MULTILINE)
    assert status == 0 and len(groups) >= 4 and "--accumulate" in said

@pytest.mark.parametrize("given", [dict(mtp_loss_weight=0.05, balance_loss_weight=0.01), {}, dict(mtp_loss_weight=0)])
def test_weights_of_losses_in_the_config_are_kept_and_others_follow_the_schedule(words, tmp_path, given):
    (tmp_path / "c.json").write_text(json.dumps(SMALL | given))
    call(*replaced(words, config=tmp_path / "c.json", steps=2), "--out", tmp_path / "out")
    saved, (first, last) = json.loads((tmp_path / "out/config.json").read_text()), metrics(tmp_path / "out")
    weights = given.get("mtp_loss_weight"), given.get("balance_loss_weight", 1e-4)
    for line, scheduled in ((first, 0.3), (last, 0.1)):
        λ = scheduled if weights[0] is None else weights[0]
        assert weighed(line, weights[1]) == pytest.approx(λ, abs=1e-5)
    assert (saved["mtp_loss_weight"], saved["balance_loss_weight"]) == (λ, weights[1])

def test_what_a_config_leaves_out_is_as_in_the_tiny_one(words, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(dict(model_type="deepseek_v3", hidden_size=64, n_shared_experts=2)))
    run = trainer(replaced(words, config=tmp_path / "c.json"), "--out", tmp_path / "out")
    small = DeepseekV3Config.tiny(hidden_size=64, n_shared_experts=2, vocab_size=270).to_dict()
    assert {name: run.config.to_dict()[name] for name in small} == small | {"bos_token_id": 0, "eos_token_id": 1}
    (tmp_path / "c.json").write_text(json.dumps(SMALL | {"vocab_size": 100}))
    words = replaced(words, config=tmp_path / "c.json", **{"vocab-size": None})
    status, _, errors = call(*words, "--out", tmp_path / "no")
    assert status == 2 and "vocab_size=100: must be at least 258" in errors[0] and not (tmp_path / "no").exists()

def test_another_checkpoint_is_where_a_run_may_begin(words, whole, tmp_path):
    again = replaced(words, **{"config": None, "vocab-size": None})
    run = trainer(again, "--from", whole.out, "--out", tmp_path / "out")
    assert same(run.model, whole.model) and run.config == whole.model.config and run.step == 0
    run.run()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (whole.out / name).read_bytes()
    older, tiktoken = contents(whole.out), tmp_path / "tiktoken"
    tiktoken.mkdir(), (tiktoken / "tiktoken.model").touch()
    shutil.copy(whole.out / "config.json", tiktoken)
    for more, culprit in {
        ("--from", whole.out, "--config", tmp_path / "c.json"): "--from brings its config",
        ("--from", whole.out, "--vocab-size", "300"): "--from brings its config",
        ("--from", tmp_path / "none"): "none: no such",
        ("--from", tiktoken): "tiktoken.model and no tokenizer.json",
    }.items():
        status, _, errors = call(*again, *more, "--out", tmp_path / "refused")
        assert status == 2 and len(errors) == 1 and culprit in errors[0]
        assert not (tmp_path / "refused").exists()
    for command in (("generate", tiktoken, "a"), ("evaluate", tiktoken, "--data", tmp_path)):
        assert "tiktoken.model and no tokenizer.json" in call(*command)[2][0]
    assert call(*again, "--from", whole.out, "--out", whole.out, "--overwrite")[0] == 2 and contents(whole.out) == older

# ---- The same numbers ----

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
        assert losses(tmp_path / str(stop)) == losses(whole.out) and same(second.model, whole.model)

def test_on_two_threads_the_same_command_gives_the_same_numbers(words, tmp_path):
    """Also killed and resumed, recomputed, accumulated; x[order // K] in the experts differs behind 11 steps."""
    (tmp_path / "c.json").write_text(json.dumps(SMALL | dict(num_experts_per_tok=4, topk_group=2)))
    large = replaced(words, config=tmp_path / "c.json", batch=8, length=64, steps=40)
    assert program("threads", large, tmp_path, 2) == [True] * 4

def test_a_label_weighs_the_same_in_whatever_part_and_process_it_is(words, tmp_path):
    """Rows here have 3 to 15 labels. Both processes stop behind one step at Ctrl-C, and leave no half."""
    (tmp_path / "text").mkdir()
    for i in range(192):
        (tmp_path / f"text/{i:03}.txt").write_text("" if i % 96 < 48 else "some more text " * (i % 4))
    words = replaced(words, data=tmp_path / "text", batch=16)
    assert program("processes", words, tmp_path, 1) == [[0, 0], [5, 0]]
    found = [(load_file(tmp_path / "2.safetensors"), json.loads((tmp_path / "2.json").read_text()))]
    for parts in (8, 4, 1):
        run = trainer(words, "--out", tmp_path / f"parts-{parts}", "--accumulate", parts)
        found.append(gradients(run))
    labels = (run.corpus.batch(0, 16)["labels"][:, 1:] != -100).sum(1)
    assert labels.min() < 9 and labels.max() > 13
    for seen, score in found:
        assert score == pytest.approx(found[-1][1], rel=1e-5)
        apart = {name: float((seen[name] - grad).norm() / (grad.norm() + 1e-6)) for name, grad in found[-1][0].items()}
        assert max(apart.values()) < 1e-5, apart
    step = len(metrics(tmp_path / "stopped"))
    assert [path.name for path in (tmp_path / "stopped/states").iterdir()] == [f"step-{step:08d}"]
    assert not [path for path in (tmp_path / "stopped").rglob("*") if "tmp" in path.name]
    assert trainer(words, "--out", tmp_path / "stopped", "--resume", "--steps", 400).step == step > 2

def test_torchrun_trains_the_same_model_stops_at_ctrl_c_and_one_process_goes_on(words, whole, tmp_path):
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, deepseek_v3.__file__, *words, "--out", str(tmp_path)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"})
    # Where the tests run in the background, interrupts are ignored, and children inherit that.
    running = subprocess.Popen(command, **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    log = tmp_path / "metrics.jsonl"
    while running.poll() is None and not (log.exists() and log.read_text().count("\n") > 1):
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    said, errors = running.communicate(timeout=60)
    states, step = sorted(path.name for path in (tmp_path / "states").iterdir()), len(metrics(tmp_path))
    assert states[-1] == f"step-{step:08d}" and not any("tmp" in name for name in states), errors
    held = DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    resumed = trainer(words, "--out", tmp_path, "--resume")
    assert resumed.step == step and same(resumed.model, held)
    resumed.run()
    np.testing.assert_allclose(losses(whole.out), losses(tmp_path), rtol=1e-4)

# ---- What is there is not lost ----

def test_only_the_last_whole_states_are_kept_and_resumed_from(words, whole, tmp_path):
    trainer(words, "--out", tmp_path, "--save-every", 1).run()
    states = sorted(path.name for path in (tmp_path / "states").iterdir())
    assert states == ["step-00000005", "step-00000006"]
    (tmp_path / "states/step-00000009.tmp").mkdir()  # a half-written one
    assert trainer(words, "--out", tmp_path, "--resume").step == 6
    status, said, errors = call(*words, "--out", tmp_path, "--resume")
    assert status == 0 and not errors and "held out:" in said  # nothing left to do

OTHERS = {  # files of somebody else
    "a checkpoint": ("config.json", "model.safetensors.index.json", "generation_config.json", "metrics.jsonl"),
    "a tokenizer": ("tokenizer.json", "tokenizer_config.json"),
}

@pytest.mark.parametrize("files", OTHERS.values(), ids=OTHERS)
def test_what_is_somebodys_is_replaced_only_if_told_so(words, tmp_path, files):
    kept = ("model_ema.safetensors", "notes.txt", "tokenizer_trials/data.txt", "word2vec.model")
    for name in (*files, *kept):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text('{"weight_map": {}, "eos_token_id": 7}')
    before = contents(tmp_path)
    for more, hint in (((), "--overwrite replaces it"), (("--resume",), "no run to resume")):
        status, _, errors = call(*words, "--out", tmp_path / "out", *more)
        assert status == 2 and len(errors) == 1 and hint in errors[0]
        assert contents(tmp_path) == before
    assert call(*replaced(words, steps=1), "--out", tmp_path / "out", "--overwrite")[0] == 0
    after = contents(tmp_path)
    assert all(after[tmp_path / "out" / name] == before[tmp_path / "out" / name] for name in kept)
    assert not any(after.get(tmp_path / "out" / name) == before[tmp_path / "out" / name] for name in files)

def test_a_refused_command_changes_nothing(words, text, whole, tmp_path):
    other, data = tmp_path / "other.json", tmp_path / "data"
    other.write_text(json.dumps(SMALL | {"intermediate_size": 64}))
    shutil.copytree(text, data)
    (data / "00.py").write_text((data / "00.py").read_text().replace("x", "y"))
    before = contents(whole.out)
    was = dict(seed=(5, 0), batch=(8, 4), length=(8, 16), lr=(0.001, 0.004), warmup=(0.5, 0.1), gamma=(0.1, 0.002))
    cases = [(("--resume", f"--{name}", now), f"{name} is {now}, but was {then}") for name, (now, then) in was.items()]
    cases += [(("--resume", "--config", other), "intermediate_size is 64, but was 48")]
    cases += [(("--resume", "--vocab-size", 290), "vocab_size is 290, but was 270")]
    cases += [(("--resume", "--data", data), "--data is other text"), ((), "--overwrite replaces it")]
    cases += [(("--resume", "--steps", 2), "but the run is at step 6"), (("--overwrite", "--batch", 4000), "windows")]
    cases += [(("--overwrite", "--length", 5000), "too short"), (("--resume", "--centred"), "centred is True")]
    cases += [(("--overwrite", "--from", "nowhere"), "nowhere"), (("--resume", "--isolate"), "isolate is True")]
    for more, culprit in cases:
        status, _, errors = call(*words, "--out", whole.out, *more)
        assert status == 2 and len(errors) == 1 and culprit in errors[0], errors
        assert contents(whole.out) == before, more
        if "--overwrite" in more:  # nor is anything left of a run that never began
            (tmp_path / "runs").mkdir(exist_ok=True)
            assert call(*words, "--out", tmp_path / "runs/new", *more)[0] == 2
            assert not list((tmp_path / "runs").iterdir())

def test_more_steps_go_on_and_say_what_becomes_of_the_learning_rate(words, whole, tmp_path):
    shutil.copytree(whole.out, tmp_path / "out")
    status, _, errors = call(*replaced(words, steps=8), "--out", tmp_path / "out", "--resume")
    rates = [line["lr"] for line in metrics(tmp_path / "out")]
    assert status == 0 and "6 steps become 8" in errors[0] and "learning rate goes on at 30%" in errors[0]
    assert rates == pytest.approx([line["lr"] for line in metrics(whole.out)] + [
        0.004 * deepseek_v3.learning_rate_factor(step / 8, 0.1) for step in (7, 8)])  # fmt: skip

def test_a_run_inside_of_its_text_does_not_read_itself(words, text, tmp_path):
    shutil.copytree(text, tmp_path / "project")
    words = [*replaced(words, data=tmp_path / "project", steps=2), "--out", tmp_path / "project/out"]
    assert call(*words)[0] == 0
    assert call(*words, "--resume")[0] == 0 and call(*words, "--overwrite")[0] == 0
    assert (np.fromfile(tmp_path / "project/out/tokens.bin", np.uint16) == 0).sum() == 42

@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("what", ["loss is nan, the gradient's norm nan", "loss is [0-9.]+, the gradient's norm inf"])
def test_what_is_not_finite_stops_the_run_before_it_learns(words, tmp_path, what, saved):
    run = trainer(words, "--out", tmp_path, "--save-every", 1 if saved else 100)
    run.model.lm_head.weight.register_hook(lambda grad: grad / float(run.step != 2))
    if "loss is nan" in what:
        run.model.model.norm.register_forward_hook(lambda *a: a[2] * (math.nan if run.step == 2 else 1))
    state = "the last good state is .*step-00000002" if saved else "no state was saved yet"
    before = []
    run.optimizer.register_step_post_hook(lambda *_: before.append(copy.deepcopy(run.model.state_dict())))
    with pytest.raises(FloatingPointError, match=f"step 3: the {what}; {state}"):
        run.run()
    biases = [name for name in before[1] if name.endswith("e_score_correction_bias")]  # they move behind it
    assert all(torch.equal(x, before[1][name]) for name, x in run.model.state_dict().items() if name not in biases)
    assert [path.name for path in tmp_path.glob("states/*")] == ["step-00000001", "step-00000002"] * saved

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

# ---- Other machines and texts ----

def test_hidden_and_binary_files_are_left_out_and_counted_in_one_line(words, text, tmp_path, monkeypatch):
    data = tmp_path / "test"  # a name that is skipped inside of Python's library
    shutil.copytree(text, data / "tests")
    (data / ".git").mkdir()
    (data / ".git/index").write_bytes(b"\xff\xfe"), (data / ".git/note").touch()
    (data / "x.png").write_bytes(b"\x89PNG")
    status, _, errors = call(*replaced(words, data=data, steps=1), "--out", tmp_path / "out")
    assert status == 0 and len(errors) == 1 and "3 files left out" in errors[0]
    assert (np.fromfile(tmp_path / "out/tokens.bin", np.uint16) == 0).sum() == 42
    (data / "b.py").write_text("pass")
    monkeypatch.setattr(deepseek_v3.sysconfig, "get_path", lambda name: str(data))
    assert [path.name for path in deepseek_v3.corpus_files(None)[0]] == ["b.py"]
    monkeypatch.setattr(deepseek_v3.sysconfig, "get_path", lambda name: str(tmp_path / "out/states"))
    with pytest.raises(ValueError, match="came without its sources, give --data"):
        deepseek_v3.corpus_files(None)

@pytest.mark.parametrize("line", [LITERAL + "---\n--x\n'a' \"b\" $HOME `c` \\", "日本語の文章です。" * 9])
def test_the_prompt_that_is_suggested_is_of_the_text_and_can_be_typed(words, tmp_path, line):
    (tmp_path / "text.txt").write_text(f"{line}\nsome more text\n" * 99 if line[0] != "日" else line * 99)
    status, said, _ = call(*replaced(words, data=tmp_path / "text.txt", steps=1), "--out", tmp_path / "out")
    *_, command, out, prompt = shlex.split(said[said.index("Next:") :])
    assert status == 0 and prompt in (tmp_path / "text.txt").read_text()
    assert call(command, out, prompt, "--max-new-tokens", 1)[1].startswith(prompt)

def test_generate_passes_on_what_it_is_told(whole, monkeypatch):
    flags = "--top-k 5 --top-p 0.75 --min-p 0.125 --temperature 0.5 --max-new-tokens 3 --mtp --draft-tokens 2"
    seen = asked(monkeypatch, whole.out, "def", *flags.split(), "--device", "cpu")
    told = dict(top_k=5, top_p=0.75, min_p=0.125, temperature=0.5, max_new_tokens=3, use_mtp=True, num_draft_tokens=2)
    assert seen | told | {"do_sample": True} == seen
    assert asked(monkeypatch, whole.out, "def", "--temperature", 0)["do_sample"] is False
    assert "nowhere" in call("generate", whole.out, "def", "--device", "nowhere")[2][0]

@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_of_few_characters_shows_question_marks(whole, monkeypatch, encoding):
    screens = [io.TextIOWrapper(io.BytesIO(), encoding, newline="") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", screens[0]), monkeypatch.setattr(sys, "stderr", screens[1])
    deepseek_v3.main(["generate", str(whole.out), "é 中", "--max-new-tokens", "9"])
    with pytest.raises(SystemExit):
        deepseek_v3.main(["generate", "日", "x"])
    monkeypatch.undo()
    shown = [(screen.flush(), screen.buffer.getvalue().decode(encoding))[1] for screen in screens]
    assert shown[0].startswith("é ?" if encoding == "cp1252" else "? ?") and "?/tokenizer.json: no" in shown[1]

def test_memory_is_that_of_the_container_for_all_processes_of_a_machine(words, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sysconf", raising=False)  # as on Windows
    run, read = trainer(words, "--out", tmp_path / "a"), Path.read_text
    size = sum(4 * parameter.numel() for parameter in run.model.parameters())
    limit = Path("/sys/fs/cgroup/memory.max")
    monkeypatch.setattr(Path, "is_file", lambda path, real=Path.is_file: path == limit or real(path))
    text = f"{3 * size // 2}\n"
    monkeypatch.setattr(Path, "read_text", lambda path, *a, **b: text if path == limit else read(path, *a, **b))
    assert trainer(words, "--out", tmp_path / "b").step == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    status, _, errors = call(*words, "--out", tmp_path / "c")
    assert status == 2 and "GiB of memory" in errors[0] and not (tmp_path / "c").exists()

def test_a_folder_that_cannot_be_written_is_named(words, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    status, _, errors = call(*words, "--out", tmp_path / "file/out")
    assert status == 2 and len(errors) == 1 and "file" in errors[0]

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    status, _, errors = call(*words, "--out", tmp_path / "out")
    assert status == 2 and len(errors) == 1 and "Permission denied" in errors[0] and str(tmp_path / "out") in errors[0]

def test_no_step_needs_float64(words, whole, tmp_path):
    run = trainer(words, "--out", tmp_path)
    with NoDoubles():
        run.train_step()
        assert call("generate", whole.out, "def", "--max-new-tokens", 4)[0] == 0
        assert call("generate", whole.out, "def", "--max-new-tokens", 4, "--mtp", "--temperature", 0)[0] == 0

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
