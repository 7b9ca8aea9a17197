"""Checkpoints: the released layout, bit for bit, slices of deep ones, and what a save leaves in a folder."""

import json
import os
import re
import warnings

import pytest
import torch
from checkpoints import INDEX, released_layout
from checkpoints import read as stored
from helpers import build, router_biases, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3Model

L, E, VOCAB, D = 3, 12, 61, 32  # of the small model

def load(directory, **more):
    """A model, and no warning on the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return DeepseekV3ForCausalLM.from_pretrained(directory, **more)

def weight_map(directory):
    return json.loads((directory / INDEX).read_text())["weight_map"]

def assert_same(first, second):
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name

# ---- There and back ----

CHANGES = [{"q_lora_rank": None}, {"attention_bias": True}, {"n_shared_experts": None}]
CHANGES += [{"first_k_dense_replace": 9}, {"first_k_dense_replace": 0}]

@pytest.mark.parametrize(
    ("changes", "dtype", "size"),
    [*((changes, torch.float32, "5GB") for changes in CHANGES),
     ({"num_nextn_predict_layers": 0}, torch.bfloat16, "40KB"),
     ({"num_nextn_predict_layers": 2}, torch.bfloat16, "5GB"), ({}, torch.float32, 1)],
    ids=str,
)  # fmt: skip
def test_what_is_saved_comes_back_bit_for_bit(changes, dtype, size, tmp_path):
    model = build(dtype=dtype, **changes)
    model.save_pretrained(tmp_path, max_shard_size=size)
    again = load(tmp_path)
    assert_same(again, model)
    assert not again.training
    assert (tmp_path / INDEX).exists() == (size != "5GB")
    assert torch.equal(again(tokens(1, 5)).logits, model(tokens(1, 5)).logits)

def test_the_trunk_alone_comes_back(tmp_path):
    model = build(DeepseekV3Model, num_nextn_predict_layers=0)
    model.save_pretrained(tmp_path)
    assert_same(DeepseekV3Model.from_pretrained(tmp_path), model)

def test_a_loaded_model_trains(tmp_path):
    build().save_pretrained(tmp_path)
    model = load(tmp_path).train()
    model(tokens(2, 6), labels=tokens(2, 6)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.update_router_bias(0.01)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dtype_is_for_weights_and_not_for_the_bias(dtype, tmp_path):
    model = build(dtype=torch.bfloat16 if dtype == torch.float32 else torch.float32)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    for old, new in zip(router_biases(model), router_biases(again), strict=True):
        assert new.dtype == torch.float32
        assert torch.equal(old, new)

def test_a_bfloat16_bias_is_read_as_float32_and_experts_in_two_dtypes_as_the_wider(tmp_path):
    """Moonlight's repository is bfloat16 throughout."""
    build(dtype=torch.bfloat16).save_pretrained(tmp_path)
    file, expert = tmp_path / "model.safetensors", "model.layers.1.mlp.experts.0.up_proj.weight"
    held = {name: t.bfloat16() for name, t in load_file(file).items()}
    save_file(held | {expert: held[expert].float()}, file)
    model = load(tmp_path)
    assert {bias.dtype for bias in router_biases(model)} == {torch.float32}
    experts = model.model.layers[1].mlp.experts
    assert (experts.up_proj.dtype, experts.gate_proj.dtype) == (torch.float32, torch.bfloat16)

# ---- The released layout ----

SIZES = {7168: D, 14336: 2 * D, 1536: 17, 24576: 3 * (6 + 8), 576: 11 + 8, 512: 11, 32768: 3 * (6 + 5)}
SIZES |= {16384: 3 * 5, 18432: 48, 2048: 16, 256: E, 129280: VOCAB}  # of the released model, and of the small one

