"""Published numbers, from configs alone: parameters, cache bytes, YaRN, compute. No weights."""

import time
from functools import cache

import pytest
import torch
from helpers import KIMI_K2, MOONLIGHT, V3, router_biases, tokens

from deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV3Model, yarn_mscale
from deepseek_v3 import blocks_of, find_tensor, released_in_fp8, released_names

EMBEDDING = 129280 * 7168  # and as many in the head
EXPERT = 44_040_192  # 3 x 7168 x 2048

# DeepSeek-V2 has the same shapes (its softmax routing has no parameters of its own).
V2_LITE = dict(
    vocab_size=102400, hidden_size=2048, num_hidden_layers=27, num_nextn_predict_layers=0,
    num_attention_heads=16, q_lora_rank=None, intermediate_size=10944, moe_intermediate_size=1408,
    first_k_dense_replace=1, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
    n_group=1, topk_group=1,
)  # fmt: skip
V2 = V2_LITE | dict(
    hidden_size=5120, num_hidden_layers=60, num_attention_heads=128, q_lora_rank=1536,
    intermediate_size=12288, moe_intermediate_size=1536, n_routed_experts=160, n_group=8, topk_group=3,
)  # fmt: skip
CONFIGS = {"V3": V3, "V2": V2, "V2-Lite": V2_LITE, "Moonlight": MOONLIGHT, "Kimi-K2": KIMI_K2}

@cache
def on_meta(name):
    """The full-size model without memory for its weights."""
    with torch.device("meta"):
        return DeepseekV3ForCausalLM(DeepseekV3Config(**CONFIGS[name]))

def count(module):
    """Parameters, each once."""
    return sum(parameter.numel() for parameter in module.parameters())

def mtp_layers(model):
    return model.model.layers[model.config.num_hidden_layers :]

def total(name):
    """Parameters of the main model."""
    return count(on_meta(name)) - count(mtp_layers(on_meta(name)))

def idle(model, layers):
    """Parameters of the routed experts that a token does not visit."""
    config = model.config
    share = 1 - config.num_experts_per_tok / config.n_routed_experts
    experts = [layer.mlp.experts for layer in layers if hasattr(layer.mlp, "experts")]
    return round(sum(count(module) for module in experts) * share)

def activated(name):
    """Parameters that a token uses in the main model, embedding and head included."""
    model = on_meta(name)
    return total(name) - idle(model, model.model.layers[: model.config.num_hidden_layers])

# ---- Parameters ----

@pytest.mark.parametrize(
    ("name", "parameters", "of_a_token", "outside"),
    [
        ("V3", 671_026_404_352, 37_552_282_624, 0),
        ("V2", 235_741_434_880, 21_375_800_320, 0),
        ("V2-Lite", 15_706_484_224, 2_661_150_208, 0),
        ("Kimi-K2", 1_026_408_209_408, 32_861_477_888, 0),
        ("Moonlight", 15_289_019_904, 2_243_685_888, 2 * 163840 * 2048),  # without embedding and head
    ],
)
def test_total_and_activated_parameters(name, parameters, of_a_token, outside):
    """And a model of any size is there in seconds."""
    start = time.perf_counter()
    on_meta(name)
    assert time.perf_counter() - start < 20
    assert total(name) - outside == parameters
    assert activated(name) - outside == of_a_token

def test_v3_parts():
    layers = on_meta("V3").model.layers
    assert count(on_meta("V3").model.embed_tokens) == count(on_meta("V3").lm_head) == EMBEDDING
    assert {count(layer.self_attn) for layer in layers} == {187_107_328}
    assert [count(layer.mlp) for layer in layers[:3]] == [396_361_728] * 3
    assert {count(layer.mlp) for layer in layers[3:]} == {11_320_164_352}
    assert count(layers[3].mlp.gate) == 1_835_008
    assert count(layers[3].mlp.experts) == 256 * EXPERT
    assert count(layers[3].mlp.shared_experts) == EXPERT
    assert sum(count(layer.mlp.experts) for layer in layers[3:61]) == 653_908_770_816  # 97 %
    assert activated("V3") - EMBEDDING == 36_625_603_584

def test_router_biases_are_scalars_beside_the_parameters():
    sizes = [bias.numel() for bias in router_biases(on_meta("V3"))]
    assert (sum(sizes[:-1]), sum(sizes)) == (14_848, 15_104)

def test_mtp_adds_11_6_billion_and_shares_embedding_and_head():
    mtp = mtp_layers(on_meta("V3"))
    assert count(mtp) == 11_610_067_968
    assert count(mtp[0].eh_proj) == 102_760_448
    assert count(mtp) - idle(on_meta("V3"), mtp) + 2 * EMBEDDING == 2_541_458_432
    # The released repository repeats both.
    assert count(on_meta("V3")) + 2 * EMBEDDING == 684_489_830_400

def test_kimi_k2_s_inventory():
    """Tensors and elements of the published repository, but for an old buffer in each of 61 layers (3,416
    elements together), which loading passes over."""
    model, sizes = on_meta("Kimi-K2"), []
    for name, pieces in released_names(model).items():
        tensor = find_tensor(model, name)
        each = [tensor[part].shape for part in pieces.values()]
        scales = [torch.Size(blocks_of(shape)) for shape in each if released_in_fp8(name, tensor)]
        sizes += [shape.numel() for shape in each + scales]
    assert (len(sizes) + 61, sum(sizes) + 3_416) == (139_644, 1_026_470_731_056)

# ---- Cache ----

