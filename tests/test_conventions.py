# SPDX-License-Identifier: MIT
"""What a transformers user does: generate's arguments, other spellings of checkpoints, twins, peft, saving.

Wherever transformers has the thing, its own classes say what is right.
"""

import copy
import json
import warnings

import peft
import pytest
import torch
import transformers
from checkpoints import ragged, read
from helpers import build, close, pad, tokens
from safetensors.torch import load_file, save_file
from transformers.generation import logits_process
from transformers.modeling_layers import MtpModel

from deepseek_v3 import (
    DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification, DeepseekV3Model,
)

load, IDS = DeepseekV3ForCausalLM.from_pretrained, tokens(2, 9)

def theirs(folder, name="AutoModelForCausalLM", **options):
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, **options).eval()

def assert_same(first, second):
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)

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

NEW = 9
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
    "plain": {}, "penalty": {"repetition_penalty": 1.8}, "reward": {"repetition_penalty": 0.7},
    "function": {"logits_processor": odd_first},
    "list after a penalty": {"logits_processor": [odd_first, *THEIR_LIST], "repetition_penalty": 1.3},
    "transformers' list": {"logits_processor": THEIR_LIST}, "transformers' class": {"logits_processor": PREFIX},
    "embeddings": {"inputs_embeds": True}, "embeddings and ids": {"inputs_embeds": True, "input_ids": True},
    "cache": {"past_key_values": 2},
    "cache and embeddings": {"past_key_values": 2, "inputs_embeds": True, "input_ids": True},
}

def asked_of(model, asked, ids, mask, ours=True):
    """Keywords of generate; embeddings are shifted ones, that no ids have."""
    given = ASKED[asked] | {"input_ids": ids, "attention_mask": mask}
    if "inputs_embeds" in given:
        given["inputs_embeds"] = model.get_parameter("model.embed_tokens.weight").detach()[(ids + 1) % 61]
        given["input_ids"] = ids if "input_ids" in ASKED[asked] else None
    if "past_key_values" in given:
        held = slice(0, given["past_key_values"])
        first = {"attention_mask": None if mask is None else mask[:, held], "use_cache": True}
        embeds = given.get("inputs_embeds")
        first |= {"input_ids": ids[:, held]} if embeds is None else {"inputs_embeds": embeds[:, held]}
        given["past_key_values"] = model(**first).past_key_values
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
    """A turn is what was said so far, and three tokens more of the user. Where drafts made rows of a batch
    unlike, the cache keeps what all have in common, the prompt: the answers are read again."""
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
        held = ids.shape[1] if use_mtp and len(ids) > 1 else found.shape[1] - 1
        assert cache.length == held
        ids = torch.cat([found, tokens(len(ids), 3, seed=turn)], 1)
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

# ---- Loading ------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["qwen2", "glm4_moe", "dots1", "deepseek_v2"])
def test_another_model_type_is_the_first_thing_said(tmp_path, kind):
    """Though more is wrong with the config, and there are no weights."""
    wrong = {"hidden_size": "x", "rope_scaling": {"type": "longrope"}, "hidden_act": "gelu", "n_group": 7}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} | wrong))
    with pytest.raises(ValueError, match=f"^model_type='{kind}': must be one of deepseek_v3"):
        load(tmp_path)

def test_a_dtype_may_be_a_string(tmp_path):
    ragged().save_pretrained(tmp_path, quantize="fp8")
    plain = load(tmp_path)
    for name in ("bfloat16", "float32"):
        assert {p.dtype for p in load(tmp_path, dtype=name).parameters()} == {getattr(torch, name)}
    assert_same(load(tmp_path, dtype="auto"), plain)

@torch.no_grad()
@pytest.mark.parametrize("size", ["5GB", "30KB"])
def test_a_trunk_that_transformers_saved_alone(tmp_path, size):
    """Its names do not begin with `model.`"""
    build(num_nextn_predict_layers=0).save_pretrained(tmp_path)
    trunk = theirs(tmp_path).model
    trunk.save_pretrained(tmp_path / "trunk", max_shard_size=size)
    found = DeepseekV3Model.from_pretrained(tmp_path / "trunk")
    close(found(IDS).last_hidden_state, trunk(IDS).last_hidden_state, 1e-5)
    with pytest.raises(ValueError, match=r"lm_head\.weight: missing"):
        load(tmp_path / "trunk")

