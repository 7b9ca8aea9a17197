# SPDX-License-Identifier: MIT
"""Drafting with MTP modules changes nothing but the number of steps.

Greedy tokens are those of decoding without a cache at all; sampled tokens have the main model's
joint distribution, in a test that fails for each usual shortcut (they are made, by changing the
source); at every step what the caches hold is what a fresh pass over the accepted tokens makes.
"""

import functools
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from helpers import build, filtered, greedy, pad, tokens

import deepseek_v3
from deepseek_v3 import Continuation, Drafter

SOURCE = Path(deepseek_v3.__file__).read_text(encoding="utf-8")
LENGTHS = (1, 7, 3, 5)  # of the prompts in a batch
NEW = 20

@pytest.fixture(scope="module")
def trained():
    """A model of 3 MTP modules that has learnt a little: drafts are accepted, but not all."""
    model = build(num_nextn_predict_layers=3, initializer_range=0.06, num_hidden_layers=2)
    optimizer = torch.optim.AdamW(model.train().parameters(), 5e-3)
    random = torch.Generator().manual_seed(0)
    following = torch.randint(61, (61, 2), generator=random)
    for _ in range(60):
        ids = walks(following, 16, 16, random)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_router_bias(0.01)
    return model.eval()

def walks(following, B, T, random):
    """Rows in which either of two tokens follows each, mostly the first of them."""
    ids = [torch.randint(61, (B,), generator=random)]
    for _ in range(T - 1):
        choice = (torch.rand(B, generator=random) > 0.6).long()
        ids.append(following[ids[-1], choice])
    return torch.stack(ids, 1)

def prompts(side):
    """Ids and mask of four padded prompts, or of one alone."""
    lengths = LENGTHS if side != "one row" else (5,)
    return pad([tokens(1, n, seed=n)[0] for n in lengths], side)

@functools.cache
def endless(model, *row):
    """The NEW greedy tokens behind a row."""
    return greedy(model, torch.tensor(row), NEW)[len(row) :].tolist()

def expected(model, ids, mask, new, stops=()):
    """The result of generate for padded prompts, row by row without a cache."""
    gained = []
    for row, real in zip(ids, mask, strict=True):
        row = endless(model, *row[real.bool()].tolist())[:new]
        ends = [i + 1 for i, token in enumerate(row) if token in stops]
        gained.append(torch.tensor(row[: min(ends, default=new)]))
    return torch.cat([ids, pad(gained, "right", stops[0] if stops else 0)[0]], 1)

# ---- Greedy ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("modules, layers, side", [(1, 1, "left"), (2, 2, "one row"), (3, 1, "right")])
def test_greedy_tokens_of_random_weights(modules, layers, side):
    model = build(num_hidden_layers=layers, num_nextn_predict_layers=modules)
    ids, mask = prompts(side)
    stops = [7, 8, 9]
    right = expected(model, ids, mask, NEW, stops)
    for K in (1, 2, 5):
        draft = dict(use_mtp=True, num_draft_tokens=K, eos_token_id=stops, max_new_tokens=NEW)
        assert torch.equal(model.generate(ids, mask, **draft), right), K

TRAINED = [(1, "left"), (2, "right"), (3, "one row"), (4, "left"), (6, "right")]

@pytest.mark.parametrize("K, side", TRAINED)
def test_greedy_tokens_of_trained_weights(trained, K, side):
    ids, mask = prompts(side)
    right = expected(trained, ids, mask, NEW)
    steps = []
    draft = dict(use_mtp=True, num_draft_tokens=K, eos_token_id=-1, statistics=steps)
    assert torch.equal(trained.generate(ids, mask, max_new_tokens=NEW, **draft), right)
    accepted = [n for _, n in steps]
    assert sum(accepted) / len(accepted) > 0.25 and min(accepted) < K, "or this test sees nothing"
    assert max(accepted) == min(K, 3) if K <= 3 else max(accepted) > 3

@pytest.mark.parametrize("K", [3, 6])
def test_the_end_of_a_text_inside_a_draft(trained, K):
    """Each token of each row in turn ends the text: some do so behind accepted drafts."""
    ids, mask = prompts("left")
    inside = 0
    for stop in expected(trained, ids, mask, 6)[:, -5:].flatten().unique()[:4].tolist():
        steps = []
        draft = dict(use_mtp=True, num_draft_tokens=K, eos_token_id=stop, statistics=steps)
        out = trained.generate(ids, mask, max_new_tokens=12, **draft)
        assert torch.equal(out, expected(trained, ids, mask, 12, [stop]))
        gained = (out[:, ids.shape[1] :] != stop).sum() + (out == stop).any(-1).sum()
        inside += sum(n + 1 for _, n in steps) + len(ids) - int(gained) > 0
    assert inside, "no text ended before the last accepted draft"

