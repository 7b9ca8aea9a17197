"""Each public entry refuses what cannot work: a ValueError, or status 2 and one line, names the culprit."""

import copy
import json
import math
import re

import pytest
import torch
from helpers import MOONLIGHT, V3, build, tokens

import deepseek_v3
from deepseek_v3 import (
    DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification,
    DeepseekV3ForTokenClassification, DeepseekV3Model,
)

IDS, D, VOCAB = tokens(2, 4), 32, 61
HUGE = 10**400  # an integer that no float holds

def refuses(culprit, call, *args, **options):
    with pytest.raises(ValueError, match=re.escape(culprit)):
        call(*args, **options)

@pytest.fixture(scope="module")
def model():
    return build(eos_token_id=None)

# ---- Forward ----

OTHER_CACHE = build(seed=1, kv_lora_rank=5)(tokens(2, 3), use_cache=True).past_key_values
FORWARD = [
    (dict(input_ids=[[1, 2]]), "input_ids: list"), (dict(input_ids="text"), "input_ids: str"),
    (dict(input_ids=IDS.numpy()), "input_ids: ndarray"),
    (dict(input_ids=IDS.float()), "input_ids: torch.float32"),
    (dict(input_ids=IDS.to(torch.int16)), "input_ids: torch.int16"),
    (dict(input_ids=IDS[0]), "input_ids: torch.int64 of shape (4,)"),
    (dict(input_ids=IDS[:0]), "input_ids: torch.int64 of shape (0, 4)"),
    (dict(input_ids=IDS[:, :0]), "input_ids: torch.int64 of shape (2, 0)"),
    (dict(input_ids=IDS + 2**62), "input_ids hold"), (dict(input_ids=IDS - 100), "input_ids hold -"),
    (dict(input_ids=None, inputs_embeds=torch.zeros(2, 4, D - 1)), "inputs_embeds"),
    (dict(input_ids=None, inputs_embeds=torch.zeros(2, D)), "inputs_embeds"),
    (dict(input_ids=None, inputs_embeds=torch.zeros(2, 4, D).long()), "inputs_embeds"),
    (dict(input_ids=None, inputs_embeds=[[[0.0] * D]]), "inputs_embeds: list"),
    (dict(attention_mask=[[1] * 4] * 2), "attention_mask: list"),
    (dict(attention_mask=torch.ones(2, 3, 4, 4)), "attention_mask: torch.float32 of shape (2, 3, 4, 4)"),
    (dict(attention_mask=torch.ones(2, 1, 4, 5)), "attention_mask: torch.float32 of shape (2, 1, 4, 5)"),
    (dict(attention_mask=torch.ones(3, 1, 4, 4)), "attention_mask: torch.float32 of shape (3, 1, 4, 4)"),
    (dict(attention_mask=torch.ones(2, 1, 4, 4).long()), "attention_mask: torch.int64 of shape (2, 1, 4, 4)"),
    (dict(attention_mask=torch.ones(4)), "attention_mask: torch.float32 of shape (4,)"),
    (dict(attention_mask=torch.tensor([[0, 0, 0, -math.inf]] * 2)), "attention_mask"),
    (dict(attention_mask=torch.full((2, 4), 2)), "attention_mask"),
    (dict(position_ids=[0, 1, 2, 3]), "position_ids: list"),
    (dict(position_ids=torch.arange(4)), "position_ids: torch.int64 of shape (4,)"),
    (dict(past_key_values=()), "past_key_values: tuple"),
    (dict(past_key_values=[(IDS, IDS)]), "past_key_values: list"),
    (dict(past_key_values=OTHER_CACHE), "past_key_values"), (dict(logits_to_keep=-1), "logits_to_keep=-1"),
    (dict(logits_to_keep=1.5), "logits_to_keep=1.5"), (dict(labels=[[1] * 4] * 2), "labels: list"),
    (dict(labels=IDS[:, 1:]), "labels: torch.int64 of shape (2, 3)"),
    (dict(labels=IDS.float()), "labels: torch.float32"), (dict(labels=IDS + VOCAB), "labels hold"),
    (dict(labels=IDS * 0 - 99), "labels hold -99"), (dict(labels=IDS, logits_to_keep=1), "labels"),
]

@pytest.mark.parametrize(("given", "culprit"), FORWARD, ids=[culprit for _, culprit in FORWARD])
def test_an_input_that_cannot_work_is_named(model, given, culprit):
    refuses(culprit, model, **{"input_ids": IDS} | given)

