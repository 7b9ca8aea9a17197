"""Experts: who is chosen and with what weight, what comes out, how the load is kept even."""

import copy
import math

import pytest
import torch
from helpers import build, pad, router_biases, tokens

from deepseek_v3 import DeepseekV3Model, trace

E, G, K = 12, 3, 4  # of the small model; its tokens may visit 2 of 3 groups
MOE_LAYERS = 2

SHUFFLED = torch.randperm(E, generator=torch.Generator().manual_seed(5))
BIASES = {
    "zeros": torch.zeros(E), "plus five": torch.full((E,), 5.0), "minus five": torch.full((E,), -5.0),
    "negative": -torch.linspace(0.5, 4, E), "mixed": torch.linspace(-3, 3, E)[SHUFFLED],
}

def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)

def moe(bias=None, dtype=torch.float32, **changes):
    """The feed-forward of the first layer with experts."""
    layer = build(DeepseekV3Model, dtype=dtype, **changes).layers[1].mlp
    if bias is not None:
        layer.gate.e_score_correction_bias.copy_(bias)
    return layer

def states(*shape, seed=3, dtype=torch.float32, width=32):
    return torch.randn(*shape, width, generator=torch.Generator().manual_seed(seed)).to(dtype)

# ---- The router ----

def route_by_hand(x, gate, groups, picked, normalise, scaling):
    """One token's {expert: weight}, Eqs. 13–16 with the node limit, in Python numbers."""
    logits = (gate.weight.double() @ x.double()).tolist()
    scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    biased = [s + b for s, b in zip(scores, gate.e_score_correction_bias.tolist(), strict=True)]
    members = torch.arange(E).view(groups, -1).tolist()
    best_two = [sum(sorted(biased[e] for e in group)[-2:]) for group in members]
    best = sorted(range(groups), key=lambda g: best_two[g])[-picked:]
    reachable = [e for g in best for e in members[g]]
    chosen = sorted(reachable, key=lambda e: biased[e])[-K:]
    total = sum(scores[e] for e in chosen) if normalise else 1
    return {e: scores[e] / total * scaling for e in chosen}

@pytest.mark.parametrize(
    ("groups", "picked", "normalise", "scaling"),
    [(3, 2, True, 2.5), (3, 3, False, 2.5), (2, 1, True, 1), (6, 2, True, 2.5), (1, 1, False, 1)],
)
def test_the_router_is_what_the_report_says(groups, picked, normalise, scaling):
    """Biases of either sign: filling with 0 where -inf belongs would send tokens outside their groups."""
    how = dict(norm_topk_prob=normalise, routed_scaling_factor=scaling)
    for bias in BIASES.values():
        gate = moe(bias, n_group=groups, topk_group=picked, **how).gate
        x = states(2, 20)
        routing = gate(x)
        for t in range(40):
            indices, weights = (rows.flatten(0, 1)[t].tolist() for rows in routing[1:])
            expected = route_by_hand(x.flatten(0, 1)[t], gate, groups, picked, normalise, scaling)
            assert dict(zip(indices, weights, strict=True)) == pytest.approx(expected, rel=1e-4)

@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scores_are_float32_whatever_the_weights_are(dtype, autocast):
    gate = moe(dtype=dtype).gate
    x = states(2, 20, dtype=dtype)
    with torch.autocast("cpu", enabled=autocast):
        routing = gate(x)
    assert routing.scores.dtype == routing.weights.dtype == torch.float32
    # Rounding a product to bfloat16 would be off by a thousandth.
    close(routing.scores, (x.double() @ gate.weight.double().T).sigmoid().float(), 1e-6)

# ---- The bias is a float32 buffer ----

