# SPDX-License-Identifier: MIT
"""The model against transformers' DeepseekV3, in float32 with random weights.

Both sides get the same weights, copied once, and the same config.json. All that follows from them,
RoPE tables, masks and positions, each side makes itself. The file climbs from parts to the whole:
config, norm, RoPE, router, experts, attention; then every module in order, hidden states, logits,
loss, gradients and generated tokens; then the classification heads and checkpoint folders.
The first failure from the top is the part that broke.
"""

import dataclasses
import functools
import json
from typing import NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn

import deepseek_v3

TOLERANCE = 1e-4

# All widths differ, so that no two of them can be mistaken for each other unseen.
BASE = dict(
    vocab_size=61, hidden_size=32, num_hidden_layers=3, first_k_dense_replace=1,
    num_nextn_predict_layers=0, num_attention_heads=3, q_lora_rank=24, kv_lora_rank=20,
    qk_nope_head_dim=10, qk_rope_head_dim=8, v_head_dim=12, intermediate_size=44,
    moe_intermediate_size=16, n_routed_experts=12, n_shared_experts=1, num_experts_per_tok=4,
    n_group=4, topk_group=2, max_position_embeddings=640, rope_scaling=None, pad_token_id=0,
    num_labels=5,
)  # fmt: skip


def yarn(factor, original, **settings):
    rope_scaling = dict(type="yarn", factor=factor, original_max_position_embeddings=original)
    return dict(rope_scaling=rope_scaling | settings, max_position_embeddings=factor * original)


SHAPES = {
    "several_groups": {},
    "one_group": dict(n_group=1, topk_group=1),
    "no_query_latent": dict(q_lora_rank=None),
    "two_shared_experts": dict(n_shared_experts=2),
    "no_dense_layer": dict(first_k_dense_replace=0),
    "only_dense_layers": dict(first_k_dense_replace=3),
    "top_1": dict(num_experts_per_tok=1),
    "top_1_weighed": dict(num_experts_per_tok=1, norm_topk_prob=False),
    "norm_topk_prob_false": dict(norm_topk_prob=False),
    "tied_embeddings": dict(tie_word_embeddings=True),
    "attention_bias": dict(attention_bias=True),
    "attention_bias_no_query_latent": dict(attention_bias=True, q_lora_rank=None),
    "coarse_eps": dict(rms_norm_eps=1e-2),  # the norms of the latents keep 1e-6
    "other_theta": dict(rope_theta=500.0),
    "values_wider_than_keys": dict(v_head_dim=24),
    "widths_not_divisible_by_4": dict(hidden_size=30, moe_intermediate_size=14),
    "yarn_as_v3": yarn(40, 4096, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0),
    "yarn_as_v2": yarn(40, 4096, beta_fast=32, beta_slow=1, mscale=0.707, mscale_all_dim=0.707),
    "yarn_other_settings": dict(qk_rope_head_dim=16, rope_theta=500.0)
    | yarn(8, 4096, beta_fast=16, beta_slow=4, mscale=1.0, mscale_all_dim=0.5),
    "yarn_without_mscale": yarn(10, 64),
    "yarn_attention_factor": yarn(10, 64, attention_factor=1.5, mscale_all_dim=1.0),
}
# Mean and spread. Under a negative bias every score + bias is below 0: a 0 would beat them all.
BIASES = {"zero_bias": (0.0, 0.0), "negative_bias": (-2.0, 0.3), "mixed_bias": (0.0, 0.5)}

every_shape = pytest.mark.parametrize("shape", SHAPES)
every_bias = pytest.mark.parametrize("bias", BIASES)
PADDED = ["left", "right", "continued"]
every_padding = pytest.mark.parametrize("side", ["unpadded", *PADDED])


# ---- The two sides ------------------------------------------------------------------------------


class Pair(NamedTuple):
    ours: nn.Module
    theirs: nn.Module


@torch.no_grad()
def randomise(model, bias):
    """Weights that keep all states of order 1, so that an absolute tolerance means something."""
    generator = torch.Generator().manual_seed(0)
    mean, spread = BIASES[bias]
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(mean + spread * noise.clamp(-3, 3))
        elif name.endswith("norm.weight"):
            tensor.copy_(1.0 + 0.3 * noise)
        else:
            tensor.copy_(noise * tensor.shape[-1] ** -0.5)