def test_a_cache_of_other_rows_is_refused_and_still_works(model):
    cache = model(IDS, use_cache=True).past_key_values
    before = copy.deepcopy(cache)
    refuses("past_key_values", model, IDS[:1], past_key_values=cache)
    refuses("attention_mask", model, IDS, torch.ones(2, 4), past_key_values=cache)
    assert torch.equal(model(IDS, past_key_values=cache).logits, model(IDS, past_key_values=before).logits)

HEADS = [DeepseekV3ForSequenceClassification, DeepseekV3ForTokenClassification]
LABELS = [[0, 1], IDS[0], torch.full((2,), 3), torch.full((2, 4), 3), torch.full((2,), -1)]
LABELS += [torch.zeros(2, 2), torch.zeros(2, 4), torch.zeros(2, 4, 3)]
CLASSES = [(cls, 3, labels) for cls in HEADS for labels in LABELS]
CLASSES += [(HEADS[1], 1, labels) for labels in LABELS]
CLASSES += [(HEADS[0], 1, labels) for labels in LABELS if len(labels) != 2 or len(torch.as_tensor(labels).shape) > 1]

@pytest.mark.parametrize(("cls", "num_labels", "labels"), CLASSES, ids=lambda x: str(x)[-40:])
def test_class_labels_that_cannot_work_are_named(cls, num_labels, labels):
    refuses("labels", build(cls, num_labels=num_labels), IDS, labels=labels)

# ---- Generation ----

GENERATE = [("max_new_tokens", value) for value in (2.5, "3", True, -1)]
GENERATE += [("temperature", value) for value in ("1", None, math.inf, math.nan, 0)]
GENERATE += [("top_k", 2.5), ("top_k", "3"), ("top_p", "0.5"), ("top_p", None), ("min_p", "0"), ("min_p", math.nan)]
GENERATE += [("eos_token_id", value) for value in ("</s>", 1.0, [1, "2"], [None], [[1]])]
GENERATE += [("num_draft_tokens", value) for value in (1.5, "2", 0, -1)]
GENERATE += [("generator", 7), ("streamer", 7), ("streamer", "print")]
GENERATE += [("repetition_penalty", value) for value in (-1.0, 0, math.nan, None)]
GENERATE += [("num_return_sequences", value) for value in (2, 0, 1.0, True)]  # 2 without do_sample
PROCESSORS = (7, [7], lambda ids, scores: None, lambda ids, scores: scores[:, :5])
GENERATE += [("logits_processor", each) for each in PROCESSORS]
GENERATE += [("past_key_values", 7), ("inputs_embeds", IDS)]

@pytest.mark.parametrize(("name", "value"), GENERATE, ids=str)
def test_an_argument_of_generate_that_cannot_work_is_named(model, name, value):
    refuses(name, model.generate, IDS, use_mtp=True, **{name: value})

@pytest.mark.parametrize("ids", [[1, 2], "text", None, IDS[0], IDS[:0], IDS[:, :0], IDS.float(), IDS + VOCAB], ids=str)
def test_a_prompt_that_cannot_work_is_named(model, ids):
    refuses("input_ids", model.generate, ids)

def test_a_cache_that_leaves_nothing_to_read_is_named(model):
    cache = model(IDS, use_cache=True).past_key_values
    refuses(f"past_key_values holds {IDS.shape[1]} tokens", model.generate, IDS, past_key_values=cache)

@pytest.mark.parametrize("use_mtp", [False, True])
def test_a_prompt_of_short_integers_is_one_too(model, use_mtp):
    found = model.generate(IDS.int(), max_new_tokens=6, use_mtp=use_mtp)
    assert torch.equal(found, model.generate(IDS, max_new_tokens=6))

def test_a_broken_model_is_not_sampled_from():
    model = build()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    refuses("logits", model.generate, IDS, do_sample=True)

# ---- Loading and saving ----

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("good")
    build(eos_token_id=None).save_pretrained(path)
    return path

