"""Generation: greedy and sampled tokens, the sets they are drawn from, stopping, padded prompts."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import build, filtered, greedy, pad, tokens

from deepseek_v3 import DeepseekV3Config, Sampling, stop_ids

@pytest.fixture(scope="module")
def model():
    return build(dtype=torch.float64, eos_token_id=None)

# ---- Greedy ----

def test_greedy_is_argmax_without_a_cache(model):
    """And asks for no random number, whatever the settings of sampling are; of nothing, it is the prompt."""
    ids = tokens(3, 6)
    expected = torch.stack([greedy(model, row, 12) for row in ids])
    before = torch.get_rng_state()
    assert torch.equal(model.generate(ids, max_new_tokens=12), expected)
    settings = dict(temperature=2.0, top_k=3, top_p=0.5)
    assert torch.equal(model.generate(ids, max_new_tokens=12, **settings), expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)

@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_continue_like_single_rows(model, side):
    rows = [tokens(7), tokens(4, seed=2), tokens(2, seed=4), tokens(1, seed=3)]
    ids, mask = pad(rows, side, value=9)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=8)
    assert torch.equal(out[:, :7], ids)
    for row, continued in zip(rows, out, strict=True):
        alone = greedy(model, row, 8)
        assert torch.equal(continued[7:], alone[len(row) :])
        assert torch.equal(model.generate(row[None], max_new_tokens=8)[0], alone)

# ---- Sampling ----

@pytest.mark.parametrize("use_mtp", [False, True])
def test_a_seed_repeats_and_a_generator_leaves_the_global_state_alone(model, use_mtp):
    def draw(generator=None):
        sampled = dict(do_sample=True, use_mtp=use_mtp, max_new_tokens=10, generator=generator)
        return model.generate(tokens(2, 4), **sampled)

    before = torch.get_rng_state()
    runs = [draw(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), before)
    runs = [(torch.manual_seed(7), draw())[1] for _ in range(2)]
    assert torch.equal(*runs)

@pytest.mark.parametrize(
    "narrow", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-6}], ids=str
)
def test_sampling_from_one_token_is_greedy(model, narrow):
    ids = tokens(2, 4)
    sampled = model.generate(ids, max_new_tokens=8, do_sample=True, **narrow)
    assert torch.equal(sampled, model.generate(ids, max_new_tokens=8))

ALL_FILTERS = {"temperature": 1.5, "top_k": 12, "top_p": 0.9, "min_p": 0.15}

@pytest.mark.parametrize("settings", [{"top_k": 1000}, {"top_p": 0.6}, {"min_p": 0.2}, ALL_FILTERS], ids=str)
def test_the_distribution_keeps_the_right_set_and_sums_to_one(settings):
    logits = 2 * torch.randn(4, 5, 20, generator=torch.Generator().manual_seed(0))
    probs = Sampling(do_sample=True, **settings).distribution(logits)
    torch.testing.assert_close(probs.sum(-1), torch.ones(4, 5))
    for row, found in zip(logits.view(-1, 20), probs.view(-1, 20), strict=True):
        assert found.tolist() == pytest.approx(filtered(row, **settings).tolist(), abs=1e-6)

@pytest.mark.parametrize(
    ("settings", "logits", "probabilities"),
    [
        ({"do_sample": False}, [0.1, 2.0, -1.0], [0, 0, 1]),
        ({"top_k": 2}, [1.0, 1.0, 1.0, 0.0], [0, 0, 0.5, 0.5]),
        ({"top_p": 0.5}, [0.0] * 8, [0] * 4 + [0.25] * 4),
        ({"top_p": 0.999}, [0.0, -math.inf, 0.0], [0, 0.5, 0.5]),
    ],
    ids=str,
)
def test_of_equals_no_more_are_kept_than_needed(settings, logits, probabilities):
    """Greedy is all on the likeliest, and a masked logit is never drawn."""
    probs = Sampling(**{"do_sample": True} | settings).distribution(torch.tensor(logits))
    assert probs.sort().values.tolist() == pytest.approx(probabilities)
    assert (probs[torch.tensor(logits) == -math.inf] == 0).all()

def test_probabilities_of_a_bfloat16_model_are_float32():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)).bfloat16()
    probs = Sampling(do_sample=True).distribution(logits)
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs.sum(), torch.ones(()))

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

def test_a_residual_of_nothing_is_p_row_by_row():
    """Where p and q are the same but for the draft's rounding, p itself is drawn from."""
    p = torch.tensor([[[0.0, 1.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]], [[0.0, 0.5], [0.0, 1.0]]])
    q = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]], [[0.5, 0.5]]])
    sampling = Sampling(do_sample=True, generator=torch.Generator().manual_seed(0))
    accepted, token = sampling.accept(torch.zeros(3, 1, dtype=torch.long), q, p)
    assert accepted.tolist() == [0, 0, 0]
    assert token.tolist() == [1, 1, 1]