@pytest.mark.parametrize("K, new", [(1, 0), (4, 1), (1, 2), (4, 3), (4, 7)])
def test_exactly_as_many_tokens_as_asked(trained, new, K):
    """Nothing random is drawn for them, and the mask that was given is left alone."""
    (ids, mask), random = prompts("right"), torch.Generator().manual_seed(5)
    given, before = mask.bool(), random.get_state()
    draft = dict(use_mtp=True, num_draft_tokens=K, eos_token_id=-1, generator=random)
    out = trained.generate(ids, given, max_new_tokens=new, **draft)
    assert out.shape == (len(ids), ids.shape[1] + new)
    assert torch.equal(out, trained.generate(ids, mask, max_new_tokens=new, eos_token_id=-1))
    assert torch.equal(given, mask.bool()) and torch.equal(random.get_state(), before)

# ---- Caches ---------------------------------------------------------------------------------------

def fresh_drafts(model, known, drafts):
    """Logits of each draft behind known tokens (n + 1), without any cache, from the definition."""
    main, blocks, D = model.model, model.mtp_blocks, len(model.mtp_blocks)
    text = torch.cat([known, drafts])
    above = main(known[None, :-1]).last_hidden_state
    hidden, logits = above, []
    for i in range(len(drafts)):
        above = hidden if i < D else torch.cat([above, hidden[:, -1:]], 1)
        context = main.context(torch.arange(above.shape[1])[None], None, None, None)
        first = min(i, D - 1) + 1
        embeds = main.embed_tokens(text[None, first : first + above.shape[1]])
        hidden, *_ = blocks[min(i, D - 1)](above, embeds, context)
        logits.append(model.lm_head(hidden[0, -1]))
    return torch.stack(logits)

def fresh_latents(model, known):
    """What each depth's cache should hold of known tokens (n + 1): one (rows, C + R) a module."""
    main, hidden, latents = model.model, model.model(known[None, :-1]).last_hidden_state, []
    for k, block in enumerate(model.mtp_blocks, 1):
        cache = deepseek_v3.LatentCache()
        hidden = hidden[:, : max(len(known) - k, 0)]
        if not hidden.shape[1]:
            return latents + [torch.zeros(0)] * (len(model.mtp_blocks) - len(latents))
        context = main.context(torch.arange(hidden.shape[1])[None], None, None, cache)
        hidden, *_ = block(hidden, main.embed_tokens(known[None, k:]), context)
        latents.append(cache.layers[0][0, : hidden.shape[1]])
    return latents

DRAFTS = [(1, 1, "left"), (1, 4, "one row"), (3, 2, "right"), (3, 3, "left"), (3, 6, "right")]