def test_casting_the_model_keeps_every_bit_of_the_bias():
    """At 5, bfloat16 steps by 0.03, and the spread of a layer's biases is about as wide."""
    model = build()
    for bias in router_biases(model):
        bias.copy_(5 + torch.linspace(0, 0.04, E))
    before = copy.deepcopy(router_biases(model))
    assert len(before) == MOE_LAYERS + 1  # and the MTP module's
    for cast in (model.half(), model.bfloat16().double(), model.to("cpu", torch.bfloat16)):
        for old, new in zip(before, router_biases(cast), strict=True):
            assert new.dtype == torch.float32
            assert torch.equal(old, new)

def test_the_bias_starts_at_zero_goes_with_the_model_is_saved_and_not_trained():
    assert all((bias == 0).all() for bias in router_biases(DeepseekV3Model(build().config)))
    model = build()
    saved = [name for name in model.state_dict() if name.endswith("e_score_correction_bias")]
    assert len(saved) == MOE_LAYERS + 1
    assert not set(saved) & {name for name, _ in model.named_parameters()}
    model.train()(tokens(2, 6), labels=tokens(2, 6)).loss.backward()
    assert all(bias.grad is None and not bias.requires_grad for bias in router_biases(model))
    assert all(block.mlp.gate.weight.grad.abs().sum() > 0 for block in model.model.layers[1:])
    moved = router_biases(model.to("meta", torch.bfloat16))
    assert {(bias.device.type, bias.dtype) for bias in moved} == {("meta", torch.float32)}

# ---- The experts ----

def experts_by_hand(layer, x):
    """Eq. 12 without the residual, a token and an expert at a time."""
    routing, experts = layer.gate(x), layer.experts
    rows = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            row = torch.zeros_like(x[b, t])
            if layer.shared_experts is not None:
                row = layer.shared_experts(x[b, t])
            chosen = zip(routing.indices[b, t].tolist(), routing.weights[b, t], strict=True)
            for e, weight in chosen:
                gate = torch.nn.functional.silu(experts.gate_proj[e] @ x[b, t])
                hidden = gate * (experts.up_proj[e] @ x[b, t])
                row = row + weight * (experts.down_proj[e] @ hidden)
            rows.append(row)
    return torch.stack(rows).view_as(x)

SHAPES = {
    "usual": {}, "odd widths": {"hidden_size": 30, "moe_intermediate_size": 13},
    "no shared expert": {"n_shared_experts": None},
    "two shared experts, one expert a token": {"n_shared_experts": 2, "num_experts_per_tok": 1},
    "one expert": dict(n_routed_experts=1, n_group=1, topk_group=1, num_experts_per_tok=1),
}

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_experts_are_a_loop_over_tokens_gradients_too(shape, dtype):
    layer = moe(dtype=dtype, **SHAPES[shape])
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    x = states(2, 6, dtype=dtype, width=layer.gate.weight.shape[1])
    found = []
    for forward in (lambda rows: layer(rows)[0], lambda rows: experts_by_hand(layer, rows)):
        layer.zero_grad()
        rows = x.clone().requires_grad_()
        out = forward(rows)
        out.square().sum().backward()
        found.append([out.detach(), rows.grad, *(p.grad.clone() for p in layer.parameters())])
    for fast, by_hand in zip(*found, strict=True):
        assert fast.dtype == dtype
        close(fast, by_hand, tolerance)

@pytest.mark.parametrize(("width", "training"), [(16, False), (16, True), (13, True)])
def test_experts_in_bfloat16_come_close(width, training):
    layer = moe(dtype=torch.bfloat16, moe_intermediate_size=width)
    x = states(2, 6, dtype=torch.bfloat16).requires_grad_(training)
    out, _ = layer(x)
    assert out.dtype == torch.bfloat16
    exact = experts_by_hand(copy.deepcopy(layer).double(), x.double())
    assert (out.double() - exact).abs().max() < 0.02 * exact.abs().max()