def small_layout(layers, depths):
    """Names and shapes of a checkpoint as published, at the sizes of the small model."""
    names, mtp = {}, f"model.layers.{layers}."
    for name, (_, shape) in released_layout(layers).items():
        expert = re.search(r"experts\.([0-9]+)", name)
        if not name.endswith("_scale_inv") and (not expert or int(expert[1]) < E):
            for depth in range(depths) if name.startswith(mtp) else [0]:
                deeper = name.replace(mtp, f"model.layers.{layers + depth}.")
                names[deeper] = tuple(SIZES[size] for size in shape)
    return names

@pytest.mark.parametrize(("layers", "depths", "size"), [(3, 0, "30KB"), (4, 1, "5GB"), (5, 2, "30KB")])
def test_names_and_shapes_are_the_released_ones(layers, depths, size, tmp_path):
    """MTP stands at layer num_hidden_layers, 61 in the released model and any other number here."""
    model = build(num_hidden_layers=layers, num_nextn_predict_layers=depths, first_k_dense_replace=3)
    model.save_pretrained(tmp_path, max_shard_size=size)
    found = {name: tuple(tensor.shape) for name, tensor in stored(tmp_path).items()}
    assert found == small_layout(layers, depths)

def test_experts_are_stored_apart_mtp_repeats_embedding_and_head_and_biases_are_float32(tmp_path):
    model = build(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    held, experts = stored(tmp_path), model.model.layers[1].mlp.experts
    for e in range(E):
        for part in ("gate_proj", "up_proj", "down_proj"):
            assert torch.equal(held[f"model.layers.1.mlp.experts.{e}.{part}.weight"], getattr(experts, part)[e])
    assert torch.equal(held[f"model.layers.{L}.embed_tokens.weight"], held["model.embed_tokens.weight"])
    assert torch.equal(held[f"model.layers.{L}.shared_head.head.weight"], held["lm_head.weight"])
    for name, tensor in held.items():
        is_bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if is_bias else torch.bfloat16), name

@pytest.mark.parametrize("size", ["0.02MB", "20 kb", "19.53125KiB", 20_000, "20000"])
def test_shards_keep_to_their_size_and_the_index_tells_where_and_how_much(tmp_path, size):
    build().save_pretrained(tmp_path, max_shard_size=size)
    files = sorted(tmp_path.glob("*.safetensors"))
    names = [f"model-{i:05d}-of-{len(files):06d}.safetensors" for i in range(1, len(files) + 1)]
    assert [file.name for file in files] == names  # as in the released repository
    where, total = {}, 0
    for file in files:
        held = load_file(file)
        size = sum(tensor.nbytes for tensor in held.values())
        assert size <= 20_000 or len(held) == 1
        total += size
        where |= dict.fromkeys(held, file.name)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"] == where
    assert index["metadata"]["total_size"] == total

# ---- The first few layers of a deep checkpoint ----

@pytest.mark.parametrize(
    ("kept", "depths", "asked"), [(1, 2, 1), (2, 1, None), (2, 2, 0), (4, 2, 2), (5, 2, 1)]
)
def test_a_slice_is_the_first_layers_and_opens_only_the_shards_that_it_needs(kept, depths, asked, tmp_path):
    deep = build(num_hidden_layers=5, num_nextn_predict_layers=depths, first_k_dense_replace=2)
    deep.save_pretrained(tmp_path, max_shard_size="10KB")
    skipped = tuple(f"model.layers.{i}." for i in range(kept, 5))
    needed = {file for name, file in weight_map(tmp_path).items() if not name.startswith(skipped)}
    for file in tmp_path.glob("*.safetensors"):
        if file.name not in needed:
            file.unlink()
    asked, more = (depths, {}) if asked is None else (asked, {"num_nextn_predict_layers": asked})
    model = load(tmp_path, num_hidden_layers=kept, **more)
    assert model.config.num_hidden_layers == kept
    blocks = [*deep.model.layers[:kept], *deep.model.layers[5 : 5 + asked]]
    for theirs, ours in zip(blocks, model.model.layers, strict=True):
        assert_same(ours, theirs)
    model.save_pretrained(tmp_path / "slice")
    assert_same(load(tmp_path / "slice"), model)