def as_transformers(tensors):
    """Our {name: tensor} as transformers has it: gate and up of an expert are one matrix there."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.endswith(".experts.gate_proj"):
            up = tensors[name.replace("gate_proj", "up_proj")]
            renamed[name.replace("gate_proj", "gate_up_proj")] = torch.cat([tensor, up], 1)
        elif not name.endswith(".experts.up_proj"):
            renamed[name] = tensor
    return renamed


def their_config(config):
    """transformers' config, from what ours writes into config.json; the plainest code paths."""
    written = json.loads(json.dumps(config.to_dict()))
    read = transformers.DeepseekV3Config.from_dict(written, attn_implementation="eager")
    read._experts_implementation = "eager"
    return read


def build(name="DeepseekV3ForCausalLM", bias="mixed_bias", **changes):
    """A model of that class name on both sides, with the same weights."""
    ours = getattr(deepseek_v3, name)(deepseek_v3.DeepseekV3Config(**(BASE | changes)))
    randomise(ours, bias)
    theirs = getattr(transformers, name)(their_config(ours.config))
    theirs.load_state_dict(as_transformers(ours.state_dict()))
    return Pair(ours.eval(), theirs.eval())


@functools.cache
def language_models(shape, bias="mixed_bias"):
    """The pair of that shape; shared by tests, which leave it as it is."""
    return build(bias=bias, **SHAPES[shape])


def batch(side="unpadded"):
    """Token ids (3, 10) and their mask, None if there is no padding; a row may have one token.

    "continued": prompts padded on the right, to 7 tokens, and 3 more tokens behind them.
    """
    ids = torch.randint(2, BASE["vocab_size"], (3, 10), generator=torch.Generator().manual_seed(1))
    if side == "unpadded":
        return ids, None
    length, place = torch.tensor([[10], [6], [1]]), torch.arange(10)
    mask = place >= 10 - length if side == "left" else place < length
    mask = mask | (place >= 7) if side == "continued" else mask
    return ids.masked_fill(~mask, BASE["pad_token_id"]), mask.long()


def real_tokens(ids, mask):
    return torch.ones_like(ids).bool() if mask is None else mask.bool()


def next_tokens(ids, mask):
    """Labels: the tokens, -100 where one is padding or the row that predicts it is."""
    real = real_tokens(ids, mask)
    real[:, 1:] = real[:, 1:] & real[:, :-1]
    return ids.masked_fill(~real, -100)


def positions(mask):
    """What transformers has to be told, and our model finds out."""
    return None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def run(pair, ids, mask=None, **options):
    """Both models' outputs for the same tokens."""
    ours = pair.ours(ids, attention_mask=mask, **options)
    theirs = pair.theirs(ids, attention_mask=mask, position_ids=positions(mask), **options)
    return ours, theirs


def assert_close(ours, theirs, what):
    torch.testing.assert_close(
        ours, theirs, atol=TOLERANCE, rtol=0, msg=lambda text: f"{what} differs. {text}"
    )


@torch.no_grad()
def record(model, *args, **options):
    """{module name: what it returned}, in the order of computation."""
    seen, hooks = {}, []
    for name, module in model.named_modules():
        hook = lambda module, args, out, name=name: seen.__setitem__(name, out)  # noqa: E731
        hooks.append(module.register_forward_hook(hook))
    try:
        model(*args, **options)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def routers(pair):
    """The routers of both sides, layer by layer."""
    layers = zip(pair.ours.model.layers, pair.theirs.model.layers, strict=True)
    return [(a.mlp.gate, b.mlp.gate) for a, b in layers if hasattr(a.mlp, "gate")]


def assert_same_routing(ours, theirs, what, rows=...):
    """The same scores, the same experts as sets, the same weight for each; of the given rows."""
    logits, weights, indices = theirs
    shape = ours.indices.shape
    logits, weights, indices = (t.unflatten(0, shape[:-1]) for t in (logits, weights, indices))
    assert_close(ours.scores[rows], logits.sigmoid()[rows], f"{what}: scores")
    chosen, order = ours.indices[rows].sort()
    their_chosen, their_order = indices[rows].sort()
    assert torch.equal(chosen, their_chosen), f"{what}: other experts are chosen"
    weights = weights[rows].gather(-1, their_order)
    assert_close(ours.weights[rows].gather(-1, order), weights, f"{what}: weights")


# ---- Parts --------------------------------------------------------------------------------------


