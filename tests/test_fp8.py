"""FP8: blocks of 128 x 128 with ragged edges, read, kept, dequantised and written as released."""

import copy
import json
import warnings
from collections import namedtuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import INDEX, RAGGED, ragged, read, released_layout, write
from helpers import FP8, V31, router_biases, tiny, tokens
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

import deepseek_v3
from deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM, Experts, Linear
from deepseek_v3 import blocks_of, dequantise, quantise, released_in_fp8

E4M3 = torch.float8_e4m3fn
# One block, the released 576 rows, what transformers mis-scales, one more and one less than a block.
SHAPES = [(128, 128), (576, 256), (192, 448), (129, 127), (1, 1), (5, 300)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fp8_folder(tmp_path, **options):
    """A model and the folder of its FP8 checkpoint."""
    model = ragged()
    model.save_pretrained(tmp_path / "fp8", quantize="fp8", **options)
    return model, tmp_path / "fp8"


# ---- Blocks ----


@pytest.mark.parametrize("shape", SHAPES)
def test_each_number_is_multiplied_by_the_scale_of_its_block(shape):
    rows, columns = shape
    weight, scale = random(*shape).to(E4M3), random(-(-rows // 128), -(-columns // 128), seed=1).exp()
    ours, codes = dequantise(weight, scale, torch.float32), weight.float()
    for i in range(rows):
        expected = torch.stack([codes[i, j] * scale[i // 128, j // 128] for j in range(columns)])
        assert torch.equal(ours[i], expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_largest_number_of_each_block_becomes_448(shape):
    weight = random(*shape)
    codes, scale = quantise(weight)
    assert codes.dtype == E4M3
    assert scale.dtype == torch.float32
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for i, row in enumerate(scale):
        for j, found in enumerate(row):
            block = weight[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
            assert found == block.abs().max() / 448
            assert codes[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128].float().abs().max() == 448
    # E4M3 has 3 bits behind the point: half a step is 1/16 of a number, or 2^-10 of a scale near 0.
    error = (dequantise(codes, scale, torch.float32) - weight).abs()
    assert (error <= weight.abs() / 16 + scale.max() * 2**-10).all()


def test_a_block_of_zeros_has_scale_one():
    weight = torch.zeros(130, 130)
    weight[129, 129] = 7.0
    codes, scale = quantise(weight)
    assert scale.tolist() == [[1, 1], [1, 7 / 448]]
    assert torch.equal(dequantise(codes, scale, torch.float32), weight)


def test_quantising_what_was_dequantised_is_exact():
    codes, scale = quantise(random(300, 200))
    again, scale_again = quantise(dequantise(codes, scale, torch.float32))
    torch.testing.assert_close(scale_again, scale)
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))


def test_without_scales_a_weight_is_only_cast():
    weight = random(3, 5)
    assert torch.equal(dequantise(weight, None, torch.bfloat16), weight.bfloat16())
    assert dequantise(weight, None, torch.float32) is weight


@pytest.mark.parametrize(
    ("shape", "blocks"), [((576, 7168), (5, 56)), ((128, 1), (1, 1)), ((129, 256), (2, 2))]
)
def test_blocks_at_the_edge_count_whole(shape, blocks):
    assert blocks_of(shape) == blocks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_in_fp8_answers_in_the_dtype_of_its_input(dtype, bias):
    layer, x = Linear(200, 130, bias=bias), random(2, 3, 200).to(dtype)
    plain = layer.weight.detach()
    assert (layer.bias is not None) == bias
    if bias:
        layer.bias = torch.nn.Parameter(layer.bias.detach().to(dtype))
    codes, scale = quantise(plain)
    layer.weight = torch.nn.Parameter(codes, requires_grad=False)
    layer.weight_scale_inv = torch.nn.Parameter(scale, requires_grad=False)
    full = dequantise(codes, scale, dtype)
    assert full.dtype == layer(x).dtype == dtype
    assert torch.equal(layer(x), torch.nn.functional.linear(x, full, layer.bias))


def test_each_expert_in_fp8_has_its_own_scales():
    config = DeepseekV3Config.tiny(
        hidden_size=140, moe_intermediate_size=130, n_routed_experts=3, num_experts_per_tok=1,
        n_group=1, topk_group=1,
    )
    experts, plain = Experts(config), Experts(config)
    for i, name in enumerate(("gate_proj", "up_proj", "down_proj")):
        stack = getattr(experts, name)
        weights = [quantise(random(*stack[0].shape, seed=3 * i + e) * 2**e) for e in range(3)]
        codes, scales = (torch.stack(parts) for parts in zip(*weights, strict=True))
        setattr(experts, name, torch.nn.Parameter(codes, requires_grad=False))
        setattr(experts, name + "_scale_inv", torch.nn.Parameter(scales))
        full = torch.stack([dequantise(*one, torch.float32) for one in weights])
        setattr(plain, name, torch.nn.Parameter(full))
    indices = torch.tensor([0, 2])[random(1, 9, 1).gt(0).long()]  # nobody visits the second
    visits = random(1, 9, 140, seed=9), indices, torch.ones(1, 9, 1)
    torch.testing.assert_close(experts(*visits), plain(*visits))


@pytest.mark.parametrize(
    ("name", "shape", "in_fp8"),
    [
        ("self_attn.o_proj.weight", (4, 4), True),
        ("mlp.experts.gate_proj", (2, 4, 4), True),
        ("self_attn.o_proj.bias", (4,), False),
        ("eh_proj.weight", (4, 8), False),
        ("mlp.gate.weight", (4, 4), False),
        ("lm_head.weight", (4, 4), False),
        ("input_layernorm.weight", (4,), False),
    ],
)
def test_what_the_release_has_in_fp8(name, shape, in_fp8):
    assert released_in_fp8(f"model.layers.3.{name}", torch.empty(shape)) is in_fp8


# ---- Reading ----


def test_reads_what_torch_reads(tmp_path):
    """torch.distributed's reader, which knows these blocks too, is the oracle for every matrix."""
    _, folder = fp8_folder(tmp_path, max_shard_size="100KB")
    stored = read(folder)
    wanted = {name: torch.zeros(t.shape) for name, t in stored.items() if t.dtype == E4M3}
    dcp.load(wanted, storage_reader=QuantizedHuggingFaceStorageReader(str(folder)), no_dist=True)
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "plain")
    plain = read(tmp_path / "plain")
    assert len(wanted) > 100
    for name, expected in wanted.items():
        assert torch.equal(plain[name], expected), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_kept_and_fp8_dequantised_compute_the_same(tmp_path, dtype):
    _, folder = fp8_folder(tmp_path)
    kept = DeepseekV3ForCausalLM.from_pretrained(folder)
    full = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {p.dtype for p in full.parameters()} == {dtype}
    ids = tokens(2, 9)
    with torch.no_grad():
        ours, theirs = kept(ids, output_mtp=True), full(ids, output_mtp=True)
    # In bfloat16 a token may choose another expert than in float32: a bound on the whole, not on each.
    for mine, other in ((ours.logits, theirs.logits), (ours.mtp_logits[0], theirs.mtp_logits[0])):
        error = (mine.float() - other.float()).norm() / other.float().norm()
        assert error < (1e-6 if dtype == torch.bfloat16 else 0.1)


def test_fp8_kept_computes_exactly_what_its_dequantised_weights_do(tmp_path):
    """In one dtype and by one path: the experts of both run one at a time."""
    _, folder = fp8_folder(tmp_path)
    kept = DeepseekV3ForCausalLM.from_pretrained(folder)
    full = copy.deepcopy(kept)
    for module in full.modules():
        for name in ("weight", "gate_proj", "up_proj", "down_proj"):
            scale, weight = getattr(module, f"{name}_scale_inv", None), getattr(module, name, None)
            if scale is not None and weight.ndim == 2:
                setattr(module, f"{name}_scale_inv", None)
                setattr(module, name, torch.nn.Parameter(dequantise(weight, scale, torch.bfloat16)))
    ids = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(kept(ids).logits, full(ids).logits)
        assert torch.equal(kept.generate(ids, max_new_tokens=4), full.generate(ids, max_new_tokens=4))


def test_dtype_none_keeps_fp8_for_the_matrices_and_nothing_else(tmp_path):
    _, folder = fp8_folder(tmp_path)
    model = DeepseekV3ForCausalLM.from_pretrained(folder)
    fp8 = {n for n, p in model.named_parameters() if p.dtype == E4M3}
    assert {n.split(".")[-2] for n in fp8 if n.endswith(".weight")} == {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj",
        "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert "model.layers.1.mlp.experts.gate_proj" in fp8
    assert model.dtype == torch.bfloat16
    assert {b.dtype for b in router_biases(model)} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters() if p.dtype == E4M3)


def test_scales_may_lie_in_another_shard(tmp_path):
    _, folder = fp8_folder(tmp_path)
    tensors, config = read(folder), json.loads((folder / "config.json").read_text())
    write(tmp_path / "dealt", dict(sorted(tensors.items())), config, shards=2)
    weight_map = json.loads((tmp_path / "dealt" / INDEX).read_text())["weight_map"]
    name = "model.layers.0.mlp.up_proj.weight"
    assert weight_map[name] != weight_map[f"{name}_scale_inv"]
    one, two = (DeepseekV3ForCausalLM.from_pretrained(d) for d in (folder, tmp_path / "dealt"))
    assert torch.equal(one(tokens(1, 5)).logits, two(tokens(1, 5)).logits)


def test_scales_are_numbers_whatever_the_config_calls_them(tmp_path):
    """V3.1 says ue8m0, stores float32, and not all of it powers of two."""
    _, folder = fp8_folder(tmp_path)
    before = DeepseekV3ForCausalLM.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = V31["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    after = DeepseekV3ForCausalLM.from_pretrained(folder)
    assert torch.equal(before(tokens(1, 5)).logits, after(tokens(1, 5)).logits)
    after.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["quantization_config"] == V31["quantization_config"]


def test_a_model_in_fp8_is_not_cast_without_its_scales(tmp_path):
    model = DeepseekV3ForCausalLM.from_pretrained(fp8_folder(tmp_path)[1])
    with pytest.raises(ValueError, match="dtype="):
        model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="dtype="):
        model.float()
    assert model.to("cpu") is model


@pytest.mark.parametrize(
    ("key", "value"),
    [("quant_method", "gptq"), ("weight_block_size", [64, 64]), ("weight_block_size", None), ("fmt", "e5m2")],
)
def test_another_quantization_is_refused_by_name(tmp_path, key, value):
    _, folder = fp8_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=key) as error:
        DeepseekV3ForCausalLM.from_pretrained(folder)
    assert repr(value) in str(error.value)


# ---- Writing ----


def test_what_is_kept_in_fp8_is_written_bit_for_bit(tmp_path):
    _, folder = fp8_folder(tmp_path)
    DeepseekV3ForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    before, after = read(folder), read(tmp_path / "again")
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name


def test_exactly_the_released_matrices_are_quantised(tmp_path):
    """Named from the released list: it has all kinds of layers, MTP too."""
    _, folder = fp8_folder(tmp_path)
    released = {name.replace(".61.", ".3."): dtype for name, (dtype, _) in released_layout().items()}
    names = {"F8_E4M3": E4M3, "BF16": torch.bfloat16, "F32": torch.float32}
    for name, tensor in read(folder).items():
        like = name.replace("layers.1.", "layers.3.").replace("layers.2.", "layers.3.")
        assert tensor.dtype == names[released[like]], name
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == FP8


def test_written_fp8_is_near_the_weights(tmp_path):
    model, folder = fp8_folder(tmp_path)
    full = dict(DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(full[name], parameter.float(), rtol=1 / 16, atol=1e-3)


def test_dequantised_weights_are_written_without_quantization(tmp_path):
    _, folder = fp8_folder(tmp_path)
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert "quantization_config" not in model.config.to_dict()
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not any(name.endswith("_scale_inv") for name in read(tmp_path / "plain"))


def test_transformers_reads_what_was_dequantised(tmp_path):
    transformers = pytest.importorskip("transformers")
    _, folder = fp8_folder(tmp_path)
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "plain")
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "plain")
    ids = tokens(1, 7)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_one_expert_is_a_stack_too(tmp_path):
    model = ragged(n_routed_experts=1, n_group=1, topk_group=1, num_experts_per_tok=1)
    model.save_pretrained(tmp_path, quantize="fp8")
    assert "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv" in read(tmp_path)
    again = DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    assert again.model.layers[1].mlp.experts.up_proj.shape == (1, 144, 136)


@pytest.mark.parametrize("quantize", ["int8", True, "FP8"])
def test_an_unknown_quantisation_is_refused(tmp_path, quantize):
    with pytest.raises(ValueError, match="quantize"):
        ragged().save_pretrained(tmp_path, quantize=quantize)
    assert not list(tmp_path.iterdir())


def test_ragged_config_is_ragged_everywhere():
    config = tiny(**RAGGED)
    widths = (config.hidden_size, config.intermediate_size, config.moe_intermediate_size)
    assert all(width % 128 for width in (*widths, config.q_lora_rank, config.kv_lora_rank))


# ---- Products that stay in FP8 ----


def scaled_mm_by_hand(a, b, scale_a, recipe_a, scale_b, recipe_b, output_dtype):
    """What F.scaled_mm computes and demands of layouts, by the rules of cuBLAS and of torch's own check."""
    kinds = torch.nn.functional.ScalingType
    assert (recipe_a, recipe_b) == (kinds.BlockWise1x128, kinds.BlockWise128x128)
    (M, K), N = a.shape, b.shape[1]
    fours = -(-K // 512) * 4
    assert a.dtype == b.dtype == E4M3 and scale_a.dtype == scale_b.dtype == torch.float32
    assert a.stride() == (K, 1) and b.stride() == (1, K) and K % 128 == N % 128 == 0
    assert scale_a.shape == (M, K // 128) and scale_a.stride() == (1, M)
    assert scale_b.shape == (fours, N // 128) and scale_b.stride() == (1, fours)
    torch._meta_registrations._check_scaled_mm_sizes_v2(
        a, b, [scale_a], [recipe_a], [scale_b], [recipe_b], out_dtype=output_dtype
    )
    a = a.float() * scale_a.repeat_interleave(128, 1)
    b = b.float() * scale_b[: K // 128].repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (a @ b).to(output_dtype)


@pytest.fixture
def fp8_units(monkeypatch):
    """As on a GPU that multiplies FP8 by blocks; the calls of its kernel, (rows, in, out)."""
    calls = []

    def scaled_mm(a, b, *others, output_dtype):
        calls.append((*a.shape, b.shape[1]))
        return scaled_mm_by_hand(a, b, *others, output_dtype)

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm)
    monkeypatch.setattr(deepseek_v3, "has_scaled_mm", lambda device: True)
    return calls


@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 17)], ids=str)
@pytest.mark.parametrize("shape", [(128, 128), (256, 640), (384, 1024)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_fp8_units_compute_what_dequantising_does(fp8_units, rows, shape, bias):
    """All that they add is that the input is rounded too, to 3 bits in tiles of 1 x 128."""
    x = (random(*rows, shape[1], seed=1) * 3).bfloat16()
    weight, scale = quantise(random(*shape))
    bias = random(shape[0], seed=2).bfloat16() if bias else None
    found = deepseek_v3.linear(x, weight, scale, bias)
    assert fp8_units == [(x[..., 0].numel(), shape[1], shape[0])]
    assert found.shape == (*rows, shape[0]) and found.dtype == torch.bfloat16
    full = dequantise(weight, scale, torch.float32)
    rounded = deepseek_v3.through_fp8(x.float(), 1)
    for inputs, tolerance in ((rounded, 0.005), (x.float(), 0.05)):
        exact = torch.nn.functional.linear(inputs, full, None if bias is None else bias.float())
        assert (found.float() - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize(
    ("shape", "dtype", "gradient"),
    [
        ((576, 128), torch.bfloat16, False),
        ((128, 200), torch.bfloat16, False),
        ((128, 128), torch.float32, False),
        ((128, 128), torch.bfloat16, True),
    ],
    ids=str,
)
def test_what_fp8_units_do_not_take_is_dequantised(fp8_units, shape, dtype, gradient):
    x = random(3, shape[1]).to(dtype).requires_grad_(gradient)
    weight, scale = quantise(random(*shape))
    full = dequantise(weight, scale, dtype)
    assert torch.equal(deepseek_v3.linear(x, weight, scale), torch.nn.functional.linear(x, full))
    assert not fp8_units


def test_zeros_and_outliers_on_fp8_units(fp8_units):
    weight, scale = quantise(random(128, 256))
    x = torch.zeros(2, 256, dtype=torch.bfloat16)
    assert (deepseek_v3.linear(x, weight, scale) == 0).all()
    x[0, 3], x[1] = 1e30, random(256).bfloat16() * 1e-20
    found = deepseek_v3.linear(x, weight, scale).double()
    exact = x.double() @ dequantise(weight, scale, torch.float64).T
    assert ((found - exact).norm(dim=-1) < 0.05 * exact.norm(dim=-1)).all()


@torch.no_grad()
def test_a_whole_model_on_fp8_units(fp8_units, tmp_path, monkeypatch):
    """Attention's, dense, shared and routed products go there; embedding, router and head do not."""
    wide = dict(hidden_size=256, intermediate_size=256, moe_intermediate_size=128, q_lora_rank=128)
    heads = dict(kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
    config = DeepseekV3Config.tiny(**wide, **heads, num_hidden_layers=2, initializer_range=0.05)
    DeepseekV3ForCausalLM(config).bfloat16().save_pretrained(tmp_path, quantize="fp8")
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path).eval()
    ids = tokens(2, 9)
    found = model(ids).logits.float()

    def by_hand(x, weight, scale):
        full = dequantise(weight, scale, torch.float32)
        return (deepseek_v3.through_fp8(x.float(), 1) @ full.T).to(x.dtype)

    monkeypatch.setattr(deepseek_v3, "scaled_product", by_hand)
    exact = model(ids).logits.float()
    assert (found - exact).norm() < 0.02 * exact.norm()
    monkeypatch.setattr(deepseek_v3, "has_scaled_mm", lambda device: False)
    exact = model(ids).logits.float()
    assert 0 < (found - exact).norm() < 0.3 * exact.norm()
    # q_a, o and gate, up, down of one dense layer, a shared expert and the experts that are hit;
    # q_b has 192 outputs and kv_a 144, which are no whole blocks.
    projections = [call for call in fp8_units if call[0] == 18]
    assert projections.count((18, 256, 128)) >= 2 * 1 + 2  # q_a, and gate and up of the shared expert
    assert projections.count((18, 256, 256)) >= 2  # gate and up of the dense layer
    assert any(rows < 18 for rows, *_ in fp8_units)  # experts


def test_fp8_units_are_looked_for_and_tried_before_use(monkeypatch):
    """Anything but Hopper has none; one whose kernel fails or is wrong is warned of, and not used."""
    has = deepseek_v3.has_scaled_mm.__wrapped__
    assert not has(torch.device("cpu"))
    gpu = namedtuple("Device", "type")("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", {gpu: (8, 9)}.get)
    assert not has(gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", {gpu: (9, 0)}.get)
    linspace = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *a, device: linspace(*a))
    kernels = {"right": scaled_mm_by_hand, "wrong": lambda *a, **k: scaled_mm_by_hand(*a, **k) * 1.1}

    def lacking(*given, **options):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    for name, kernel in (kernels | {"lacking": lacking}).items():
        monkeypatch.setattr(torch.nn.functional, "scaled_mm", kernel)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert has(gpu) == (name == "right")
        assert len(said) == (name != "right")
        text = " ".join(str(warning.message) for warning in said)
        assert (name == "right") != ("FP8 weights are dequantised" in text)
        assert (name == "lacking") == ("CUBLAS_STATUS_NOT_SUPPORTED" in text)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 33, 256])
@pytest.mark.parametrize("shape", [(128, 128), (256, 640), (7168, 2048)], ids=str)
def test_a_gpu_multiplies_fp8_as_by_hand(rows, shape):
    device = torch.device("cuda", torch.cuda.current_device())
    if not deepseek_v3.has_scaled_mm(device):
        pytest.skip("this GPU has no block-scaled products")
    x, (weight, scale) = random(rows, shape[1]).bfloat16(), quantise(random(*shape, seed=1))
    found = deepseek_v3.linear(*(part.to(device) for part in (x, weight, scale))).float().cpu()
    rounded = deepseek_v3.through_fp8(x.float(), 1)
    exact = rounded @ dequantise(weight, scale, torch.float32).T
    assert (found - exact).norm() < 0.01 * exact.norm()