@pytest.mark.parametrize("modules, K, side", DRAFTS)
def test_caches_are_what_a_fresh_pass_makes(trained, modules, K, side, monkeypatch):
    model = trained
    if modules == 1:
        model = build(num_nextn_predict_layers=1)
        model.load_state_dict(trained.state_dict(), strict=False)
    ids, mask = prompts(side)
    calls, draft, ended, add = [], Drafter.draft, [], Continuation.add

    def watch_ends(self, *gained):
        add(self, *gained)
        ended.append(list(self.finished))

    def watch(self, window, hidden, known, last, token, count):
        drafts, q = draft(self, window, hidden, known, last, token, count)
        caches = []
        for cache in self.caches[:count]:
            held = cache.layers[0][:, : cache.length].clone()
            documents = torch.ones_like(held[..., 0]) if cache.documents is None else cache.documents
            caches.append((held, documents > 0))
        calls.append((ended[-1], hidden, known, last, drafts, q, caches))
        return drafts, q

    monkeypatch.setattr(Drafter, "draft", watch)
    monkeypatch.setattr(Continuation, "add", watch_ends)
    sample = dict(do_sample=True, eos_token_id=-1, generator=torch.Generator().manual_seed(3))
    draft_more = dict(use_mtp=True, num_draft_tokens=K, max_new_tokens=14)
    out = model.generate(ids, mask, **sample, **draft_more)
    assert len(calls) > 2
    assert side == "one row" or any(not known[:, ids.shape[1] :].all() for _, _, known, *_ in calls)
    for b in range(len(ids)):
        text = torch.cat([ids[b, mask[b].bool()], out[b, ids.shape[1] :]])
        for finished, hidden, known, last, drafts, q, caches in calls:
            if finished[b]:
                break
            now = text[: int(known[b].sum()) + 1]  # and a last token that the caches do not hold
            with torch.no_grad():
                state = model.model(now[None, :-1]).last_hidden_state[0, -1]
                logits, latents = fresh_drafts(model, now, drafts[b]), fresh_latents(model, now)
            torch.testing.assert_close(hidden[b, last[b]], state, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(q[b], logits.softmax(-1), rtol=1e-3, atol=1e-5)
            for (held, real), latent in zip(caches, latents, strict=False):
                right = latent.reshape(-1, held.shape[-1])
                torch.testing.assert_close(held[b, real[b]], right, rtol=1e-3, atol=1e-4)

def test_holes_are_bounded_by_the_best_row_and_statistics_count_rows_and_steps(trained, monkeypatch):
    """A step takes as many slots as its best row gains tokens."""
    lengths, draft = [], Drafter.draft

    def watch(self, window, hidden, known, *rest):
        lengths.append(known.shape[1])
        return draft(self, window, hidden, known, *rest)

    monkeypatch.setattr(Drafter, "draft", watch)
    ids, mask = prompts("left")
    steps = []
    draft_more = dict(use_mtp=True, num_draft_tokens=3, max_new_tokens=30, eos_token_id=-1)
    trained.generate(ids, mask, statistics=steps, **draft_more)
    assert lengths[-1] > ids.shape[1] + 30 - 4
    gained = sum(accepted + 1 for _, accepted in steps)
    assert lengths[-1] <= ids.shape[1] + gained
    assert all(0 <= accepted <= drafted <= 3 for drafted, accepted in steps)
    # All but a row's first token, its last if that was not drafted for, and what stood past the end.
    assert 28 * len(ids) <= gained <= (29 + 3) * len(ids)

# ---- Sampling -------------------------------------------------------------------------------------

VOCAB, ROWS, DEEP = 11, 12000, 3
FILTERS = {
    "temperature": dict(temperature=0.8), "top-k": dict(top_k=5, temperature=1.2),
    "top-p": dict(top_p=0.95, temperature=1.3), "min-p": dict(min_p=0.2, temperature=1.1),
    "all": dict(top_k=7, top_p=0.9, min_p=0.1, temperature=1.3),
}

def small(module=deepseek_v3, modules=1):
    """A model of 11 tokens whose MTP modules disagree with it, but not wholly."""
    sizes = dict(vocab_size=VOCAB, num_hidden_layers=1, num_nextn_predict_layers=modules)
    model = build(seed=2, initializer_range=0.3, **sizes)
    if module is deepseek_v3:
        return model
    changed = module.DeepseekV3ForCausalLM(module.DeepseekV3Config(**vars(model.config)))
    changed.load_state_dict(model.state_dict())
    return changed.eval()

def exact_joint(model, prompt, filters):
    """P of each continuation by DEEP tokens, (VOCAB ** DEEP), filters written out anew."""
    joint, ends = torch.ones(1, dtype=torch.float64), prompt[None]
    for _ in range(DEEP):
        with torch.no_grad():
            logits = model(ends).logits[:, -1].double()
        step = torch.stack([filtered(row, **filters) for row in logits])
        joint = (joint[:, None] * step).flatten()
        following = torch.arange(VOCAB).repeat(len(ends))[:, None]
        ends = torch.cat([ends.repeat_interleave(VOCAB, 0), following], 1)
    return joint

def surprise(model, filters, K, rows=ROWS, prompt=(3, 1, 4)):
    """Chi-square of sampled continuations in standard deviations above its mean; inf if impossible."""
    prompt = torch.tensor(prompt)
    ids = prompt.expand(rows, -1)
    sample = dict(do_sample=True, eos_token_id=-1, generator=torch.Generator().manual_seed(K))
    draft = dict(use_mtp=True, num_draft_tokens=K, max_new_tokens=DEEP)
    new = model.generate(ids, **sample, **draft, **filters)[:, len(prompt) :]
    cell = (new * VOCAB ** torch.arange(DEEP - 1, -1, -1)).sum(-1)
    seen = torch.bincount(cell, minlength=VOCAB**DEEP).double()
    right = exact_joint(model, prompt, filters) * rows
    if seen[right == 0].any():
        return math.inf
    common = right >= 5
    seen = torch.cat([seen[common], seen[~common].sum()[None]])
    right = torch.cat([right[common], right[~common].sum()[None]])
    seen, right = seen[right > 0], right[right > 0]
    assert len(right) >= 10
    freedom = len(right) - 1
    return float(((seen - right) ** 2 / right).sum() - freedom) / math.sqrt(2 * freedom)

LIMIT = 4.0  # standard deviations; one test in thousands of right ones is above

DRAWN = [(1, 1, "temperature"), (1, 2, "top-k"), (2, 2, "top-p"), (1, 1, "min-p"), (1, 2, "all"), (2, 2, "all")]

@pytest.mark.parametrize("modules, K, name", DRAWN)
def test_sampled_tokens_have_the_main_models_joint_distribution(name, modules, K):
    assert surprise(small(modules=modules), FILTERS[name], K) < LIMIT

MUTATIONS = {
    "every draft is accepted": ("(chance * q_x < p_x)", "(chance * q_x <= q_x)"),
    "the residual is p": ("(p - q).clamp(min=0)", "p"),
    "the residual is |p - q|": ("(p - q).clamp(min=0)", "(p - q).abs()"),
    "accepted where p beats q": ("(chance * q_x < p_x)", "(q_x <= p_x)"),
    "accepted with probability p": ("(chance * q_x < p_x)", "(chance < p_x)"),
    "the likeliest token is drafted": (
        "drafts.append(self.sampling.draw(q[-1].squeeze(1)).unsqueeze(1))",
        "drafts.append(q[-1].argmax(-1))",
    ),
    "drafts are drawn without filters": (
        "drafts.append(self.sampling.draw(q[-1].squeeze(1)).unsqueeze(1))",
        "drafts.append(self.sampling.draw(self.model.lm_head(newest)[:, 0].softmax(-1)).unsqueeze(1))",
    ),
    "p alone is filtered, q is not what was drawn from": (
        "return torch.cat(drafts, 1), torch.cat(q, 1)",
        "return torch.cat(drafts, 1), torch.cat(q, 1).add(1 / 11).div(2)",
    ),
    "p is not filtered": (
        "        p = sampling.distribution(sampling.process(logits, drafts, gained))\n",
        "        p = logits.softmax(-1)\n",
    ),
}

def changed_module(old, new, path):
    """deepseek_v3 with one piece of its source replaced."""
    assert SOURCE.count(old) == 1, f"{SOURCE.count(old)} times in the source: {old}"
    path.write_text(SOURCE.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[path.stem]
    return module

@pytest.mark.parametrize("name", MUTATIONS)
def test_each_shortcut_is_noticed(name, tmp_path):
    module = changed_module(*MUTATIONS[name], tmp_path / "shortcut.py")
    rows = ROWS if name == "drafts are drawn without filters" else ROWS // 3  # the subtlest
    assert surprise(small(module), FILTERS["all"], 1, rows) > 2 * LIMIT

# ---- Streaming, statistics, errors ----------------------------------------------------------------

@pytest.mark.parametrize("use_mtp, side", [(False, "left"), (True, "left"), (True, "one row")])
def test_columns_are_streamed_in_order(trained, use_mtp, side):
    ids, mask = prompts(side)
    seen = []
    stop = int(expected(trained, ids, mask, 6)[0, -1])
    draft = dict(use_mtp=use_mtp, eos_token_id=stop, streamer=seen.append)
    out = trained.generate(ids, mask, max_new_tokens=NEW, **draft)
    assert all(column.shape == (len(ids),) for column in seen)
    assert torch.equal(torch.stack(seen, 1), out[:, ids.shape[1] :])

def test_a_single_row_streams_each_token_once_it_is_accepted(trained, monkeypatch):
    events, draft = [], Drafter.draft
    steps = []
    monkeypatch.setattr(Drafter, "draft", lambda *a: events.append("draft") or draft(*a))
    more = dict(use_mtp=True, num_draft_tokens=3, max_new_tokens=20, eos_token_id=-1)
    trained.generate(tokens(1, 5), streamer=lambda t: events.append("token"), statistics=steps, **more)
    assert events[:2] == ["token", "draft"]
    gained = [len(part.split()) for part in " ".join(events).split("draft")[1:]]
    assert gained[: len(steps)] == [n + 1 for _, n in steps][: len(gained) - 1] + gained[-1:]

def test_what_drafting_needs_is_named(trained):
    with pytest.raises(ValueError, match="use_mtp=True"):
        trained.generate(tokens(1, 4), num_draft_tokens=2)
    model = build(num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match="num_nextn_predict_layers=1.*checkpoint"):
        model.generate(tokens(1, 4), use_mtp=True)
    assert model.generate(tokens(1, 4), max_new_tokens=2, eos_token_id=-1).shape == (1, 6)
