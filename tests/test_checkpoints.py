"""Checkpoints: the released layout, bit for bit, and every broken folder refused by name."""

import json
import os
import shutil
import warnings

import pytest
import torch
from helpers import build, router_biases, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import deepseek_v3
from deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3Model

INDEX = "model.safetensors.index.json"
L, E, VOCAB, D = 3, 12, 61, 32  # of the small model


def load(directory, **more):
    """A model, and no warning on the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return DeepseekV3ForCausalLM.from_pretrained(directory, **more)


def weight_map(directory):
    return json.loads((directory / INDEX).read_text())["weight_map"]


def stored(directory):
    """All tensors of a folder by name, read without the project's code."""
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same(first, second):
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


# ---- There and back ----


@pytest.mark.parametrize("size", ["5GB", "40KB", 1], ids=["one file", "shards", "a file a tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("depths", [0, 1, 2])
def test_what_is_saved_comes_back_bit_for_bit(depths, dtype, size, tmp_path):
    model = build(num_nextn_predict_layers=depths, dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size=size)
    again = load(tmp_path)
    assert_same(again, model)
    assert not again.training
    assert (tmp_path / INDEX).exists() == (size != "5GB")
    assert torch.equal(again(tokens(1, 5)).logits, model(tokens(1, 5)).logits)


@pytest.mark.parametrize("changes", [{"q_lora_rank": None}, {"attention_bias": True},
    {"n_shared_experts": None}, {"first_k_dense_replace": 9}, {"first_k_dense_replace": 0},
])  # fmt: skip
def test_variants_come_back_too(changes, tmp_path):
    model = build(**changes)
    model.save_pretrained(tmp_path)
    assert_same(load(tmp_path), model)


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


def test_a_bfloat16_bias_is_read_as_float32(tmp_path):
    """Moonlight's repository is bfloat16 throughout."""
    build(dtype=torch.bfloat16).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(file).items()}, file)
    assert {bias.dtype for bias in router_biases(load(tmp_path))} == {torch.float32}


def test_overrides_win_over_the_stored_config(tmp_path):
    build().save_pretrained(tmp_path)
    assert load(tmp_path, mtp_loss_weight=0.1).config.mtp_loss_weight == 0.1


# ---- The released layout ----


