# SPDX-License-Identifier: MIT
"""The model against transformers' DeepseekV3, in float32 with random weights.

Both sides get the same weights, copied once, and the same config.json. All that follows from them,
RoPE tables, masks and positions, each side makes itself. The file climbs from parts to the whole:
config, norm, RoPE, router, experts, attention; then every module in order, hidden states, logits,
loss, gradients and generated tokens; then the classification heads and checkpoint folders.
The first failure from the top is the part that broke.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
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
    n_group=4, topk_group=2, max_position_embeddings=640, rope_scaling=None, pad_token_id=0, num_labels=5,
)  # fmt: skip

def yarn(factor, original, **settings):
    rope_scaling = dict(type="yarn", factor=factor, original_max_position_embeddings=original)
    return dict(rope_scaling=rope_scaling | settings, max_position_embeddings=factor * original)

# What may differ from BASE, by dimension; of each the first is the usual one.
CONFIGS = {
    "positions": {
        "plain_rope": {},
        "yarn_as_v3": yarn(40, 4096, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0),
        "yarn_other_settings": dict(qk_rope_head_dim=16, rope_theta=500.0)
        | yarn(8, 4096, beta_fast=16, beta_slow=4, mscale=1.0, mscale_all_dim=0.5),
        "yarn_without_mscale": yarn(10, 64),
        "yarn_attention_factor": yarn(10, 64, attention_factor=1.5, mscale_all_dim=1.0),
    },
    "queries": {"query_latent": {}, "no_query_latent": dict(q_lora_rank=None)},
    "attention_bias": {"no_attention_bias": {}, "attention_bias": dict(attention_bias=True)},
    "values": {"narrow_values": {}, "values_wider_than_keys": dict(v_head_dim=24)},
    "groups": {"several_groups": {}, "one_group": dict(n_group=1, topk_group=1)},
    "chosen": {"top_4": {}, "top_1": dict(num_experts_per_tok=1)},
    "weights": {"normalised": {}, "norm_topk_prob_false": dict(norm_topk_prob=False)},
    "shared": {"one_shared": {}, "two_shared": dict(n_shared_experts=2)},
    "layers": {"one_dense_layer": {}, "no_dense_layer": dict(first_k_dense_replace=0)},
    "embeddings": {"own_head": {}, "tied_embeddings": dict(tie_word_embeddings=True)},
    "eps": {"fine_eps": {}, "coarse_eps": dict(rms_norm_eps=1e-2)},  # latents keep 1e-6
    "widths": {"widths": {}, "not_divisible_by_4": dict(hidden_size=30, moe_intermediate_size=14)},
}
# Mean and spread. Under a negative bias every score + bias is below 0: a 0 would beat them all.
BIASES = {"mixed_bias": (0.0, 0.5), "negative_bias": (-2.0, 0.3), "zero_bias": (0.0, 0.0)}
CHUNKS = {"shrinking": [4, 3, 2, 1], "one_by_one": [1] * 10, "mostly_new": [1, 6, 3]}
LABELS = {  # of the classification heads: num_labels and labels
    "classes": (5, torch.tensor([4, 0, 2])),
    "several_labels": (5, torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 1], [1, 1, 0, 0, 0]])),
    "regression": (1, torch.tensor([0.5, -2.0, 1.0])),
    "tokens": (5, None),
}
DIMENSIONS = CONFIGS | {
    "side": ["unpadded", "left", "right", "continued"], "bias": BIASES, "chunks": CHUNKS, "labels": LABELS,
    "size": ["5GB", "30KB"],
}  # fmt: skip

def all_pairs(dimensions):
    """Rows, a value of each dimension, in which any two values of two dimensions meet at least once."""
    choices = [[(name, value) for value in dimensions[name]] for name in dimensions]
    missing = dict.fromkeys(p for a, b in itertools.combinations(choices, 2) for p in itertools.product(a, b))
    rows = []
    while missing:
        row = list(next(iter(missing)))
        for options in choices:
            if options[0][0] not in dict(row):
                gains = [sum((a, b) in missing or (b, a) in missing for b in row) for a in options]
                row.append(options[gains.index(max(gains))])
        for pair in itertools.permutations(row, 2):
            missing.pop(pair, None)
        rows.append(dict(row))
    return rows

Row = collections.namedtuple("Row", DIMENSIONS)
USUAL = Row(*(next(iter(values)) for values in DIMENSIONS.values()))
ROWS = [Row(**row) for row in all_pairs(DIMENSIONS)]
ONLY_DENSE = USUAL._replace(layers="only_dense_layers")  # beside the pairs: it leaves out what others vary
CONFIGS["layers"]["only_dense_layers"] = dict(first_k_dense_replace=3)

def named(row):
    return "-".join(value for value, usual in zip(row, USUAL, strict=True) if value != usual) or "usual"

every_row = pytest.mark.parametrize("row", [*ROWS, ONLY_DENSE], ids=named)
every_third_row = pytest.mark.parametrize("row", ROWS[::3], ids=named)

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

def build(name="DeepseekV3ForCausalLM", row=USUAL, **changes):
    """A model of that class name on both sides, with the same weights."""
    varied = [values[getattr(row, dimension)] for dimension, values in CONFIGS.items()]
    config = functools.reduce(dict.__or__, varied, BASE) | changes
    ours = getattr(deepseek_v3, name)(deepseek_v3.DeepseekV3Config(**config))
    randomise(ours, row.bias)
    theirs = getattr(transformers, name)(their_config(ours.config))
    theirs.load_state_dict(as_transformers(ours.state_dict()))
    return Pair(ours.eval(), theirs.eval())

@functools.cache
def language_models(row=USUAL):
    """The pair of that row; shared by tests, which leave it as it is."""
    return build(row=row)

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
    said = f"{what} differs. {{}}".format
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0, msg=said)

@torch.no_grad()
def record(model, *args, **options):
    """{module name: what it returned}, in the order of computation."""
    seen = {}
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            hook = module.register_forward_hook(lambda _m, _a, out, name=name: seen.update({name: out}))
            hooks.callback(hook.remove)
        model(*args, **options)
    return seen

def vectors(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))

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

@every_row
def test_config_json_is_read_alike_in_both_directions(row):
    config, theirs = (side.config for side in language_models(row))
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

@every_row
def test_rms_norm_has_the_same_epsilon_everywhere(row):
    """Small inputs show the epsilon; the norms of the latents have one of their own."""
    pair = language_models(row)
    norms = [name for name, _ in pair.ours.named_modules() if name.endswith("norm")]
    assert any("kv_a_layernorm" in name for name in norms)
    for name, scale in itertools.product(norms, [1.0, 1e-2, 1e-4]):
        ours, theirs = pair.ours.get_submodule(name), pair.theirs.get_submodule(name)
        x = scale * vectors(4, len(ours.weight))
        assert_close(ours(x), theirs(x), f"{name} of vectors of size {scale}")

@every_row
def test_rope_tables_and_softmax_scale(row):
    ours, theirs = (side.model for side in language_models(row))
    assert_close(ours.rotary_emb.inv_freq, theirs.rotary_emb.inv_freq, "inv_freq")
    where = torch.tensor([[*range(64), 639, 4095]])
    their_tables = theirs.rotary_emb(torch.zeros(1), where)  # (1, T, R), the angles twice
    for name, a, b in zip(["cos", "sin"], ours.rotary_emb(where), their_tables, strict=True):
        assert_close(a.squeeze(2), b.chunk(2, -1)[0], name)
    scaling = theirs.layers[0].self_attn.scaling
    assert ours.config.softmax_scale == pytest.approx(scaling, rel=1e-6)

@every_row
def test_experts_that_are_chosen_and_what_they_return(row):
    pair = language_models(row)
    x = vectors(2, 50, pair.ours.config.hidden_size)
    for layer in range(pair.ours.config.first_k_dense_replace, BASE["num_hidden_layers"]):
        ours, theirs = (side.model.layers[layer].mlp for side in pair)
        assert_same_routing(ours.gate(x), theirs.gate(x), f"router of layer {layer}")
        assert_close(ours(x)[0], theirs(x), f"layers.{layer}.mlp")

@pytest.mark.parametrize("bias", ["negative_bias", "mixed_bias"])
def test_router_cases_are_hard_enough(bias):
    """The biases of these tests change choices, and drop below 0 what must still be chosen."""
    router = language_models(USUAL._replace(bias=bias)).ours.model.layers[1].mlp.gate
    routing = router(vectors(2, 50, BASE["hidden_size"]))
    biased = routing.scores + router.e_score_correction_bias
    assert (biased.gather(-1, routing.indices) < 0).any()
    unbiased = routing.scores.topk(BASE["num_experts_per_tok"]).indices
    assert (unbiased.sort().values != routing.indices.sort().values).any()

# ---- The whole model ----------------------------------------------------------------------------

@every_row
def test_every_module_returns_the_same(row):
    """The layer debugger: the message names the first module, in order, that is off."""
    pair = language_models(row)
    ids, _ = batch()
    ours, theirs = record(pair.ours, ids), record(pair.theirs, ids)
    for name, value in ours.items():
        if name.endswith("mlp.gate"):
            assert_same_routing(value, theirs.pop(name), f"first of all modules, {name}")
            continue
        value, their_value = (out[0] if isinstance(out, tuple) else out for out in (value, theirs.get(name)))
        if isinstance(value, Tensor) and isinstance(their_value, Tensor) and "rotary" not in name:
            theirs.pop(name)
            assert_close(value, their_value.reshape(value.shape), f"first of all modules, {name}")
    unseen = {name.rpartition(".")[-1] for name in theirs}
    assert unseen == {"", "model", "rotary_emb", "act_fn"}

@every_row
def test_all_that_can_be_looked_at(row):
    """Hidden states, attentions, routing and logits of real tokens."""
    pair, (ids, mask) = language_models(row), batch(row.side)
    ours, theirs = run(pair, ids, mask, output_hidden_states=True, output_attentions=True)
    real, layers = real_tokens(ids, mask), BASE["num_hidden_layers"]
    assert (len(ours.hidden_states), len(ours.attentions)) == (layers + 1, layers)
    for i, (a, b) in enumerate(zip(ours.hidden_states, theirs.hidden_states, strict=True)):
        assert_close(a[real], b[real], f"hidden state {i} of {layers}")
    assert torch.equal(ours.hidden_states[-1], ours.last_hidden_state)
    for i, (a, b) in enumerate(zip(ours.attentions, theirs.attentions, strict=True)):
        a, b = (probs.transpose(1, 2)[real] for probs in (a, b))  # (real tokens, heads, keys)
        assert_close(a, b, f"attention of layer {i}")
    routing = pair.ours(ids, attention_mask=mask, output_routing=True).routing
    recorded = record(pair.theirs, ids, attention_mask=mask, position_ids=positions(mask))
    recorded = [value for name, value in recorded.items() if name.endswith("mlp.gate")]
    for i, (a, b) in enumerate(zip(routing, recorded, strict=True)):
        assert_same_routing(a, b, f"router {i}", real)
    assert_close(ours.logits[real], theirs.logits[real], "logits")

@pytest.mark.parametrize("keep", [1, 4])
def test_last_logits(keep):
    ours, theirs = run(language_models(), batch()[0], logits_to_keep=keep)
    assert_close(ours.logits, theirs.logits, f"the last {keep} logits")

@every_row
def test_logits_at_positions_far_apart(row):
    """Beyond the original context, where YaRN's slower frequencies count."""
    ids, where = batch()[0], (torch.arange(10) * 61).expand(3, -1)
    ours, theirs = (side(ids, torch.ones_like(ids), where).logits for side in language_models(row))
    assert_close(ours, theirs, "logits")

