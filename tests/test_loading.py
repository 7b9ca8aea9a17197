"""Checkpoint folders: the released one in its exact layout, bad ones by name, and saves cut short."""

import contextlib
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from checkpoints import INDEX, ragged, read, released_layout, write, write_sparse
from helpers import V3, build, tokens
from safetensors.torch import load_file, save_file

import deepseek_v3
from deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM

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

def test_every_name_and_shape_of_671b_is_checked_in_seconds(released, monkeypatch):
    headers = 0
    for path in released.glob("*.safetensors"):
        with open(path, "rb") as file:
            headers += 8 + int.from_bytes(file.read(8), "little")
    assert sum(path.stat().st_size for path in released.glob("*.safetensors")) - headers == 688_574_839_360
    monkeypatch.setattr(deepseek_v3.Checkpoint, "read", lambda self, name: torch.zeros(1))  # MTP's copies
    start = time.perf_counter()
    stored, config = deepseek_v3.Checkpoint(released), DeepseekV3Config.from_pretrained(released)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    sources = deepseek_v3.released_names(model, config.num_hidden_layers)
    deepseek_v3.check_coverage(model, stored, sources, config)
    assert time.perf_counter() - start < 30
    names = [piece for pieces in sources.values() for piece in pieces]
    fp8 = sum(stored.find(name)[0] == deepseek_v3.FP8 for name in names)
    assert len(names) + fp8 + 2 == 91_991  # with a scale for each FP8 matrix, and MTP's two copies