@pytest.mark.parametrize("width", [16, 13])
def test_an_expert_that_nobody_chose_has_a_zero_gradient(width):
    bias = torch.zeros(E)
    bias[[0, E - 1]] = -100  # the first and the last: both ends of the sorted visits
    layer = moe(bias, moe_intermediate_size=width)
    layer(states(2, 30).requires_grad_())[0].square().sum().backward()
    for weight in layer.experts.parameters():
        busy = weight.grad.flatten(1).abs().sum(-1) > 0
        assert busy.tolist() == [False] + [True] * (E - 2) + [False]

@pytest.mark.parametrize(
    ("dtype", "width", "training", "way"),
    [
        (torch.float32, 16, False, "one_by_one"),  # on a CPU the loop is as fast
        (torch.float32, 4, True, "all_at_once"),  # 16 bytes
        (torch.float32, 6, True, "one_by_one"),
        (torch.bfloat16, 8, True, "all_at_once"),
        (torch.bfloat16, 4, True, "one_by_one"),
        (torch.float64, 16, True, "one_by_one"),
    ],
    ids=str,
)
def test_the_grouped_kernel_runs_where_it_can_and_pays(monkeypatch, dtype, width, training, way):
    """Both ways give the same, in other times: so the calls are counted."""
    layer, calls = moe(dtype=dtype, moe_intermediate_size=width), []
    for name in ("all_at_once", "one_by_one"):
        monkeypatch.setattr(layer.experts, name, lambda x, *_, name=name: calls.append(name) or x)
    layer(states(2, 6, dtype=dtype).requires_grad_(training))
    assert calls == [way]

# ---- Counting loads and moving the bias ----

def train_step(model, *batches, gamma=0.01, **more):
    """Forward each (ids, mask), move the bias once: biases and MaxVio of each layer."""
    model.train()
    for ids, mask in batches:
        model(ids, mask)
    violations = model.update_router_bias(gamma, **more)
    return torch.stack(router_biases(model)), violations

def visits(model, ids, mask=None, training=False):
    """How many real tokens visit each expert of each layer, counted one by one: (layers, E)."""
    with torch.set_grad_enabled(training):
        routing = model.train(training)(ids, mask, output_routing=True).routing
    counts = torch.zeros(len(routing), E)
    for layer, decision in enumerate(routing):
        for b, t in (torch.ones_like(ids) if mask is None else mask).nonzero().tolist():
            for e in decision.indices[b, t].tolist():
                counts[layer, e] += 1
    return counts

def violations_of(counts):
    """MaxVio of each layer, from its experts' visits (layers, E)."""
    return pytest.approx((counts.amax(-1) / counts.mean(-1) - 1).tolist())

PLAIN = dict(num_nextn_predict_layers=0)

@pytest.mark.parametrize("gamma", [0.0, 0.01, None])
def test_busy_experts_fall_and_idle_ones_rise_by_gamma_and_loads_are_forgotten(gamma):
    """γ = 0.001 of §4.2, not centred, is what a call without arguments takes; 0 only measures."""
    model = build(**PLAIN)
    before, counts = torch.stack(router_biases(model)), visits(model, tokens(2, 9))
    model.train()(tokens(2, 9))
    violations = model.update_router_bias() if gamma is None else model.update_router_bias(gamma)
    after, mean = torch.stack(router_biases(model)), 2 * 9 * K / E
    assert torch.equal(counts.sum(-1), torch.full((MOE_LAYERS,), 2 * 9.0 * K))
    close(after - before, (0.001 if gamma is None else gamma) * (mean - counts).sign(), 1e-6)
    assert violations == violations_of(counts)
    assert train_step(model)[1] == [0.0] * MOE_LAYERS
    assert torch.equal(torch.stack(router_biases(model)), after)

def test_an_expert_at_the_mean_stays_where_it_is():
    """Every token visits every expert. And below one visit an expert: one token visits 4 of 12."""
    model = build(**PLAIN, num_experts_per_tok=E, topk_group=G)
    before = torch.stack(router_biases(model))
    after, violations = train_step(model, (tokens(1, 5), None))
    assert torch.equal(after, before)
    assert violations == [0.0] * MOE_LAYERS
    assert train_step(build(**PLAIN), (tokens(1, 1), None))[1] == pytest.approx([2.0] * MOE_LAYERS)