def test_a_state_dict_with_stacked_experts_is_refused(tmp_path):
    build(num_nextn_predict_layers=0).save_pretrained(tmp_path)
    held = {name: tensor.clone() for name, tensor in theirs(tmp_path).state_dict().items()}
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="experts.gate_up_proj: a state_dict; save its model by save_pretrained"):
        load(tmp_path)

def test_a_tied_checkpoint_may_hold_its_head_too(tmp_path):
    model, file = build(tie_word_embeddings=True), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    held = load_file(file)
    save_file(held | {"lm_head.weight": held["model.embed_tokens.weight"].clone()}, file)
    assert_same(load(tmp_path), model)
    save_file(held | {"lm_head.weight": 1 + held["model.embed_tokens.weight"]}, file)
    with pytest.raises(ValueError, match="lm_head.weight: differs"):
        load(tmp_path)

# ---- Twins --------------------------------------------------------------------------------------

SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=3)
SIZES |= dict(num_key_value_heads=3, kv_lora_rank=11, qk_rope_head_dim=8, qk_nope_head_dim=6, v_head_dim=5)
SIZES |= dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, max_position_embeddings=64)
GLM = SIZES | dict(q_lora_rank=17, moe_intermediate_size=16, n_routed_experts=12, num_experts_per_tok=4)
YOUTU = SIZES | dict(q_lora_rank=17, pad_token_id=3)
TWINS = {
    "glm": ("Glm4MoeLite", GLM),
    "glm in groups": ("Glm4MoeLite", GLM | dict(n_group=3, topk_group=2, norm_topk_prob=False)),
    "glm of two dense layers": ("Glm4MoeLite", GLM | dict(mlp_layer_types=["dense", "dense", "sparse"])),
    "glm without dense layers": ("Glm4MoeLite", GLM | dict(mlp_layer_types=["sparse"] * 3)),
    "glm, biased and tied": ("Glm4MoeLite", GLM | dict(attention_bias=True, tie_word_embeddings=True)),
    "youtu": ("Youtu", YOUTU), "youtu with a head": ("Youtu", YOUTU | dict(tie_word_embeddings=False)),
    "youtu, biased, q from the state": ("Youtu", YOUTU | dict(attention_bias=True, q_lora_rank=None)),
}

