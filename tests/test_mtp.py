"""Multi-token prediction: alignment, order, norms and sharing of the modules, and the loss."""

import pytest
import torch
import torch.nn.functional as F
from helpers import build, close, tokens

from deepseek_v3 import trace

L, D, VOCAB = 3, 32, 61  # of the small model; module k of MTP is layer L + k - 1
DEPTHS = 3

def fresh(**changes):
    return build(**({"num_nextn_predict_layers": DEPTHS, "dtype": torch.float64} | changes))

@pytest.fixture(scope="module")
def model():
    """Three modules, in float64, so that only a mistake, and not rounding, can show."""
    return fresh()

@torch.no_grad()
def mtp_logits(model, ids, *given):
    """The modules' logits; `given` are a mask and positions."""
    return model(ids, *given, output_mtp=True).mtp_logits

# ---- Alignment: row i of depth k has read tokens up to i + k and predicts token i + k + 1 ----

@pytest.mark.parametrize("changed", [1, 4, 9])
def test_a_row_never_sees_the_token_that_it_predicts(model, changed):
    """Changing token j leaves rows up to j - k - 1 alone; row j - k is the first to feel it."""
    ids = tokens(1, 10)
    other = ids.clone()
    other[0, changed] = (ids[0, changed] + 1) % VOCAB
    for depth, (before, after) in enumerate(zip(mtp_logits(model, ids), mtp_logits(model, other), strict=True), 1):
        first = max(changed - depth, 0)
        close(after[0, :first], before[0, :first])
        moved = (after - before)[0].abs().amax(-1)
        assert (moved[first:] > 1e-6).all()

# ---- What enters a module, and what leaves it ----

@torch.no_grad()
def test_modules_read_normed_states_and_the_embeddings_ahead(model):
    """The first those after the final norm, the next those of the one before."""
    with trace(model, "hnorm", "enorm", "shared_head.norm") as seen:
        out = model(tokens(2, 8), output_mtp=True)
    states, embeds = out.last_hidden_state, model.model.embed_tokens(tokens(2, 8))
    for k, block in enumerate(model.mtp_blocks, 1):
        name = f"model.layers.{L + k - 1}."
        close(seen[name + "hnorm"], block.hnorm(states[:, :-1]))
        close(seen[name + "enorm"], block.enorm(embeds[:, k:]))
        states = seen[name + "shared_head.norm"]

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
@pytest.mark.parametrize("depth", [1, 3])
def test_a_module_has_a_norm_of_its_own_before_the_shared_head(depth):
    """And the head is the main model's."""
    model, ids = fresh(), tokens(2, 8)
    before = model(ids, output_mtp=True)
    model.model.layers[L + depth - 1].shared_head["norm"].weight *= -2
    after = model(ids, output_mtp=True)
    assert torch.equal(after.logits, before.logits)
    close(after.mtp_logits[depth - 1], -2 * before.mtp_logits[depth - 1])
    model.lm_head.weight *= 2
    for new, old in zip(mtp_logits(model, ids), after.mtp_logits, strict=True):
        close(new, 2 * old)

def test_modules_have_experts_behind_dense_layers_too():
    assert all(hasattr(block.mlp, "gate") for block in fresh(first_k_dense_replace=L).mtp_blocks)

@torch.no_grad()
def test_mtp_changes_nothing_in_the_main_model_and_reads_embeddings_too(model):
    ids = tokens(2, 8)
    plain, asked = model(ids), model(ids, output_mtp=True)
    assert torch.equal(plain.logits, asked.logits)
    assert plain.mtp_logits is None
    embedded = model(inputs_embeds=model.model.embed_tokens(ids), output_mtp=True)
    close(embedded.logits, asked.logits)
    for given, looked_up in zip(embedded.mtp_logits, asked.mtp_logits, strict=True):
        close(given, looked_up)

LENGTHS = [[10], [4, 6], [1, 2, 7], [3, 1, 5, 1]]  # of the documents in rows of 10 tokens
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS])

@pytest.mark.parametrize("training", [False, True])
def test_packed_documents_are_learnt_from_as_each_alone(training):
    """Its logits, its targets, none across a border; and its tokens' share of the balance loss."""
    model, ids = fresh().train(training), tokens(4, 10)
    out = model(ids, position_ids=POSITIONS, labels=ids)
    for k, block in enumerate(model.mtp_blocks, 1):  # a row that would join two documents is no load
        rows = sum(max(n - k, 0) for lengths in LENGTHS for n in lengths)
        assert block.mlp.gate.load.sum() == 4 * rows * training
    main, ahead = [], [[] for _ in range(DEPTHS)]
    for i, lengths in enumerate(LENGTHS):
        for document, end in zip(ids[i].split(lengths), torch.tensor(lengths).cumsum(0), strict=True):
            start, alone = int(end) - len(document), model(document[None], output_mtp=True)
            terms = F.cross_entropy(alone.logits[0, :-1], document[1:], reduction="none")
            main.append(terms)
            for k, rows in enumerate(alone.mtp_logits or (), 1):
                close(out.mtp_logits[k - 1][i, start : int(end) - k], rows[0], 1e-5)
                targets = document[k + 1 :]
                terms = F.cross_entropy(rows[0, : len(targets)], targets, reduction="none")
                ahead[k - 1].append(terms)
    close(out.main_loss, torch.cat(main).mean())
    close(out.mtp_loss, sum(torch.cat(terms).mean() for terms in ahead) / DEPTHS)

