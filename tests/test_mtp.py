"""Multi-token prediction: alignment, order, norms and sharing of the modules, and the loss."""

import pytest
import torch
import torch.nn.functional as F
from helpers import build, pad, tokens

from deepseek_v3 import LatentCache, trace

L, D, VOCAB = 3, 32, 61  # of the small model; module k of MTP is layer L + k - 1
DEPTHS = 3


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def fresh(**changes):
    return build(**({"num_nextn_predict_layers": DEPTHS, "dtype": torch.float64} | changes))


@pytest.fixture(scope="module")
def model():
    """Three modules, in float64, so that only a mistake, and not rounding, can show."""
    return fresh()


@torch.no_grad()
def mtp_logits(model, ids, mask=None):
    return model(ids, mask, output_mtp=True).mtp_logits


# ---- Alignment: row i of depth k has read tokens up to i + k and predicts token i + k + 1 ----


@pytest.mark.parametrize("changed", range(1, 10))
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_row_never_sees_the_token_that_it_predicts(model, depth, changed):
    """Changing token j leaves rows up to j - k - 1 alone; row j - k is the first to feel it."""
    ids = tokens(1, 10)
    other = ids.clone()
    other[0, changed] = (ids[0, changed] + 1) % VOCAB
    before, after = (mtp_logits(model, row)[depth - 1][0] for row in (ids, other))
    first = max(changed - depth, 0)
    close(after[:first], before[:first])
    moved = (after - before).abs().amax(-1)
    assert (moved[first:] > 1e-6).all()


def test_depth_k_has_k_rows_less(model):
    assert [tuple(rows.shape) for rows in mtp_logits(model, tokens(2, 10))] == [
        (2, 9, VOCAB),
        (2, 8, VOCAB),
        (2, 7, VOCAB),
    ]


# ---- What enters a module, and what leaves it ----


@torch.no_grad()
def test_the_first_module_reads_states_after_the_final_norm(model):
    with trace(model, "layers.3.hnorm", "layers.3.enorm") as seen:
        out = model(tokens(2, 8), output_mtp=True)
    block = model.model.layers[L]
    embeds = model.model.embed_tokens(tokens(2, 8))
    close(seen["model.layers.3.hnorm"], block.hnorm(out.last_hidden_state[:, :-1]))
    close(seen["model.layers.3.enorm"], block.enorm(embeds[:, 1:]))


@torch.no_grad()
def test_the_next_module_reads_the_normed_states_of_the_one_before(model):
    with trace(model, "layers.3.shared_head.norm", "layers.4.hnorm", "layers.4.enorm") as seen:
        model(tokens(2, 8), output_mtp=True)
    block = model.model.layers[L + 1]
    embeds = model.model.embed_tokens(tokens(2, 8))
    states = seen["model.layers.3.shared_head.norm"]
    close(seen["model.layers.4.hnorm"], block.hnorm(states[:, :-1]))
    close(seen["model.layers.4.enorm"], block.enorm(embeds[:, 2:]))


@torch.no_grad()
def test_the_projection_takes_the_embedding_first():
    """The last token comes in as an embedding only, the first as a state only: deaf to one half
    of its input, the module misses one of them, and still hears a token in between."""
    for deaf, changed in ((slice(0, D), 7), (slice(D, 2 * D), 0)):
        model = fresh(num_nextn_predict_layers=1)
        model.model.layers[L].eh_proj.weight[:, deaf] = 0
        ids = tokens(1, 8)
        other = ids.clone()
        other[0, changed] = (ids[0, changed] + 1) % VOCAB
        close(mtp_logits(model, other)[0], mtp_logits(model, ids)[0])
        other[0, 4] = (ids[0, 4] + 1) % VOCAB
        assert (mtp_logits(model, other)[0] - mtp_logits(model, ids)[0]).abs().max() > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_module_has_a_norm_of_its_own_before_the_shared_head(depth):
    model, ids = fresh(), tokens(2, 8)
    before = model(ids, output_mtp=True)
    model.model.layers[L + depth - 1].shared_head["norm"].weight *= -2
    after = model(ids, output_mtp=True)
    assert torch.equal(after.logits, before.logits)
    close(after.mtp_logits[depth - 1], -2 * before.mtp_logits[depth - 1])


def test_embedding_and_head_are_shared(model):
    for block in model.model.layers[L:]:
        names = {name for name, _ in block.named_parameters()}
        plain = {name for name, _ in model.model.layers[L - 1].named_parameters()}
        own = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
        assert names == plain | own
        assert block.eh_proj.weight.shape == (D, 2 * D)