@every_row
def test_logits_of_packed_documents(row):
    """Positions that restart within a row keep documents apart."""
    ids, where = batch()[0], torch.tensor([[*range(4), *range(5), 0]]).expand(3, -1)
    ours, theirs = (side(ids, position_ids=where, use_cache=False).logits for side in language_models(row))
    assert_close(ours, theirs, "logits")
    alone = language_models(row).ours(ids[:, 4:9]).logits
    assert_close(ours[:, 4:9], alone, "logits of a document by itself")

@every_row
def test_logits_of_cached_chunks(row):
    """Fed in chunks into each side's own cache."""
    pair, (ids, mask) = language_models(row), batch(row.side)
    real, where = real_tokens(ids, mask), positions(mask)
    caches, start = [None, None], 0
    for size in CHUNKS[row.chunks]:
        new = slice(start, start + size)
        inputs = dict(input_ids=ids[:, new], use_cache=True)
        inputs |= dict(attention_mask=None if mask is None else mask[:, : new.stop])
        told = dict(position_ids=None if where is None else where[:, new])
        with torch.no_grad():
            ours = pair.ours(past_key_values=caches[0], **inputs)
            theirs = pair.theirs(past_key_values=caches[1], **inputs, **told)
        rows = real[:, new]
        assert_close(ours.logits[rows], theirs.logits[rows], f"logits of tokens {new}")
        caches, start = [ours.past_key_values, theirs.past_key_values], new.stop