def test_loads_are_counted_for_real_and_not_saved():
    """Built on `meta` for loading, a model must count all the same; a checkpoint has no loads."""
    with torch.device("meta"):
        model = DeepseekV3Model(build().config)
    for layer in model.layers[1:]:
        assert layer.mlp.gate.load.device.type == "cpu"
        assert (layer.mlp.gate.load.dtype, layer.mlp.gate.load.sum()) == (torch.int64, 0)
    assert not any("load" in name for name in model.state_dict())

def test_padding_behind_a_cache_is_no_load():
    """The mask covers the cached tokens too; only the new ones are counted."""
    model, T = build(DeepseekV3Model).train(), 4
    cache = model(tokens(2, 3), use_cache=True).past_key_values
    model.update_router_bias(0.0)
    mask = torch.ones(2, 3 + T, dtype=torch.long)
    mask[0, 2], mask[1, 3] = 0, 0
    out = model(tokens(2, T, seed=2), mask, past_key_values=cache)
    close(out.balance_loss, sum(balance_by_hand(r, mask[:, 3:]) for r in out.routing))
    visited = [r.indices[mask[:, 3:].bool()].flatten() for r in out.routing]
    counts = torch.stack([torch.bincount(experts, minlength=E) for experts in visited]).float()
    assert model.update_router_bias(0.0) == violations_of(counts)

def test_padding_is_no_load_and_micro_batches_are_one_batch():
    rows = [tokens(9), tokens(4, seed=2), tokens(1, seed=3)]
    ids, mask = pad(rows, "left", value=5)
    alone = train_step(build(), *((row[None], None) for row in rows))
    together = train_step(build(), (ids, mask))
    assert torch.equal(together[0], alone[0])
    assert together[1] == alone[1]
    assert together[1][:MOE_LAYERS] == violations_of(visits(build(), ids, mask))

def test_evaluation_is_no_load_and_has_no_balance_loss():
    model = build()
    before = torch.stack(router_biases(model))
    assert model.eval()(tokens(2, 9), labels=tokens(2, 9)).balance_loss is None
    model.generate(tokens(1, 3), max_new_tokens=2)
    model.update_router_bias(0.01)
    assert torch.equal(torch.stack(router_biases(model)), before)

def test_loads_are_whole_numbers_that_bfloat16_does_not_round():
    """900 tokens: above 256 a bfloat16 count would skip, and near ties change sign."""
    bfloat16 = dict(dtype=torch.bfloat16, **PLAIN)
    violations = train_step(build(**bfloat16), (tokens(3, 300), None))[1]
    assert violations == violations_of(visits(build(**bfloat16), tokens(3, 300), training=True))

def test_checkpointing_has_the_same_gradients_and_counts_once():
    """One of two unlike batches is recomputed: counted twice, it would outweigh the other."""
    found = []
    for recompute in (False, True):
        model, gradients = build(dtype=torch.float64).train(), []
        for ids, flag in ((tokens(2, 9), recompute), (tokens(2, 5, seed=2), False)):
            model.gradient_checkpointing = flag
            model(ids, labels=ids).loss.backward()
            gradients += [parameter.grad.clone() for parameter in model.parameters()]
        violations = model.update_router_bias(0.01)
        found.append((gradients, violations, torch.stack(router_biases(model)).tolist()))
    for plain, recomputed in zip(found[0][0], found[1][0], strict=True):
        close(recomputed, plain, 1e-10)
    assert found[0][1:] == found[1][1:]
    counts = visits(build(dtype=torch.float64), tokens(2, 9))
    counts += visits(build(dtype=torch.float64), tokens(2, 5, seed=2))
    assert found[0][1][:MOE_LAYERS] == violations_of(counts)

