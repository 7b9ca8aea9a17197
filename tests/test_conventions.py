# SPDX-License-Identifier: MIT
"""What a transformers user does: generate's arguments, other spellings of checkpoints, twins, peft, saving.

Wherever transformers has the thing, its own classes say what is right.
"""

import json
import os
import warnings

import pytest
import torch
import transformers
from helpers import build, close, pad, tokens
from transformers.generation import logits_process

from deepseek_v3 import DeepseekV3ForCausalLM

load = DeepseekV3ForCausalLM.from_pretrained

def theirs(folder, name="AutoModelForCausalLM", **options):
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, **options).eval()

# ---- generate -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model with three MTP modules, and transformers' of the same weights."""
    model, folder = build(num_nextn_predict_layers=3, eos_token_id=None), tmp_path_factory.mktemp("pair")
    with torch.no_grad():  # the last token says most about the next, so that many drafts stand
        for name, parameter in model.named_parameters():
            parameter.mul_(3.0 if "embed" in name else 0.5 if "down_proj" in name or "o_proj" in name else 1.0)
        for block in model.mtp_blocks:
            block.eh_proj.weight.mul_(0.3)[:, :32] += torch.eye(32)
        model.lm_head.weight.copy_(model.model.embed_tokens.weight.roll(3, 0))
    model.save_pretrained(folder)
    return model, theirs(folder)

NEW = 12
ROWS = [tokens(9), tokens(5, seed=2), tokens(3, seed=3)]
PAD = 28  # a token that a text would have: a penalty must not take padding for it
BATCHES = {"one": (ROWS[0][None], None)} | {side: pad(ROWS, side, PAD) for side in ("left", "right")}

def odd_first(ids, scores):
    """A processor that looks at the last token: odd and even ones take turns."""
    wanted = torch.arange(scores.shape[1]) % 2 != ids[:, -1:] % 2
    return scores.masked_fill(~wanted, -torch.inf)

def allowed(row, ids):
    """Other tokens for each row of the batch, and for each length."""
    return [token for token in range(61) if (token + row + len(ids)) % 5 > 1]

THEIR_LIST = logits_process.LogitsProcessorList(
    [logits_process.NoRepeatNGramLogitsProcessor(2), logits_process.SuppressTokensLogitsProcessor([3, 40])]
)
PREFIX = logits_process.PrefixConstrainedLogitsProcessor(allowed, 1)
ASKED = {
    "plain": {},
    "penalty": {"repetition_penalty": 1.8},
    "reward": {"repetition_penalty": 0.7},
    "function": {"logits_processor": odd_first},
    "list after a penalty": {"logits_processor": [odd_first, *THEIR_LIST], "repetition_penalty": 1.3},
    "transformers' list": {"logits_processor": THEIR_LIST},
    "transformers' class": {"logits_processor": PREFIX},
    "embeddings": {"inputs_embeds": True},
    "embeddings and ids": {"inputs_embeds": True, "input_ids": True},
    "cache": {"past_key_values": 2},
}

