"""Attention: rotary positions, three forms of the same products, latent cache, masks, watching."""

import itertools
import math

import pytest
import torch
from helpers import FORMS, SHORT_YARN, build, close, force, in_chunks, pad, tiny, tokens
from torch import nn

from deepseek_v3 import DeepseekV3Model, LatentCache, Linear, apply_rope, trace, visible

LAYERS, C, R, H, E, K = 3, 11, 8, 3, 12, 4  # of the small model

@pytest.fixture(scope="module")
def model():
    """In float64, so that only a mistake, and not rounding, can show."""
    return build(dtype=torch.float64)

@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Attention forced into one of its three forms."""
    force(monkeypatch, request.param)

@torch.no_grad()
def logits(model, ids, *more, **named):
    return model(ids, *more, **named).logits

# ---- Rotary positions ----

def test_rotary_pairs_are_neighbours_and_not_halves():
    """Channels (2i, 2i + 1) are one complex number, turned by position * theta^(-2i / R)."""
    x, positions = torch.randn(4, R, generator=torch.Generator().manual_seed(0)), [0, 1, 5, 77]
    cos, sin = DeepseekV3Model(tiny(rope_scaling=None)).rotary_emb(torch.tensor(positions)[None])
    angles = torch.outer(torch.tensor(positions), 10000.0 ** (-torch.arange(0, R, 2) / R))
    turned = torch.view_as_complex(x.view(4, -1, 2)) * torch.polar(torch.ones(4, R // 2), angles)
    found = apply_rope(x[None, :, None], cos, sin)[0, :, 0]
    close(found, torch.view_as_real(turned).flatten(1), 1e-5)

def test_yarn_is_a_property_of_the_weights_and_not_of_a_prompts_length(model):
    yarn = SHORT_YARN | {"original_max_position_embeddings": 4096}
    with_yarn, without = build(rope_scaling=yarn), build(rope_scaling=None)
    with_yarn.load_state_dict(without.state_dict())
    assert (logits(with_yarn, tokens(1, 6)) - logits(without, tokens(1, 6))).abs().max() > 1e-3
    ids = tokens(1, 80)  # beyond the 32 positions of the original context
    close(logits(model, ids)[:, :20], logits(model, ids[:, :20]))

def test_angles_are_made_for_real_whatever_happens_to_the_model():
    """They are no weights: nothing would ever fill them in behind `torch.device("meta")`."""
    right = DeepseekV3Model(tiny()).rotary_emb.inv_freq
    with torch.device("meta"):
        built = DeepseekV3Model(tiny())
    for found in (built, built.to_empty(device="cpu"), built.bfloat16(), built.double()):
        assert torch.equal(found.rotary_emb.inv_freq, right)
        assert found.rotary_emb.inv_freq.dtype == torch.float32
    assert "rotary_emb.inv_freq" not in built.state_dict()

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
def test_attention_is_what_the_equations_say(form):
    model = build(rms_norm_eps=0.1)
    with trace(model, "layers.0.input_layernorm", "layers.0.self_attn") as seen:
        model(tokens(1, 7))
    attn, inv_freq = model.model.layers[0].self_attn, model.model.rotary_emb.inv_freq
    x, (out, _) = seen["model.layers.0.input_layernorm"][0], seen["model.layers.0.self_attn"]
    close(out[0], attention_by_the_equations(attn, inv_freq, x), 1e-4)

ROWS = [tokens(9), tokens(5, seed=2), tokens(1, seed=3)]

def padded(side):
    """Three rows of 9, 5 and 1 tokens and their mask; no padding: three of 9."""
    return (tokens(3, 9), None) if side is None else pad(ROWS, side, value=7)

@pytest.mark.parametrize("side", [None, "left", "right"])
def test_the_three_forms_have_the_same_values_and_gradients(side, monkeypatch):
    """In one pass, and behind a cache."""
    found, (ids, mask) = [], padded(side)
    for name in FORMS:
        force(monkeypatch, name)
        model = build(dtype=torch.float64)
        values, cache = in_chunks(model, ids, [5, 4], mask)
        out = model(ids, mask, labels=ids)
        (out.loss + model(tokens(3, 4), past_key_values=cache).logits.square().mean()).backward()
        gradients = [p.grad for p in model.model.layers[:LAYERS].parameters()]
        found.append([values, out.logits.detach(), *gradients])
    for absorbed, fused, eager in zip(*found, strict=True):
        close(absorbed, eager)
        close(fused, eager)

@torch.no_grad()
def test_bfloat16_comes_close_in_every_form(form):
    """Absorbed, the float32 softmax meets bfloat16 latents and weights."""
    ids = tokens(2, 9)
    found = in_chunks(build(dtype=torch.bfloat16, num_hidden_layers=1), ids, [5, 4])[0]
    exact = logits(build(num_hidden_layers=1), ids)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 0.03 * exact.norm()

def test_decoding_absorbs_and_training_expands():
    """All give the same, in other times and with other things to watch: so the choice is asked for."""
    attn = build(num_hidden_layers=1).model.layers[0].self_attn

    def taken():
        """In training, in decoding, and where the probabilities are asked for."""
        asked = [(30, 30, False), (1, 31, False), (1, 31, True)]
        return " ".join(attn.form(*sizes).__name__.removeprefix("attend_") for sizes in asked)

    assert taken() == "fused absorbed eager"
    for hook in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
        for module, right in ((attn.kv_b_proj, "fused fused eager"), (attn.softmax, "eager eager eager")):
            handle = getattr(module, f"register_{hook}_hook")(lambda *_: None)
            assert taken() == right
            handle.remove()
    assert taken() == "fused absorbed eager"

class Sharper(nn.Module):
    def forward(self, scores):
        return (2 * scores).softmax(-1)

class Doubled(Linear):
    def forward(self, x):
        return 2 * super().forward(x)

class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight

def change(attn, how):
    """Keys and values, or scores, twice as large, by every way to change a module's output."""
    if how == "projection replaced":
        attn.kv_b_proj, old = Doubled(11, 33), attn.kv_b_proj
        attn.kv_b_proj.to(torch.float64).load_state_dict(old.state_dict())
    elif how == "projection hooked":
        attn.kv_b_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif how == "projection parametrized":
        nn.utils.parametrize.register_parametrization(attn.kv_b_proj, "weight", Twice())
    elif how == "softmax replaced":
        attn.softmax = Sharper()
    elif how == "softmax hooked":
        attn.softmax.register_forward_pre_hook(lambda module, scores: 2 * scores[0])
    elif how == "projection":
        attn.kv_b_proj.weight.data *= 2
    else:
        attn.scale *= 2

