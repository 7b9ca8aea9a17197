"""Placing a model over devices by bytes, and hopping between them."""

from functools import cache

import pytest
import torch
from checkpoints import ragged
from helpers import V3, build, tiny, tokens
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

import deepseek_v3
from deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM, Experts, LatentCache, plan_devices

load = DeepseekV3ForCausalLM.from_pretrained
GB = 10**9

# ---- The plan, a pure function ----

SIZES = {"embed": 4, "layers.0": 1, "layers.1": 20, "layers.2": 20, "layers.3": 20, "head": 4}

def loads(plan, sizes):
    return {device: sum(sizes[p] for p, d in plan.items() if d == device) for device in plan.values()}

@pytest.mark.parametrize(
    ("room", "balanced", "expected"),
    [
        ({0: 100, 1: 100}, False, [0, 0, 0, 0, 0, 0]),
        ({0: 100, 1: 100}, True, [0, 0, 0, 1, 1, 1]),
        ({0: 30, 1: 30, 2: 30}, False, [0, 0, 0, 1, 2, 2]),
        ({0: 30, 1: 30, "cpu": 100}, False, [0, 0, 0, 1, "cpu", "cpu"]),
        ({0: 30, 1: 30, "cpu": 100}, True, [0, 0, 0, 1, "cpu", "cpu"]),  # overflow: the GPUs are full
        ({"cpu": 100, 0: 30}, True, [0, 0, 0, "cpu", "cpu", "cpu"]),  # GPUs come first
        ({"cpu": 100}, True, ["cpu"] * 6),
        ({0: 3, 1: 100}, True, [1, 1, 1, 1, 1, 1]),  # too small for the first one
        ({0: -5, 1: 100}, False, [1, 1, 1, 1, 1, 1]),  # full of something else
    ],
)
def test_the_plan(room, balanced, expected):
    assert list(plan_devices(SIZES, room, balanced).values()) == expected

def test_balanced_means_by_bytes():
    """Dense layers are 20 times lighter: counting layers would fill the second GPU first."""
    sizes = {f"layers.{i}": 1 if i < 12 else 20 for i in range(24)}
    plan = plan_devices(sizes, {0: 10**6, 1: 10**6})
    assert loads(plan, sizes) == {0: 132, 1: 120}

@pytest.mark.parametrize("seed", range(3))
def test_a_plan_keeps_order_and_room(seed):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(1, 100, (30,), generator=generator).tolist()
    sizes, room = {f"layers.{i}": n for i, n in enumerate(numbers)}, {0: 500, 1: 400, 2: 700, "cpu": 900}
    for balanced in (False, True):
        plan = plan_devices(sizes, room, balanced)
        order = [list(room).index(device) for device in plan.values()]
        assert order == sorted(order)
        assert all(used <= room[device] for device, used in loads(plan, sizes).items())

def test_what_does_not_fit_is_told_with_its_bytes():
    with pytest.raises(ValueError, match="69 bytes do not fit"):
        plan_devices(SIZES, {0: 30, 1: 30})

# ---- 671B on 8 GPUs ----

@cache
def released():
    """The model on meta and the bytes of its tensors as released."""
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**V3))
    kinds = deepseek_v3.assumed_kinds(model)
    sizes = {n: deepseek_v3.held_bytes(deepseek_v3.find_tensor(model, n), k) for n, k in kinds.items()}
    return model, sizes

def test_8_gpus_of_141_gb_hold_671b_in_fp8_with_room_to_spare():
    model, sizes = released()
    room = dict.fromkeys(range(8), "141GB")
    devices = deepseek_v3.assign_devices(model, sizes, "balanced", room)
    used = loads(devices, sizes)
    assert sum(used.values()) == 688_574_839_360 - 2 * 129280 * 7168 * 2  # MTP's copies are not held
    assert max(used.values()) < 100 * GB
    assert len(used) == 8