@torch.no_grad()
@pytest.mark.parametrize("twin", TWINS)
def test_a_twin_computes_the_same_and_is_read_by_its_own_class(tmp_path, twin):
    """Youtu's class zeroes the embedding of the pad id wherever it loads: what it reads from us is compared
    with what it reads from itself."""
    prefix, changes = TWINS[twin]
    other = getattr(transformers, prefix + "ForCausalLM")(getattr(transformers, prefix + "Config")(**changes)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in other.state_dict().items():
        centre = 1.0 if "norm" in name else -0.6 if name.endswith("correction_bias") else 0.0
        tensor.normal_(centre, 0.2, generator=generator)
    other.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    close(ours(IDS).logits, other(IDS).logits, 1e-5)
    ours.save_pretrained(tmp_path / "ours")
    first, second = (theirs(tmp_path / name) for name in ("theirs", "ours"))
    assert type(second) is type(other)
    assert_same(second, first)
    written, was = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
    assert {key: written.get(key) for key in was if key not in ("dtype", "rope_parameters")}.items() <= was.items()

@pytest.mark.parametrize(("prefix", "kind"), [("Glm4MoeLite", "glm4_moe_lite"), ("Youtu", "youtu")])
def test_what_a_twin_s_config_leaves_out_is_as_in_its_own_class(prefix, kind):
    config, other = DeepseekV3Config(model_type=kind), getattr(transformers, prefix + "Config")()
    assert config.tie_word_embeddings == other.tie_word_embeddings and config.rope_scaling is None
    assert config.num_nextn_predict_layers == 0 and config.kind == kind == config.to_dict()["model_type"]
    if kind == "glm4_moe_lite":
        assert (config.n_group, config.topk_group) == (other.n_group, other.topk_group)
        assert config.first_k_dense_replace == other.mlp_layer_types.count("dense")

def test_a_dense_layer_behind_a_sparse_one_is_refused():
    with pytest.raises(ValueError, match="mlp_layer_types=.*'dense' layers, then 'sparse'"):
        DeepseekV3Config(model_type="glm4_moe_lite", **GLM, mlp_layer_types=["dense", "sparse", "dense"])

@pytest.mark.parametrize("left_out", [(), ("embedding_initializer_range",)])
def test_a_new_youtu_model_is_drawn_as_transformers_draws_it(left_out):
    sizes = YOUTU | dict(vocab_size=500, hidden_size=64, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1)
    other = transformers.YoutuForCausalLM(transformers.YoutuConfig(**sizes))
    given = {name: value for name, value in other.config.to_dict().items() if name not in left_out}
    ours = DeepseekV3ForCausalLM(DeepseekV3Config(**given))
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.o_proj.weight"):
        assert ours.get_parameter(name).std().item() == pytest.approx(other.get_parameter(name).std().item(), rel=0.1)

# ---- Classification -----------------------------------------------------------------------------

PROBLEMS = {
    "regression": (3, torch.tensor([[0.5, -1.0, 2.0], [0.0, 1.0, 3.0]])),
    "regression of one": (1, torch.tensor([0.5, -1.0])),
    "single_label_classification": (3, torch.tensor([2, 0])),
    "multi_label_classification": (3, torch.tensor([[1.0, 0, 1], [0, 0, 1]])),
}

@torch.no_grad()
@pytest.mark.parametrize("kind", PROBLEMS)
def test_problem_type_says_which_loss(tmp_path, kind):
    labels, name = PROBLEMS[kind], "DeepseekV3ForSequenceClassification"
    settings = dict(num_labels=labels[0], problem_type=kind.removesuffix(" of one"), pad_token_id=0)
    model = build(DeepseekV3ForSequenceClassification, num_nextn_predict_layers=0, **settings)
    model.save_pretrained(tmp_path)
    expected = theirs(tmp_path, name)(IDS, labels=labels[1]).loss
    close(model(IDS, labels=labels[1]).loss, expected, 1e-6)
    close(DeepseekV3ForSequenceClassification.from_pretrained(tmp_path)(IDS, labels=labels[1]).loss, expected, 1e-6)
    model.config.extra["problem_type"] = "guessing"
    with pytest.raises(ValueError, match="problem_type='guessing': must be one of regression"):
        model(IDS, labels=labels[1])

# ---- What models, outputs and configs are asked --------------------------------------------------

def test_an_output_is_a_mapping_of_what_is_there_and_a_tuple(pair):
    """In transformers' order; our last_hidden_state, which is always there, stands behind logits."""
    outs = [model(IDS, labels=IDS, output_attentions=True, use_cache=True) for model in pair]
    assert [name for name in outs[0] if name in outs[1]] == list(outs[1].keys())
    assert len(outs[0]) == len(outs[0].to_tuple()) == len(list(outs[0].keys()))
    assert outs[0].to_tuple()[1] is outs[0][1] is outs[0]["logits"] and "routing" not in outs[0]
    assert pair[0](IDS, return_dict=False)[0].shape == (2, 9, 61)
    head = build(DeepseekV3ForSequenceClassification)(IDS, return_dict=False)
    assert type(head) is tuple and head[0].shape == (2, 2)

@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [70, 50])
def test_a_vocabulary_grows_and_shrinks_and_is_saved(tmp_path, tied, size):
    model = build(tie_word_embeddings=tied)
    old, kept = model(IDS % 50).logits, min(size, 61)
    assert model.resize_token_embeddings(size) is model.get_input_embeddings() is model.base_model.embed_tokens
    close(model(IDS % 50).logits[..., :kept], old[..., :kept], 1e-6)
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == size
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same(again, model)
    assert again.get_output_embeddings().weight.shape == (size, 32) and again.config.vocab_size == size
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    assert model.generate(IDS % 50, max_new_tokens=4).shape == (2, 13)
    other = theirs(tmp_path)
    close(other(IDS % 50).logits, model(IDS % 50).logits, 1e-4)
    main = build(num_nextn_predict_layers=0, tie_word_embeddings=tied, vocab_size=size)
    assert main.num_parameters() == other.num_parameters()

