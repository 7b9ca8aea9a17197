"""Experts: who is chosen and with what weight, what comes out, how the load is kept even."""

import copy
import math

import pytest
import torch
from helpers import build, pad, router_biases, tokens

from deepseek_v3 import DeepseekV3Model, trace

E, G, K, SCALING = 12, 3, 4, 2.5  # of the small model; its tokens may visit 2 of 3 groups
MOE_LAYERS = 2

SHUFFLED = torch.randperm(E, generator=torch.Generator().manual_seed(5))
BIASES = {
    "zeros": torch.zeros(E),
    "plus five": torch.full((E,), 5.0),
    "minus five": torch.full((E,), -5.0),
    "negative": -torch.linspace(0.5, 4, E),
    "mixed": torch.linspace(-3, 3, E)[SHUFFLED],
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


def route_by_hand(x, gate, groups, picked):
    """One token's {expert: weight}, Eqs. 13–16 with the node limit, in Python numbers."""
    logits = (gate.weight.double() @ x.double()).tolist()
    scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    biased = [s + b for s, b in zip(scores, gate.e_score_correction_bias.tolist(), strict=True)]
    size = E // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    best_two = [sum(sorted(biased[e] for e in group)[-2:]) for group in members]
    best = sorted(range(groups), key=lambda g: best_two[g])[-picked:]
    reachable = [e for g in best for e in members[g]]
    chosen = sorted(reachable, key=lambda e: biased[e])[-K:]
    total = sum(scores[e] for e in chosen)
    return {e: scores[e] / total * SCALING for e in chosen}


@pytest.mark.parametrize(("groups", "picked"), [(3, 2), (3, 3), (2, 1), (6, 2), (1, 1)])
@pytest.mark.parametrize("bias", BIASES)
def test_the_router_is_what_the_report_says(bias, groups, picked):
    gate = moe(BIASES[bias], n_group=groups, topk_group=picked).gate
    x = states(2, 20)
    routing = gate(x)
    for b in range(2):
        for t in range(20):
            found = dict(
                zip(routing.indices[b, t].tolist(), routing.weights[b, t].tolist(), strict=True)
            )
            expected = route_by_hand(x[b, t], gate, groups, picked)
            assert found == pytest.approx(expected, rel=1e-4)


def groups_of(indices):
    return indices // (E // G)


@pytest.mark.parametrize("bias", BIASES)
def test_a_token_stays_inside_its_best_groups(bias):
    gate = moe(BIASES[bias]).gate
    visited = groups_of(gate(states(4, 50)).indices).flatten(0, 1)
    assert max(len(set(row)) for row in visited.tolist()) <= 2


def test_experts_outside_the_groups_lose_even_to_negative_scores():
    """Filling with 0 where -inf belongs sends every token outside its groups here."""
    gate = moe(torch.full((E,), -1.5)).gate
    routing = gate(states(4, 50))
    biased = (routing.scores - 1.5).unflatten(-1, (G, E // G))
    best = biased.topk(2, -1).values.sum(-1).topk(2).indices  # (B, T, 2)
    inside = groups_of(routing.indices).unsqueeze(-1) == best.unsqueeze(-2)
    assert inside.any(-1).all()


@pytest.mark.parametrize("shift", [-7.0, -1.0, 0.5, 5.0])
@pytest.mark.parametrize("bias", BIASES)
def test_a_constant_on_all_biases_changes_no_choice(bias, shift):
    x = states(4, 50)
    before = moe(BIASES[bias]).gate(x).indices.sort(-1).values
    after = moe(BIASES[bias] + shift).gate(x).indices.sort(-1).values
    assert torch.equal(before, after)


@pytest.mark.parametrize("bias", BIASES)
def test_weights_come_from_unbiased_scores(bias):
    routing = moe(BIASES[bias]).gate(states(2, 20))
    chosen = routing.scores.gather(-1, routing.indices)
    close(routing.weights, chosen / chosen.sum(-1, keepdim=True) * SCALING)


@pytest.mark.parametrize("scaling", [1, 2.446])
def test_weights_sum_to_the_scaling_factor(scaling):
    weights = moe(routed_scaling_factor=scaling).gate(states(2, 20)).weights
    close(weights.sum(-1), torch.full((2, 20), float(scaling)))


def test_unnormalised_weights_are_the_scores():
    routing = moe(norm_topk_prob=False).gate(states(2, 20))
    close(routing.weights, routing.scores.gather(-1, routing.indices) * SCALING)


def test_the_bias_moves_the_choice_and_not_the_scores():
    x = states(2, 20)
    without, with_bias = moe(torch.zeros(E)).gate(x), moe(BIASES["mixed"]).gate(x)
    assert torch.equal(without.scores, with_bias.scores)
    assert not torch.equal(without.indices.sort(-1).values, with_bias.indices.sort(-1).values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scores_are_float32_whatever_the_weights_are(dtype):
    gate = moe(dtype=dtype).gate
    x = states(2, 20, dtype=dtype)
    routing = gate(x)
    assert routing.scores.dtype == routing.weights.dtype == torch.float32
    # Rounding a product to bfloat16 would be off by a thousandth.
    close(routing.scores, (x.double() @ gate.weight.double().T).sigmoid().float(), 1e-6)


def test_underflowing_scores_give_no_nan():
    gate = moe(torch.zeros(E)).gate
    with torch.no_grad():
        gate.weight.fill_(-100.0)
    routing = gate(torch.ones(1, 3, 32))
    assert (routing.scores == 0).all()
    assert routing.weights.isfinite().all()


# ---- The bias is a float32 buffer ----

CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "there and back": lambda model: model.bfloat16().float(),
    "to device and dtype": lambda model: model.to("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casting_the_model_keeps_every_bit_of_the_bias(cast):
    """At 5, bfloat16 steps by 0.03, and the spread of a layer's biases is about as wide."""
    model = build()
    for bias in router_biases(model):
        bias.copy_(5 + torch.linspace(0, 0.04, E))
    before = copy.deepcopy(router_biases(model))
    after = router_biases(CASTS[cast](model))
    assert len(after) == MOE_LAYERS + 1  # and the MTP module's
    for old, new in zip(before, after, strict=True):
        assert new.dtype == torch.float32
        assert torch.equal(old, new)


def test_the_bias_goes_where_the_model_goes():
    model = build().to("meta", torch.bfloat16)
    assert {(b.device.type, b.dtype) for b in router_biases(model)} == {("meta", torch.float32)}


def test_the_bias_is_saved_and_not_trained():
    model = build()
    named = [name for name, _ in model.named_parameters()]
    saved = [name for name in model.state_dict() if name.endswith("e_score_correction_bias")]
    assert len(saved) == MOE_LAYERS + 1
    assert not set(saved) & set(named)
    model.train()(tokens(2, 6), labels=tokens(2, 6)).loss.backward()
    assert all(bias.grad is None and not bias.requires_grad for bias in router_biases(model))


def test_a_new_bias_is_zero():
    model = DeepseekV3Model(build().config)
    assert all((bias == 0).all() for bias in router_biases(model))


def test_the_router_learns_through_the_weights():
    layer = moe()
    layer(states(2, 6)).square().sum().backward()
    assert layer.gate.weight.grad.abs().sum() > 0


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
    "usual": {},
    "odd widths": {"hidden_size": 30, "moe_intermediate_size": 13},
    "no shared expert": {"n_shared_experts": None},
    "zero shared experts": {"n_shared_experts": 0},
    "two shared experts": {"n_shared_experts": 2},
    "one expert a token": {"num_experts_per_tok": 1},
    "one expert": dict(n_routed_experts=1, n_group=1, topk_group=1, num_experts_per_tok=1),
}


@pytest.mark.parametrize(("shared", "width"), [(None, None), (0, None), (1, 16), (2, 32)])
def test_shared_experts_are_one_that_is_as_wide_as_all(shared, width):
    found = moe(n_shared_experts=shared).shared_experts
    assert (found and found.up_proj.weight.shape) == (width and (width, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_experts_are_a_loop_over_tokens_gradients_too(shape, dtype):
    layer = moe(dtype=dtype, **SHAPES[shape])
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    x = states(2, 6, dtype=dtype, width=layer.gate.weight.shape[1])
    found = []
    for forward in (layer, lambda rows: experts_by_hand(layer, rows)):
        layer.zero_grad()
        rows = x.clone().requires_grad_()
        out = forward(rows)
        out.square().sum().backward()
        found.append([out.detach(), rows.grad, *(p.grad.clone() for p in layer.parameters())])
    for fast, by_hand in zip(*found, strict=True):
        assert fast.dtype == dtype
        close(fast, by_hand, tolerance)


@pytest.mark.parametrize("width", [16, 13])
def test_experts_in_bfloat16_come_close(width):
    layer = moe(dtype=torch.bfloat16, moe_intermediate_size=width)
    x = states(2, 6, dtype=torch.bfloat16)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    exact = experts_by_hand(copy.deepcopy(layer).double(), x.double())
    assert (out.double() - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("width", [16, 13])
def test_an_expert_that_nobody_chose_has_a_zero_gradient(width):
    bias = torch.zeros(E)
    bias[[0, E - 1]] = -100  # the first and the last: both ends of the sorted visits
    layer = moe(bias, moe_intermediate_size=width)
    layer(states(2, 30)).square().sum().backward()
    for weight in layer.experts.parameters():
        busy = weight.grad.flatten(1).abs().sum(-1) > 0
        assert busy.tolist() == [False] + [True] * (E - 2) + [False]


@pytest.mark.parametrize(
    ("dtype", "width", "training", "grouped"),
    [
        (torch.float32, 16, True, True),
        (torch.float32, 16, False, False),  # on a CPU the loop is as fast
        (torch.float32, 4, True, True),  # 16 bytes
        (torch.float32, 6, True, False),
        (torch.bfloat16, 8, True, True),
        (torch.bfloat16, 4, True, False),
        (torch.float64, 16, True, False),
    ],
    ids=str,
)
def test_the_grouped_kernel_runs_where_it_can_and_pays(monkeypatch, dtype, width, training, grouped):
    """Both ways give the same, in other times: so the calls are counted."""
    layer, calls = moe(dtype=dtype, moe_intermediate_size=width).experts, []
    for way in ("all_at_once", "one_by_one"):
        work = getattr(layer, way)
        monkeypatch.setattr(layer, way, lambda *a, w=work, n=way: (calls.append(n), w(*a))[1])
    x = states(2, 6, dtype=dtype).requires_grad_(training)
    indices = torch.tensor([[0, 2, 5]]).expand(2, 6, 3)
    weights = torch.rand(2, 6, 3, generator=torch.Generator().manual_seed(0))
    out = layer(x, indices, weights.to(torch.promote_types(dtype, torch.float32)))
    assert calls == ["all_at_once" if grouped else "one_by_one"]
    assert out.dtype == dtype
    exact = torch.zeros(2, 6, 32, dtype=torch.float64)
    rows = x.detach().double()
    for k, e in enumerate((0, 2, 5)):
        gate, up, down = (w[e].detach().double() for w in (layer.gate_proj, layer.up_proj, layer.down_proj))
        hidden = torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)
        exact += weights[..., k, None].double() * (hidden @ down.T)
    tolerance = 0.02 * exact.abs().max() if dtype == torch.bfloat16 else 1e-5
    assert (out.double() - exact).abs().max() < tolerance


def test_a_single_token_visits_its_experts():
    layer = moe()
    close(layer(states(1, 1)), experts_by_hand(layer, states(1, 1)))


# ---- Counting loads and moving the bias ----


def train_step(model, *batches, gamma=0.01, **more):
    """Forward each (ids, mask), move the bias once: biases and MaxVio of each layer."""
    model.train()
    for ids, mask in batches:
        model(ids, mask)
    violations = model.update_router_bias(gamma, **more)
    return torch.stack(router_biases(model)), violations


def visits(model, ids, mask=None):
    """How many real tokens visit each expert of each layer, counted one by one: (layers, E)."""
    with torch.no_grad():
        routing = model.eval()(ids, mask, output_routing=True).routing
    counts = torch.zeros(len(routing), E)
    for layer, decision in enumerate(routing):
        for b, t in (torch.ones_like(ids) if mask is None else mask).nonzero().tolist():
            for e in decision.indices[b, t].tolist():
                counts[layer, e] += 1
    return counts


def test_busy_experts_fall_and_idle_ones_rise_by_gamma():
    model = build(num_nextn_predict_layers=0)
    before, counts = torch.stack(router_biases(model)), visits(model, tokens(2, 9))
    after, violations = train_step(model, (tokens(2, 9), None), gamma=0.01)
    mean = 2 * 9 * K / E
    assert torch.equal(counts.sum(-1), torch.full((MOE_LAYERS,), 2 * 9.0 * K))
    close(after - before, 0.01 * (mean - counts).sign(), 1e-6)
    assert violations == pytest.approx((counts.amax(-1) / mean - 1).tolist())


def test_an_expert_at_the_mean_stays_where_it_is():
    """Every token visits every expert."""
    model = build(num_nextn_predict_layers=0, num_experts_per_tok=E, topk_group=G)
    before = torch.stack(router_biases(model))
    after, violations = train_step(model, (tokens(1, 5), None))
    assert torch.equal(after, before)
    assert violations == [0.0] * MOE_LAYERS


def test_gamma_scales_the_step_and_zero_only_measures():
    start = torch.stack(router_biases(build()))
    by_gamma = {g: train_step(build(), (tokens(2, 9), None), gamma=g) for g in (0.0, 0.001, 0.1)}
    assert torch.equal(by_gamma[0.0][0], start)
    close((by_gamma[0.1][0] - start) / 100, by_gamma[0.001][0] - start, 1e-6)
    assert by_gamma[0.0][1] == by_gamma[0.1][1]


def test_the_report_moves_by_a_thousandth_and_not_centred():
    """γ = 0.001 of §4.2 is what a call without arguments takes."""
    asked, default = build().train(), build().train()
    for model in (asked, default):
        model(tokens(2, 9))
    asked.update_router_bias(0.001, centred=False)
    default.update_router_bias()
    assert torch.equal(torch.stack(router_biases(asked)), torch.stack(router_biases(default)))


def test_the_violation_of_a_load_below_one_visit_an_expert():
    """One token: 4 of 12 experts are visited once, three times their mean of 1/3."""
    violations = train_step(build(num_nextn_predict_layers=0), (tokens(1, 1), None))[1]
    assert violations == pytest.approx([2.0] * MOE_LAYERS)


def test_loads_are_counted_for_real_and_not_saved():
    """Built on `meta` for loading, a model must count all the same; a checkpoint has no loads."""
    with torch.device("meta"):
        model = DeepseekV3Model(build().config)
    for layer in model.layers[1:]:
        assert layer.mlp.gate.load.device.type == "cpu"
        assert (layer.mlp.gate.load.dtype, layer.mlp.gate.load.sum()) == (torch.int64, 0)
    assert not any("load" in name for name in model.state_dict())


@pytest.mark.parametrize("T", [2, 4])
def test_padding_behind_a_cache_is_no_load(T):
    """The mask covers the cached tokens too; only the new ones are counted."""
    model = build(num_nextn_predict_layers=0).train()
    cache = model(tokens(2, 3), use_cache=True).past_key_values
    model.update_router_bias(0.0)
    mask = torch.ones(2, 3 + T, dtype=torch.long)
    mask[0, 2], mask[1, 3] = 0, 0
    out = model(tokens(2, T, seed=2), mask, past_key_values=cache, output_routing=True)
    counts = torch.zeros(MOE_LAYERS, E)
    for layer, decision in enumerate(out.routing):
        for e in decision.indices[mask[:, 3:].bool()].flatten().tolist():
            counts[layer, e] += 1
    expected = sum(balance_by_hand(r, mask[:, 3:]) for r in out.routing)
    assert out.balance_loss.item() == pytest.approx(expected, rel=1e-5)
    found = model.update_router_bias(0.0)
    assert found == pytest.approx((counts.amax(-1) / counts.mean(-1) - 1).tolist())


def test_loads_are_forgotten_after_the_update():
    model = build()
    train_step(model, (tokens(2, 9), None))
    held = torch.stack(router_biases(model))
    again, violations = train_step(model)
    assert torch.equal(again, held)
    assert violations == [0.0] * (MOE_LAYERS + 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_load(side):
    rows = [tokens(9), tokens(4, seed=2), tokens(1, seed=3)]
    ids, mask = pad(rows, side, value=5)
    plain = dict(num_nextn_predict_layers=0)
    alone = train_step(build(**plain), *((row[None], None) for row in rows))
    together = train_step(build(**plain), (ids, mask))
    assert torch.equal(together[0], alone[0])
    assert together[1] == alone[1]
    counts = visits(build(**plain), ids, mask)
    assert together[1] == pytest.approx((counts.amax(-1) / (14 * K / E) - 1).tolist())


def test_evaluation_is_no_load():
    model = build()
    before = torch.stack(router_biases(model))
    model.eval()(tokens(2, 9), labels=tokens(2, 9))
    model.generate(tokens(1, 3), max_new_tokens=2)
    model.update_router_bias(0.01)
    assert torch.equal(torch.stack(router_biases(model)), before)


def test_four_micro_batches_are_one_batch():
    ids = tokens(4, 9)
    whole = train_step(build(), (ids, None))
    parts = train_step(build(), *((row[None], None) for row in ids))
    assert torch.equal(whole[0], parts[0])
    assert whole[1] == parts[1]


def test_loads_are_whole_numbers_that_bfloat16_does_not_round():
    """300 tokens: above 256 a bfloat16 count would skip, and near ties change sign."""
    ids = tokens(3, 300)
    whole = train_step(build(dtype=torch.bfloat16, num_nextn_predict_layers=0), (ids, None))
    counts = visits(build(dtype=torch.bfloat16, num_nextn_predict_layers=0), ids)
    assert whole[1] == pytest.approx((counts.amax(-1) / (900 * K / E) - 1).tolist(), rel=1e-6)


def test_checkpointing_has_the_same_gradients():
    found = []
    for recompute in (False, True):
        model = build(dtype=torch.float64).train()
        model.model.gradient_checkpointing = recompute
        loss = model(tokens(2, 9), labels=tokens(2, 9)).loss
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in model.parameters())])
    for plain, recomputed in zip(*found, strict=True):
        close(recomputed, plain, 1e-10)


@pytest.mark.parametrize(
    ("asked", "training", "runs"), [(False, True, 1), (True, True, 2), (True, False, 1)]
)
def test_layers_are_recomputed_where_asked_for_only(asked, training, runs):
    model, seen = build().train(training), []
    assert model.model.gradient_checkpointing is False
    model.model.gradient_checkpointing = asked
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    model(tokens(1, 4)).logits.sum().backward()
    assert len(seen) == runs


def test_checkpointing_counts_once():
    """One of two unlike batches is recomputed: counted twice, it would outweigh the other."""
    found = []
    for recompute in (False, True):
        model = build(num_nextn_predict_layers=0).train()
        for ids, flag in ((tokens(2, 9), recompute), (tokens(2, 5, seed=2), False)):
            model.model.gradient_checkpointing = flag
            model(ids, labels=ids).loss.backward()
        violations = model.update_router_bias(0.01)
        found.append((violations, torch.stack(router_biases(model)).tolist()))
    counts = visits(build(num_nextn_predict_layers=0), tokens(2, 9))
    counts += visits(build(num_nextn_predict_layers=0), tokens(2, 5, seed=2))
    assert found[0] == found[1]
    assert found[0][0] == pytest.approx((counts.amax(-1) / (28 * K / E) - 1).tolist())


def test_the_routers_of_mtp_modules_are_balanced_too():
    model = build(num_nextn_predict_layers=2).train()
    before = torch.stack(router_biases(model))
    with trace(model, "layers.3.mlp.gate", "layers.4.mlp.gate") as seen:
        model(tokens(2, 9), labels=tokens(2, 9))
    violations = model.update_router_bias(0.01)
    moved = torch.stack(router_biases(model)) - before
    assert len(violations) == MOE_LAYERS + 2
    for place, name in ((-2, "model.layers.3.mlp.gate"), (-1, "model.layers.4.mlp.gate")):
        counts = torch.bincount(seen[name].indices.flatten(), minlength=E).float()
        close(moved[place], 0.01 * (counts.mean() - counts).sign(), 1e-6)
        assert violations[place] == pytest.approx((counts.max() / counts.mean() - 1).item())


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


def test_updates_even_out_the_load():
    model = build(num_nextn_predict_layers=0)
    batch = (tokens(4, 30), None)
    first = train_step(model, batch, gamma=0.2)[1]
    for step in range(30):
        last = train_step(model, batch, gamma=0.2 * 0.85**step)[1]
    assert max(last) < 0.2 * max(first)


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
    """Eqs. 17–20 of one layer without alpha, in loops; mean over the sequences."""
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
    return sum(losses) / len(losses)


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_the_balance_loss_is_what_the_report_says(side):
    ids, mask = tokens(3, 9), None
    if side:
        ids, mask = pad([tokens(9), tokens(5, seed=2), tokens(1, seed=3)], side)
    model = build(num_nextn_predict_layers=0).train()
    out = model(ids, mask, output_routing=True)
    real = torch.ones_like(ids) if mask is None else mask
    expected = sum(balance_by_hand(routing, real) for routing in out.routing)
    assert out.balance_loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_balance_loss_includes_mtp_modules():
    model = build().train()
    with trace(model, "mlp.gate") as seen:
        out = model(tokens(2, 9), labels=tokens(2, 9))
    expected = sum(balance_by_hand(r, torch.ones(r.scores.shape[:2])) for r in seen.values())
    assert len(seen) == MOE_LAYERS + 1
    assert out.balance_loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_balance_loss_teaches_the_router():
    model = build(num_nextn_predict_layers=0).train()
    model(tokens(2, 9)).balance_loss.backward()
    gradients = [layer.mlp.gate.weight.grad for layer in model.model.layers[1:]]
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_evaluation_has_no_balance_loss():
    assert build()(tokens(2, 9), labels=tokens(2, 9)).balance_loss is None