@every_shape
def test_config_json_is_read_alike_in_both_directions(shape):
    config = deepseek_v3.DeepseekV3Config(**(BASE | SHAPES[shape]))
    theirs = their_config(config)
    back = deepseek_v3.DeepseekV3Config(**json.loads(theirs.to_json_string(use_diff=False)))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "rope_scaling":
            assert (value or {}).items() <= theirs.rope_parameters.items()
            assert (value is None) == (theirs.rope_parameters["rope_type"] == "default")
            assert (value is None) == (back.rope_scaling is None)
            assert (value or {}).items() <= (back.rope_scaling or {}).items()
            continue
        read = theirs.rope_parameters if field.name == "rope_theta" else vars(theirs)
        their_name = theirs.attribute_map.get(field.name, field.name)
        their_value = len(theirs.id2label) if field.name == "num_labels" else read[their_name]
        assert their_value == value, field.name
        assert getattr(back, field.name) == value, field.name


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("shape", ["several_groups", "coarse_eps"])
def test_rms_norm_has_the_same_epsilon_everywhere(shape, scale):
    """Small inputs show the epsilon; the norms of the latents have one of their own."""
    pair = language_models(shape)
    norms = [name for name, _ in pair.ours.named_modules() if name.endswith("norm")]
    assert any("kv_a_layernorm" in name for name in norms)
    for name in norms:
        ours, theirs = pair.ours.get_submodule(name), pair.theirs.get_submodule(name)
        x = scale * torch.randn(4, len(ours.weight), generator=torch.Generator().manual_seed(2))
        assert_close(ours(x), theirs(x), name)


@pytest.mark.parametrize("shape", ["other_theta", *(name for name in SHAPES if "yarn" in name)])
def test_rope_tables_and_softmax_scale(shape):
    ours, theirs = (side.model for side in language_models(shape))
    assert_close(ours.rotary_emb.inv_freq, theirs.rotary_emb.inv_freq, "inv_freq")
    where = torch.tensor([[*range(64), 639, 4095]])
    their_tables = theirs.rotary_emb(torch.zeros(1), where)  # (1, T, R), the angles twice
    for name, a, b in zip(["cos", "sin"], ours.rotary_emb(where), their_tables, strict=True):
        assert_close(a.squeeze(2), b.chunk(2, -1)[0], name)
    scaling = theirs.layers[0].self_attn.scaling
    assert ours.config.softmax_scale == pytest.approx(scaling, rel=1e-6)


@every_bias
@every_shape
def test_router_chooses_and_weighs_the_same_experts(shape, bias):
    pair = language_models(shape, bias)
    x = torch.randn(2, 50, pair.ours.config.hidden_size, generator=torch.Generator().manual_seed(3))
    for layer, (ours, theirs) in enumerate(routers(pair)):
        assert_same_routing(ours(x), theirs(x), f"router {layer}")


@pytest.mark.parametrize("bias", ["negative_bias", "mixed_bias"])
def test_router_cases_are_hard_enough(bias):
    """The biases of these tests change choices, and drop below 0 what must still be chosen."""
    (router, _), *_ = routers(language_models("several_groups", bias))
    x = torch.randn(2, 50, BASE["hidden_size"], generator=torch.Generator().manual_seed(3))
    routing = router(x)
    biased = routing.scores + router.e_score_correction_bias
    assert (biased.gather(-1, routing.indices) < 0).any()
    unbiased = routing.scores.topk(BASE["num_experts_per_tok"]).indices
    assert (unbiased.sort().values != routing.indices.sort().values).any()


@every_bias
@every_shape
def test_moe_block(shape, bias):
    pair = language_models(shape, bias)
    x = torch.randn(2, 50, pair.ours.config.hidden_size, generator=torch.Generator().manual_seed(4))
    for layer in range(pair.ours.config.first_k_dense_replace, len(pair.ours.model.layers)):
        ours, theirs = (side.model.layers[layer].mlp for side in pair)
        assert_close(ours(x), theirs(x), f"layers.{layer}.mlp")


@every_padding
@every_shape
def test_attention_of_the_same_vectors(shape, side):
    """Layer 0 on vectors given from outside: no embedding and no earlier layer takes part."""
    pair = language_models(shape)
    ids, mask = batch(side)
    width = pair.ours.config.hidden_size
    x = torch.randn(*ids.shape, width, generator=torch.Generator().manual_seed(5))
    ours = record(pair.ours, inputs_embeds=x, attention_mask=mask)
    theirs = record(
        pair.theirs, inputs_embeds=x, attention_mask=mask, position_ids=positions(mask)
    )
    name, real = "model.layers.0.self_attn", real_tokens(ids, mask)
    assert_close(ours[name][real], theirs[name][0][real], name)


