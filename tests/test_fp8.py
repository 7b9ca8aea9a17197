"""FP8: blocks of 128 x 128 with ragged edges, read, kept, dequantised and written as released."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from checkpoints import ragged, read, released_layout
from experiments import FP8Experts, FP8Linear, swap_in_fp8, through_fp8
from helpers import FP8, V31, build, router_biases, tiny, tokens
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

from deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM, Experts, Linear
from deepseek_v3 import blocks_of, dequantise, quantise

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

def tensors_of(model):
    return [*model.named_parameters(), *model.named_buffers()]

# ---- Blocks ----

def block_by_block(weight, scale, dtype):
    """What dequantise is to give, by its description."""
    full = torch.empty(weight.shape, dtype=dtype)
    for i in range(scale.shape[-2]):
        for j in range(scale.shape[-1]):
            block = (..., slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128))
            full[block] = (weight[block].float() * scale[..., i : i + 1, j : j + 1]).to(dtype)
    return full

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (576, 7168), (3, 192, 448), (2, 3, 130, 5)], ids=str)
def test_each_number_is_multiplied_by_the_scale_of_its_block(shape, dtype):
    weight = random(*shape).to(E4M3)
    scale = random(*shape[:-2], *blocks_of(shape[-2:]), seed=1).exp()
    before = weight.view(torch.uint8).clone(), scale.clone()
    found = dequantise(weight, scale, dtype)
    assert found.dtype == dtype and torch.equal(found, block_by_block(weight, scale, dtype))
    assert torch.equal(weight.view(torch.uint8), before[0]) and torch.equal(scale, before[1])

@pytest.mark.parametrize(("shape", "rows"), [*((s, 128) for s in SHAPES), ((129, 127), 1), ((5, 300), 1)])
def test_the_largest_number_of_each_block_becomes_448(shape, rows):
    """Blocks of 128 x 128 as released; the experiments have tiles of 1 x 128 too."""
    weight = random(*shape) * torch.logspace(-3, 3, shape[1])
    codes, scale = quantise(weight, rows)
    assert (codes.dtype, scale.dtype) == (E4M3, torch.float32)
    assert scale.shape == (-(-shape[0] // rows), -(-shape[1] // 128))
    assert rows == 1 or scale.shape == blocks_of(shape)
    for i, row in enumerate(scale):
        for j, found in enumerate(row):
            block = slice(i * rows, i * rows + rows), slice(j * 128, j * 128 + 128)
            assert found == weight[block].abs().max() / 448
            assert codes[block].float().abs().max() == 448
            # E4M3 has 3 bits behind the point: half a step is 1/16 of a number, or 2^-10 of a scale near 0.
            rounded = codes[block].float() * found
            assert ((rounded - weight[block]).abs() <= weight[block].abs() / 16 + found * 2**-10).all()
            torch.testing.assert_close(through_fp8(weight, rows)[block], rounded)

def test_a_block_of_zeros_has_scale_one():
    weight = torch.zeros(130, 130)
    weight[129, 129] = 7.0
    codes, scale = quantise(weight)
    assert scale.tolist() == [[1, 1], [1, 7 / 448]]
    assert torch.equal(dequantise(codes, scale, torch.float32), weight)

def test_quantising_what_was_dequantised_is_exact():
    """Of a stack, as of each weight in it."""
    weights = random(2, 300, 200)
    codes, scale = quantise(weights)
    again, scale_again = quantise(dequantise(codes[1], scale[1], torch.float32))
    torch.testing.assert_close(scale_again, scale[1])
    assert torch.equal(again.view(torch.uint8), codes[1].view(torch.uint8))

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
    assert torch.equal(layer(x), F.linear(x, full, layer.bias))

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

# ---- Reading ----

def test_reads_what_torch_reads(tmp_path):
    """torch.distributed's reader, which knows these blocks too, is the oracle for every matrix."""
    saved, folder = fp8_folder(tmp_path, max_shard_size="100KB")
    stored = read(folder)
    wanted = {name: torch.zeros(t.shape) for name, t in stored.items() if t.dtype == E4M3}
    dcp.load(wanted, storage_reader=QuantizedHuggingFaceStorageReader(str(folder)), no_dist=True)
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "plain")
    plain = read(tmp_path / "plain")
    assert len(wanted) > 100
    for name, expected in wanted.items():
        assert torch.equal(plain[name], expected), name
    for name, parameter in saved.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter.float(), rtol=1 / 16, atol=1e-3)

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

@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}], ids=str)
def test_torchs_default_dtype_changes_nothing_that_is_loaded(tmp_path, options):
    """Scales, router biases and rotary frequencies stay float32."""
    _, folder = fp8_folder(tmp_path)
    plain = DeepseekV3ForCausalLM.from_pretrained(folder, **options)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model, fresh = DeepseekV3ForCausalLM.from_pretrained(folder, **options), DeepseekV3ForCausalLM(plain.config)
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, ours), (_, theirs) in zip(tensors_of(model), tensors_of(plain), strict=True):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours.float(), theirs.float()), name
        kept = name.endswith(("_scale_inv", "correction_bias", "inv_freq"))
        assert not kept or ours.dtype == torch.float32, name
    assert any(name.endswith("_scale_inv") for name, _ in tensors_of(model)) == (not options)
    assert torch.equal(model(tokens(1, 5)).logits, plain(tokens(1, 5)).logits)
    assert torch.equal(fresh.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)

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