CHANGES = ["projection replaced", "projection hooked", "projection parametrized"]
CHANGES += ["softmax replaced", "softmax hooked"]

@pytest.mark.parametrize("how", CHANGES)
def test_a_changed_module_is_heard_in_prefill_and_decoding(model, how):
    found, ids = [], tokens(2, 9)
    for way in (how.split()[0], how):
        changed = build(dtype=torch.float64)
        for layer in changed.model.layers:
            change(layer.self_attn, way)
        found.append(in_chunks(changed, ids, [5, 1, 1, 2])[0])
    close(*found)
    assert (found[0] - logits(model, ids)).abs().max() > 1e-3

# ---- The cache ----

GROWTH = [(0, [4, 5, 6, 7, 9, 10, 100], [4, 6, 6, 9, 9, 13, 100]), (20, [4, 20, 21], [20, 20, 30])]

@pytest.mark.parametrize(("capacity", "lengths", "rooms"), GROWTH)
def test_the_cache_grows_by_half_or_as_much_as_is_needed(capacity, lengths, rooms):
    cache = LatentCache(capacity)
    everything = torch.arange(1.0, 101).expand(2, 1, -1).transpose(1, 2)
    for end, room in zip(lengths, rooms, strict=True):
        held = cache.append(0, everything[:, cache.length : end])
        cache.length = end
        assert torch.equal(held, everything[:, :end])
        assert cache.layers[0].shape == (2, room, 1)

def test_a_cache_in_training_gives_new_tokens_their_gradients():
    cache = LatentCache()
    cache.append(0, torch.ones(1, 2, 3, requires_grad=True))
    cache.length = 2
    new = torch.full((1, 1, 3), 2.0, requires_grad=True)
    seen = cache.append(0, new)
    assert seen[0, :, 0].tolist() == [1, 1, 2] and not cache.layers[0].requires_grad
    seen.sum().backward()
    assert torch.equal(new.grad, torch.ones(1, 1, 3))

@torch.no_grad()
@pytest.mark.parametrize("keep", [9, 6, 0, -3, -9])
def test_a_cropped_cache_forgets_and_keeps_its_padding(model, keep):
    """keep 9: nothing is forgotten; a negative number drops so many."""
    for side in (None, "left"):
        ids, mask = padded(side)
        cache = model(ids, mask, use_cache=True).past_key_values
        for beyond in (10, -10):
            with pytest.raises(ValueError, match=rf"crop\({beyond}\).* 9 tokens"):
                cache.crop(beyond)
        cache.crop(keep)
        left = keep if keep >= 0 else 9 + keep
        assert cache.length == left
        more = tokens(3, 2, seed=4)
        found = logits(model, more, past_key_values=cache)
        for i in range(3):
            kept = ids[i, :left] if mask is None else ids[i, :left][mask[i, :left].bool()]
            close(found[i], logits(model, torch.cat([kept, more[i]])[None])[0, len(kept) :])