def released_layout(layers, depths, dense=1):
    """Names and shapes of a checkpoint, as published, at the sizes of the small model."""
    H, N, R, V, C, Q, F, F_expert = 3, 6, 8, 5, 11, 17, 48, 16
    attention = {
        "q_a_proj": (Q, D),
        "q_a_layernorm": (Q,),
        "q_b_proj": (H * (N + R), Q),
        "kv_a_proj_with_mqa": (C + R, D),
        "kv_a_layernorm": (C,),
        "kv_b_proj": (H * (N + V), C),
        "o_proj": (D, H * V),
    }
    names = {"model.embed_tokens.weight": (VOCAB, D), "model.norm.weight": (D,)}
    names["lm_head.weight"] = (VOCAB, D)
    for i in range(layers + depths):
        layer = f"model.layers.{i}"
        names |= {f"{layer}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        names[f"{layer}.input_layernorm.weight"] = (D,)
        names[f"{layer}.post_attention_layernorm.weight"] = (D,)
        swiglus = {"mlp": F}
        if i >= dense:
            swiglus = {f"mlp.experts.{e}": F_expert for e in range(E)}
            swiglus["mlp.shared_experts"] = F_expert
            names[f"{layer}.mlp.gate.weight"] = (E, D)
            names[f"{layer}.mlp.gate.e_score_correction_bias"] = (E,)
        for part, width in swiglus.items():
            names[f"{layer}.{part}.gate_proj.weight"] = (width, D)
            names[f"{layer}.{part}.up_proj.weight"] = (width, D)
            names[f"{layer}.{part}.down_proj.weight"] = (D, width)
        if i >= layers:
            names[f"{layer}.embed_tokens.weight"] = (VOCAB, D)
            names[f"{layer}.enorm.weight"] = (D,)
            names[f"{layer}.hnorm.weight"] = (D,)
            names[f"{layer}.eh_proj.weight"] = (D, 2 * D)
            names[f"{layer}.shared_head.norm.weight"] = (D,)
            names[f"{layer}.shared_head.head.weight"] = (VOCAB, D)
    return names


@pytest.mark.parametrize("size", ["5GB", "30KB"])
@pytest.mark.parametrize(("layers", "depths"), [(2, 1), (3, 0), (5, 1), (5, 2)])
def test_names_and_shapes_are_the_released_ones(layers, depths, size, tmp_path):
    """MTP stands at layer num_hidden_layers, 61 in the released model and any other number here."""
    model = build(num_hidden_layers=layers, num_nextn_predict_layers=depths)
    model.save_pretrained(tmp_path, max_shard_size=size)
    found = {name: tuple(tensor.shape) for name, tensor in stored(tmp_path).items()}
    assert found == released_layout(layers, depths)


def test_each_expert_is_stored_apart(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    held, experts = stored(tmp_path), model.model.layers[1].mlp.experts
    for e in range(E):
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.1.mlp.experts.{e}.{part}.weight"
            assert torch.equal(held[name], getattr(experts, part)[e])


def test_mtp_repeats_embedding_and_head(tmp_path):
    build().save_pretrained(tmp_path)
    held = stored(tmp_path)
    embedding, head = held["model.embed_tokens.weight"], held["lm_head.weight"]
    assert torch.equal(held[f"model.layers.{L}.embed_tokens.weight"], embedding)
    assert torch.equal(held[f"model.layers.{L}.shared_head.head.weight"], head)


def test_the_bias_is_float32_in_a_bfloat16_file(tmp_path):
    build(dtype=torch.bfloat16).save_pretrained(tmp_path)
    for name, tensor in stored(tmp_path).items():
        is_bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if is_bias else torch.bfloat16), name


def test_shards_keep_to_their_size_and_the_index_tells_where_and_how_much(tmp_path):
    build().save_pretrained(tmp_path, max_shard_size="20KB")
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


@pytest.mark.parametrize("size", ["0", "-5GB", "5XB", "", "nan", None])
def test_a_shard_size_that_is_none_is_named(size, tmp_path):
    with pytest.raises(ValueError, match=f"max_shard_size={size!r}"):
        build().save_pretrained(tmp_path, max_shard_size=size)
    assert not list(tmp_path.iterdir())


# ---- The first few layers of a deep checkpoint ----


@pytest.mark.parametrize("depths", [0, 1, 2])
@pytest.mark.parametrize("kept", [1, 2, 4, 5])
def test_a_slice_opens_only_the_shards_that_it_needs(kept, depths, tmp_path):
    deep = build(num_hidden_layers=5, num_nextn_predict_layers=depths)
    deep.save_pretrained(tmp_path, max_shard_size="10KB")
    skipped = tuple(f"model.layers.{i}." for i in range(kept, 5))
    needed = {file for name, file in weight_map(tmp_path).items() if not name.startswith(skipped)}
    for file in tmp_path.glob("*.safetensors"):
        if file.name not in needed:
            file.unlink()
    model = load(tmp_path, num_hidden_layers=kept)
    assert model.config.num_hidden_layers == kept
    assert len(model.model.layers) == kept + depths
    theirs = deep.state_dict()
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[1] == "layers" and int(parts[2]) >= kept:  # an MTP module has moved down
            parts[2] = str(int(parts[2]) + 5 - kept)
        assert torch.equal(tensor, theirs[".".join(parts)]), name


def test_a_slice_can_be_saved_and_read(tmp_path):
    build(num_hidden_layers=5).save_pretrained(tmp_path / "deep")
    model = load(tmp_path / "deep", num_hidden_layers=2)
    model.save_pretrained(tmp_path / "slice")
    assert_same(load(tmp_path / "slice"), model)
    assert stored(tmp_path / "slice").keys() == released_layout(2, 1).keys()


@pytest.mark.parametrize("layers", [0, -1, 4])
def test_more_layers_than_there_are_is_refused(layers, tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"num_hidden_layers={layers}"):
        load(tmp_path, num_hidden_layers=layers)


# ---- MTP modules that are or are not there ----


def test_a_config_that_announces_absent_mtp_modules_warns(tmp_path):
    build(num_nextn_predict_layers=0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    with pytest.warns(UserWarning, match="MTP"):
        model = DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    assert model.config.num_nextn_predict_layers == 0
    assert len(model.model.layers) == L
    assert model(tokens(1, 4), labels=tokens(1, 4)).mtp_logits is None


@pytest.mark.parametrize("depths", [1, 2])
def test_mtp_modules_can_be_left_out(depths, tmp_path):
    build(num_nextn_predict_layers=depths).save_pretrained(tmp_path)
    assert len(load(tmp_path, num_nextn_predict_layers=0).model.layers) == L


@pytest.mark.parametrize("copy", ["embed_tokens", "shared_head.head"])
def test_a_copy_that_differs_is_named(copy, tmp_path):
    build().save_pretrained(tmp_path)
    name = f"model.layers.{L}.{copy}.weight"
    edit(tmp_path, lambda held: held[name].add_(1))
    with pytest.raises(ValueError, match=name):
        load(tmp_path)


def test_copies_may_be_missing(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda held: [held.pop(f"model.layers.{L}.{copy}.weight")
                                 for copy in ("embed_tokens", "shared_head.head")])  # fmt: skip
    assert_same(load(tmp_path), model)


# ---- Broken folders ----


def edit(directory, change):
    """Rewrite the single file of a checkpoint after a change to its dict of tensors."""
    file = directory / "model.safetensors"
    held = load_file(file)
    change(held)
    save_file(held, file)


SOME_TENSORS = [
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.experts.11.down_proj.weight",
    "model.layers.2.mlp.gate.e_score_correction_bias",
    "model.layers.3.eh_proj.weight",
    "model.layers.3.shared_head.norm.weight",
]


@pytest.mark.parametrize("name", SOME_TENSORS)
def test_a_missing_tensor_is_named(name, tmp_path):
    build().save_pretrained(tmp_path)
    edit(tmp_path, lambda held: held.pop(name))
    with pytest.raises(ValueError, match=name):
        load(tmp_path)


@pytest.mark.parametrize("name", SOME_TENSORS)
def test_a_tensor_of_another_shape_is_named_with_both(name, tmp_path):
    build().save_pretrained(tmp_path)
    right = tuple(stored(tmp_path)[name].shape)
    wrong = (*right[:-1], right[-1] + 1)
    edit(tmp_path, lambda held: held.update({name: torch.zeros(wrong)}))
    with pytest.raises(ValueError, match=name) as error:
        load(tmp_path)
    assert str(right) in str(error.value)
    assert str(wrong) in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.12.up_proj.weight",  # one expert too many
        "model.layers.0.mlp.gate.weight",  # a router in a dense layer
        "model.layers.4.input_layernorm.weight",  # behind the MTP module
        "model.layers.30.input_layernorm.weight",
        "lm_head.bias",
        "something.else",
    ],
)
def test_an_unexpected_tensor_is_named(name, tmp_path):
    build().save_pretrained(tmp_path)
    edit(tmp_path, lambda held: held.update({name: torch.zeros(3)}))
    with pytest.raises(ValueError, match=name):
        load(tmp_path)


