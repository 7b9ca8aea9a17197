"""What holds for every config, shape, padding, chunking and dtype: hypothesis looks for exceptions."""

import itertools
import warnings

import pytest
import torch
from helpers import FORMS, SHORT_YARN, build, close, force, in_chunks, pad, tiny, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deepseek_v3
from deepseek_v3 import (
    DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification, DeepseekV3ForTokenClassification, Router,
    Sampling,
)

HEADS = [DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification, DeepseekV3ForTokenClassification]
HEAD = st.sampled_from(HEADS)
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
DTYPE = st.sampled_from(DTYPES)
SIDES = st.sampled_from(["left", "right"])
SEEDS = st.integers(0, 999)

def examples(count):
    """The same `count` cases in every run."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    how = dict(derandomize=True, deadline=None, database=None, suppress_health_check=slow)
    return settings(max_examples=count, **how)

@st.composite
def sizes(draw, **fixed):
    """Keywords of a small config, in any numbers that fit together."""

    def n(low, high):
        return draw(st.integers(low, high))

    groups, per_group = n(1, 3), n(2, 4)
    picked = n(1, groups)
    heads = dict(num_attention_heads=n(1, 3), qk_nope_head_dim=n(1, 6), qk_rope_head_dim=2 * n(1, 3))
    widths = dict(hidden_size=4 * n(1, 4), v_head_dim=n(1, 12), kv_lora_rank=n(1, 9))
    widths |= dict(intermediate_size=n(1, 9), moe_intermediate_size=4 * n(1, 2) - n(0, 1))
    experts = dict(n_group=groups, n_routed_experts=groups * per_group, topk_group=picked)
    experts |= dict(num_experts_per_tok=n(1, picked * per_group), norm_topk_prob=draw(st.booleans()))
    layers = dict(num_hidden_layers=n(1, 3), num_nextn_predict_layers=n(0, 2))
    layers |= dict(first_k_dense_replace=n(0, 2), q_lora_rank=n(0, 9) or None)
    layers |= dict(n_shared_experts=n(0, 2), rope_scaling=draw(st.sampled_from([None, SHORT_YARN])))
    layers |= dict(attention_bias=draw(st.booleans()), tie_word_embeddings=draw(st.booleans()))
    return heads | widths | experts | layers | fixed

def rows_of(lengths):
    return [tokens(length, seed=i) for i, length in enumerate(lengths)]

LENGTHS = st.lists(st.integers(1, 8), min_size=1, max_size=3)
ENDS = st.sets(st.integers(1, 8), max_size=8)

@examples(40)
@given(sizes(), LENGTHS, SIDES, ENDS, st.booleans(), st.sampled_from(FORMS), SEEDS)
def test_any_chunks_behind_a_cache_and_any_form_of_attention_are_one_pass(
    config, lengths, side, ends, always, form, seed
):
    model = build(dtype=torch.float64, seed=seed, **config)
    ids, mask = pad(rows_of(lengths), side, value=9)
    ends = sorted({0, ids.shape[1]} | {end for end in ends if end < ids.shape[1]})
    with pytest.MonkeyPatch.context() as patch:
        force(patch, form)
        chunks = [after - before for before, after in itertools.pairwise(ends)]
        together, cache = in_chunks(model, ids, chunks, mask, always=always)
    at_once, real = model(ids, mask, output_attentions=True), mask.bool()
    close(together[real], at_once.logits[real])
    for matrix in at_once.attentions:
        close(matrix.sum(-1), torch.ones_like(matrix[..., 0]))
    held = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    assert cache.bytes == 8 * held * ids.numel() * config["num_hidden_layers"]

@examples(30)
@given(sizes(), st.lists(st.integers(0, 8), min_size=1, max_size=4).filter(any), HEAD, SEEDS)
def test_a_row_is_itself_alone_in_a_batch_and_under_either_padding(config, lengths, cls, seed):
    model, rows = build(cls, dtype=torch.float64, seed=seed, **config), rows_of(lengths)
    more = {"output_mtp": True} if cls is DeepseekV3ForCausalLM else {}
    for side in ("left", "right"):
        ids, mask = pad(rows, side, value=9)
        out = model(ids, mask, **more)
        assert out.logits.isfinite().all()  # rows of length 0 too
        for i, (row, real) in enumerate(zip(rows, mask.bool(), strict=True)):
            if not len(row):
                continue
            alone, found = model(row[None], **more), out.logits[i]
            close(found if cls is DeepseekV3ForSequenceClassification else found[real], alone.logits[0])
            for k, ahead in enumerate(alone.mtp_logits or (), 1):
                close(out.mtp_logits[k - 1][i][(real[k:] & real[:-k]).nonzero()[:, 0]], ahead[0])

@examples(20)
@given(sizes(), st.lists(LENGTHS, min_size=1, max_size=3), SEEDS)
def test_a_packed_document_is_itself_alone(config, lengths, seed):
    """In rows of as many documents as there are, each row cut to the length of the shortest."""
    model = build(dtype=torch.float64, seed=seed, **config)
    positions = [torch.cat([torch.arange(n) for n in row]) for row in lengths]
    T = min(map(len, positions))
    positions, ids = torch.stack([row[:T] for row in positions]), tokens(len(lengths), T, seed=seed)
    out = model(ids, position_ids=positions, output_mtp=True)
    for i, row in enumerate(positions):
        starts = [*(row == 0).nonzero()[:, 0].tolist(), T]
        for start, end in itertools.pairwise(starts):
            alone = model(ids[i : i + 1, start:end], output_mtp=True)
            close(out.logits[i, start:end], alone.logits[0])
            for k, ahead in enumerate(alone.mtp_logits or (), 1):
                close(out.mtp_logits[k - 1][i, start : end - k], ahead[0])

@examples(30)
@given(sizes(), st.integers(2, 8), st.data(), SEEDS)
def test_a_later_token_changes_no_earlier_logit(config, T, data, seed):
    model, ids = build(dtype=torch.float64, seed=seed, **config), tokens(2, T, seed=seed)
    changed = data.draw(st.integers(1, T - 1), "changed")
    other = torch.cat([ids[:, :changed], (ids[:, changed:] + 1 + seed % 60) % 61], 1)
    one, two = model(ids, output_mtp=True), model(other, output_mtp=True)
    close(one.logits[:, :changed], two.logits[:, :changed])
    for depth, (before, after) in enumerate(zip(one.mtp_logits or (), two.mtp_logits or (), strict=True), 1):
        rows = max(0, changed - depth)  # row i has read token i + depth
        close(before[:, :rows], after[:, :rows])

@examples(100)
@given(sizes(), DTYPE, st.sampled_from([0.01, 1, 30]), st.sampled_from([0, 0.3, 5, 100]), SEEDS)
def test_routing_stays_in_its_groups_and_gates_sum_to_the_factor(config, dtype, spread, bias, seed):
    torch.manual_seed(seed)
    config = tiny(**config)
    gate, x = Router(config), torch.randn(2, 5, config.hidden_size).to(dtype)
    torch.nn.init.normal_(gate.weight, std=spread)
    gate.e_score_correction_bias.normal_(-bias, bias / 2)
    scores, indices, weights = gate.to(dtype)(x)
    biased = scores + gate.e_score_correction_bias
    groups = indices // (config.n_routed_experts // config.n_group)
    strength = biased.unflatten(-1, (config.n_group, -1)).topk(2).values.sum(-1)
    better = strength.unsqueeze(-1) > strength.gather(-1, groups).unsqueeze(-2)
    if config.n_group > 1:
        assert (better.sum(-2) < config.topk_group).all()
    assert all(len(row.unique()) <= config.topk_group for row in groups.flatten(0, 1))
    assert all(len(row.unique()) == config.num_experts_per_tok for row in indices.flatten(0, 1))
    visited = torch.zeros_like(strength, dtype=torch.bool).scatter(-1, groups, True)
    passed_over = biased.unflatten(-1, (config.n_group, -1)).masked_fill(~visited.unsqueeze(-1), -torch.inf)
    passed_over = passed_over.flatten(-2).scatter(-1, indices, -torch.inf).amax(-1)
    assert (passed_over <= biased.gather(-1, indices).amin(-1)).all()
    chosen = scores.gather(-1, indices)
    total = chosen.sum(-1, keepdim=True) if config.norm_topk_prob else torch.ones(2, 5, 1)
    expected = chosen / total * config.routed_scaling_factor
    close(weights.where(total > 1e-12, 0), expected.where(total > 1e-12, 0), 1e-5)
    assert weights.isfinite().all()  # below, where all scores underflow
    assert scores.dtype == torch.promote_types(dtype, torch.float32)

@examples(20)
@given(sizes(), HEAD, DTYPE, st.sampled_from(["5GB", "2KB", 1]), SEEDS)
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path_factory, config, cls, dtype, size, seed):
    folder = tmp_path_factory.mktemp("saved")
    depths = config["num_nextn_predict_layers"] * (cls is DeepseekV3ForCausalLM)
    model = build(cls, dtype=dtype, seed=seed, **config | {"num_nextn_predict_layers": depths})
    model.save_pretrained(folder, max_shard_size=size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = cls.from_pretrained(folder)
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    written = again.config.to_dict()
    assert {name: written[name] for name in model.config.to_dict()} == model.config.to_dict()

@examples(30)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(DTYPES[:2]), st.integers(0, 60), SEEDS)
def test_fp8_is_within_half_a_step_of_each_block(rows, columns, dtype, decades, seed):
    random, blocks = torch.Generator().manual_seed(seed), (-(-rows // 128), -(-columns // 128))

    def spread(scales):
        return scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]

    each = torch.rand(blocks, generator=random)
    each = 10 ** (decades * (each - 0.5)) * (each > 0.1)  # a scale of its own for each block, or zero
    weight = (torch.randn(rows, columns, generator=random) * spread(each)).to(dtype)
    quantised, scale = deepseek_v3.quantise(weight)
    assert quantised.dtype == torch.float8_e4m3fn and scale.isfinite().all()
    again = deepseek_v3.dequantise(quantised, scale, torch.float32)
    # Three bits behind the point: half a step is 1/16 of a number, and near zero 2**-10 of 1/448.
    largest = torch.zeros_like(each)
    for i, j in itertools.product(*map(range, blocks)):
        block = weight[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
        largest[i, j] = block.abs().max()
    half_a_step = torch.maximum(spread(largest) / 448 * 2**-10, weight.float().abs() / 16)
    assert ((again - weight.float()).abs() <= half_a_step * (1 + 1e-5)).all()

TEMPERATURES = st.floats(0.05, 5) | st.sampled_from([1e-300, 1e-40, 1e-6, 1e6, 1e300])

@examples(150)
@given(
    st.integers(1, 40), st.sampled_from([0.1, 3, 60]), st.sampled_from([None, 1, 0]), st.booleans(),
    TEMPERATURES, st.integers(0, 45), st.floats(1e-9, 1), st.floats(0, 1), SEEDS,
)  # fmt: skip
def test_a_distribution_sums_to_one_and_keeps_to_its_set(
    vocab, spread, digits, masked, temperature, top_k, top_p, min_p, seed
):
    logits = spread * torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed))
    if digits is not None:
        logits = logits.round(decimals=digits)  # many are equal
    if masked:
        logits[:, seed % vocab + 1 :] = -torch.inf
    sampling = Sampling(True, temperature, top_k, top_p, min_p)
    probs, all_of_it = sampling.distribution(logits), Sampling(True, temperature).distribution(logits)
    close(probs.sum(-1), torch.ones(3), 1e-5)
    assert (probs >= 0).all()
    for p, base, token in zip(probs, all_of_it, sampling.draw(probs), strict=True):
        kept = p > 0
        assert kept[token]
        if top_k:
            assert kept.sum() <= top_k
            base = base.where(base >= base.topk(min(top_k, vocab)).values[-1], 0)
        assert (base[kept] >= min_p * base.max() * (1 - 1e-5)).all()
        held = base[kept] / base[base > 0].sum()
        assert held.sum() - held.min() < top_p + 1e-5  # without its least likely, it holds less
        assert base[kept].max() == base.max()