@every_row
def test_loss_and_gradient_of_every_parameter(row):
    pair, (ids, mask) = language_models(row), batch(row.side)
    labels = next_tokens(ids, mask)
    labels[0, 3:5] = -100
    real = real_tokens(ids, mask)
    for count in (None, 7):  # 7: the labels of a global batch, of which this one is a part
        ours, theirs = run(pair, ids, mask, labels=labels, num_items_in_batch=count)
        assert_close(ours.loss, theirs.loss, "loss")
        assert_close(ours.logits[real], theirs.logits[real], "logits")
    assert_same_gradients(pair, ids, mask, labels)

def gradients(model, scale, *args, **options):
    """{parameter name: gradient} of so many losses as make them of order 1, like all else here."""
    loss = scale * model(*args, **options).loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

def assert_same_gradients(pair, ids, mask, labels, scale=10):
    ours = as_transformers(gradients(pair.ours, scale, ids, attention_mask=mask, labels=labels))
    told = dict(attention_mask=mask, position_ids=positions(mask), labels=labels)
    theirs = gradients(pair.theirs, scale, ids, **told)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, f"gradient of {name}")

# The plainest of decoding, which never stops.
GREEDY = dict(max_new_tokens=12, do_sample=False, eos_token_id=-1)

@every_third_row
def test_greedy_tokens(row):
    """Prompts of several lengths, padded on the left, as transformers wants them."""
    ids, mask = batch("left")
    ours, theirs = (side.generate(ids, attention_mask=mask, **GREEDY) for side in language_models(row))
    assert ours.shape == (3, 22)
    assert ours.tolist() == theirs.tolist()