SLICE = """
import json, resource, sys, torch
import deepseek_v3
opened, real = [], deepseek_v3.safe_open
deepseek_v3.safe_open = lambda path, **options: (opened.append(path.name), real(path, **options))[1]
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
    other = other if shard_of(folder).name != other else "model-00002-of-000003.safetensors"
    edit_index(folder, **{UP: other})

def forget_entry(folder):
    """A shard holds what the index does not know."""
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.layers.0.self_attn.o_proj.weight_scale_inv"]
    (folder / INDEX).write_text(json.dumps(index))

def hide_a_tensor(folder):
    """A shard holds one tensor more than the index knows."""
    tensors = load_file(shard_of(folder))
    save_file(tensors | {"hidden": torch.ones(2)}, shard_of(folder))

def pickle_only(folder):
    for path in folder.glob("model*"):
        path.unlink()
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        (folder / name).write_bytes(b"\x80\x02")

def with_nan(folder):
    scale = load_file(shard_of(folder, UP + "_scale_inv"))[UP + "_scale_inv"].clone()
    scale[0, 0] = torch.nan
    change(folder, UP + "_scale_inv", scale)

def changed(name, *tensor):
    """A tensor replaced by ones of a shape and dtype."""
    shape, dtype = tensor if len(tensor) == 2 else (tensor[0], torch.float32)
    return lambda folder: change(folder, name, torch.ones(shape).to(dtype))

def entry(name, place):
    def spoil(folder):
        edit_index(folder, **{name: place.format(d=folder) if isinstance(place, str) else place})

    return spoil

def index_of(content):
    return lambda folder: (folder / INDEX).write_bytes(content)

def shard_with(content):
    return lambda folder: shard_of(folder).write_bytes(content)

def truncated(keep):
    return lambda folder: os.truncate(shard_of(folder), keep % shard_of(folder).stat().st_size)

BIAS, NORM = "model.layers.2.mlp.gate.e_score_correction_bias", "model.norm.weight"
EH, HEAD = "model.layers.3.eh_proj.weight", "model.layers.3.shared_head.head.weight"
EMBEDDING, SCALE = "model.layers.3.embed_tokens.weight", f"{UP}_scale_inv"
LFS = b"version https://git-lfs.github.com/spec/v1\n"
BAD = [(f"{name}: missing", partial(change, name=name, tensor=None)) for name in (UP, SCALE, NORM, BIAS, EH)]
BAD += [
    (f"{name}: of shape {wrong}, must be {right}", changed(name, wrong))
    for name, wrong, right in (
        (NORM, (7,), (136,)), (SCALE, (1, 2), (2, 2)), (BIAS, (11,), (12,)), (EH, (136, 273), (136, 272)),
        (UP, (144, 137), (144, 136)),
    )
]  # fmt: skip
BAD += [
    (f"{name}: unexpected", changed(name, (3,)))
    for name in (
        "model.layers.1.mlp.experts.12.up_proj.weight",  # one expert too many
        "model.layers.0.mlp.gate.weight",  # a router in a dense layer
        "model.layers.4.input_layernorm.weight",  # behind the MTP module
        "lm_head.weight_scale_inv",
        "something.else",
    )
]
BAD += [(name, changed(name, (61, 136), torch.bfloat16)) for name in (HEAD, EMBEDDING)]  # no copies then
BAD += [(NORM, changed(NORM, (136,), dtype)) for dtype in (torch.int64, torch.float8_e4m3fn)]
BAD += [(SCALE, changed(SCALE, (2, 2), torch.uint8)), (SCALE, with_nan)]
BAD += [(UP, changed(UP, (144, 136)))]  # one that is not in FP8, where the others are
BAD += [("-of-000003.safetensors: not a whole", truncated(keep)) for keep in (-1, 100)]
BAD += [
    ("-of-000003.safetensors: not a whole", shard_with(content))
    for content in (b"", bytes(range(256)) * 99, b"\xff" * 7 + b"\x7f" + b"{}" * 99, LFS)
]
BAD += [("model.safetensors: not a whole", lambda d: (d / SINGLE).write_bytes(LFS))]
BAD += [("-of-000003.safetensors: no such file", lambda d: shard_of(d).unlink())]
BAD += [("-of-000003.safetensors", lambda d: (shard_of(d).unlink(), shard_of(d).mkdir()))]
BAD += [
    (f"weight_map[{UP!r}]=", entry(UP, place))
    for place in (
        "../dealt/model-00001-of-000003.safetensors", "{d}/model-00001-of-000003.safetensors",
        "a/../b.safetensors", "/dev/zero", "..", "", 3, None, ["model.safetensors"], "pytorch_model.bin",
    )
]  # fmt: skip
BAD += [
    (UP, swap_entry), ("model.layers.0.self_attn.o_proj.weight_scale_inv", forget_entry),
    ("hidden", hide_a_tensor),
    *((INDEX, index_of(content)) for content in (b"{", b"[]", b"{}", b'{"weight_map": []}', b"\xff\x00")),
    ("missing", index_of(b'{"weight_map": {}}')), ("no model.safetensors", pickle_only),
    ("model_type='llama'", lambda d: edit_config(d, model_type="llama")),
    ("config.json", lambda d: (d / "config.json").unlink()),
    ("experts.0.down_proj.weight: of shape", lambda d: edit_config(d, moe_intermediate_size=128)),
    ("missing", lambda d: edit_config(d, num_hidden_layers=40, num_nextn_predict_layers=0)),
    ("missing", lambda d: edit_config(d, n_routed_experts=9000)),
]

@pytest.mark.filterwarnings("ignore:.*MTP")  # an index without tensors has none of MTP either
@pytest.mark.parametrize(("named", "spoil"), BAD, ids=[f"{i} {named}" for i, (named, _) in enumerate(BAD)])
def test_a_bad_folder_is_named(good, tmp_path, named, spoil):
    folder = shutil.copytree(good, tmp_path / "dealt")
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(folder)
    assert named in str(error.value)

def test_the_folder_that_is_spoilt_above_is_good_though_scales_lie_in_another_shard(good):
    scales = [name for name in read(good) if name.endswith("_scale_inv")]
    assert any(shard_of(good, name) != shard_of(good, name.removesuffix("_scale_inv")) for name in scales)
    assert same(load(good), load(good.parent / "saved"))

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

class Killed(BaseException):
    pass

def killed_at(step, monkeypatch):
    """Stop in the step-th change of a file: nothing runs after a kill, no clean-up either."""
    left = [step]

    def stop(function):
        def stopping(*args, **options):
            left[0] -= 1
            if left[0] < 0 and function is save_file:
                args[1].write_bytes(b"part of it")
            if left[0] < 0:
                raise Killed
            return function(*args, **options)

        return stopping

    for name in ("replace", "unlink", "write_text"):
        monkeypatch.setattr(pathlib.Path, name, stop(getattr(pathlib.Path, name)))
    monkeypatch.setattr(deepseek_v3, "save_file", stop(deepseek_v3.save_file))
    return left

@pytest.mark.parametrize("after", ["5GB", "50KB"])
@pytest.mark.parametrize("before", ["5GB", "50KB"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path, monkeypatch, before, after):
    few = dict(num_hidden_layers=2, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1)
    # Their configs differ too: mixing their files would not go unnoticed.
    old, new = build(seed=1, **few), build(seed=2, **few, routed_scaling_factor=1.5)
    seen, step = set(), 0
    while step is not None:
        folder = tmp_path / str(step)
        old.save_pretrained(folder, max_shard_size=before)
        (folder / "model_ema.safetensors").write_text("of somebody else")
        with monkeypatch.context() as patch:
            left = killed_at(step, patch)
            with contextlib.suppress(Killed):
                new.save_pretrained(folder, max_shard_size=after)
        found = load(folder)
        assert same(found, old) or same(found, new), f"step {step}"
        seen.add(same(found, new))
        new.save_pretrained(folder, max_shard_size=after)  # and the next save succeeds, and tidies up
        assert same(load(folder), new)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        assert (folder / "model_ema.safetensors").read_text() == "of somebody else"
        step = step + 1 if left[0] < 0 else None
    assert seen == {False, True}

def test_a_full_disk_leaves_the_old_one(tmp_path):
    """Files of more than 30,000 bytes fail as there."""
    old, new = build(seed=1), build(seed=2)
    old.save_pretrained(tmp_path, max_shard_size="60KB")
    files, limits = sorted(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(OSError, match=re.escape(str(tmp_path))):
            new.save_pretrained(tmp_path, max_shard_size="60KB")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.iterdir()) == files
    assert same(load(tmp_path), old)
