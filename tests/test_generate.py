"""Generation: greedy and sampled tokens, the sets they are drawn from, stopping, padded prompts."""

import math
import re

import pytest
import torch
from helpers import build, pad, tokens

from deepseek_v3 import DeepseekV3Config, Sampling, stop_ids


@pytest.fixture(scope="module")
def model():
    return build(dtype=torch.float64, eos_token_id=None)


@torch.no_grad()
def argmax_loop(model, row, steps):
    """Greedy continuation of one row, everything recomputed for every token."""
    ids = row[None]
    for _ in range(steps):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0]


# ---- Greedy ----


def test_greedy_is_argmax_without_a_cache(model):
    ids = tokens(3, 6)
    expected = torch.stack([argmax_loop(model, row, 12) for row in ids])
    assert torch.equal(model.generate(ids, max_new_tokens=12), expected)


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_prompts(model, length):
    row = tokens(length)
    assert torch.equal(model.generate(row[None], max_new_tokens=5)[0], argmax_loop(model, row, 5))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_continue_like_single_rows(model, side):
    rows = [tokens(7), tokens(4, seed=2), tokens(1, seed=3)]
    ids, mask = pad(rows, side, value=9)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=8)
    assert torch.equal(out[:, :7], ids)
    for row, continued in zip(rows, out, strict=True):
        assert torch.equal(continued[7:], argmax_loop(model, row, 8)[len(row) :])


def test_no_new_tokens_is_the_prompt(model):
    assert torch.equal(model.generate(tokens(2, 4), max_new_tokens=0), tokens(2, 4))


def test_greedy_leaves_the_random_state_alone(model):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model.generate(tokens(1, 4), max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), before)


# ---- Sampling ----


def test_a_generator_repeats_and_leaves_the_global_state_alone(model):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(tokens(2, 4), max_new_tokens=10, do_sample=True, generator=generator)

    before = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_global_seed_repeats(model):
    def draw():
        torch.manual_seed(7)
        return model.generate(tokens(2, 4), max_new_tokens=10, do_sample=True)

    assert torch.equal(draw(), draw())


@pytest.mark.parametrize(
    "narrow", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-6}], ids=str
)
def test_sampling_from_one_token_is_greedy(model, narrow):
    ids = tokens(2, 4)
    sampled = model.generate(ids, max_new_tokens=8, do_sample=True, **narrow)
    assert torch.equal(sampled, model.generate(ids, max_new_tokens=8))


def test_without_do_sample_the_settings_do_not_matter(model):
    ids = tokens(2, 4)
    still_greedy = model.generate(ids, max_new_tokens=8, temperature=2.0, top_k=3, top_p=0.5)
    assert torch.equal(still_greedy, model.generate(ids, max_new_tokens=8))


def distribution_by_hand(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """One row: the k likeliest, of these the fewest that hold top_p, of these those above min_p."""
    powers = [math.exp(logit / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda i: -powers[i])
    kept = order[: top_k or len(logits)]
    total, held, nucleus = sum(powers[i] for i in kept), 0.0, []
    for i in kept:
        if held < top_p:
            nucleus.append(i)
        held += powers[i] / total
    kept = [i for i in nucleus if powers[i] >= min_p * powers[order[0]]]
    total = sum(powers[i] for i in kept)
    return [powers[i] / total if i in kept else 0.0 for i in range(len(logits))]


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 3},
    {"top_k": 1000},
    {"top_p": 0.6},
    {"top_p": 0.05},
    {"min_p": 0.2},
    {"temperature": 0.7, "top_k": 10, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.15},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_distribution_keeps_the_right_set_and_sums_to_one(settings):
    logits = 2 * torch.randn(4, 5, 20, generator=torch.Generator().manual_seed(0))
    probs = Sampling(do_sample=True, **settings).distribution(logits)
    torch.testing.assert_close(probs.sum(-1), torch.ones(4, 5))
    for row, found in zip(logits.view(-1, 20), probs.view(-1, 20), strict=True):
        expected = distribution_by_hand(row.tolist(), **settings)
        assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_greedy_is_all_on_the_likeliest():
    probs = Sampling().distribution(torch.tensor([[0.1, 2.0, -1.0]]))
    assert probs.tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_keeps_k_of_equals(k):
    probs = Sampling(do_sample=True, top_k=k).distribution(torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert sorted(probs.tolist()) == pytest.approx([0] * (4 - k) + [1 / k] * k)


def test_top_p_keeps_no_more_of_equals_than_it_needs():
    probs = Sampling(do_sample=True, top_p=0.5).distribution(torch.zeros(8))
    assert sorted(probs.tolist()) == [0] * 4 + [0.25] * 4


def test_a_masked_logit_is_never_drawn():
    logits = torch.tensor([0.0, -math.inf, 1.0])
    probs = Sampling(do_sample=True, top_p=0.999).distribution(logits)
    assert probs[1] == 0
    assert probs.isfinite().all()


def test_probabilities_of_a_bfloat16_model_are_float32():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)).bfloat16()
    probs = Sampling(do_sample=True).distribution(logits)
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs.sum(), torch.ones(()))