@pytest.mark.parametrize(("layers", "bytes_a_token"), [(61, 70_272), (60, 69_120)])
def test_cache_bytes_a_token(layers, bytes_a_token):
    """61 or 60 layers (V3, V2) of 512 + 64 bfloat16 numbers, whatever the heads and widths are."""
    narrow = dict(vocab_size=61, hidden_size=16, num_attention_heads=2, q_lora_rank=8)
    narrow |= dict(qk_nope_head_dim=4, v_head_dim=4, intermediate_size=8)
    depth = dict(num_hidden_layers=layers, first_k_dense_replace=layers)
    model = DeepseekV3Model(DeepseekV3Config(**narrow, **depth)).bfloat16().eval()
    with torch.no_grad():
        held = model(tokens(1, 10), use_cache=True).past_key_values
    assert held.bytes == 10 * bytes_a_token

# ---- YaRN ----

def inv_freq(name):
    return on_meta(name).model.rotary_emb.inv_freq

def test_yarn_frequencies():
    """Kept up to pair 10, slowed by 40 from pair 23 on: bounds of 10.472 and 22.513, rounded outwards."""
    published = {0: 1.0, 10: 0.0562341, 15: 0.00833451, 16: 0.0055, 20: 7.905694e-4}
    published |= {23: 3.3338e-5, 31: 3.33380e-6}
    found = {pair: inv_freq("V3")[pair].item() for pair in published}
    assert found == pytest.approx(published, rel=2e-6)

@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        # The share of each of 8 pairs' frequency that is kept; R = 16, theta = 10,000, s = 40.
        ({"beta_fast": 1000}, [1, 3 / 4, 1 / 2, 1 / 4, 0, 0, 0, 0]),  # -2.6: from 0 on
        ({"beta_slow": 1e-6}, [1, 1, *(1 - i / 14 for i in range(1, 7))]),  # 15.4: to R - 1
        ({"beta_fast": 85, "beta_slow": 85}, [1, 0, 0, 0, 0, 0, 0, 0]),  # -0.5 and -0.5: 0 and 0
    ],
)
def test_yarn_stays_inside_the_pairs_there_are(changes, kept):
    narrow = dict(vocab_size=2, hidden_size=2, num_hidden_layers=1, num_attention_heads=1)
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 300}
    yarn |= {"beta_fast": 8, "beta_slow": 1} | changes
    config = DeepseekV3Config(**narrow, intermediate_size=2, qk_rope_head_dim=16, rope_scaling=yarn)
    plain = 10000.0 ** (-torch.arange(8) / 8)
    share = (DeepseekV3Model(config).rotary_emb.inv_freq / plain - 1 / 40) / (1 - 1 / 40)
    assert share.tolist() == pytest.approx(kept, abs=1e-5)

def test_yarn_is_off_at_a_factor_of_1_and_on_above():
    assert [yarn_mscale(factor, 1.0) for factor in (0.5, 1, 1.5)] == pytest.approx([1, 1, 1.0405465])

SCALES = [("V3", 0.1352337788609), ("Moonlight", 0.0721687836), ("Kimi-K2", 0.13086079996)]  # Kimi: 1.8133 more

@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_softmax_scale(name, scale):
    assert DeepseekV3Config(**CONFIGS[name]).softmax_scale == pytest.approx(scale, rel=1e-9)

M, M2 = 1.3688879454, 1.2608037774  # 0.1 m ln 40 + 1 for m = 1 (V3) and m = 0.707 (V2)

@pytest.mark.parametrize(
    ("mscale", "all_dim", "more", "softmax", "length"),
    [
        (0.707, 0.707, {}, 1.5896261652, 1.0),  # V2
        (0.707, 1.0, {}, M**2, M2 / M),
        (None, 0.707, {}, M2**2, M),  # with one of them only, cos and sin take 0.1 ln 40 + 1
        (0.707, None, {}, 1.0, M),
        (1.0, 1.0, {"attention_factor": 1.5}, M**2, 1.5),
    ],
)
def test_the_softmax_takes_mscale_all_dim_and_cos_and_sin_the_ratio(mscale, all_dim, more, softmax, length):
    """Equal in every released member, so that mixing the two up would not show there."""
    narrow = dict(vocab_size=2, hidden_size=2, num_hidden_layers=1, num_attention_heads=1)
    yarn = V3["rope_scaling"] | {"mscale": mscale, "mscale_all_dim": all_dim} | more
    config = DeepseekV3Config(**narrow, intermediate_size=2, rope_scaling=yarn)
    assert config.softmax_scale * 192**0.5 == pytest.approx(softmax)
    rotary = DeepseekV3Model(config).rotary_emb
    cos, sin = rotary(torch.arange(7)[None])
    assert rotary.factor == pytest.approx(length)
    torch.testing.assert_close((cos**2 + sin**2).sqrt(), torch.full_like(cos, length))

# ---- Compute ----

@pytest.mark.parametrize(("name", "published"), [("V3", 250.46), ("V2", 155.31)])
def test_training_compute_a_token(name, published):
    """6 per activated weight in a product, and 3 L H (d_qk + d_v) T for causal attention; T = 4096."""
    config = on_meta(name).config
    widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    products = 6 * (activated(name) - config.vocab_size * config.hidden_size)
    attention = 3 * config.num_hidden_layers * config.num_attention_heads * widths * 4096
    assert (products + attention) / 1e9 == pytest.approx(published, abs=0.01)

@pytest.mark.parametrize(
    ("new", "keys", "absorb"),
    [
        (1, 2, True),  # decoding
        (1, 100_000, True),
        (170, 10**9, True),
        (171, 10**9, False),  # C (N + V) / (2 C - N - V) = 170.7 behind an endless cache
        (4096, 4096, False),  # prefill and training
        (1, 1, False),
    ],
)
def test_absorbing_pays_below_171_new_tokens(new, keys, absorb):
    assert on_meta("V3").model.layers[0].self_attn.absorbing_is_cheaper(new, keys) is absorb