# ---- MTP modules that are or are not there ----

@pytest.mark.parametrize(("held", "announced"), [(0, 1), (1, 2)])
def test_a_config_that_announces_absent_mtp_modules_warns(tmp_path, held, announced):
    model = build(num_nextn_predict_layers=held)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": announced}))
    with pytest.warns(UserWarning, match=f"announces {announced} MTP modules, but holds {held}"):
        again = DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    assert_same(again, model)
    assert (again.config.num_nextn_predict_layers, len(again.model.layers)) == (held, L + held)
    assert (again(tokens(1, 4), labels=tokens(1, 4)).mtp_logits is None) == (held == 0)

def test_copies_may_be_missing_and_an_old_buffer_of_frequencies_is_no_stranger(tmp_path):
    """Older tools wrote rotary frequencies along; they follow from the config."""
    model, file = build(), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    copies = {f"model.layers.{L}.{copy}.weight" for copy in ("embed_tokens", "shared_head.head")}
    held = {name: tensor for name, tensor in load_file(file).items() if name not in copies}
    save_file(held | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file)
    assert_same(load(tmp_path), model)

# ---- Saving over an older checkpoint ----

MANY, SOME, ONE = "10KB", "60KB", "5GB"

def test_a_folder_holds_one_checkpoint_and_what_is_not_of_it(tmp_path):
    """Each kind of save over each kind, and files that only look like a checkpoint's stay as they are."""
    build(seed=9).save_pretrained(tmp_path / "other", max_shard_size=SOME)
    shard = sorted((tmp_path / "other").glob("model-*"))[0].name  # as another save could call its own
    foreign = {"model_ema.safetensors", "model-lora.safetensors", "notes.txt", "tokenizer.json", shard}
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in foreign:
        (folder / name).write_text(name)
    for seed, size in enumerate([ONE, ONE, SOME, SOME, MANY, MANY, ONE, MANY, SOME, ONE]):
        model = build(seed=seed, num_hidden_layers=2 + seed % 2)
        model.save_pretrained(folder, max_shard_size=size, quantize="fp8" if seed % 3 == 1 else None)
        shards = {"model.safetensors"} if size == ONE else {INDEX, *weight_map(folder).values()}
        assert {path.name for path in folder.iterdir()} == foreign | {"config.json"} | shards
        assert all((folder / name).read_text() == name for name in foreign)
        again = load(folder, dtype=torch.float32)
        if seed % 3 == 1:
            assert torch.equal(again.lm_head.weight, model.lm_head.weight)  # which is not in FP8
        else:
            assert_same(again, model)

@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)], ids=oct)
def test_files_have_the_permissions_of_the_umask(tmp_path, umask, mode):
    before, model = os.umask(umask), build()
    model.tokenizer_files, model.generation_config.eos_token_id = {"tokenizer.json": b"{}"}, 1
    try:
        for size in (ONE, SOME):
            model.save_pretrained(tmp_path, max_shard_size=size)
            assert len(list(tmp_path.glob("*.json"))) >= 3
            assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}
    finally:
        os.umask(before)

def test_saving_again_writes_the_same(tmp_path):
    """And notes that it holds PyTorch tensors: other libraries refuse a file without that."""
    build().save_pretrained(tmp_path / "a")
    load(tmp_path / "a").save_pretrained(tmp_path / "b")
    once, again = (safe_open(tmp_path / f / "model.safetensors", framework="pt") for f in "ab")
    assert once.metadata() == again.metadata() and list(once.keys()) == list(again.keys())
    assert once.metadata()["format"] == "pt"
    assert all(torch.equal(once.get_tensor(name), again.get_tensor(name)) for name in list(once.keys()))
    first, second = (json.loads((tmp_path / f / "config.json").read_text()) for f in "ab")
    assert first == second