@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "padded", "packed", "packed alike"])
def test_a_cache_goes_on_in_several_ways(model, kind):
    """Each branch is its own: the cache that it came from goes on as if there were none."""
    ids, mask = padded("left" if kind == "padded" else None)
    given = {"attention_mask": mask} if kind == "padded" else {}
    if kind.startswith("packed"):
        given["position_ids"] = packed([4, 5]).expand(1 if "alike" in kind else 3, 9)
    cache = model(ids, use_cache=True, **given).past_key_values
    branch = cache.repeat_interleave(2)
    more = tokens(6, 3, seed=4)
    found = logits(model, more, past_key_values=branch)
    assert (cache.length, branch.length, branch.bytes) == (9, 12, 2 * cache.bytes * 12 // 9)
    for start in (0, 1):
        again = model(ids, use_cache=True, **given).past_key_values
        close(found[start::2], logits(model, more[start::2], past_key_values=again))
    close(logits(model, more[::2], past_key_values=cache), found[::2])

# ---- What a query may see ----

def test_without_padding_there_is_no_pattern(model):
    """Plain causal attention, or one query that sees all, is faster without a matrix."""
    assert visible(None, None, 5, 5, "cpu") is None
    assert visible(None, None, 1, 5, "cpu") is None
    assert visible(None, None, 2, 4, "cpu").int().tolist() == [[[[1, 1, 1, 0], [1, 1, 1, 1]]]]
    assert model(tokens(2, 6), torch.ones(2, 6)).documents is None
    assert model(tokens(2, 6), position_ids=torch.arange(6)[None]).documents is None
    assert model(tokens(2, 1), torch.ones(2, 1)).documents is not None  # asking would cost more

def square(mask, added=None):
    """A mask of every query and key, (B, 1, T, S), boolean or to be added."""
    T = mask.shape[1]
    sees = (mask[:, None, None].bool() & torch.ones(T, T).tril().bool()).clone()
    return sees if added is None else torch.zeros(sees.shape).masked_fill(~sees, added)

@torch.no_grad()
@pytest.mark.parametrize("side", [None, "left"])
def test_masks_of_every_kind_say_the_same(model, side, form):
    """Of two axes: numbers, booleans, floats. Of four: booleans, or what is added to the scores."""
    ids, mask = padded(side)
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # what a mask of two axes alone says
    right, real = logits(model, ids, mask), mask.bool()
    if side is None:
        close(logits(model, ids), right)
    lowest = torch.finfo(torch.float32).min
    for other in (real, mask.float(), square(mask), square(mask, -math.inf), square(mask, lowest)):
        close(logits(model, ids, other, positions)[real], right[real])
        close(in_chunks(model, ids, [4, 1, 4], other, positions)[0][real], right[real])
        assert logits(model, ids, other, positions).isfinite().all()
    if side is None:  # one row of a mask for all
        close(logits(model, ids, square(mask[:1])), right)

DOCUMENTS = [[9], [4, 5], [1, 1, 7], [3, 1, 4, 1]]

def packed(lengths):
    """position_ids (1, 9) of documents of these lengths behind one another."""
    return torch.cat([torch.arange(length) for length in lengths])[None]

@pytest.mark.parametrize("sizes", [None, [2, 3, 4]], ids=str)
def test_packed_documents_are_each_document_alone(model, sizes, form):
    """In one pass, or behind a cache in chunks, whatever documents are in the rows beside."""
    positions = torch.cat([packed(lengths) for lengths in DOCUMENTS])
    ids = tokens(len(DOCUMENTS), 9)
    if sizes is None:
        together = logits(model, ids, position_ids=positions)
    else:
        together = in_chunks(model, ids, sizes, position_ids=positions)[0]
    for row, found, lengths in zip(ids, together, DOCUMENTS, strict=True):
        alone = [logits(model, document[None])[0] for document in row.split(lengths)]
        close(found, torch.cat(alone), 1e-5)
    document = (positions == 0).cumsum(-1)
    mask = square(torch.ones_like(ids)) & (document[:, None, :, None] == document[:, None, None])
    for other in (mask, torch.zeros(mask.shape).masked_fill(~mask, -math.inf)):
        close(in_chunks(model, ids, sizes or [9], other, positions)[0], together)
    close(logits(model, ids, mask[-1:], positions[-1:]), logits(model, ids, position_ids=positions[-1:]))

@torch.no_grad()
def test_the_last_packed_document_goes_on_behind_a_cache(model):
    ids, more = tokens(2, 9), tokens(2, 3, seed=4)
    cache = model(ids, position_ids=packed([3, 1, 5]), use_cache=True).past_key_values
    found = [logits(model, more[:, t : t + 1], past_key_values=cache) for t in range(3)]
    alone = logits(model, torch.cat([ids[:, 4:], more], 1))
    close(torch.cat(found, 1), alone[:, 5:])

def test_positions_count_from_the_first_token_and_only_distances_matter(model):
    ids = tokens(2, 6)
    right = logits(model, ids)
    for positions in (torch.arange(6)[None], torch.arange(6).expand(2, 6), torch.arange(6)[None].int()):
        close(logits(model, ids, position_ids=positions), right)
    close(logits(model, ids, position_ids=torch.arange(50, 56)[None]), right, 1e-4)

def test_an_error_of_shape_says_which_would_be_right(model):
    for name, shape in itertools.product(("attention_mask", "position_ids"), [(2, 5), (3, 6)]):
        with pytest.raises(ValueError, match=name) as error:
            model(tokens(2, 6), **{name: torch.ones(shape, dtype=torch.long)})
        assert str(shape) in str(error.value) and "(2, 6)" in str(error.value)
    cache = model(tokens(2, 4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask.*\(2, 2\).*\(2, 6\)"):
        model(tokens(2, 2), torch.ones(2, 2), past_key_values=cache)

# ---- Looking inside ----

@torch.no_grad()
def test_attentions_behind_a_cache_are_the_last_rows_of_all(model):
    """And those sum to one over the real keys up to the query."""
    ids, mask = padded("left")
    at_once = model(ids, mask, output_attentions=True).attentions
    behind = model(ids[:, 4:], mask, past_key_values=in_chunks(model, ids, [4], mask)[1], output_attentions=True)
    real = mask.bool()
    for matrix, last in zip(at_once, behind.attentions, strict=True):
        close(last.transpose(1, 2)[real[:, 4:]], matrix.transpose(1, 2)[:, 4:][real[:, 4:]])
        close(matrix.sum(-1), torch.ones(3, H, 9, dtype=matrix.dtype))
        assert torch.equal(matrix, matrix.tril())
        on_padding = (matrix * ~real[:, None, None]).sum(-1).transpose(1, 2)
        assert (on_padding[real] == 0).all()

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
    assert torch.equal(out.hidden_states[0], out.inputs_embeds)
    assert (len(out.hidden_states), len(out.attentions)) == (LAYERS + 1, LAYERS)
    for routing in out.routing:
        assert (routing.scores.shape, routing.scores.dtype) == ((2, 5, E), torch.float32)
        assert routing.indices.shape == routing.weights.shape == (2, 5, K)
    assert len(out.routing) == LAYERS - 1
    assert [tuple(rows.shape) for rows in out.mtp_logits] == [(2, 4, 61)]
    assert out.loss is None and out["logits"] is out[0] is out.logits
    assert len(out[:]) == sum(value is not None for value in vars(out).values())

@torch.no_grad()
@pytest.mark.parametrize("mask", [None, torch.tensor([[0, 0, 1, 1, 1], [1] * 5])])
def test_watching_changes_no_bit_but_where_probabilities_are_shown(model, mask):
    ids, plain = tokens(2, 5), logits(model, tokens(2, 5), mask)
    with trace(model, "layers.?", "layers.*.mlp*", "lm_head"):
        assert torch.equal(logits(model, ids, mask), plain)
    assert torch.equal(logits(model, ids, mask, output_hidden_states=True, output_routing=True), plain)
    with trace(model, "self_attn.softmax") as seen:
        close(logits(model, ids, mask), plain)
    shown = model(ids, mask, output_attentions=True)
    close(shown.logits, plain)
    for matrix, traced in zip(shown.attentions, seen.values(), strict=True):
        assert torch.equal(matrix, traced)

@torch.no_grad()
def test_trace_records_what_modules_return():
    model, ids = build(), tokens(2, 5)
    with trace(model, "layers.*.mlp.gate", "model.norm") as seen:
        out = model(ids, output_routing=True)
    gates = [name for name in seen if name.endswith("mlp.gate")]
    assert gates == ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
    assert torch.equal(seen["model.norm"], out.last_hidden_state)
    assert torch.equal(seen[gates[0]].indices, out.routing[0].indices)

def test_trace_says_what_it_cannot_show_and_leaves_no_hook_behind():
    model = build()
    near = r"block\.\*\.mlp\.gate.*model\.layers\.1\.mlp\.gate"
    with pytest.raises(ValueError, match=near), trace(model, "model.norm", "block.*.mlp.gate"):
        pass
    with pytest.raises(RuntimeError, match="stop"), trace(model, "layers.*", "lm_head"):
        raise RuntimeError("stop")
    with pytest.raises(RuntimeError, match="ran"), trace(model, "layers.3"):
        model(tokens(1, 3))  # its MTP module has nothing to do
    assert not any(module._forward_hooks for module in model.modules())