def asked_of(model, asked, ids, mask, ours=True):
    """Keywords of generate; embeddings are shifted ones, that no ids have."""
    given = ASKED[asked] | {"input_ids": ids, "attention_mask": mask}
    if "inputs_embeds" in given:
        given["inputs_embeds"] = model.get_parameter("model.embed_tokens.weight").detach()[(ids + 1) % 61]
        given["input_ids"] = ids if "input_ids" in ASKED[asked] else None
    if "past_key_values" in given:
        held = slice(0, given["past_key_values"])
        first = None if mask is None else mask[:, held]
        given["past_key_values"] = model(ids[:, held], attention_mask=first, use_cache=True).past_key_values
    if not ours:
        listed = given.get("logits_processor", [])
        listed = listed if isinstance(listed, list) else [listed]
        given["logits_processor"] = logits_process.LogitsProcessorList(listed)
        given |= {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return given

@torch.no_grad()
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("asked", ASKED)
def test_greedy_tokens_are_transformers_and_drafts_change_none(pair, asked, batch):
    """Prompts padded on the right, from which transformers does not generate, with and without drafts."""
    (model, other), (ids, mask) = pair, BATCHES[batch]
    runs = [{"use_mtp": False}, {"use_mtp": True, "num_draft_tokens": 1}, {"use_mtp": True}]
    found = [
        model.generate(max_new_tokens=NEW, eos_token_id=-1, **run, **asked_of(model, asked, ids, mask)) for run in runs
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    if batch != "right":
        expected = other.generate(max_new_tokens=NEW, **asked_of(other, asked, ids, mask, ours=False))
        assert found[0].tolist() == expected.tolist()

@torch.no_grad()
@pytest.mark.parametrize("use_mtp", [False, True])
@pytest.mark.parametrize("batch", ["one", "left"])
def test_each_turn_of_a_chat_reads_its_own_tokens_alone(pair, batch, use_mtp):
    """A turn is what was said so far, and three tokens more of the user."""
    (model, other), (ids, mask) = pair, BATCHES[batch]
    cache = model(ids[:, :2], attention_mask=None if mask is None else mask[:, :2], use_cache=True).past_key_values
    read, held = [], cache.length
    handle = model.model.embed_tokens.register_forward_hook(lambda m, inputs, out: read.append(inputs[0].shape[1]))
    for turn in range(3):
        expected = other.generate(
            ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        read.clear()
        options = dict(max_new_tokens=5, eos_token_id=-1, use_mtp=use_mtp, past_key_values=cache)
        found = model.generate(ids, mask, **options)
        assert found.tolist() == expected.tolist(), f"turn {turn}"
        assert read[0] == ids.shape[1] - held
        ids, held = torch.cat([found, tokens(len(ids), 3, seed=turn)], 1), found.shape[1] - 1
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(ids), 8)], 1)
    handle.remove()

@pytest.mark.parametrize("batch", ["one", "left"])
def test_several_samples_of_a_prompt_are_those_of_transformers_and_it_is_read_once(pair, batch):
    (model, other), (ids, mask) = pair, BATCHES[batch]
    read, asked = [], dict(attention_mask=mask, max_new_tokens=5, do_sample=True, num_return_sequences=3)
    handle = model.model.embed_tokens.register_forward_hook(lambda m, inputs, out: read.append(inputs[0].shape))
    torch.manual_seed(3)
    found = model.generate(ids, eos_token_id=-1, **asked)
    handle.remove()
    torch.manual_seed(3)
    expected = other.generate(ids, eos_token_id=None, pad_token_id=0, top_k=0, **asked)
    assert found.tolist() == expected.tolist() and read[0] == ids.shape
    assert torch.equal(found[:, : ids.shape[1]], ids.repeat_interleave(3, 0))
    for use_mtp in (False, True):
        runs = [
            model.generate(ids, generator=torch.Generator().manual_seed(seed), use_mtp=use_mtp, **asked)
            for seed in (1, 1, 2)
        ]
        assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])

@pytest.mark.parametrize("eos", [40, [44, 40]])
def test_generation_config_json_says_where_texts_end_and_is_kept(tmp_path, eos):
    """Its ids go before those of config.json."""
    model, ids = build(eos_token_id=3), tokens(3, 5)
    endless = model.generate(ids, max_new_tokens=8, eos_token_id=-1)
    stops = [int(endless[0, 7]), int(endless[1, 9])][: 1 if eos == 40 else 2]
    settings = {"eos_token_id": stops if len(stops) > 1 else stops[0], "pad_token_id": 17, "temperature": 0.6}
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    load(tmp_path).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == settings
    other = theirs(tmp_path)
    for folder in (tmp_path, tmp_path / "again"):
        found = load(folder).generate(ids, max_new_tokens=8)
        assert found.tolist() == other.generate(ids, max_new_tokens=8, do_sample=False).tolist()
        assert (found == 17).any() and not torch.equal(found, endless)

@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_inferred_from_the_pad_id_with_one_warning(side):
    model, (ids, mask) = build(pad_token_id=PAD, eos_token_id=None), BATCHES[side]
    with pytest.warns(UserWarning, match=f"pad_token_id={PAD}") as seen:
        found = model.generate(ids, max_new_tokens=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.generate(ids, mask, max_new_tokens=6), found)
        ended = model.generate(ids, max_new_tokens=6, eos_token_id=[PAD])  # pad == eos: it may be text
        assert torch.equal(ended, model.generate(ids, torch.ones_like(mask), max_new_tokens=6, eos_token_id=[PAD]))
        model.generate(ids.masked_fill(ids == PAD, 1), max_new_tokens=1)
    assert len(seen) == 1
    assert not torch.equal(found, model.generate(ids, torch.ones_like(mask), max_new_tokens=6))