@pytest.mark.parametrize(
    ("asked", "training", "runs"), [(False, True, 1), (True, True, 2), (True, False, 1)]
)
def test_layers_are_recomputed_where_asked_for_only(asked, training, runs):
    model, seen = build().train(training), []
    assert model.gradient_checkpointing is model.model.gradient_checkpointing is False
    model.model.gradient_checkpointing = asked
    assert model.gradient_checkpointing is asked
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    model(tokens(1, 4)).logits.sum().backward()
    assert len(seen) == runs

def test_the_routers_of_mtp_modules_are_balanced_too():
    model = build(num_nextn_predict_layers=2, balance_loss_weight=0.05).train()
    before = torch.stack(router_biases(model))
    with trace(model, "mlp.gate") as seen:
        out = model(tokens(2, 9), labels=tokens(2, 9))
    by_hand = [balance_by_hand(r, torch.ones(r.scores.shape[:2])).mean() for r in seen.values()]
    assert len(by_hand) == MOE_LAYERS + 2
    close(out.balance_loss, sum(by_hand))
    visited = [routing.indices.flatten() for routing in seen.values()]
    counts = torch.stack([torch.bincount(experts, minlength=E) for experts in visited]).float()
    assert model.update_router_bias(0.01) == violations_of(counts)
    step = 0.01 * (counts.mean(-1, keepdim=True) - counts).sign()
    close(torch.stack(router_biases(model)) - before, step, 1e-6)

def test_the_centred_step_makes_the_same_choices_and_does_not_drift():
    plain, centred = build(), build()
    start = torch.stack(router_biases(plain)).mean(-1)
    for step in range(5):
        ids = tokens(2, 9, seed=step)
        moved = train_step(plain, (ids, None), gamma=0.05)[0]
        kept = train_step(centred, (ids, None), gamma=0.05, centred=True)[0]
    close(kept.mean(-1), start, 1e-5)
    difference = moved - kept
    close(difference, difference.mean(-1, keepdim=True).expand_as(difference), 1e-5)
    assert difference.abs().max() > 1e-3
    for a, b in zip(*(visits(m, tokens(2, 9)) for m in (plain, centred)), strict=True):
        assert torch.equal(a, b)

def test_a_single_process_needs_no_distributed_torch(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_initialized", raising=False)
    before = torch.stack(router_biases(build()))
    assert not torch.equal(train_step(build(), (tokens(2, 9), None))[0], before)

def test_a_model_without_experts_has_nothing_to_move():
    model = build(first_k_dense_replace=9).train()
    model(tokens(1, 4), labels=tokens(1, 4)).loss.backward()
    assert model.update_router_bias(0.01) == []

# ---- The sequence-wise balance loss ----

def balance_by_hand(routing, mask):
    """Eqs. 17–20 of one layer without alpha, in loops, of each sequence -> (B)."""
    losses = []
    for scores, real in zip(routing.scores, mask, strict=True):
        rows = [row.tolist() for row, keep in zip(scores, real.tolist(), strict=True) if keep]
        loss = 0.0
        for i in range(E):
            f = P = 0.0
            for row in rows:
                top = sorted(range(E), key=lambda e, row=row: row[e])[-K:]  # no bias in Eq. 18
                f += (i in top) * E / (K * len(rows))
                P += row[i] / sum(row) / len(rows)
            loss += f * P
        losses.append(loss)
    return torch.tensor(losses)

@pytest.mark.parametrize("side", [None, "left"])
def test_the_balance_loss_is_what_the_report_says_and_teaches_the_router(side):
    ids, mask = tokens(3, 9), None
    if side:
        ids, mask = pad([tokens(9), tokens(5, seed=2), tokens(1, seed=3)], side)
    model = build(DeepseekV3Model).train()
    out = model(ids, mask)
    real = torch.ones_like(ids) if mask is None else mask
    close(out.balance_loss, sum(balance_by_hand(routing, real) for routing in out.routing))
    out.balance_loss.sum().backward()
    assert all(layer.mlp.gate.weight.grad.abs().sum() > 0 for layer in model.layers[1:])