def test_modules_are_numbered_behind_the_layers(model):
    """Their number is the key of their latents in a cache, and never that of a dense layer."""
    assert [block.self_attn.layer_idx for block in model.model.layers] == list(range(L + DEPTHS))
    behind_dense = fresh(first_k_dense_replace=L)
    assert all(hasattr(block.mlp, "gate") for block in behind_dense.mtp_blocks)


@torch.no_grad()
def test_a_module_behind_a_cache_reads_what_it_holds(model):
    """Rows in two chunks through a cache, as drafting feeds them, are the rows of one pass."""
    ids, block, cache = tokens(1, 8), model.model.layers[L], LatentCache()
    hidden, embeds = model(ids).last_hidden_state[:, :-1], model.model.embed_tokens(ids)[:, 1:]
    at_once = block(hidden, embeds, *model.model.context(hidden, None, None, None)[1:])
    chunks = []
    for part in (slice(0, 4), slice(4, 7)):
        _, rope, pattern = model.model.context(hidden[:, part], None, None, cache)
        chunks.append(block(hidden[:, part], embeds[:, part], rope, pattern, cache))
        cache.length = part.stop
    close(torch.cat(chunks, 1), at_once)


@torch.no_grad()
def test_the_shared_head_is_the_main_one():
    model, ids = fresh(), tokens(2, 8)
    before = model(ids, output_mtp=True)
    model.lm_head.weight *= 2
    after = model(ids, output_mtp=True)
    close(after.logits, 2 * before.logits)
    for new, old in zip(after.mtp_logits, before.mtp_logits, strict=True):
        close(new, 2 * old)


@torch.no_grad()
def test_mtp_changes_nothing_in_the_main_model(model):
    ids = tokens(2, 8)
    plain, asked = model(ids), model(ids, output_mtp=True)
    assert torch.equal(plain.logits, asked.logits)
    assert plain.mtp_logits is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_row_alone(model, side):
    rows = [tokens(9), tokens(6, seed=2), tokens(4, seed=3), tokens(1, seed=4)]
    ids, mask = pad(rows, side, value=7)
    together = mtp_logits(model, ids, mask)
    for i, row in enumerate(rows):
        start = 9 - len(row) if side == "left" else 0
        for k, alone in enumerate(mtp_logits(model, row[None]) or (), 1):
            close(together[k - 1][i, start : start + len(row) - k], alone[0])


def test_embeddings_stand_for_their_tokens(model):
    ids = tokens(2, 8)
    with torch.no_grad():
        out = model(inputs_embeds=model.model.embed_tokens(ids), output_mtp=True)
    for given, looked_up in zip(out.mtp_logits, mtp_logits(model, ids), strict=True):
        close(given, looked_up)


# ---- Loss ----


def loss_by_hand(mtp_logits, labels):
    """Eqs. 24 and 25 without λ: the mean over each depth's targets, then over the depths."""
    losses = []
    for k, rows in enumerate(mtp_logits, 1):
        terms = []
        for b in range(labels.shape[0]):
            for i in range(labels.shape[1] - k - 1):
                target = labels[b, i + k + 1]
                if target != -100:
                    terms.append(-rows[b, i].log_softmax(-1)[target])
        losses.append(sum(terms) / len(terms))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("depths", [1, 2, 3])
@pytest.mark.parametrize("ignored", [[], [0, 3, 9], range(5)], ids=str)
def test_the_loss_is_the_mean_of_the_depths(depths, ignored):
    model = fresh(num_nextn_predict_layers=depths)
    ids = tokens(2, 10)
    labels = ids.clone()
    labels[1, list(ignored)] = -100
    out = model(ids, labels=labels)
    close(out.mtp_loss, loss_by_hand(out.mtp_logits, labels))
    rows, targets = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    close(out.main_loss, F.cross_entropy(rows, targets))


def test_a_target_that_is_ignored_everywhere_costs_nothing(model):
    out = model(tokens(2, 6), labels=torch.full((2, 6), -100))
    assert out.loss == out.main_loss == out.mtp_loss == 0