def sharded(directory):
    """A checkpoint of several files; one of them."""
    build().save_pretrained(directory, max_shard_size="40KB")
    return sorted(directory.glob("*.safetensors"))[1]


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_shard_is_named(keep, tmp_path):
    shard = sharded(tmp_path)
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ValueError, match=shard.name):
        load(tmp_path)


def test_a_file_that_is_no_safetensors_is_named(tmp_path):
    build().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    shard = sharded(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load(tmp_path)


def change_index(directory, **entries):
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] |= entries
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "place",
    ["../outside.safetensors", "{root}/outside.safetensors", "a/../../outside.safetensors",
     "/dev/zero", "..", "", 3, None, ["model.safetensors"]],
    ids=str,
)  # fmt: skip
def test_an_index_cannot_point_outside_its_folder(place, tmp_path):
    folder = tmp_path / "checkpoint"
    shard = sharded(folder)
    shutil.copy(shard, tmp_path / "outside.safetensors")
    (folder / "a").mkdir()
    place = place.format(root=tmp_path) if isinstance(place, str) else place
    moved = [name for name, file in weight_map(folder).items() if file == shard.name]
    change_index(folder, **dict.fromkeys(moved, place))
    with pytest.raises(ValueError, match=INDEX.replace(".", r"\.")):
        load(folder)