# ---- Writing ----

def test_what_is_kept_in_fp8_is_written_bit_for_bit(tmp_path):
    _, folder = fp8_folder(tmp_path)
    DeepseekV3ForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    before, after = read(folder), read(tmp_path / "again")
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name

def test_exactly_the_released_matrices_are_quantised(tmp_path):
    """Named from the released list: it has all kinds of layers, MTP too; and no biases."""
    ragged(attention_bias=True).save_pretrained(tmp_path, quantize="fp8")
    released = {name.replace(".61.", ".3."): dtype for name, (dtype, _) in released_layout().items()}
    names = {"F8_E4M3": E4M3, "BF16": torch.bfloat16, "F32": torch.float32}
    for name, tensor in read(tmp_path).items():
        like = name.replace("layers.1.", "layers.3.").replace("layers.2.", "layers.3.")
        assert tensor.dtype == names["BF16" if name.endswith(".bias") else released[like]], name
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == FP8

def test_what_was_dequantised_is_written_plainly(tmp_path):
    _, folder = fp8_folder(tmp_path)
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not any(name.endswith("_scale_inv") for name in read(tmp_path / "plain"))
    again = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(model(tokens(1, 7)).logits, again(tokens(1, 7)).logits)

def test_one_expert_is_a_stack_too(tmp_path):
    model = ragged(n_routed_experts=1, n_group=1, topk_group=1, num_experts_per_tok=1)
    model.save_pretrained(tmp_path, quantize="fp8")
    assert "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv" in read(tmp_path)
    again = DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    assert again.model.layers[1].mlp.experts.up_proj.shape == (1, 144, 136)

# ---- Products in simulated FP8, of the experiments ----

def test_a_map_in_simulated_fp8_rounds_what_goes_into_its_three_products():
    layer, x, gradient = FP8Linear(200, 130), random(5, 200, seed=1).requires_grad_(), random(5, 130, seed=2)
    out = layer(x)
    out.backward(gradient)
    inputs, weight, gradient = through_fp8(x, 1), through_fp8(layer.weight, 128), through_fp8(gradient, 1)
    torch.testing.assert_close(out, inputs @ weight.T)
    torch.testing.assert_close(x.grad, gradient @ weight)
    torch.testing.assert_close(layer.weight.grad, gradient.T @ inputs)

def test_experts_in_simulated_fp8_are_such_maps():
    experts, gradient = FP8Experts(tiny()), random(2, 6, 32, seed=3)
    for stack in experts.parameters():
        torch.nn.init.normal_(stack)
    x, weights = random(2, 6, 32).requires_grad_(), random(2, 6, 4, seed=1).requires_grad_()
    indices = random(2, 6, 12, seed=2).topk(4).indices

    def product(name, e, rows):
        weight = getattr(experts, name)[e]
        return torch.func.functional_call(FP8Linear(1, 1), {"weight": weight}, rows)

    by_hand = torch.zeros(12, 32)
    for e in range(12):
        token, slot = torch.where(indices.view(12, 4) == e)
        rows = x.view(12, 32)[token]
        hidden = F.silu(product("gate_proj", e, rows)) * product("up_proj", e, rows)
        visits = product("down_proj", e, hidden) * weights.view(12, 4)[token, slot, None]
        by_hand = by_hand.index_add(0, token, visits)
    found, expected = experts(x, indices, weights), by_hand.view(2, 6, 32)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    inputs = (x, weights, *experts.parameters())
    gradients = (torch.autograd.grad(out, inputs, gradient) for out in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

def test_a_model_in_simulated_fp8_moves_a_little_and_keeps_its_parameters():
    plain, rounded = (build(initializer_range=0.02).train() for _ in range(2))
    before = dict(rounded.named_parameters())
    assert swap_in_fp8(rounded) is rounded
    assert all(parameter is before[name] for name, parameter in rounded.named_parameters())
    kinds = {name for name, module in rounded.named_modules() if isinstance(module, FP8Linear | FP8Experts)}
    assert len(kinds) == 4 * 5 + 3 + 3 * (3 + 1) and not any("eh_proj" in name for name in kinds)
    losses = []
    for model in (plain, rounded):
        losses.append(model(tokens(4, 16), labels=tokens(4, 16)).loss)
        losses[-1].backward()
    assert 0 < abs(losses[1] / losses[0] - 1) < 0.01
    for (name, p), (_, q) in zip(plain.named_parameters(), rounded.named_parameters(), strict=True):
        assert 0 < (p.grad - q.grad).norm() < 0.25 * p.grad.norm(), name
    with torch.no_grad():
        inside = rounded.eval()(tokens(2, 9)).logits
    torch.testing.assert_close(inside, rounded(tokens(2, 9)).logits)
