"""Numbers at the edges: bfloat16 and outliers, nothing to see or to choose, long and many inputs."""

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import build, router_biases, tokens

import deepseek_v3
from deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM

HERE = Path(__file__).parent

# ---- Precision ----

def with_outliers(model, factor, seed):
    """One weight in 500 of each matrix is `factor` times as large, as in trained models."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                large = torch.rand(parameter.shape, generator=random) < 1 / 500
                parameter.mul_(torch.where(large, factor, 1.0).to(parameter.dtype))
    return model

@torch.no_grad()
@pytest.mark.parametrize("factor", [1, 100])
def test_bfloat16_stays_close_to_float32(factor):
    """Half of all tokens within 2 % of the logits' norm, nine in ten within 5 %; few change an expert."""
    errors, moved = [], []
    for seed in range(8):
        model = with_outliers(build(seed=seed, dtype=torch.bfloat16, initializer_range=0.1), factor, seed)
        exact, ids = copy.deepcopy(model).float(), tokens(4, 16, seed=seed)
        rough, fine = model(ids, output_routing=True), exact(ids, output_routing=True)
        assert rough.logits.dtype == torch.bfloat16 and rough.logits.isfinite().all()
        errors.append((rough.logits - fine.logits).norm(dim=-1) / fine.logits.norm(dim=-1))
        for one, two in zip(rough.routing, fine.routing, strict=True):
            moved.append((one.indices.sort().values != two.indices.sort().values).any(-1))
    errors = torch.stack(errors).flatten()
    assert errors.median() < 0.02 and errors.quantile(0.9) < 0.05
    assert torch.stack(moved).float().mean() < 0.05

# ---- Nothing to see, nothing to choose ----

def all_finite(out, model):
    gradients = [parameter.grad for parameter in model.parameters()]
    assert out.loss.isfinite() and out.logits.isfinite().all()
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)

def labelled(model, ids, mask=None):
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    out = model(ids, mask, labels=labels, output_routing=True)
    out.loss.backward()
    return out

MASKS = [[[0] * 6, [1] * 6], [[0] * 6] * 2, [[0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0]]]

@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_rows_without_a_token_give_no_nan(mask):
    model, ids = build(dtype=torch.bfloat16).train(), tokens(2, 6)
    all_finite(labelled(model, ids, torch.tensor(mask)), model)
    out = model.generate(ids, torch.tensor(mask), max_new_tokens=3, use_mtp=True, eos_token_id=-1)
    assert out.shape == (2, 9)

def test_scores_that_underflow_give_no_nan():
    model = build().train()
    with torch.no_grad():
        for block in model.model.layers[1:]:
            block.mlp.gate.weight.copy_(-1e4 * torch.ones_like(block.mlp.gate.weight))
    out = labelled(model, tokens(2, 12))
    assert any((routing.scores.sum(-1) == 0).any() for routing in out.routing)
    assert all(routing.weights.isfinite().all() for routing in out.routing)
    all_finite(out, model)
    model.update_router_bias(0.01)
    assert all(bias.isfinite().all() for bias in router_biases(model))

# ---- Too long, long, many ----

def long_warnings(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]

def test_positions_past_the_limit_warn_at_each_call_and_are_counted_through_the_cache():
    model = build(max_position_embeddings=8, num_nextn_predict_layers=0)
    assert not long_warnings(lambda: model(tokens(1, 8)))
    for length in (11, 12):
        (message,) = long_warnings(lambda length=length: model(tokens(1, length)))
        assert f"{length} positions" in message and "max_position_embeddings=8" in message
    found = long_warnings(lambda: model.generate(tokens(2, 5), max_new_tokens=6, eos_token_id=-1))
    assert [message.split(",")[0] for message in found] == ["9 positions", "10 positions"]
    dense = build(max_position_embeddings=8, first_k_dense_replace=9).to("meta")
    assert long_warnings(lambda: dense(tokens(1, 9).to("meta")))  # read off no number on a device