@torch.no_grad()
@pytest.mark.parametrize("kind", ["left", "packed"])
def test_a_square_mask_reaches_the_modules(model, kind):
    """What it says is what a mask of two axes, or packed positions, say."""
    ids, mask, positions = tokens(4, 10), torch.ones(4, 10), POSITIONS
    if kind == "left":
        mask[1, :3] = 0
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    document = (positions == 0).long().cumsum(-1) if kind == "packed" else mask
    causal = torch.ones(10, 10).tril().bool()
    square = ((document[:, :, None] == document[:, None]) & (document[:, None] > 0) & causal)[:, None]
    right = mtp_logits(model, ids, None if kind == "packed" else mask, positions)
    for other in (square, torch.zeros(square.shape).masked_fill(~square, -torch.inf)):
        for k, found in enumerate(mtp_logits(model, ids, other, positions), 1):
            inside = (document[:, :-k] == document[:, k:]) & (document[:, :-k] > 0)
            close(found[inside], right[k - 1][inside])

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

@pytest.mark.parametrize(("depths", "ignored"), [(1, []), (3, [0, 3, 9]), (2, range(5))], ids=str)
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

@pytest.mark.parametrize("training", [False, True])
def test_losses_of_parts_over_the_number_of_all_labels_add_up_to_that_of_the_whole(training):
    """num_items_in_batch: each part's losses are sums over it, as in gradient accumulation."""
    model, ids = fresh(balance_loss_weight=0.05).train(training), tokens(4, 10)
    labels = ids.masked_fill(torch.tensor([[0], [4], [9], [1]]) > torch.arange(10), -100)
    count = (labels[:, 1:] != -100).sum()
    whole = model(ids, labels=labels, num_items_in_batch=count)
    split = [(ids[part], labels[part]) for part in (slice(0, 1), slice(1, 3), slice(3, 4))]
    parts = [model(rows, labels=given, num_items_in_batch=int(count)) for rows, given in split]
    for name in ("loss", "main_loss", "mtp_loss") + ("balance_loss",) * training:
        close(sum(part[name] for part in parts), whole[name], 1e-7)
    plain = model(ids, labels=labels)
    close(whole.main_loss, plain.main_loss)
    assert (whole.loss != whole.main_loss) == training

def test_labels_behind_a_cache_score_the_main_model_only(model):
    cache = model(tokens(1, 4), use_cache=True).past_key_values
    out = model(tokens(1, 3), labels=tokens(1, 3), past_key_values=cache)
    assert out.mtp_logits is None and out.mtp_loss is None
    assert out.loss == out.main_loss
    with pytest.raises(ValueError, match="output_mtp"):
        model(tokens(1, 2), past_key_values=cache, output_mtp=True)
    assert model(tokens(2, 6), logits_to_keep=1, output_mtp=True).mtp_logits is not None

@torch.no_grad()
def test_given_positions_reach_the_modules(model):
    """Twice as far apart, tokens are others to a module too; the same positions change nothing."""
    ids, mask, plain = tokens(1, 8), torch.ones(1, 8), mtp_logits(model, tokens(1, 8))
    for stretch in (1, 2):
        positions = stretch * torch.arange(8)[None]
        hidden, embeds = model(ids, mask, positions).last_hidden_state, model.model.embed_tokens(ids)
        context = model.model.context(positions[:, :-1], None, None, None)
        alone = model.lm_head(model.model.layers[L](hidden[:, :-1], embeds[:, 1:], context)[0])
        found = mtp_logits(model, ids, mask, positions)[0]
        close(found, alone)
        assert ((found - plain[0]).abs().max() < 1e-10) == (stretch == 1)

@pytest.mark.parametrize("weight", [0.3, 0])
def test_the_training_loss_is_main_mtp_and_balance(weight):
    model = fresh(mtp_loss_weight=weight, balance_loss_weight=0.05).train()
    out = model(tokens(2, 10), labels=tokens(2, 10))
    close(out.loss, out.main_loss + weight * out.mtp_loss + 0.05 * out.balance_loss)
    assert out.balance_loss > 0
    in_evaluation = model.eval()(tokens(2, 10), labels=tokens(2, 10))
    assert in_evaluation.loss == in_evaluation.main_loss and in_evaluation.mtp_loss > 0

def test_the_mtp_loss_teaches_the_trunk_and_the_shared_parts():
    model = fresh().train()
    model(tokens(2, 10), labels=tokens(2, 10)).mtp_loss.backward()
    for name in ("embed_tokens.weight", "layers.0.self_attn.o_proj.weight", "norm.weight"):
        assert model.model.get_parameter(name).grad.abs().sum() > 0, name
    assert model.lm_head.weight.grad.abs().sum() > 0
    for block in model.model.layers[L:]:
        assert block.eh_proj.weight.grad.abs().sum() > 0

# ---- Edges ----

@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_sequences_shorter_than_the_depths(length):
    model = fresh().train()
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