# ---- The whole model ----------------------------------------------------------------------------


@every_shape
def test_every_module_returns_the_same(shape):
    """The layer debugger: the message names the first module, in order, that is off."""
    pair = language_models(shape)
    ids, _ = batch()
    ours, theirs = record(pair.ours, ids), record(pair.theirs, ids)
    for name, value in ours.items():
        if name.endswith("mlp.gate"):
            assert_same_routing(value, theirs.pop(name), f"first of all modules, {name}")
        elif name in theirs and isinstance(value, Tensor):
            their_value = theirs.pop(name)
            their_value = their_value[0] if name.endswith("self_attn") else their_value
            their_value = their_value.reshape(value.shape)
            assert_close(value, their_value, f"first of all modules, {name}")
    unseen = {name.rpartition(".")[-1] for name in theirs}
    assert unseen == {"", "model", "rotary_emb", "act_fn"}


@functools.cache
def observed(shape, side):
    """Both models' outputs with all that can be looked at."""
    options = dict(output_hidden_states=True, output_attentions=True)
    return run(language_models(shape), *batch(side), **options)


@every_padding
@every_shape
def test_hidden_states(shape, side):
    ours, theirs = observed(shape, side)
    real = real_tokens(*batch(side))
    assert len(ours.hidden_states) == BASE["num_hidden_layers"] + 1
    for i, (a, b) in enumerate(zip(ours.hidden_states, theirs.hidden_states, strict=True)):
        assert_close(a[real], b[real], f"hidden state {i} of {BASE['num_hidden_layers']}")
    assert torch.equal(ours.hidden_states[-1], ours.last_hidden_state)


@every_padding
@every_shape
def test_attentions(shape, side):
    ours, theirs = observed(shape, side)
    real = real_tokens(*batch(side))
    for i, (a, b) in enumerate(zip(ours.attentions, theirs.attentions, strict=True)):
        a, b = (probs.transpose(1, 2)[real] for probs in (a, b))  # (real tokens, heads, keys)
        assert_close(a, b, f"attention of layer {i}")


@every_bias
@every_padding
def test_routing_of_real_tokens(side, bias):
    pair = language_models("several_groups", bias)
    ids, mask = batch(side)
    ours = pair.ours(ids, attention_mask=mask, output_routing=True).routing
    theirs = record(pair.theirs, ids, attention_mask=mask, position_ids=positions(mask))
    theirs = [value for name, value in theirs.items() if name.endswith("mlp.gate")]
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_same_routing(a, b, f"router {i}", real_tokens(ids, mask))


@every_bias
@every_shape
def test_logits(shape, bias):
    ids, _ = batch()
    ours, theirs = run(language_models(shape, bias), ids)
    assert_close(ours.logits, theirs.logits, "logits")


@pytest.mark.parametrize("side", PADDED)
@every_shape
def test_logits_of_padded_batches(shape, side):
    ids, mask = batch(side)
    ours, theirs = run(language_models(shape), ids, mask)
    real = mask.bool()
    assert_close(ours.logits[real], theirs.logits[real], "logits")


@pytest.mark.parametrize("keep", [1, 4])
def test_last_logits(keep):
    ids, _ = batch()
    ours, theirs = run(language_models("several_groups"), ids, logits_to_keep=keep)
    assert_close(ours.logits, theirs.logits, f"the last {keep} logits")


@pytest.mark.parametrize("shape", [name for name in SHAPES if "yarn" in name])
def test_logits_at_positions_far_apart(shape):
    """Beyond the original context, where YaRN's slower frequencies count."""
    pair = language_models(shape)
    ids, _ = batch()
    where = (torch.arange(10) * 61).expand(3, -1)
    ours, theirs = (side(ids, position_ids=where).logits for side in pair)
    assert_close(ours, theirs, "logits")


@torch.no_grad()
def assert_same_chunks(pair, side, sizes):
    """Logits of real tokens, fed in chunks of these sizes into each side's own cache."""
    ids, mask = batch(side)
    real, where = real_tokens(ids, mask), positions(mask)
    caches, start = [None, None], 0
    for size in sizes:
        new = slice(start, start + size)
        seen = None if mask is None else mask[:, : new.stop]
        inputs = dict(input_ids=ids[:, new], attention_mask=seen, use_cache=True)
        told = dict(position_ids=None if where is None else where[:, new])
        ours = pair.ours(past_key_values=caches[0], **inputs)
        theirs = pair.theirs(past_key_values=caches[1], **inputs, **told)
        rows = real[:, new]
        assert_close(ours.logits[rows], theirs.logits[rows], f"logits of tokens {new}")
        caches, start = [ours.past_key_values, theirs.past_key_values], new.stop