def test_draws_follow_the_distribution():
    sampling = Sampling(do_sample=True, generator=torch.Generator().manual_seed(0))
    probs = torch.tensor([0.5, 0.3, 0.2, 0.0])
    drawn = sampling.draw(probs.expand(20_000, 4))
    share = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(share, probs, atol=0.015, rtol=0)
    assert share[3] == 0


P_Q = [  # p of two drafts and the token behind, q of the drafts: of three tokens
    [[[0.1, 0.2, 0.7], [0.5, 0.5, 0.0], [0.2, 0.8, 0.0]], [[0.1, 0.2, 0.7], [1.0, 0.0, 0.0]]],
    [[[0.6, 0.1, 0.3], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]], [[0.2, 0.5, 0.3], [0.0, 0.0, 1.0]]],
    [[[0.0, 1.0, 0.0], [0.3, 0.3, 0.4], [1.0, 0.0, 0.0]], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]],
]


def test_drafts_stand_and_fall_by_row():
    """p > q: stands for sure. p = 0: falls, and the token comes from what p has more of than q."""
    p, q = (torch.tensor([row[i] for row in P_Q]) for i in (0, 1))
    drafts = torch.tensor([[2, 0], [0, 2], [0, 1]])
    seen = {}
    for seed in range(300):
        sampling = Sampling(do_sample=True, generator=torch.Generator().manual_seed(seed))
        for row, found in enumerate(zip(*sampling.accept(drafts, q, p), strict=True)):
            seen.setdefault(row, []).append(tuple(map(int, found)))
    # Row 0: draft 2 as likely in both stands; draft 0 has p / q = 1/2, behind it only token 1 gains.
    assert set(seen[0]) == {(1, 1), (2, 0), (2, 1)}
    assert sum(n == 2 for n, _ in seen[0]) / 300 == pytest.approx(0.5, abs=0.1)
    assert sum(t == 1 for n, t in seen[0] if n == 2) / sum(n == 2 for n, _ in seen[0]) > 0.65
    assert set(seen[1]) == {(2, 1)}  # p is at least q twice: both stand, the third is drawn from p
    assert set(seen[2]) == {(0, 1)}  # p = 0: the first falls, and so does what stands behind it


def test_greedy_drafts_stand_while_they_are_the_likeliest():
    p = torch.eye(4)[torch.tensor([[1, 2, 3], [1, 0, 3], [0, 2, 3]])]
    drafts = torch.tensor([[1, 2]] * 3)
    accepted, token = Sampling().accept(drafts, torch.eye(4)[drafts], p)
    assert accepted.tolist() == [2, 1, 0]
    assert token.tolist() == [3, 0, 0]


def test_a_residual_of_nothing_is_p_row_by_row():
    """Where p and q are the same but for the draft's rounding, p itself is drawn from."""
    p = torch.tensor([[[0.0, 1.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])
    q = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]])
    sampling = Sampling(do_sample=True, generator=torch.Generator().manual_seed(0))
    accepted, token = sampling.accept(torch.tensor([[0], [0]]), q, p)
    assert accepted.tolist() == [0, 0]
    assert token.tolist() == [1, 1]


# ---- Stopping ----


@pytest.mark.parametrize(
    ("config", "argument", "stops"),
    [
        (1, None, [1]),
        ([1, 2], None, [1, 2]),
        (None, None, []),
        (1, 7, [7]),
        (1, [7, 8], [7, 8]),
        (1, (7, 8), [7, 8]),
        (1, 0, [0]),
        (0, None, [0]),
        (1, -1, []),
        ([1, -1], None, []),
        (1, [], []),
    ],
)
def test_what_ends_a_text(config, argument, stops):
    """The argument, else the config; -1 stands for none."""
    found = stop_ids(DeepseekV3Config(eos_token_id=config), argument)
    assert found == stops
    assert type(found) is list


def stopping(model, ids, steps, stops, padding):
    """What must come out: each row of the endless continuation, cut at its first stop, padded."""
    endless = model.generate(ids, max_new_tokens=steps, eos_token_id=-1)[:, ids.shape[1] :]
    rows = []
    for row in endless.tolist():
        ends = [i for i, token in enumerate(row) if token in stops]
        rows.append(row[: ends[0] + 1] if ends else row)
    longest = max(map(len, rows))
    return torch.tensor([row + [padding] * (longest - len(row)) for row in rows])


