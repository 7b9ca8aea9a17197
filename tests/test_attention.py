"""Attention: rotary positions, both orders of the same products, latent cache, masks, watching."""

import math

import pytest
import torch
from helpers import SHORT_YARN, build, pad, tiny, tokens

from deepseek_v3 import MLA, DeepseekV3Model, LatentCache, apply_rope, attention_pattern
from deepseek_v3 import key_mask, trace

LAYERS, C, R, H, E, K = 3, 11, 8, 3, 12, 4  # of the small model


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def model():
    """In float64, so that only a mistake, and not rounding, can show."""
    return build(dtype=torch.float64)


@pytest.fixture(params=[True, False], ids=["absorbed", "expanded"])
def either_order(request, monkeypatch):
    """Attention forced into one of its two forms."""
    monkeypatch.setattr(MLA, "absorbing_is_cheaper", lambda self, T, S: request.param)


@torch.no_grad()
def logits(model, ids, **more):
    return model(ids, **more).logits


@torch.no_grad()
def in_chunks(model, ids, sizes, mask=None):
    """Logits of all tokens, fed through a cache in chunks; and the cache."""
    cache, chunks = None, []
    for end, size in zip(torch.tensor(sizes).cumsum(0).tolist(), sizes, strict=True):
        held = None if mask is None else mask[:, :end]
        out = model(ids[:, end - size : end], held, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        chunks.append(out.logits)
    return torch.cat(chunks, 1), cache


# ---- Rotary positions ----


def rotate(x, positions, **changes):
    """RoPE on x (T, R) at the given positions."""
    rotary = DeepseekV3Model(tiny(**changes)).rotary_emb
    return apply_rope(x[None, :, None], rotary(torch.tensor(positions)[None]))[0, :, 0]


def test_position_0_is_not_turned():
    x = torch.randn(5, R, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rotate(x, [0] * 5), x)


def test_turning_keeps_the_norm():
    x = torch.randn(6, R, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, [0, 1, 7, 100, 3000, 9999])
    close(turned.norm(dim=-1), x.norm(dim=-1), 1e-5)


@pytest.mark.parametrize("shift", [1, 13, 200])
def test_scores_depend_on_the_distance_only(shift):
    q, k = torch.randn(2, 1, R, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    here = (rotate(q, [9]) * rotate(k, [4])).sum()
    there = (rotate(q, [9 + shift]) * rotate(k, [4 + shift])).sum()
    close(there, here, 1e-4)
    assert abs((rotate(q, [10]) * rotate(k, [4])).sum() - here) > 1e-3


@pytest.mark.parametrize("position", [1, 5, 77])
def test_rotary_pairs_are_neighbours_and_not_halves(position):
    """Channels (2i, 2i + 1) are one complex number, turned by position * theta^(-2i / R)."""
    x = torch.randn(1, R, generator=torch.Generator().manual_seed(0))
    angles = position * 10000.0 ** (-torch.arange(0, R, 2) / R)
    turned = torch.view_as_complex(x.view(-1, 2)) * torch.polar(torch.ones(R // 2), angles)
    close(rotate(x, [position], rope_scaling=None), torch.view_as_real(turned).view(1, R), 1e-5)


def test_yarn_works_below_its_original_context():
    """It is a property of the weights, not of how long a prompt happens to be."""
    yarn = SHORT_YARN | {"original_max_position_embeddings": 4096}
    with_yarn, without = build(rope_scaling=yarn), build(rope_scaling=None)
    with_yarn.load_state_dict(without.state_dict())
    ids = tokens(1, 6)
    assert (logits(with_yarn, ids) - logits(without, ids)).abs().max() > 1e-3


def test_a_long_prompt_does_not_change_how_its_start_is_read(model):
    ids = tokens(1, 80)  # beyond the 32 positions of the original context
    close(logits(model, ids)[:, :20], logits(model, ids[:, :20]))


def test_angles_are_made_for_real_whatever_device_the_model_is_built_on():
    """They are no weights: nothing would ever fill them in behind `torch.device("meta")`."""
    for changes in ({}, {"rope_scaling": None}):
        with torch.device("meta"):
            built = DeepseekV3Model(tiny(**changes)).rotary_emb
        close(built.inv_freq, DeepseekV3Model(tiny(**changes)).rotary_emb.inv_freq)


# ---- The equations ----


def attention_by_the_equations(attn, inv_freq, x):
    """Eqs. 1–11 in loops over heads and tokens, rotary channels as complex numbers; x (T, D)."""
    T, N, V = len(x), 6, 5
    turn = torch.polar(torch.ones(T, R // 2), torch.arange(T)[:, None] * inv_freq)

    def norm(rows, module):  # the latent norms have eps 1e-6 whatever rms_norm_eps is
        return rows / (rows.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight

    def rope(rows):
        return torch.view_as_real(torch.view_as_complex(rows.view(T, -1, 2)) * turn).view(T, -1)

    down = x @ attn.kv_a_proj_with_mqa.weight.T  # first the latent, then the rotary key
    c_kv = norm(down[:, :C], attn.kv_a_layernorm)
    k_rope = rope(down[:, C:].contiguous())
    c_q = norm(x @ attn.q_a_proj.weight.T, attn.q_a_layernorm)
    sharpen = (0.1 * math.log(SHORT_YARN["factor"]) + 1) ** 2
    heads = []
    for head in range(H):
        w_q = attn.q_b_proj.weight[head * (N + R) : (head + 1) * (N + R)]
        w_kv = attn.kv_b_proj.weight[head * (N + V) : (head + 1) * (N + V)]
        q_nope, q_rope = c_q @ w_q[:N].T, rope(c_q @ w_q[N:].T)
        k_nope, values = c_kv @ w_kv[:N].T, c_kv @ w_kv[N:].T
        for t in range(T):
            scores = k_nope[: t + 1] @ q_nope[t] + k_rope[: t + 1] @ q_rope[t]
            probabilities = (scores * sharpen / math.sqrt(N + R)).softmax(0)
            heads.append(probabilities @ values[: t + 1])
    joined = torch.stack(heads).view(H, T, V).transpose(0, 1).flatten(1)
    return joined @ attn.o_proj.weight.T


@torch.no_grad()
def test_attention_is_what_the_equations_say(either_order):
    model = build(rms_norm_eps=0.1)
    with trace(model, "layers.0.input_layernorm", "layers.0.self_attn") as seen:
        model(tokens(1, 7))
    attn, inv_freq = model.model.layers[0].self_attn, model.model.rotary_emb.inv_freq
    x = seen["model.layers.0.input_layernorm"][0]
    close(seen["model.layers.0.self_attn"][0], attention_by_the_equations(attn, inv_freq, x), 1e-4)


def padded(side):
    """Three rows of 9, 5 and 1 tokens; no padding: three of 9."""
    if side is None:
        return tokens(3, 9), None
    return pad([tokens(9), tokens(5, seed=2), tokens(1, seed=3)], side)


@pytest.mark.parametrize("sizes", [[9], [5, 4]], ids=["one pass", "behind a cache"])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_absorbed_is_expanded(model, side, sizes, monkeypatch):
    found = []
    for absorb in (True, False):
        monkeypatch.setattr(MLA, "absorbing_is_cheaper", lambda self, T, S, choice=absorb: choice)
        ids, mask = padded(side)
        found.append(in_chunks(model, ids, sizes, mask)[0])
    close(*found)


def test_absorbed_and_expanded_have_the_same_gradients(monkeypatch):
    found = []
    for absorb in (True, False):
        monkeypatch.setattr(MLA, "absorbing_is_cheaper", lambda self, T, S, choice=absorb: choice)
        model = build(dtype=torch.float64)
        model(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
        found.append([p.grad for p in model.parameters()])
    for absorbed, expanded in zip(*found, strict=True):
        close(absorbed, expanded)


@torch.no_grad()
def test_bfloat16_comes_close_in_either_order(either_order):
    """Absorbed, the float32 softmax meets bfloat16 latents and weights."""
    ids = tokens(2, 9)
    found = in_chunks(build(dtype=torch.bfloat16, num_hidden_layers=1), ids, [5, 4])[0]
    exact = logits(build(num_hidden_layers=1), ids)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 0.03 * exact.norm()


# ---- The cache ----

SPLITS = [[1] * 9, [9], [5, 4], [4, 5], [2, 3, 4], [8, 1], [1, 8]]


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_any_split_into_chunks_is_one_pass(model, sizes, either_order):
    ids = tokens(2, 9)
    close(in_chunks(model, ids, sizes)[0], logits(model, ids))


@pytest.mark.parametrize("sizes", [[1] * 9, [5, 4], [2, 3, 4]], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_any_split_of_padded_rows_is_one_pass(model, sizes, side, either_order):
    ids, mask = padded(side)
    real = mask.bool()
    at_once = logits(model, ids, attention_mask=mask)
    close(in_chunks(model, ids, sizes, mask)[0][real], at_once[real])


@torch.no_grad()
def test_the_cache_remembers_the_padding(model):
    ids, mask = pad([tokens(6), tokens(3, seed=2)], "left")
    more = tokens(2, 2, seed=4)
    cache = model(ids, mask, use_cache=True).past_key_values
    alone = in_chunks(model, torch.cat([tokens(3, seed=2), more[1]])[None], [5])[0]
    close(model(more, past_key_values=cache).logits[1], alone[0, 3:])


def test_the_cache_holds_a_latent_and_a_rotary_key_a_token_and_layer(model):
    _, cache = in_chunks(model, tokens(2, 9), [5, 4])
    assert cache.bytes == 2 * 9 * LAYERS * (C + R) * 8  # rows, tokens, layers, numbers, float64
    assert cache.length == 9


def test_no_cache_unless_asked(model):
    assert model(tokens(1, 3)).past_key_values is None


def test_the_cache_keeps_no_gradient_graph(model):
    cache = model(tokens(1, 3), use_cache=True).past_key_values
    assert not any(held.requires_grad for held in cache.layers.values())


@torch.no_grad()
def test_growing_does_not_copy_the_cache_at_every_token():
    model = build(DeepseekV3Model, num_hidden_layers=1)
    ids, cache, blocks = tokens(1, 1000), None, []
    for t in range(1000):
        cache = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).past_key_values
        if not blocks or cache.layers[0].data_ptr() != blocks[-1].data_ptr():
            blocks.append(cache.layers[0])  # keeping it keeps its address from being used again
    assert len(blocks) <= 40
    assert cache.layers[0].shape[1] <= 2000


@pytest.mark.parametrize(
    ("capacity", "lengths", "rooms"),
    [
        (0, [4, 5, 6, 7, 9, 10], [4, 6, 6, 9, 9, 13]),  # half as much again, or as much as is needed
        (0, [10, 100], [10, 100]),
        (20, [4, 19, 20, 21], [20, 20, 20, 30]),
    ],
)
def test_the_cache_grows_by_half(capacity, lengths, rooms):
    cache = LatentCache(capacity)
    everything = torch.arange(1.0, 101).expand(2, 1, -1).transpose(1, 2)
    for end, room in zip(lengths, rooms, strict=True):
        held = cache.append(0, everything[:, cache.length : end])
        cache.length = end
        assert torch.equal(held, everything[:, :end])
        assert cache.layers[0].shape == (2, room, 1)


def test_a_cache_in_training_gives_new_tokens_their_gradients():
    cache = LatentCache()
    cache.append(0, torch.ones(1, 2, 3))
    cache.length = 2
    new = torch.full((1, 1, 3), 2.0, requires_grad=True)
    seen = cache.append(0, new)
    assert seen[0, :, 0].tolist() == [1, 1, 2]
    seen.sum().backward()
    assert torch.equal(new.grad, torch.ones(1, 1, 3))


def test_decoding_absorbs_and_training_expands(monkeypatch):
    """Both give the same, in other times: so the calls are counted."""
    taken = []
    for name in ("attend_absorbed", "attend_expanded"):
        form = getattr(MLA, name)
        monkeypatch.setattr(
            MLA, name, lambda *a, form=form, name=name: (taken.append(name), form(*a))[1]
        )
    model = build(num_hidden_layers=1)
    cache = model(tokens(1, 30), use_cache=True).past_key_values
    model(tokens(1, 1), past_key_values=cache)
    assert taken == ["attend_expanded", "attend_absorbed"]


@pytest.mark.parametrize("keep", [0, 1, 6])
def test_a_cropped_cache_forgets(model, keep):
    first, second = tokens(2, 9), tokens(2, 4, seed=2)
    _, cache = in_chunks(model, first, [9])
    cache.crop(keep)
    joined = torch.cat([first[:, :keep], second], 1)
    close(logits(model, second, past_key_values=cache), logits(model, joined)[:, keep:])
    assert cache.length == keep + 4


@torch.no_grad()
def test_a_cropped_cache_keeps_its_padding(model):
    ids, mask = pad([tokens(6), tokens(3, seed=2)], "left")
    cache = model(ids, mask, use_cache=True).past_key_values
    cache.crop(5)
    more = tokens(2, 2, seed=4)
    alone = logits(model, torch.cat([tokens(3, seed=2)[:2], more[1]])[None])
    close(model(more, past_key_values=cache).logits[1], alone[0, 2:])


# ---- What a query may see ----


def test_without_padding_there_is_no_pattern():
    """Plain causal attention, or one query that sees all, is faster without a matrix."""
    assert attention_pattern(None, 5, 5, "cpu") is None
    assert attention_pattern(None, 1, 5, "cpu") is None
    assert attention_pattern(None, 2, 4, "cpu").int().tolist() == [[[[1, 1, 1, 0], [1, 1, 1, 1]]]]
    assert key_mask(torch.ones(2, 6), None, 2, 6) is None
    assert key_mask(torch.ones(2, 2), None, 2, 2) is None
    assert key_mask(torch.ones(2, 1), None, 2, 1).dtype == torch.bool  # asking would cost more


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_row_alone(model, side, either_order):
    rows = [tokens(9), tokens(5, seed=2), tokens(1, seed=3)]
    ids, mask = pad(rows, side, value=7)
    together = logits(model, ids, attention_mask=mask)
    for i, row in enumerate(rows):
        close(together[i][mask[i].bool()], logits(model, row[None])[0])


def test_a_mask_of_ones_is_no_mask(model):
    ids = tokens(2, 6)
    close(logits(model, ids, attention_mask=torch.ones_like(ids)), logits(model, ids))


def test_a_boolean_mask_is_a_mask(model):
    ids, mask = padded("left")
    close(logits(model, ids, attention_mask=mask.bool()), logits(model, ids, attention_mask=mask))


@pytest.mark.parametrize("changed", [0, 3, 7])
def test_no_token_sees_a_later_one(model, changed, either_order):
    ids = tokens(1, 8)
    other = ids.clone()
    other[0, changed] = (ids[0, changed] + 1) % 61
    before, after = logits(model, ids), logits(model, other)
    close(before[:, :changed], after[:, :changed])
    moved = (before - after).abs().amax(-1)[0]
    assert (moved[changed:] > 1e-6).all()


@pytest.mark.parametrize("training", [False, True])
def test_a_row_of_padding_gives_no_nan(training, either_order):
    model = build().train(training)
    ids, mask = tokens(2, 5), torch.tensor([[1] * 5, [0] * 5])
    out = model(ids, mask, labels=ids.masked_fill(mask == 0, -100))
    out.loss.backward()
    assert out.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_default_positions_count_from_the_first_real_token(model):
    ids, mask = padded("left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given = logits(model, ids, attention_mask=mask, position_ids=positions)
    close(given, logits(model, ids, attention_mask=mask))


def test_shifted_positions_change_nothing(model):
    ids = tokens(1, 6)
    shifted = logits(model, ids, position_ids=torch.arange(50, 56)[None])
    close(shifted, logits(model, ids), 1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [("attention_mask", torch.ones(2, 5)), ("position_ids", torch.arange(5)[None])],
)
def test_a_mask_or_positions_of_another_length_are_refused(model, name, value):
    with pytest.raises(ValueError, match=name):
        model(tokens(2, 6), **{name: value})


def test_positions_may_be_one_row_for_all(model):
    ids = tokens(2, 6)
    close(logits(model, ids, position_ids=torch.arange(6)[None]), logits(model, ids))


@pytest.mark.parametrize("shape", [(2, 5), (1, 5), (3, 6), (6,)], ids=str)
def test_an_error_of_shape_says_which_would_be_right(model, shape):
    for name in ("attention_mask", "position_ids"):
        with pytest.raises(ValueError, match=name) as error:
            model(tokens(2, 6), **{name: torch.ones(shape, dtype=torch.long)})
        assert str(shape) in str(error.value) and "(2, 6)" in str(error.value)


def test_an_error_of_shape_counts_what_the_cache_holds(model):
    cache = model(tokens(2, 4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask.*\(2, 2\).*\(2, 6\)"):
        model(tokens(2, 2), torch.ones(2, 2), past_key_values=cache)


@pytest.mark.parametrize(
    "inputs",
    [{}, {"input_ids": tokens(1, 3), "inputs_embeds": torch.zeros(1, 3, 32)}],
    ids=["neither", "both"],
)
def test_exactly_one_kind_of_input(model, inputs):
    with pytest.raises(ValueError, match="input_ids and inputs_embeds"):
        model(**inputs)


def test_embeddings_stand_for_their_tokens(model):
    ids = tokens(2, 6)
    close(logits(model, None, inputs_embeds=model.model.embed_tokens(ids)), logits(model, ids))


@pytest.mark.parametrize("token", [-1, 61])
def test_a_token_outside_the_vocabulary_is_named(model, token):
    with pytest.raises(ValueError, match=f"input_ids.*{token}"):
        model(torch.tensor([[3, token]]))


# ---- Variants ----


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora_rank": None},
        {"rope_scaling": None},
        {"attention_bias": True},
        {"v_head_dim": 20},
        {"num_attention_heads": 1},
    ],
    ids=str,
)
def test_variants_agree_with_themselves_through_the_cache(changes):
    model = build(dtype=torch.float64, **changes)
    ids = tokens(2, 7)
    close(in_chunks(model, ids, [3, 1, 3])[0], logits(model, ids))


def test_without_query_compression_there_is_one_projection():
    attn = build(q_lora_rank=None).model.layers[0].self_attn
    assert attn.q_proj.weight.shape == (H * 14, 32)
    assert not hasattr(attn, "q_a_proj")


# ---- Looking inside ----


@torch.no_grad()
@pytest.mark.parametrize("past", [0, 4])
def test_attention_rows_sum_to_one_and_end_at_the_query(model, past, either_order):
    ids, cache = tokens(2, 6), None
    if past:
        cache = in_chunks(model, tokens(2, past, seed=9), [past])[1]
    seen = model(ids, past_key_values=cache, output_attentions=True).attentions
    assert len(seen) == LAYERS
    for matrix in seen:
        assert matrix.shape == (2, H, 6, past + 6)
        close(matrix.sum(-1), torch.ones(2, H, 6, dtype=matrix.dtype))
        assert torch.equal(matrix, matrix.tril(past))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_no_real_query_attends_to_padding(model, side, either_order):
    ids, mask = padded(side)
    for matrix in model(ids, mask, output_attentions=True).attentions:
        real = (mask[:, :, None] * mask[:, None]).bool()[:, None].expand_as(matrix)
        on_padding = matrix.masked_fill(real, 0).sum(-1)
        assert (on_padding.transpose(1, 2)[mask.bool()] == 0).all()


@torch.no_grad()
def test_every_output_field_has_its_shape():
    """Float32 model; 3 layers, 2 of them with experts."""
    model = build()
    out = model(
        tokens(2, 5), use_cache=True, output_attentions=True, output_hidden_states=True,
        output_routing=True, output_mtp=True,
    )  # fmt: skip
    assert out.logits.shape == (2, 5, 61)
    assert out.last_hidden_state.shape == (2, 5, 32)
    assert [tuple(state.shape) for state in out.hidden_states] == [(2, 5, 32)] * (LAYERS + 1)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(tokens(2, 5)))
    assert [tuple(matrix.shape) for matrix in out.attentions] == [(2, H, 5, 5)] * LAYERS
    assert all(matrix.is_floating_point() for matrix in out.attentions)
    for routing in out.routing:
        assert (routing.scores.shape, routing.scores.dtype) == ((2, 5, E), torch.float32)
        assert routing.indices.shape == routing.weights.shape == (2, 5, K)
    assert len(out.routing) == LAYERS - 1
    assert [tuple(rows.shape) for rows in out.mtp_logits] == [(2, 4, 61)]
    assert out.loss is None


def test_nothing_is_shown_unasked(model):
    out = model(tokens(1, 3))
    shown = {name for name, value in vars(out).items() if value is not None}
    assert shown == {"logits", "last_hidden_state"}


@pytest.mark.parametrize("last", [1, 2, 5])
def test_logits_of_the_last_tokens_only(model, last):
    ids = tokens(2, 5)
    close(logits(model, ids, logits_to_keep=last), logits(model, ids)[:, -last:])


@torch.no_grad()
@pytest.mark.parametrize("mask", [None, torch.tensor([[0, 0, 1, 1, 1], [1] * 5])])
def test_watching_changes_no_bit(mask):
    model, ids = build(), tokens(2, 5)
    plain = model(ids, mask).logits
    with trace(model, "layers.*", "self_attn.softmax", "mlp.gate", "lm_head"):
        traced = model(ids, mask).logits
    shown = model(
        ids, mask, output_attentions=True, output_hidden_states=True, output_routing=True
    ).logits
    assert torch.equal(plain, traced)
    assert torch.equal(plain, shown)


@torch.no_grad()
def test_trace_records_what_modules_return():
    model, ids = build(), tokens(2, 5)
    with trace(model, "layers.*.mlp.gate", "model.norm") as seen:
        out = model(ids, output_routing=True)
    gates = [name for name in seen if name.endswith("mlp.gate")]
    assert gates == ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
    assert torch.equal(seen["model.norm"], out.last_hidden_state)
    assert torch.equal(seen[gates[0]].indices, out.routing[0].indices)


def test_trace_refuses_a_pattern_that_matches_nothing(model):
    with pytest.raises(ValueError, match=r"block\.\*\.mlp\.gate.*model\.layers\.1\.mlp\.gate"):
        with trace(model, "model.norm", "block.*.mlp.gate"):
            pass


def test_trace_leaves_no_hook_behind():
    model = build()
    with pytest.raises(RuntimeError, match="stop"), trace(model, "layers.*", "lm_head"):
        raise RuntimeError("stop")
    with pytest.raises(ValueError, match="nowhere"), trace(model, "lm_head", "nowhere"):
        pass
    assert not any(module._forward_hooks for module in model.modules())