def test_gradients_reach_adapters_in_recomputed_layers_that_are_frozen():
    model = build(num_nextn_predict_layers=0).train().requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.model.layers[0].self_attn.o_proj.weight.requires_grad_()
    assert model.gradient_checkpointing and model.num_parameters(only_trainable=True) == 32 * 15
    model(IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].self_attn.o_proj.weight.grad.abs().max() > 0
    model.gradient_checkpointing_disable()
    assert not model.gradient_checkpointing and model(IDS).inputs_embeds.requires_grad
    model.set_input_embeddings(torch.nn.Embedding(61, 32))
    assert model.model.embed_tokens is model.get_input_embeddings()

def test_a_kept_key_of_a_config_reads_like_a_field():
    config = DeepseekV3Config(use_cache=False)
    assert config.use_cache is False and not hasattr(config, "sliding_window")
    assert copy.deepcopy(config).use_cache is False and config.get_text_config() is config

# ---- Saving -------------------------------------------------------------------------------------

ALONG = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "tiktoken.model"]

def test_tokenizer_files_come_along_and_none_is_overwritten(tmp_path):
    build().save_pretrained(tmp_path / "old")
    for name in [*ALONG, "generation_config.json", "README.md"]:
        (tmp_path / "old" / name).write_text(json.dumps({"is": name}))
    new = tmp_path / "new"
    new.mkdir()
    for name in (ALONG[0], "generation_config.json"):
        (new / name).write_text("{}")
    load(tmp_path / "old").save_pretrained(new)
    expected = {*ALONG, "generation_config.json", "config.json", "model.safetensors"}
    assert {path.name for path in new.iterdir()} == expected
    assert (new / ALONG[0]).read_text() == "{}"
    for name in [*ALONG[1:], "generation_config.json"]:
        assert json.loads((new / name).read_text()) == {"is": name}

def test_compiled_parts_are_saved_under_their_plain_names(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "plain")
    model.model.layers[0] = torch.compile(model.model.layers[0])
    model.model.layers[1].mlp.experts = torch.compile(model.model.layers[1].mlp.experts)
    model.lm_head = torch.compile(model.lm_head)
    for name, each in (("parts", model), ("whole", torch.compile(build()))):
        each.save_pretrained(tmp_path / name, max_shard_size="60KB")
        assert_same(load(tmp_path / name), load(tmp_path / "plain"))

def test_float16_is_saved_and_loaded_again(tmp_path):
    model = build().half()
    model.save_pretrained(tmp_path)
    assert_same(load(tmp_path), model)
    assert load(tmp_path, dtype="float16").dtype == theirs(tmp_path).half().dtype == torch.float16

def adapted():
    peft.get_peft_model(model := build(), peft.LoraConfig(r=2, target_modules=["o_proj"]))
    return model

def of_another_vocabulary():
    model = build()
    model.model.embed_tokens = torch.nn.Embedding(70, 32)
    return model

UNSAVABLE = {
    "an adapter": (adapted, r"o_proj.*merge_and_unload\(\)"),
    "another vocabulary": (of_another_vocabulary, "embed_tokens.weight: not as the config says"),
}

@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("kind", UNSAVABLE)
def test_what_could_not_be_loaded_again_is_refused_before_anything_is_written(tmp_path, kind, older):
    make, said = UNSAVABLE[kind]
    build(seed=1).save_pretrained(tmp_path) if older else None
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=said):
        make().save_pretrained(tmp_path if older else tmp_path / "new")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files