CHUNKS = {"one_by_one": [1] * 10, "shrinking": [4, 3, 2, 1], "mostly_new": [1, 6, 3]}
every_chunking = pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS.keys())


@every_chunking
@every_shape
def test_logits_of_cached_chunks(shape, sizes):
    assert_same_chunks(language_models(shape), "unpadded", sizes)


@every_chunking
@pytest.mark.parametrize("side", PADDED)
def test_logits_of_cached_chunks_of_padded_batches(side, sizes):
    assert_same_chunks(language_models("several_groups"), side, sizes)


@every_padding
def test_loss_skips_ignored_labels(side):
    ids, mask = batch(side)
    labels = next_tokens(ids, mask)
    labels[0, 3:5] = -100
    ours, theirs = run(language_models("several_groups"), ids, mask, labels=labels)
    assert_close(ours.loss, theirs.loss, "loss")


def gradients(model, *args, labels, **options):
    """{parameter name: gradient} of ten losses, which makes them of order 1 like all else here."""
    loss = 10 * model(*args, labels=labels, **options).loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same_gradients(pair, ids, mask, labels):
    ours = as_transformers(gradients(pair.ours, ids, attention_mask=mask, labels=labels))
    told = dict(attention_mask=mask, position_ids=positions(mask), labels=labels)
    theirs = gradients(pair.theirs, ids, **told)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, f"gradient of {name}")


@every_bias
@every_shape
def test_gradient_of_every_parameter(shape, bias):
    ids, _ = batch()
    assert_same_gradients(language_models(shape, bias), ids, None, ids)


@pytest.mark.parametrize("side", PADDED)
def test_gradient_of_every_parameter_in_padded_batches(side):
    ids, mask = batch(side)
    pair = language_models("several_groups")
    assert_same_gradients(pair, ids, mask, next_tokens(ids, mask))


# The plainest of decoding, which never stops.
GREEDY = dict(max_new_tokens=12, do_sample=False, eos_token_id=-1)


@every_shape
def test_greedy_tokens(shape):
    """Prompts of several lengths, padded on the left, as transformers wants them."""
    pair = language_models(shape)
    ids, mask = batch("left")
    ours, theirs = (side.generate(ids, attention_mask=mask, **GREEDY) for side in pair)
    assert ours.shape == (3, 22)
    assert ours.tolist() == theirs.tolist()


def test_greedy_tokens_of_prompts_padded_on_the_right():
    """transformers does not generate from these, but from each row alone."""
    pair = language_models("several_groups")
    ids, mask = batch("right")
    ours = pair.ours.generate(ids, attention_mask=mask, **GREEDY)
    for row, prompt, real in zip(ours, ids, mask.bool(), strict=True):
        theirs = pair.theirs.generate(prompt[real][None], **GREEDY)
        assert row[10:].tolist() == theirs[0, -12:].tolist()


def test_greedy_tokens_end_where_a_row_ends():
    pair = language_models("several_groups")
    ids, mask = batch("left")
    free = pair.ours.generate(ids, attention_mask=mask, **GREEDY)[:, 10:]
    stop = GREEDY | dict(eos_token_id=free[0:2, 4].tolist())  # ends rows 0 and 1 at the latest
    ours, theirs = (side.generate(ids, attention_mask=mask, **stop) for side in pair)
    assert (ours[:2, -1] == BASE["pad_token_id"]).any()
    assert ours.tolist() == theirs.tolist()


# ---- Classification heads -----------------------------------------------------------------------

SEQUENCE_LABELS = {
    "classes": (5, torch.tensor([4, 0, 2])),
    "several_labels": (5, torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 1], [1, 1, 0, 0, 0]])),
    "regression": (1, torch.tensor([0.5, -2.0, 1.0])),
}