LOAD = [("num_hidden_layers", value) for value in ("2", 2.0, True, 0, -1, 4, HUGE)]
LOAD += [("dtype", value) for value in ("float8_e4m3fn", "int8", 16, torch.int8, deepseek_v3.FP8)]
LOAD += [("device_map", value) for value in ("nowhere", 99, -1, 1.5, [], "cuda:99", {"": "nowhere"}, {}, {5: "cpu"})]
LOAD += [("device_map", {"model.layers.9": "cpu"}), ("device_map", "mps"), ("device_map", "disk")]
LOAD += [("max_memory", value) for value in ({0: "many"}, {"cpu": None}, {"cpu": HUGE}, {"cpu": -1}, "8GB")]
LOAD += [("hidden_size", "32")]

@pytest.mark.parametrize(("name", "value"), LOAD, ids=lambda x: str(x)[:20])
def test_an_argument_of_from_pretrained_that_cannot_work_is_named(folder, name, value):
    options = {"device_map": "auto"} if name == "max_memory" else {}
    refuses(name, DeepseekV3ForCausalLM.from_pretrained, folder, **options | {name: value})

OTHERS = {"torch_dtype": torch.bfloat16, "device": "cuda", "token": "hf_x", "load_in_8bit": True}

@pytest.mark.parametrize("name", [*OTHERS, "trust_remote_code", "hiden_size"])
def test_a_keyword_that_is_no_argument_is_named(folder, name):
    hints = {"torch_dtype": "use dtype", "device": "use device_map", "token": "nothing is downloaded"}
    hint = (hints | {"trust_remote_code": "no code of the folder runs"}).get(name, "no argument")
    for cls in (DeepseekV3ForCausalLM, DeepseekV3Model, DeepseekV3Config):
        given = {name: OTHERS.get(name, 8)}
        refuses(f"from_pretrained({name}=…): {hint}", cls.from_pretrained, folder, **given)

@pytest.mark.parametrize("directory", [None, 5, b"folder", ["folder"], ""], ids=str)
def test_what_is_no_folder_is_named(directory):
    for cls in (DeepseekV3ForCausalLM, DeepseekV3Config, DeepseekV3Model):
        refuses("directory", cls.from_pretrained, directory)
    refuses("directory", build().save_pretrained, directory)
    refuses("directory", build().config.save_pretrained, directory)

@pytest.mark.parametrize("name", ["nowhere", "x" * 5000, "nul\0", "config.json/deeper", "../nowhere"])
def test_a_folder_that_is_not_there_is_named(folder, name):
    for cls in (DeepseekV3ForCausalLM, DeepseekV3Config):
        with pytest.raises(FileNotFoundError, match=re.escape(name)):
            cls.from_pretrained(folder / name)

SAVE = [("max_shard_size", value) for value in (HUGE, "9" * 400 + "GB", math.nan, [5], "5 apples")]
SAVE += [("quantize", value) for value in ("int8", True, ["fp8"], torch.float8_e4m3fn)]

@pytest.mark.parametrize(("name", "value"), SAVE, ids=lambda x: str(x)[:20])
def test_an_argument_of_save_pretrained_that_cannot_work_is_named(tmp_path, name, value):
    refuses(name, build().save_pretrained, tmp_path / "new", **{name: value})
    assert not list(tmp_path.iterdir())