@pytest.mark.parametrize("given", ["argument", "config"])
@pytest.mark.parametrize("how_many", [1, 2])
@pytest.mark.parametrize("pad_id", [None, 60])
def test_rows_stop_at_their_end_and_are_padded_behind_it(given, how_many, pad_id):
    model, ids = build(dtype=torch.float64, pad_token_id=pad_id), tokens(3, 5)
    endless = model.generate(ids, max_new_tokens=10, eos_token_id=-1)[:, 5:]
    stops = endless[torch.arange(how_many), torch.tensor([2, 4])[:how_many]].tolist()
    eos = stops[0] if how_many == 1 else stops
    padding = stops[0] if pad_id is None else pad_id
    expected = stopping(model, ids, 10, stops, padding)
    if given == "config":
        model.config.eos_token_id, eos = eos, None
    out = model.generate(ids, max_new_tokens=10, eos_token_id=eos)
    assert torch.equal(out[:, 5:], expected)
    assert torch.equal(out[:, :5], ids)


def test_generation_ends_when_every_row_has():
    model, ids = build(dtype=torch.float64), tokens(1, 5)
    endless = model.generate(ids, max_new_tokens=10, eos_token_id=-1)[0, 5:].tolist()
    out = model.generate(ids, max_new_tokens=10, eos_token_id=endless[3])
    assert out.shape[1] == 5 + endless.index(endless[3]) + 1


def test_minus_one_never_stops():
    model = build(eos_token_id=list(range(61)))
    assert model.generate(tokens(1, 5), max_new_tokens=7).shape == (1, 6)
    assert model.generate(tokens(1, 5), max_new_tokens=7, eos_token_id=-1).shape == (1, 12)


# ---- Around it ----


def test_the_streamer_gets_each_token(model):
    streamed = []
    out = model.generate(tokens(2, 4), max_new_tokens=6, streamer=streamed.append)
    assert torch.equal(torch.stack(streamed, 1), out[:, 4:])


def test_the_streamer_gets_tokens_as_they_come(model):
    streamed = []

    def stop_at_two(token):
        streamed.append(token)
        if len(streamed) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        model.generate(tokens(1, 4), max_new_tokens=100, streamer=stop_at_two)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("broken", [True, False])
def test_the_training_mode_is_as_before(training, broken):
    model = build().train(training)

    def streamer(token):
        assert not any(module.training for module in model.modules())
        if broken:
            raise InterruptedError

    try:
        model.generate(tokens(1, 4), max_new_tokens=2, streamer=streamer)
    except InterruptedError:
        assert broken
    assert all(module.training is training for module in model.modules())


def test_generating_needs_no_gradient():
    model = build()
    out = model.generate(tokens(1, 4), max_new_tokens=3, do_sample=True)
    assert not out.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("max_new_tokens", -1),
    ],
)
@pytest.mark.parametrize("do_sample", [True, False])
def test_a_bad_argument_is_named_with_its_value(model, name, value, do_sample):
    with pytest.raises(ValueError, match=name) as error:
        model.generate(tokens(1, 4), do_sample=do_sample, **{name: value})
    assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("temperature", 0.0, "above 0; greedy is do_sample=False"),
        ("top_k", -1, "0 (off) or more"),
        ("top_p", 0.0, "in (0, 1]"),
        ("min_p", 2.0, "in [0, 1]"),
    ],
)
def test_the_error_says_what_would_be_right(name, value, right):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value}: must be {right}")):
        Sampling(**{name: value})


@pytest.mark.parametrize("settings", [{}, {"top_k": 1}, {"min_p": 0.0}, {"min_p": 1.0}, {"top_p": 1.0}])
def test_the_last_value_that_works_is_taken(settings):
    plain = {"do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert vars(Sampling(**settings)) == plain | {"generator": None} | settings


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), "input_ids"),
        (torch.zeros(4, dtype=torch.long), "input_ids"),
        (torch.zeros(1, 4), "input_ids"),
        (torch.tensor([[61]]), "input_ids.*61"),
    ],
    ids=["empty", "flat", "floats", "outside the vocabulary"],
)
def test_a_bad_prompt_is_refused(model, ids, message):
    with pytest.raises(ValueError, match=message):
        model.generate(ids)


def test_a_mask_of_another_shape_is_refused(model):
    with pytest.raises(ValueError, match="attention_mask"):
        model.generate(tokens(2, 4), attention_mask=torch.ones(2, 5))