def test_the_loss_of_a_single_target_is_its_own(model):
    out = model(tokens(1, 3), labels=tokens(1, 3).index_fill(1, torch.tensor([1]), -100))
    target = tokens(1, 3)[0, 2]
    close(out.main_loss, -out.logits[0, 1].log_softmax(-1)[target])
    assert len(out.mtp_logits) == 2  # the second has a row, but no target behind it
    close(out.mtp_loss, -out.mtp_logits[0][0, 0].log_softmax(-1)[target] / 2)


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (tokens(2, 5), r"labels.*\(2, 5\).*\(2, 6\)"),
        (tokens(1, 6), r"labels.*\(1, 6\).*\(2, 6\)"),
        (torch.full((2, 6), 61), "labels.*61"),
        (torch.full((2, 6), -1), "labels.*-1"),
    ],
)
def test_labels_that_cannot_be_scored_are_named(model, labels, named):
    with pytest.raises(ValueError, match=named):
        model(tokens(2, 6), labels=labels)


def test_labels_need_the_logits_of_all_tokens(model):
    with pytest.raises(ValueError, match="labels"):
        model(tokens(2, 6), labels=tokens(2, 6), logits_to_keep=1)
    assert model(tokens(2, 6), logits_to_keep=1, output_mtp=True).mtp_logits is not None


def test_labels_behind_a_cache_score_the_main_model_only(model):
    cache = model(tokens(1, 4), use_cache=True).past_key_values
    out = model(tokens(1, 3), labels=tokens(1, 3), past_key_values=cache)
    assert out.mtp_logits is None and out.mtp_loss is None
    assert out.loss == out.main_loss


@torch.no_grad()
def test_given_positions_reach_the_modules(model):
    """Twice as far apart, tokens are others to a module too; the same positions change nothing."""
    ids, plain = tokens(1, 8), mtp_logits(model, tokens(1, 8))
    for stretch in (1, 2):
        positions = stretch * torch.arange(8)[None]
        out = model(ids, position_ids=positions, output_mtp=True)
        hidden = model(ids, position_ids=positions).last_hidden_state
        embeds = model.model.embed_tokens(ids)
        _, rope, pattern = model.model.context(hidden[:, :-1], None, positions[:, :-1], None)
        alone = model.lm_head(model.model.layers[L](hidden[:, :-1], embeds[:, 1:], rope, pattern))
        close(out.mtp_logits[0], alone)
        if stretch == 1:
            close(out.mtp_logits[0], plain[0])


@pytest.mark.parametrize("weight", [0.3, 0.1, 0])
def test_the_training_loss_is_main_mtp_and_balance(weight):
    model = fresh(mtp_loss_weight=weight, balance_loss_weight=0.05).train()
    out = model(tokens(2, 10), labels=tokens(2, 10))
    close(out.loss, out.main_loss + weight * out.mtp_loss + 0.05 * out.balance_loss)
    assert out.balance_loss > 0


def test_the_evaluation_loss_is_the_main_one(model):
    out = model(tokens(2, 10), labels=tokens(2, 10))
    assert out.loss == out.main_loss
    assert out.mtp_loss > 0


def test_the_mtp_loss_teaches_the_trunk_and_the_shared_parts():
    model = fresh().train()
    model(tokens(2, 10), labels=tokens(2, 10)).mtp_loss.backward()
    for name in ("embed_tokens.weight", "layers.0.self_attn.o_proj.weight", "norm.weight"):
        assert model.model.get_parameter(name).grad.abs().sum() > 0, name
    assert model.lm_head.weight.grad.abs().sum() > 0
    for block in model.model.layers[L:]:
        assert block.eh_proj.weight.grad.abs().sum() > 0


# ---- Edges ----


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_sequences_shorter_than_the_depths(length, training):
    model = fresh().train(training)
    ids = tokens(2, length)
    out = model(ids, labels=ids)
    out.loss.backward()
    shapes = [tuple(rows.shape) for rows in out.mtp_logits or ()]
    assert shapes == [(2, length - k, VOCAB) for k in range(1, DEPTHS + 1) if k < length]
    assert out.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_without_modules_there_is_nothing_to_show():
    model = fresh(num_nextn_predict_layers=0)
    out = model(tokens(2, 6), labels=tokens(2, 6), output_mtp=True)
    assert out.mtp_logits is None
    assert out.mtp_loss is None
    assert out.loss == out.main_loss
    training = model.train()(tokens(2, 6), labels=tokens(2, 6))
    close(training.loss, training.main_loss + 0.0001 * training.balance_loss)


def test_modules_do_not_run_behind_a_cache(model):
    cache = model(tokens(1, 4), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="output_mtp"):
        model(tokens(1, 2), past_key_values=cache, output_mtp=True)