@pytest.mark.parametrize("kind", SEQUENCE_LABELS)
@every_padding
def test_sequence_classification(side, kind):
    num_labels, labels = SEQUENCE_LABELS[kind]
    pair = build("DeepseekV3ForSequenceClassification", num_labels=num_labels)
    ids, mask = batch(side)
    ours, theirs = run(pair, ids, mask, labels=labels)
    assert ours.logits.shape == (3, num_labels)
    assert_close(ours.logits, theirs.logits, "logits")
    assert_close(ours.loss, theirs.loss, "loss")
    assert_same_gradients(pair, ids, mask, labels)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_classification_finds_the_last_token_by_its_pad_id(side):
    """Without a mask padding takes part in attention, but the label is read off a real token."""
    pair = build("DeepseekV3ForSequenceClassification")
    ids, _ = batch(side)
    ours, theirs = run(pair, ids)
    assert_close(ours.logits, theirs.logits, "logits")


@every_padding
def test_token_classification(side):
    pair = build("DeepseekV3ForTokenClassification")
    ids, mask = batch(side)
    real = real_tokens(ids, mask)
    labels = (ids % BASE["num_labels"]).masked_fill(~real, -100)
    ours, theirs = run(pair, ids, mask, labels=labels)
    assert ours.logits.shape == (3, 10, BASE["num_labels"])
    assert_close(ours.logits[real], theirs.logits[real], "logits")
    assert_close(ours.loss, theirs.loss, "loss")
    assert_same_gradients(pair, ids, mask, labels)


# ---- Checkpoint folders -------------------------------------------------------------------------

CHECKPOINTS = ["several_groups", "no_query_latent", "tied_embeddings", "attention_bias"]
CHECKPOINTS += ["yarn_as_v2", "yarn_other_settings"]
shards = pytest.mark.parametrize(
    "size", [pytest.param("5GB", id="one_file"), pytest.param("30KB", id="sharded")]
)


def assert_files(folder, size):
    files = list(folder.glob("*.safetensors"))
    assert (len(files) > 1) == (size != "5GB")


@pytest.mark.parametrize("loader", ["DeepseekV3ForCausalLM", "AutoModelForCausalLM"])
@shards
@pytest.mark.parametrize("shape", CHECKPOINTS)
def test_transformers_loads_what_we_save(tmp_path, shape, size, loader):
    ours = build(**SHAPES[shape]).ours
    ours.save_pretrained(tmp_path, max_shard_size=size)
    assert_files(tmp_path, size)
    theirs, report = getattr(transformers, loader).from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert type(theirs) is transformers.DeepseekV3ForCausalLM
    assert not any(report.values()), report
    assert_close(*(out.logits for out in run(Pair(ours, theirs), batch()[0])), "logits")


@shards
@pytest.mark.parametrize("shape", CHECKPOINTS)
def test_we_load_what_transformers_saves(tmp_path, shape, size):
    theirs = build(**SHAPES[shape]).theirs
    theirs.save_pretrained(tmp_path, max_shard_size=size)
    assert_files(tmp_path, size)
    ours = deepseek_v3.DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    assert_close(*(out.logits for out in run(Pair(ours, theirs), batch()[0])), "logits")


@pytest.mark.parametrize(
    "name", ["DeepseekV3ForSequenceClassification", "DeepseekV3ForTokenClassification"]
)
def test_classification_heads_are_saved_and_loaded_both_ways(tmp_path, name):
    pair = build(name)
    pair.ours.save_pretrained(tmp_path / "ours")
    pair.theirs.save_pretrained(tmp_path / "theirs")
    theirs = getattr(transformers, name).from_pretrained(tmp_path / "ours")
    ours = getattr(deepseek_v3, name).from_pretrained(tmp_path / "theirs")
    expected = pair.theirs(batch()[0]).logits
    for loaded in (ours, theirs):
        assert_close(loaded(batch()[0]).logits, expected, f"logits of {type(loaded).__module__}")


def test_transformers_loads_the_main_model_of_a_checkpoint_with_mtp(tmp_path):
    ours = deepseek_v3.DeepseekV3ForCausalLM(
        deepseek_v3.DeepseekV3Config(**(BASE | dict(num_nextn_predict_layers=1)))
    )
    randomise(ours, "mixed_bias")
    ours.eval().save_pretrained(tmp_path)
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    assert_close(*(out.logits for out in run(Pair(ours, theirs), batch()[0])), "logits")


def test_we_load_a_checkpoint_that_announces_mtp_and_has_none(tmp_path):
    """As transformers saves one: its config keeps the MTP modules, its weights do not."""
    theirs = build().theirs
    theirs.config.num_nextn_predict_layers = 1
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="MTP"):
        ours = deepseek_v3.DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    assert_close(*(out.logits for out in run(Pair(ours, theirs), batch()[0])), "logits")