def test_greedy_tokens_of_prompts_padded_on_the_right():
    """transformers does not generate from these, but from each row alone."""
    pair, (ids, mask) = language_models(), batch("right")
    ours = pair.ours.generate(ids, attention_mask=mask, **GREEDY)
    for row, prompt, real in zip(ours, ids, mask.bool(), strict=True):
        theirs = pair.theirs.generate(prompt[real][None], **GREEDY)
        assert row[10:].tolist() == theirs[0, -12:].tolist()

# ---- Classification heads and checkpoint folders ------------------------------------------------

@every_row
def test_classification(row):
    """Logits, loss and gradients of the head for labels of tokens or of sequences."""
    num_labels, labels = LABELS[row.labels]
    kind = "Token" if labels is None else "Sequence"
    pair = build(f"DeepseekV3For{kind}Classification", row, num_labels=num_labels)
    ids, mask = batch(row.side)
    real = real_tokens(ids, mask) if labels is None else ...
    labels = (ids % num_labels).masked_fill(~real, -100) if labels is None else labels
    ours, theirs = run(pair, ids, mask, labels=labels)
    assert ours.logits.shape[-1] == num_labels
    assert_close(ours.logits[real], theirs.logits[real], "logits")
    assert_close(ours.loss, theirs.loss, "loss")
    assert_same_gradients(pair, ids, mask, labels, scale=1 if num_labels == 1 else 10)

@pytest.mark.parametrize("kind", ["Sequence", "Token"])
def test_classification_heads_are_saved_and_loaded_both_ways(tmp_path, kind):
    name, ids = f"DeepseekV3For{kind}Classification", batch()[0]
    pair = build(name)
    pair.ours.save_pretrained(tmp_path / "ours")
    pair.theirs.save_pretrained(tmp_path / "theirs")
    theirs = getattr(transformers, name).from_pretrained(tmp_path / "ours")
    ours = getattr(deepseek_v3, name).from_pretrained(tmp_path / "theirs")
    for loaded in (ours, theirs):
        assert_close(loaded(ids).logits, pair.theirs(ids).logits, f"logits of {type(loaded).__module__}")

@every_third_row
def test_checkpoints_are_read_both_ways(tmp_path, row):
    pair, ids = language_models(row), batch()[0]
    for side, name in zip(pair, ("ours", "theirs"), strict=True):
        side.save_pretrained(tmp_path / name, max_shard_size=row.size)
        assert (len(list((tmp_path / name).glob("*.safetensors"))) > 1) == (row.size != "5GB")
    plain = dict(attn_implementation="eager", experts_implementation="eager", output_loading_info=True)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", **plain)
    assert type(theirs) is transformers.DeepseekV3ForCausalLM
    assert not any(report.values()), report
    ours = deepseek_v3.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "theirs")
    expected = run(pair, ids)[0].logits
    for out in run(Pair(ours, theirs), ids):
        assert_close(out.logits, expected, "logits")