# ---- peft ---------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("learned", ["lora", "prompt"])
def test_an_adapter_for_language_models_trains_generates_and_merges(tmp_path, learned):
    config = peft.LoraConfig(r=2, target_modules=["o_proj", "kv_b_proj"], task_type="CAUSAL_LM")
    if learned == "prompt":
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = build(eos_token_id=None)
    wrapped = peft.get_peft_model(model, config).train()
    optimizer, losses = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], 0.02), []
    for _ in range(3):
        loss = wrapped(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > losses[1] > losses[2]
    for ids, mask in BATCHES.values():
        mask = torch.ones_like(ids) if mask is None else mask
        found = wrapped.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, use_mtp=True)
        assert torch.equal(wrapped.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6), found)
        if learned == "prompt":
            prompt = wrapped.get_prompt(len(ids))
            embeds = torch.cat([prompt, model.model.embed_tokens(ids)], 1)
            both = torch.cat([mask.new_ones(len(ids), 4), mask], 1)
            new = model.generate(inputs_embeds=embeds, attention_mask=both, max_new_tokens=6)
            assert torch.equal(found, torch.cat([ids, new], 1))
    if learned == "lora":
        merged = wrapped.merge_and_unload()
        merged.save_pretrained(tmp_path)
        assert torch.equal(load(tmp_path).generate(ids, mask, max_new_tokens=6), found)
        assert not torch.equal(build(eos_token_id=None).generate(ids, mask, max_new_tokens=6), found)

# ---- transformers reads MTP modules and FP8 -----------------------------------------------------

def as_mtp_layer(tensors, layer, E):
    """{name in transformers' MtpModel: tensor} of the MTP module at that layer of a checkpoint."""
    renamed = {"shared_head.norm": "post_norm"} | {name: name for name in ("enorm", "hnorm", "eh_proj")}
    tensors = {k.removeprefix(layer): v for k, v in tensors.items() if k.startswith(layer) and "embed" not in k}
    tensors.pop("shared_head.head.weight")
    stack = lambda part: torch.stack([tensors.pop(f"mlp.experts.{e}.{part}.weight") for e in range(E)])  # noqa: E731
    gate, up, down = map(stack, ("gate_proj", "up_proj", "down_proj"))
    tensors |= {"mlp.experts.gate_up_proj": torch.cat([gate, up], 1), "mlp.experts.down_proj": down}
    found = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        found[f"{renamed[module]}.weight" if module in renamed else f"mtp_block.{name}"] = tensor
    return found

@torch.no_grad()
def test_mtp_logits_are_those_of_transformers(tmp_path):
    """transformers names MTP modules otherwise, and runs them only in generate: layer by layer here."""
    model = build(num_nextn_predict_layers=2)
    model.save_pretrained(tmp_path)
    main, held = theirs(tmp_path), read(tmp_path)
    other = MtpModel(main, 2).eval()
    for k, layer in enumerate(other.layers):
        report = layer.load_state_dict(as_mtp_layer(held, f"model.layers.{3 + k}.", 12), strict=False)
        assert not report.missing_keys and not report.unexpected_keys
    hidden = main.model(IDS).last_hidden_state
    for k, found in enumerate(model(IDS, output_mtp=True).mtp_logits, 1):
        where = torch.arange(IDS.shape[1] - k)[None]
        hidden = other.forward_layer(k - 1, hidden[:, :-1], where, None, input_ids=IDS[:, k:])
        close(found, main.lm_head(hidden), 1e-4)

WHOLE = dict(hidden_size=128, intermediate_size=256, moe_intermediate_size=128, q_lora_rank=128, kv_lora_rank=120)
WHOLE |= dict(num_attention_heads=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=6)

@torch.no_grad()
def test_transformers_reads_fp8_where_blocks_are_whole(tmp_path):
    """On a CPU it dequantises; it refuses the 4.5 blocks of rows of the released kv_a_proj_with_mqa."""
    model = build(**WHOLE, num_experts_per_tok=2, initializer_range=0.05)
    model.save_pretrained(tmp_path, quantize="fp8")
    other = theirs(tmp_path, quantization_config=transformers.FineGrainedFP8Config(dequantize=True))
    close(other(IDS).logits, load(tmp_path, dtype=torch.float32)(IDS).logits, 1e-4)

@pytest.mark.parametrize("recompute", [False, True])
def test_transformers_trainer_trains(tmp_path, recompute):
    model, ids = build(), tokens(4, 9)
    rows = [{"input_ids": row, "labels": row} for row in ids] * 5
    how = dict(max_steps=10, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2)
    quiet = dict(report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True)
    settings = transformers.TrainingArguments(str(tmp_path), gradient_checkpointing=recompute, **how, **quiet)
    trainer = transformers.Trainer(model, settings, train_dataset=rows)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.5
    assert model.gradient_checkpointing == recompute