PEAKS = """
import json, resource, sys, torch
sys.path[:0] = sys.argv[1:]
from helpers import build, tokens
torch.set_num_threads(1)
small = dict(num_hidden_layers=1, first_k_dense_replace=0, num_attention_heads=2, hidden_size=32)
small |= dict(n_routed_experts=4, n_group=1, topk_group=1, max_position_embeddings=10**5)
model = build(**small, num_nextn_predict_layers=1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
model.generate(tokens(2, 9), max_new_tokens=3)
before, peaks = peak(), {}
with torch.no_grad():
    mask = torch.ones(32, 512, dtype=torch.long)
    mask[0, :100] = 0
    model.generate(tokens(32, 512), mask, max_new_tokens=8, use_mtp=True)
    peaks["32 rows of 512"] = peak() - before
    cache = model(tokens(1, 20_480), use_cache=True, logits_to_keep=1).past_key_values
    peaks["20k at once"] = peak() - before
    for new in (1, 8, 500):
        model(tokens(1, new), past_key_values=cache, logits_to_keep=1)
    peaks["chunks behind 20k"] = peak() - before
print(json.dumps(peaks))
"""

def test_many_rows_and_long_contexts_take_bounded_memory():
    """A matrix of 20k x 20k for two heads would be 3.1 GiB, one of booleans for all heads 400 MiB."""
    command = [sys.executable, "-c", PEAKS, str(HERE), str(HERE.parent)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    peaks = json.loads(run.stdout)
    assert max(peaks.values()) < 300, f"MiB: {peaks}"

# ---- Products of a few rows on a CPU --------------------------------------------------------------

@pytest.mark.parametrize(("shape", "bias"), [((512, 256), False), ((257, 600), True), ((40, 30), True)], ids=str)
@pytest.mark.parametrize("rows", [(0,), (1, 1), (2, 2), (5,)], ids=str)
def test_a_product_of_few_rows_is_the_product(rows, shape, bias):
    """Large and small weights, an odd number of outputs, and results and gradients of each way."""
    generator = torch.Generator().manual_seed(0)
    n_out, n_in = shape
    given = [torch.randn(*size, generator=generator) for size in ((*rows, n_in), shape, (n_out,))]
    given = given if bias else given[:2]
    found, exact = ([v.clone().to(d).requires_grad_() for v in given] for d in (torch.float32, torch.float64))
    y = deepseek_v3.linear(*found[:2], None, *found[2:])
    expected = torch.nn.functional.linear(*exact)
    assert y.shape == (*rows, n_out) and y.dtype == torch.float32
    y.square().sum().backward(), expected.square().sum().backward()
    grads = ((a.grad, b.grad) for a, b in zip(found, exact, strict=True))
    for a, b in [(y, expected), *grads]:
        close = 1e-5 * b.abs().max().item() if b.numel() else 0
        torch.testing.assert_close(a.double(), b, rtol=0, atol=close)

@pytest.mark.parametrize(
    ("rows", "shape", "dtype", "plain"),
    [
        (4, (512, 256), torch.float32, False),
        (5, (512, 256), torch.float32, True),
        (1, (511, 256), torch.float32, True),  # small
        (1, (512, 256), torch.bfloat16, True),
    ],
    ids=str,
)
def test_few_rows_by_a_large_weight_go_another_way(monkeypatch, rows, shape, dtype, plain):
    """Both ways give the same, in other times: so the calls are counted."""
    calls, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda *a: (calls.append(1), linear(*a))[1]
    )
    deepseek_v3.linear(torch.ones(rows, shape[1], dtype=dtype), torch.ones(*shape, dtype=dtype))
    assert len(calls) == plain

def test_decoding_by_large_weights_is_reading_the_prompt_at_once():
    """The ways that small models, and so most tests, do not take."""
    wide = dict(hidden_size=512, moe_intermediate_size=256, intermediate_size=512, vocab_size=4096)
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config.tiny(**wide, num_hidden_layers=2)).eval()
    ids = torch.randint(0, 4096, (1, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, cache, parts = model(ids).logits, deepseek_v3.LatentCache(), []
        for size in (1, 1, 3, 2, 1):  # a token, and a token with its drafts
            chunk = ids[:, cache.length : cache.length + size]
            parts.append(model(chunk, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