@pytest.mark.parametrize("room", [{0: "80GB", "cpu": "700GB"}, {0: "24GB", 1: "80GB", "cpu": "640GB"}])
def test_what_gpus_cannot_hold_goes_to_the_cpu(room):
    model, sizes = released()
    used = loads(deepseek_v3.assign_devices(model, sizes, "auto", room), sizes)
    assert {str(device).replace("cuda:", "") for device in used} == {str(device) for device in room}
    for device, size in room.items():
        held = used[deepseek_v3.parse_device(device)]
        assert held < deepseek_v3.parse_size("room", size)

@pytest.fixture(autouse=True)
def eight_gpus(monkeypatch):
    """Placing needs no GPU, only their number."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)

# ---- A dict of prefixes ----

def devices(model):
    return {name: str(p.device) for name, p in model.named_parameters()}

@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_the_longest_prefix_at_a_dot_counts(tmp_path, quantize):
    build(num_hidden_layers=12).save_pretrained(tmp_path, quantize=quantize)
    placed = devices(load(tmp_path, device_map={"": "cpu", "model.layers.1": "meta", "lm_head": "meta"}))
    on_meta = {name for name, device in placed.items() if device == "meta"}
    assert on_meta == {name for name in placed if name.startswith(("model.layers.1.", "lm_head."))}

@pytest.mark.parametrize("quantize", [None, "fp8"])
@pytest.mark.parametrize("device_map", ["meta", torch.device("meta"), {"": "meta"}])
def test_one_device_takes_parameters_and_router_biases(tmp_path, device_map, quantize):
    build().save_pretrained(tmp_path, quantize=quantize)
    model = load(tmp_path, device_map=device_map)
    assert set(devices(model).values()) == {"meta"}
    assert {str(b.device) for n, b in model.named_buffers() if "bias" in n} == {"meta"}
    assert model.device.type == "meta"

@pytest.mark.parametrize(
    ("device_map", "named"),
    [
        ({"model.embed_tokens": "cpu", "model.layers": "cpu", "lm_head": "cpu"}, "model.norm"),
        ({}, "model.embed_tokens"), ({"": "cpu", "model.layer": "cpu"}, "'model.layer'"),
        ({"": "cpu", "model.layers.77": "cpu"}, "'model.layers.77'"),
        ({"": "cpu", "model.layers.1.mlp": "meta"}, "model.layers.1"), ({"": "gpu7"}, "gpu7"),
        ({"": "cpu", "model.layers.1": "disk"}, "disk is no device"),
    ],
)
def test_a_map_that_cannot_work_is_named(tmp_path, device_map, named):
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=named):
        load(tmp_path, device_map=device_map)

def test_memory_that_is_no_device_is_named(tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="disk is no device"):
        load(tmp_path, device_map="auto", max_memory={"cpu": "1KB", "disk": "1TB"})

# ---- Hops, on devices that need not exist ----

def spread_over(model, places):
    """Move parts of a model made of fake tensors."""
    for path, device in places.items():
        for module in model.get_submodule(path).modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    moved = None if tensor is None else tensor.detach().to(device)
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(moved) if is_parameter else moved
    return model

# In fake mode a tensor on "meta" may come back, and mixing the two devices is refused.
PLACES = {"model.layers.1": "meta", "model.layers.3": "meta", "model.norm": "meta"}

MORE_PLACES = PLACES | {"model.layers.2": "meta", "model.norm": "cpu", "lm_head": "meta"}

@pytest.mark.parametrize("places", [PLACES, MORE_PLACES])
def test_every_hop_is_made_and_the_answer_comes_home(places, monkeypatch):
    """Fake tensors refuse a product of two devices: a forgotten hop is an error here."""
    # Weights on "meta" count as offloaded ones; here it stands for a second device.
    monkeypatch.setattr(deepseek_v3, "home", lambda module, x: next(module.parameters(), x).device)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = spread_over(DeepseekV3ForCausalLM(tiny()).eval(), places)
        embeds, cache = torch.zeros(2, 6, 32), LatentCache()
        # Routing depends on numbers, which fake tensors lack; experts have their own tests.
        for block in model.model.layers[1:]:
            block.mlp.experts.forward = lambda x, indices, weights: x
        out = model(inputs_embeds=embeds, past_key_values=cache, output_mtp=True)
        assert str(out.logits.device) == str(out.mtp_logits[0].device) == "cpu"
        expected = [places.get(f"model.layers.{i}", "cpu") for i in range(3)]
        assert [str(cache.layers[i].device) for i in range(3)] == expected
        chunk = model(inputs_embeds=embeds[:, :2], past_key_values=cache)  # which has a mask that hops
        assert str(chunk.logits.device) == "cpu"

def test_every_tensor_is_made_where_its_inputs_are():
    """Masks, positions, loss and draws of a model that lies elsewhere as a whole."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
        model, ids = DeepseekV3ForCausalLM(tiny()).train(), torch.zeros(2, 6, dtype=torch.long)
        for block in model.model.layers[1:]:  # counting visits depends on numbers
            block.mlp = block.mlp.shared_experts
        single = model.model.embed_tokens(ids[:, :1])
        given = torch.ones(2, 7, dtype=torch.long)
    with FakeTensorMode(allow_non_fake_inputs=True):
        cache = LatentCache()
        out = model(ids, output_mtp=True, output_attentions=True)
        loss = deepseek_v3.shifted_cross_entropy(out.mtp_logits[0], ids, 2, None, None)
        model.eval()(ids, past_key_values=cache)
        out = model(inputs_embeds=single, attention_mask=given, past_key_values=cache)
        probs = deepseek_v3.Sampling(do_sample=True, top_k=3, top_p=0.5).distribution(out.logits)
        found = deepseek_v3.Sampling().accept(ids[:, :1], probs, probs.expand(2, 2, 61))
        last = deepseek_v3.last_real_token(single, None, given, None)
        for tensor in (loss, out.logits, probs, *found, last):
            assert tensor.device.type == "meta"

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("quantize", [None, "fp8"])
@pytest.mark.parametrize(
    "device_map",
    ["cuda", {"": "cpu", "model.layers.1": "cuda", "model.layers.3": "cuda"},
     {"": "cuda", "model.layers.2": "cpu"}],
)  # fmt: skip
@torch.no_grad()
def test_cpu_and_gpu_together_compute_the_same(tmp_path, device_map, quantize):
    ragged().save_pretrained(tmp_path, quantize=quantize)
    whole, split = load(tmp_path), load(tmp_path, device_map=device_map)
    ids = tokens(2, 7)
    here = ids.to(split.device)
    expected, found = whole(ids, labels=ids), split(here, labels=here)
    torch.testing.assert_close(found.logits.cpu(), expected.logits, rtol=0, atol=0.1)
    torch.testing.assert_close(found.mtp_logits[0].cpu(), expected.mtp_logits[0], rtol=0, atol=0.1)
    torch.testing.assert_close(found.loss.cpu(), expected.loss, rtol=0, atol=0.1)
    drafted = split.generate(here, max_new_tokens=8, use_mtp=True, eos_token_id=-1)
    assert drafted.shape == (2, 15) and drafted.device == here.device

def test_a_decoding_step_on_a_gpu_never_asks_for_a_number(monkeypatch):
    """Fake tensors have none to give: each .item(), .tolist(), nonzero() or such would be an error."""
    monkeypatch.setattr(Experts, "one_by_one", Experts.all_at_once)  # what a GPU takes
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(tiny()).bfloat16().eval()
        ids, real = torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for mask in (None, real):
            cache = LatentCache()
            model(ids, past_key_values=cache)
            out = model(ids[:, :1], mask, past_key_values=cache)
            out = model(ids[:, :1], past_key_values=cache)
            assert out.logits.shape == (2, 1, 61)
        monkeypatch.undo()
        with pytest.raises(DynamicOutputShapeException):  # as the loop over experts does
            model(ids[:, :1], past_key_values=cache)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_a_gpu_is_not_waited_for_inside_a_decoding_step():
    model = DeepseekV3ForCausalLM(tiny()).to("cuda", torch.bfloat16).eval()
    cache, ids = LatentCache(16), tokens(2, 6).cuda()
    model(ids, past_key_values=cache)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(ids[:, :1], past_key_values=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
