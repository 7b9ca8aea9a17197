"""Checkpoint folders: the released one in its exact layout, bad ones by name, and saves cut short."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
import torch
from checkpoints import INDEX, RAGGED, ragged, read, released_layout, write, write_sparse
from helpers import V3, build, tokens
from safetensors.torch import load_file, save_file

import deepseek_v3
from deepseek_v3 import DeepseekV3ForCausalLM

SINGLE = "model.safetensors"
load = DeepseekV3ForCausalLM.from_pretrained


def same(one, two):
    """Whether two models compute the same, bit for bit."""
    return torch.equal(one(tokens(1, 6)).logits, two(tokens(1, 6)).logits)


# ---- The released checkpoint, 688 GB of holes ----


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    write_sparse(folder, released_layout())
    yield folder
    shutil.rmtree(folder)


def test_the_layout_has_the_released_numbers(released):
    sizes = [path.stat().st_size for path in released.glob("*.safetensors")]
    weight_map = json.loads((released / INDEX).read_text())["weight_map"]
    assert len(weight_map) == 91_991
    headers = 0
    for path in released.glob("*.safetensors"):
        with open(path, "rb") as file:
            headers += 8 + int.from_bytes(file.read(8), "little")
    assert sum(sizes) - headers == 688_574_839_360


def coverage(folder):
    """Check every name and shape of a folder against the model that its config describes."""
    stored = deepseek_v3.Checkpoint(folder)
    config = deepseek_v3.DeepseekV3Config.from_pretrained(folder)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    sources = deepseek_v3.released_names(model, config.num_hidden_layers)
    deepseek_v3.check_coverage(model, stored, sources, config)
    return model, stored, sources


def test_every_name_and_shape_of_671b_is_checked_in_seconds(released, monkeypatch):
    monkeypatch.setattr(deepseek_v3.Checkpoint, "read", lambda self, name: torch.zeros(1))  # MTP's copies
    start = time.perf_counter()
    _, stored, sources = coverage(released)
    assert time.perf_counter() - start < 30
    names = [piece for pieces in sources.values() for piece in pieces]
    fp8 = sum(stored.find(name).dtype == deepseek_v3.FP8 for name in names)
    assert len(names) + fp8 + 2 == 91_991  # with a scale for each FP8 matrix, and MTP's two copies


SLICE = """
import json, resource, sys, torch
import deepseek_v3
opened, read_header = [], deepseek_v3.read_header
deepseek_v3.read_header = lambda path: (opened.append(path.name), read_header(path))[1]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
deepseek_v3.DeepseekV3ForCausalLM(deepseek_v3.DeepseekV3Config.tiny())
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
model = deepseek_v3.DeepseekV3ForCausalLM.from_pretrained(
    sys.argv[1], num_hidden_layers=1, num_nextn_predict_layers=0
)
held = sum(p.nbytes for p in model.parameters())
largest = max(p.nbytes for p in model.parameters())
print(json.dumps([peak() - before, held, largest, opened]))
"""


def test_a_slice_opens_its_shards_only_and_peaks_at_one_tensor_more(tmp_path):
    """Real widths but for the vocabulary, which would take 3.7 of the 4.3 GB."""
    tensors = {n: t for n, t in released_layout().items() if not n.startswith("model.layers.61.")}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = "BF16", (4096, 7168)
    write_sparse(tmp_path, tensors, V3 | {"vocab_size": 4096, "num_nextn_predict_layers": 1})
    run = subprocess.run(
        [sys.executable, "-c", SLICE, str(tmp_path)],
        capture_output=True, text=True, timeout=120, cwd=pathlib.Path(deepseek_v3.__file__).parent,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    peak, held, largest, opened = json.loads(run.stdout)
    assert held > 600_000_000
    assert held < peak < held + largest + 50_000_000, (peak, held, largest)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    needed = ("model.layers.0.", "model.embed", "model.norm", "lm_head")
    assert set(opened) == {file for name, file in weight_map.items() if name.startswith(needed)}


# ---- Slices ----


@pytest.mark.parametrize("kept", [1, 2, 3])
@pytest.mark.parametrize("mtp", [0, 1, 2])
def test_a_slice_is_the_first_layers_and_the_asked_for_mtp_modules(tmp_path, kept, mtp):
    whole = build(num_nextn_predict_layers=2, first_k_dense_replace=2)
    whole.save_pretrained(tmp_path)
    part = load(tmp_path, num_hidden_layers=kept, num_nextn_predict_layers=mtp)
    assert len(part.model.layers) == kept + mtp
    blocks = [*whole.model.layers[:kept], *whole.model.layers[3 : 3 + mtp]]
    for theirs, ours in zip(blocks, part.model.layers, strict=True):
        ours, theirs = ours.state_dict(), theirs.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    part.save_pretrained(tmp_path / "part")
    assert same(load(tmp_path / "part"), part)


@pytest.mark.parametrize("kept", [0, -1, 4])
def test_a_slice_must_lie_in_the_checkpoint(tmp_path, kept):
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"num_hidden_layers={kept}.*3"):
        load(tmp_path, num_hidden_layers=kept)


# ---- Bad folders: each error names the tensor or the file ----


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """An FP8 checkpoint in three shards; tests spoil a copy."""
    folder = tmp_path_factory.mktemp("good")
    ragged().save_pretrained(folder / "saved", quantize="fp8")
    config = json.loads((folder / "saved" / "config.json").read_text())
    return write(folder / "dealt", read(folder / "saved"), config, shards=3)


UP = "model.layers.1.mlp.experts.3.up_proj.weight"


def change(folder, name, tensor):
    """Put a tensor in place of another, or take it out of its shard and the index."""
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"].setdefault(name, "model-00001-of-000003.safetensors")
    tensors = load_file(folder / file)
    tensors.pop(name, None)
    if tensor is None:
        del index["weight_map"][name]
    else:
        tensors[name] = tensor
    save_file(tensors, folder / file)
    (folder / INDEX).write_text(json.dumps(index))


def shard_of(folder, name=UP):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit_index(folder, **entries):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= entries
    (folder / INDEX).write_text(json.dumps(index))


def edit_config(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def swap_entry(folder):
    """The index says that a tensor is in a shard where it is not."""
    other = "model-00001-of-000003.safetensors"
    edit_index(folder, **{UP: other if shard_of(folder).name != other else "model-00002-of-000003.safetensors"})


def forget_entry(folder):
    """A shard holds what the index does not know."""
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.layers.0.self_attn.o_proj.weight_scale_inv"]
    (folder / INDEX).write_text(json.dumps(index))


def hide_a_tensor(folder):
    """A shard holds one tensor more than the index knows."""
    tensors = load_file(shard_of(folder))
    save_file(tensors | {"hidden": torch.ones(2)}, shard_of(folder))


def truncate(folder):
    path = shard_of(folder)
    os.truncate(path, path.stat().st_size - 1)


def pickle_only(folder):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


def with_nan(folder):
    scale = load_file(shard_of(folder, UP + "_scale_inv"))[UP + "_scale_inv"].clone()
    scale[0, 0] = torch.nan
    change(folder, UP + "_scale_inv", scale)


BIAS, NORM = "model.layers.2.mlp.gate.e_score_correction_bias", "model.norm.weight"
BAD = {
    "missing tensor": (lambda d: change(d, UP, None), f"{UP}: missing"),
    "missing norm": (lambda d: change(d, NORM, None), f"{NORM}: missing"),
    "missing bias": (lambda d: change(d, BIAS, None), f"{BIAS}: missing"),
    "missing scale": (lambda d: change(d, UP + "_scale_inv", None), f"{UP}_scale_inv: missing"),
    "mis-shaped": (lambda d: change(d, NORM, torch.ones(7)), f"{NORM}: of shape (7,), must be (136,)"),
    "mis-shaped scale": (lambda d: change(d, UP + "_scale_inv", torch.ones(1, 2)), f"{UP}_scale_inv: of shape (1, 2)"),
    "scale of bytes": (lambda d: change(d, UP + "_scale_inv", torch.ones(2, 2, dtype=torch.uint8)), f"{UP}_scale_inv"),
    "integers": (lambda d: change(d, NORM, torch.ones(136, dtype=torch.int64)), NORM),
    "fp8 vector": (lambda d: change(d, NORM, torch.ones(136).to(torch.float8_e4m3fn)), NORM),
    "nan scale": (with_nan, f"{UP}_scale_inv"),
    "one expert unlike the others": (lambda d: change(d, UP, torch.ones(144, 136)), UP),
    "extra": (lambda d: change(d, "model.layers.0.mlp.gate.weight", torch.ones(2)), "layers.0.mlp.gate.weight: unexp"),
    "extra layer": (lambda d: change(d, "model.layers.9.x", torch.ones(2)), "model.layers.9.x: unexpected"),
    "extra scale": (lambda d: change(d, "lm_head.weight_scale_inv", torch.ones(1, 2)), "lm_head.weight_scale_inv"),
    "mtp copy differs": (
        lambda d: change(d, "model.layers.3.shared_head.head.weight", torch.ones(61, 136).bfloat16()),
        "model.layers.3.shared_head.head.weight",
    ),
    "truncated": (truncate, "safetensors"),
    "empty": (lambda d: shard_of(d).write_bytes(b""), "safetensors"),
    "garbage": (lambda d: shard_of(d).write_bytes(bytes(range(256)) * 99), "safetensors"),
    "huge header": (lambda d: shard_of(d).write_bytes(b"\xff" * 7 + b"\x7f" + b"{}" * 99), "safetensors"),
    "no shard": (lambda d: shard_of(d).unlink(), "safetensors"),
    "shard is a folder": (lambda d: (shard_of(d).unlink(), shard_of(d).mkdir()), "safetensors"),
    "path escape": (lambda d: edit_index(d, **{UP: "../dealt/model-00001-of-000003.safetensors"}), UP),
    "absolute path": (lambda d: edit_index(d, **{UP: "/etc/model.safetensors"}), UP),
    "not a file name": (lambda d: edit_index(d, **{UP: 3}), UP),
    "a pickle in the index": (lambda d: edit_index(d, **{UP: "pytorch_model.bin"}), "pytorch_model.bin"),
    "index places it elsewhere": (swap_entry, UP),
    "index forgets it": (forget_entry, "model.layers.0.self_attn.o_proj.weight_scale_inv"),
    "a shard holds more": (hide_a_tensor, "hidden"),
    "index is no object": (lambda d: (d / INDEX).write_text("[]"), INDEX),
    "index without map": (lambda d: (d / INDEX).write_text("{}"), INDEX),
    "index is garbage": (lambda d: (d / INDEX).write_bytes(b"\xff\x00"), INDEX),
    "pickle only": (pickle_only, "pickle"),
    "model type": (lambda d: edit_config(d, model_type="llama"), "model_type='llama'"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "other width": (lambda d: edit_config(d, moe_intermediate_size=128), "experts.0.down_proj.weight: of shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_named(good, tmp_path, case):
    spoil, named = BAD[case]
    folder = shutil.copytree(good, tmp_path / "spoilt")
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(folder)
    assert named in str(error.value)


def test_the_folder_that_is_spoilt_above_is_good(good):
    assert load(good).config.num_hidden_layers == 3


def test_all_is_checked_before_anything_is_read(good, tmp_path, monkeypatch):
    folder = shutil.copytree(good, tmp_path / "spoilt")
    change(folder, "model.norm.weight", None)
    monkeypatch.setattr(deepseek_v3.Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match="missing"):
        load(folder)


def test_the_error_lists_ten_and_counts_the_rest(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "spoilt")
    edit_config(folder, hidden_size=128)
    with pytest.raises(ValueError, match="and [0-9]+ more"):
        load(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, torch.float8_e4m3fn])
def test_a_dtype_that_cannot_work_is_refused(good, dtype):
    with pytest.raises(ValueError, match="dtype"):
        load(good, dtype=dtype)


def test_links_are_followed(good, tmp_path):
    """As in the cache of the Hugging Face hub, where each file links to a blob elsewhere."""
    for path in good.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert same(load(tmp_path), load(good))


def test_what_was_loaded_does_not_depend_on_its_files(tmp_path):
    ragged().save_pretrained(tmp_path)
    model, twin = load(tmp_path), load(tmp_path)
    before = model(tokens(1, 6)).logits
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(twin(tokens(1, 6)).logits, before)


# ---- Saving: whole or not at all ----


def old_and_new():
    """Two models whose configs differ too: mixing their files would not go unnoticed."""
    return build(seed=1), build(seed=2, routed_scaling_factor=1.5)


class Killed(BaseException):
    pass


def killed_at(step, monkeypatch):
    """Stop at the step-th change of a file: nothing runs after a kill, no clean-up either."""
    left = [step]

    def stop(function):
        def stopping(*args, **options):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*args, **options)

        return stopping

    for name in ("replace", "unlink", "write_text"):
        monkeypatch.setattr(pathlib.Path, name, stop(getattr(pathlib.Path, name)))
    monkeypatch.setattr(deepseek_v3, "save_file", stop(deepseek_v3.save_file))
    return left


@pytest.mark.parametrize("after", ["5GB", "300KB"])
@pytest.mark.parametrize("before", ["5GB", "300KB"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path, monkeypatch, before, after):
    old, new = old_and_new()
    seen, step = set(), 0
    while step is not None:
        folder = tmp_path / str(step)
        old.save_pretrained(folder, max_shard_size=before)
        with monkeypatch.context() as patch:
            left = killed_at(step, patch)
            try:
                new.save_pretrained(folder, max_shard_size=after)
            except Killed:
                pass
        found = load(folder)
        assert same(found, old) or same(found, new), f"step {step}"
        seen.add(same(found, new))
        new.save_pretrained(folder, max_shard_size=after)  # and the next save succeeds, and tidies up
        assert same(load(folder), new)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        step = step + 1 if left[0] < 0 else None
    assert seen == {False, True}


def test_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch):
    old, new = old_and_new()
    old.save_pretrained(tmp_path, max_shard_size="60KB")
    files = sorted(tmp_path.iterdir())
    count = []

    def full(tensors, path, metadata):
        count.append(path)
        if len(count) == 3:
            path.write_bytes(b"part of it")
            raise deepseek_v3.SafetensorError("No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(deepseek_v3, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        new.save_pretrained(tmp_path, max_shard_size="60KB")
    assert sorted(tmp_path.iterdir()) == files
    assert same(load(tmp_path), old)


@pytest.mark.parametrize("sizes", [("5GB", "60KB"), ("60KB", "5GB"), ("60KB", "40KB"), ("60KB", "60KB", "60KB")])
def test_a_folder_holds_one_checkpoint(tmp_path, sizes):
    for seed, size in enumerate(sizes):
        model = build(seed=seed)
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert same(load(tmp_path), model)
        shards = {path.name for path in tmp_path.glob("*.safetensors")}
        if size != "5GB":
            assert shards == set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())
        assert (tmp_path / INDEX).exists() == (size != "5GB") == (shards != {SINGLE})


def test_a_model_is_saved_over_the_files_it_came_from(tmp_path):
    ragged().save_pretrained(tmp_path, max_shard_size="200KB")
    model = load(tmp_path)
    before = model(tokens(1, 6)).logits
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert torch.equal(load(tmp_path)(tokens(1, 6)).logits, before)


@pytest.mark.parametrize("size", ["60KB", "0.06MB", "60 kb", 60_000, "60000"])
def test_no_shard_is_larger_than_asked_for(tmp_path, size):
    build().save_pretrained(tmp_path, max_shard_size=size)
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    assert all(sum(t.nbytes for t in load_file(path).values()) <= 60_000 for path in shards)


@pytest.mark.parametrize("size", ["5 apples", "", None, 0, "0GB", -5, "nan", "infGB"])
def test_a_size_that_means_nothing_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size"):
        build().save_pretrained(tmp_path, max_shard_size=size)


def test_other_files_of_the_folder_stay(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    build().save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


def test_ragged_widths_are_saved_whole(tmp_path):
    model = ragged()
    model.save_pretrained(tmp_path)
    assert load(tmp_path).config.kv_lora_rank == RAGGED["kv_lora_rank"]
    assert same(load(tmp_path), model)
