"""Classification heads, their losses and how they start from a language model; tied embeddings."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import build, close, pad, tiny, tokens
from safetensors import safe_open

from deepseek_v3 import (
    DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification, DeepseekV3ForTokenClassification,
    DeepseekV3Model,
)

ROWS = [tokens(7), tokens(4, seed=2), tokens(1, seed=3)]
HEADS = [DeepseekV3ForSequenceClassification, DeepseekV3ForTokenClassification]
CAUSAL = DeepseekV3ForCausalLM

def classifier(**changes):
    return build(
        DeepseekV3ForSequenceClassification, **({"num_labels": 3, "dtype": torch.float64} | changes)
    )

# ---- A label a sequence ----

@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sequence_is_read_off_its_last_token_wherever_padding_is(side):
    """Behind a cache too, and even where padding looks like an end of sequence, which rows end in."""
    model = classifier(pad_token_id=1, eos_token_id=1)
    out = model(tokens(2, 5), torch.ones(2, 5))
    close(out.logits, model.score(out.last_hidden_state[:, -1]))
    assert out.logits.shape == (2, 3)
    rows = [torch.cat([row, torch.tensor([1])]) for row in ROWS]
    for texts, value in ((ROWS, 5), (rows, 1)):
        ids, mask = pad(texts, side, value=value)
        alone = torch.cat([model(row[None], torch.ones_like(row)[None]).logits for row in texts])
        close(model(ids, mask).logits, alone)
        if side == "left":
            cache = model(ids[:, :4], mask[:, :4], use_cache=True).past_key_values
            close(model(ids[:, 4:], mask, past_key_values=cache).logits, alone)

@torch.no_grad()
def test_without_a_mask_the_pad_id_tells_where_rows_end():
    model = classifier(pad_token_id=60)
    ids, _ = pad([row % 60 for row in ROWS], "right", value=60)
    states = model(ids).last_hidden_state
    close(model(ids).logits, model.score(states[torch.arange(3), torch.tensor([6, 3, 0])]))
    padding = torch.full((2, 3), 60)  # a row of nothing else gives no NaN
    assert model(padding).logits.isfinite().all()
    assert model(padding, torch.tensor([[1, 1, 1], [0, 0, 0]])).logits.isfinite().all()

# ---- A label a token ----

@pytest.mark.parametrize("ignored", [[], [0, 4]], ids=str)
def test_token_labels_are_not_shifted_and_can_be_ignored(ignored):
    model = build(DeepseekV3ForTokenClassification, dtype=torch.float64, num_labels=3)
    labels = tokens(2, 5, vocab=3)
    labels[1, ignored] = -100
    out = model(tokens(2, 5), labels=labels)
    assert out.logits.shape == (2, 5, 3)
    close(out.loss, F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()))
    for training in (False, True):  # a part of 20 labels that count in the whole batch
        part = model.train(training)(tokens(2, 5), labels=labels, num_items_in_batch=20)
        close(part.main_loss, out.loss * (10 - len(ignored)) / 20)

# ---- Both ----

def some_labels(cls):
    return torch.tensor([0, 1]) if cls is HEADS[0] else tokens(2, 6, vocab=2)

@pytest.mark.parametrize("cls", HEADS)
def test_training_adds_the_balance_loss(cls):
    model = build(cls, balance_loss_weight=0.05, dtype=torch.float64).train()
    out = model(tokens(2, 6), labels=some_labels(cls))
    close(out.loss, out.main_loss + 0.05 * out.balance_loss)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert len(model.update_router_bias(0.01)) == 2

@pytest.mark.parametrize(("cls", "depths"), [(HEADS[0], 0), (HEADS[1], 1)])
def test_a_language_model_lends_its_trunk_and_the_new_head_is_announced(cls, depths, tmp_path):
    causal = build(num_nextn_predict_layers=depths)
    causal.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"score\."):
        model = cls.from_pretrained(tmp_path, num_labels=4)
    trunk = causal.model.state_dict()
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor, trunk[name]), name
    assert model.score.weight.shape == (4, 32)
    assert model.score.weight.isfinite().all()
    assert model.score.weight.abs().max() > 0
    assert model(tokens(1, 4)).logits.isfinite().all()

@pytest.mark.parametrize("cls", [*HEADS, CAUSAL])
def test_a_new_model_is_drawn_as_the_config_says(cls):
    """Matrices from a normal distribution around 0, norms 1, biases 0, router biases 0."""
    torch.manual_seed(0)
    model = cls(tiny(initializer_range=0.03, attention_bias=True, hidden_size=64, num_labels=40))
    for name, tensor in model.named_parameters():
        if tensor.ndim > 1:
            assert tensor.std().item() == pytest.approx(0.03, rel=0.15), name
            assert abs(tensor.mean().item()) < 0.15 * 0.03, name
        else:
            assert (tensor == (0.0 if name.endswith("bias") else 1.0)).all(), name
    assert any(name.endswith("o_proj.bias") for name, _ in model.named_parameters())
    assert ("score.bias" in dict(model.named_parameters())) == (cls is HEADS[1])

@torch.no_grad()
@pytest.mark.parametrize("cls", HEADS)
def test_a_head_hands_every_input_to_the_model(cls):
    """Given alone, each changes the states as it does for the model without a head."""
    head, ids = build(cls), tokens(2, 5)
    mask, apart = torch.tensor([[0, 1, 1, 1, 1], [1] * 5]), 3 * torch.arange(5)[None]
    cache = head(ids, use_cache=True).past_key_values
    assert cache.length == 5
    for given in (
        {"input_ids": ids, "attention_mask": mask}, {"input_ids": ids, "position_ids": apart},
        {"inputs_embeds": head.model.embed_tokens(ids)},
    ):
        ours, plain = head(**given).last_hidden_state, head.model(**given).last_hidden_state
        assert torch.equal(ours, plain)
    behind = head(ids, past_key_values=cache, output_attentions=True)
    assert behind.attentions[0].shape == (2, 3, 5, 10)
    assert behind.past_key_values.length == 10

@pytest.mark.parametrize("cls", [HEADS[0], CAUSAL, DeepseekV3Model])
def test_nothing_is_shown_unasked(cls):
    shown = {name for name, value in vars(build(cls)(tokens(1, 3))).items() if value is not None}
    assert shown - {"logits"} == {"last_hidden_state", "inputs_embeds"}
    assert ("logits" in shown) == (cls is not DeepseekV3Model)

# ---- Tied embeddings ----

def test_tied_embeddings_are_one_matrix_saved_once(tmp_path):
    model = build(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "model.embed_tokens.weight" in file.keys()  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    again = DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens(1, 5)).logits, model(tokens(1, 5)).logits)
    for tied in (model, again, copy.deepcopy(model).to(torch.bfloat16).float()):
        assert tied.lm_head.weight is tied.model.embed_tokens.weight

def test_tied_embeddings_stay_tied_when_weights_are_exchanged():
    model = build(tie_word_embeddings=True)
    model.load_state_dict(build(tie_word_embeddings=True, seed=1).state_dict(), assign=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.model.embed_tokens = torch.nn.Embedding(61, 32)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