def test_a_tensor_that_is_not_where_the_index_says_is_named(tmp_path):
    shard = sharded(tmp_path)
    name = next(name for name, file in weight_map(tmp_path).items() if file != shard.name)
    change_index(tmp_path, **{name: shard.name})
    with pytest.raises(ValueError, match=name):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore:.*MTP")  # an index without tensors has none of MTP either
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_broken_index_is_refused(content, tmp_path):
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"index\.json|missing"):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "pickle", ["pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json"]
)
def test_a_folder_of_pickles_is_refused(pickle, tmp_path):
    build().config.save_pretrained(tmp_path)
    torch.save({}, tmp_path / pickle)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no model.safetensors"):
        load(tmp_path)


def test_an_old_buffer_of_frequencies_is_no_stranger(tmp_path):
    """Older tools wrote rotary frequencies along; they follow from the config."""
    model = build()
    model.save_pretrained(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(tmp_path, lambda held: held.update({name: torch.ones(4)}))
    assert_same(load(tmp_path), model)


# ---- Saving over an older checkpoint ----

MANY, SOME, ONE = "10KB", "60KB", "5GB"


@pytest.mark.parametrize("second", [MANY, SOME, ONE])
@pytest.mark.parametrize("first", [MANY, SOME, ONE])
def test_saving_replaces_the_older_checkpoint_and_leaves_no_stale_file(first, second, tmp_path):
    build(seed=1).save_pretrained(tmp_path, max_shard_size=first)
    (tmp_path / "tokenizer.json").write_text("{}")
    model = build(seed=2, num_hidden_layers=2)
    model.save_pretrained(tmp_path, max_shard_size=second)
    assert_same(load(tmp_path), model)
    shards = {"model.safetensors"}
    if (tmp_path / INDEX).exists():
        shards = {INDEX, *weight_map(tmp_path).values()}
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"config.json", "tokenizer.json", *shards}


@pytest.mark.parametrize("size", [SOME, ONE])
def test_a_crash_while_writing_leaves_the_older_checkpoint_whole(size, tmp_path, monkeypatch):
    older = build(seed=1)
    older.save_pretrained(tmp_path, max_shard_size=size)

    def full_disk(tensors, path, **more):
        if "00001" not in str(path):
            raise OSError("no space left on device")
        save_file(tensors, path, **more)

    monkeypatch.setattr(deepseek_v3, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        build(seed=2).save_pretrained(tmp_path, max_shard_size=size)
    assert_same(load(tmp_path), older)


@pytest.mark.parametrize("sizes", [(ONE, ONE), (SOME, SOME), (SOME, ONE), (ONE, SOME)], ids=str)
@pytest.mark.parametrize("calls", range(8))
def test_a_crash_at_any_moment_leaves_one_whole_checkpoint(calls, sizes, tmp_path, monkeypatch):
    """The process dies before its n-th change to the folder: the older or the newer is there."""
    older, newer = build(seed=1), build(seed=2)
    older.save_pretrained(tmp_path, max_shard_size=sizes[0])
    left = iter(range(calls))

    def dies(change):
        def limited(*args, **more):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return change(*args, **more)

        return limited

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for name in ("replace", "rename", "unlink", "remove"):
            patch.setattr(os, name, dies(getattr(os, name)))
        newer.save_pretrained(tmp_path, max_shard_size=sizes[1])
        raise KeyboardInterrupt  # fewer changes than calls: nothing to interrupt
    found = load(tmp_path)
    is_older = torch.equal(found.lm_head.weight, older.lm_head.weight)
    assert_same(found, older if is_older else newer)


def test_saving_again_writes_the_same(tmp_path):
    build().save_pretrained(tmp_path / "a")
    load(tmp_path / "a").save_pretrained(tmp_path / "b")
    once, again = (safe_open(tmp_path / f / "model.safetensors", framework="pt") for f in "ab")
    assert once.metadata() == again.metadata() and list(once.keys()) == list(again.keys())
    assert all(torch.equal(once.get_tensor(name), again.get_tensor(name)) for name in once.keys())
    first, second = (json.loads((tmp_path / f / "config.json").read_text()) for f in "ab")
    assert first == second


def test_the_file_says_that_it_holds_pytorch_tensors(tmp_path):
    """Other libraries refuse a file without this note."""
    build().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