def test_what_fp8_cannot_hold_is_named_and_the_older_checkpoint_stays(tmp_path):
    older, model = build(seed=1), build(seed=2)
    older.save_pretrained(tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.up_proj[3, 0, 0] = math.nan
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    refuses(name, model.save_pretrained, tmp_path, quantize="fp8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(DeepseekV3ForCausalLM.from_pretrained(tmp_path)(IDS).logits, older(IDS).logits)

def test_a_model_without_numbers_is_not_saved(tmp_path):
    refuses("meta", build().to("meta").save_pretrained, tmp_path / "new")
    assert not list(tmp_path.iterdir())

# ---- Commands ----

@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Files that the commands below are pointed at."""
    root = tmp_path_factory.mktemp("commands")
    (root / "text").mkdir()
    (root / "text/a.txt").write_text("some text, some more text\n" * 400)
    (root / "empty").mkdir()
    (root / "bytes.txt").write_bytes(b"\xff\xfe\x00bad")
    (root / "broken.json").write_text("{")
    (root / "odd.json").write_text(json.dumps({"hidden_size": "wide"}))
    (root / "moonlight.json").write_text(json.dumps(MOONLIGHT))
    (root / "huge.json").write_text(json.dumps(V3 | {"num_hidden_layers": 10**9}))
    (root / "v3.json").write_text(json.dumps(V3 | {"hidden_size": 700_000}))
    build().save_pretrained(root / "no_tokenizer")
    build().save_pretrained(root / "odd_tokenizer")
    (root / "odd_tokenizer/tokenizer.json").write_text('{"model": 5}')
    tokenizer = deepseek_v3.train_tokenizer([root / "text/a.txt"], 258)
    build(vocab_size=258).save_pretrained(root / "model")
    tokenizer.save(str(root / "model/tokenizer.json"))
    return root

COMMANDS = [
    ("", "required"), ("fly", "fly"), ("generate", "directory"), ("generate nowhere hi", "nowhere"),
    ("generate {root}/broken.json hi", "broken.json"), ("generate {root}/empty hi", "empty"),
    ("generate {root}/no_tokenizer hi", "tokenizer.json"),
    ("generate {root}/odd_tokenizer hi", "tokenizer.json"),
    ("generate {root}/model hi --max-new-tokens -1", "--max-new-tokens: -1"),
    ("generate {root}/model hi --max-new-tokens many", "--max-new-tokens"),
    ("generate {root}/model hi --temperature nan", "--temperature: nan"),
    ("generate {root}/model hi --seed 1" + "0" * 30, "--seed"),
    ("generate {root}/model hi --draft-tokens 0 --mtp", "draft"),
    ("generate {root}/model hi --draft-tokens 2", "draft"),
    ("generate {root}/model hi --chat", "chat template"), ("info nowhere", "nowhere"),
    ("info {root}/broken.json", "broken.json"), ("info {root}/odd.json", "hidden_size='wide'"),
    ("info {root}/huge.json", "num_hidden_layers"),
    ("info {root}/moonlight.json --gpus 1000 --gpu-memory 1", "one layer takes"),
    ("info {root}/model --gpus 0", "--gpus: 0"), ("info {root}/model --gpus 1000000000", "--gpus"),
    ("info {root}/model --gpus 2 --gpu-memory nan", "--gpu-memory: nan"),
    ("info {root}/model --gpus 2 --gpu-memory 0", "--gpu-memory: 0"), ("train --data {root}/empty", "empty"),
    ("train --data nowhere", "nowhere"),
    ("train --data {root}/bytes.txt --vocab-size 270", "bytes.txt: not UTF-8"),
    ("train --steps 0", "--steps: 0"), ("train --length 3", "--length: 3"),
    ("train --batch 1000000000000", "--batch"), ("train --warmup nan", "--warmup: nan"),
    ("train --gamma nan", "--gamma: nan"), ("train --batch-ramp 0.5", "--batch-ramp"), ("train --fp8", "--fp8"),
    ("train --batch -4", "--batch: -4: must be in 1"),
    ("train --batch 4 --accumulate 3", "--batch 4: must be a multiple of 3"),
    ("train --vocab-size 100", "--vocab-size: 100"), ("train --lr inf", "--lr: inf"),
    ("train --vocab-size 1" + "0" * 30, "--vocab-size"), ("train --keep 0", "--keep: 0"),
    ("train --device nowhere", "--device"), ("train --device cuda:99", "--device"),
    ("train --config {root}/broken.json", "broken.json"),
    ("train --config {root}/huge.json", "num_hidden_layers"), ("train --config nowhere.json", "nowhere.json"),
]

@pytest.mark.parametrize(("words", "culprit"), COMMANDS, ids=[words or "nothing" for words, _ in COMMANDS])
def test_a_command_that_cannot_work_says_so_in_one_line(places, tmp_path, capsys, monkeypatch, words, culprit):
    monkeypatch.chdir(tmp_path)
    words = words.format(root=places).split()
    if words[:1] == ["train"] and "--data" not in words:
        words += ["--data", str(places / "text")]
    before = sorted(places.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        deepseek_v3.main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and culprit in error, error
    assert len(error.splitlines()) == 1, error
    assert not list(tmp_path.iterdir()) and sorted(places.rglob("*")) == before

def test_a_model_too_large_to_train_is_not_begun(places, tmp_path, capsys):
    words = ["train", "--config", places / "v3.json", "--data", places / "text", "--out", tmp_path]
    with pytest.raises(SystemExit) as stop:
        deepseek_v3.main([*map(str, words), "--length", "8", "--batch", "2"])
    assert stop.value.code == 2 and "GiB" in capsys.readouterr().err.splitlines()[-1]