# ---- Stopping ----

@pytest.mark.parametrize(
    ("config", "argument", "stops"),
    [
        ([1, 2], None, [1, 2]), (None, None, []), (1, (7, 8), [7, 8]), (1, 0, [0]), (0, None, [0]), (1, -1, []),
        ([1, -1], None, []), (1, [], []),
    ],
)
def test_what_ends_a_text(config, argument, stops):
    """The argument, else the config; -1 stands for none."""
    model = SimpleNamespace(config=DeepseekV3Config(eos_token_id=config), generation_config=None)
    found = stop_ids(model, argument)
    assert found == stops
    assert type(found) is list

CASES = [("config", 1, None), ("argument", 2, None), ("config", 2, 60)]

@pytest.mark.parametrize(("given", "how_many", "pad_id"), CASES)
def test_rows_stop_at_their_end_and_are_padded_behind_it(given, how_many, pad_id):
    model, ids = build(dtype=torch.float64, pad_token_id=pad_id), tokens(3, 5)
    endless = model.generate(ids, max_new_tokens=10, eos_token_id=-1)[:, 5:]
    stops = endless[torch.arange(how_many), torch.tensor([2, 4])[:how_many]].tolist()
    eos = stops[0] if how_many == 1 else stops
    rows = [greedy(model, row, 10, stops) for row in ids]
    expected, _ = pad(rows, "right", stops[0] if pad_id is None else pad_id)
    if given == "config":
        model.config.eos_token_id, eos = eos, None
    assert torch.equal(model.generate(ids, max_new_tokens=10, eos_token_id=eos), expected)
    alone = model.generate(ids[:1], max_new_tokens=10, eos_token_id=eos)
    assert torch.equal(alone, rows[0][None])  # generation ends when every row has

# ---- Around it ----

@pytest.mark.parametrize(("broken", "use_mtp"), [(True, False), (False, True)])
def test_each_module_has_its_own_training_mode_as_before(broken, use_mtp):
    """Also where a streamer, which gets tokens as they come, stops it all; no gradient is made."""
    model, seen = build().train(), []
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]

    def streamer(token):
        assert not any(module.training for module in model.modules())
        seen.append(token)
        if broken and len(seen) == 2:
            raise InterruptedError

    try:
        draft = dict(use_mtp=use_mtp, streamer=streamer, eos_token_id=-1)
        out = model.generate(tokens(1, 4), max_new_tokens=5, **draft)
        assert not out.requires_grad
    except InterruptedError:
        assert broken and len(seen) == 2
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())

VALUES = [("temperature", value, "above 0; greedy is do_sample=False") for value in (0, -1.0, math.nan)]
VALUES += [("top_p", value, "in (0, 1]") for value in (0.0, 1.1, math.nan)]
VALUES += [("min_p", value, "in [0, 1]") for value in (-0.1, 1.5)]
VALUES += [("top_k", -1, "0 (off) or more"), ("max_new_tokens", -1, "a whole number, 0 or more")]

@pytest.mark.parametrize(("name", "value", "right"), VALUES)
def test_an_error_says_what_would_be_right(model, name, value, right):
    for do_sample in (True, False):
        with pytest.raises(ValueError, match=re.escape(f"{name}={value}: must be {right}")):
            model.generate(tokens(1, 4), do_sample=do_sample, **{name: value})

@pytest.mark.parametrize("settings", [{}, {"top_k": 1}, {"min_p": 0.0}, {"min_p": 1.0}, {"top_p": 1.0}])
def test_the_last_value_that_works_is_taken(settings):
    plain = {"do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert vars(Sampling(**settings)).items() >= (plain | {"generator": None} | settings).items()
