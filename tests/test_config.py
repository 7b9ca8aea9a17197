"""The config: released files read as they are, and what cannot work is refused by name."""

import contextlib
import copy
import dataclasses
import json
import math
import re

import pytest
import torch
from helpers import FAMILY, MOONLIGHT, V3, YARN, tiny

from deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV3Model

FIELDS = {field.name for field in dataclasses.fields(DeepseekV3Config)}


def write(directory, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / "config.json").write_text(text)
    return directory


# ---- Released members of the family ----


def test_the_defaults_are_the_released_671b_model():
    config = DeepseekV3Config()
    assert {key: getattr(config, key) for key in V3.keys() & FIELDS} == {
        key: V3[key] for key in V3.keys() & FIELDS
    }


def test_fields_that_the_release_leaves_out_default_to_the_report():
    """λ of the first 10T tokens and α (§4.2); no pad id, two labels."""
    config = DeepseekV3Config()
    assert (config.mtp_loss_weight, config.balance_loss_weight) == (0.3, 0.0001)
    assert (config.pad_token_id, config.num_labels) == (None, 2)


@pytest.mark.parametrize("name", FAMILY)
def test_a_released_config_reads_as_it_is(name, tmp_path):
    released = FAMILY[name]
    config = DeepseekV3Config.from_pretrained(write(tmp_path, released))
    for key in released.keys() & FIELDS:
        assert getattr(config, key) == released[key], key


@pytest.mark.parametrize("name", FAMILY)
def test_every_released_key_is_written_back(name, tmp_path):
    released = FAMILY[name]
    config = DeepseekV3Config.from_pretrained(write(tmp_path, released))
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {key: written.get(key) for key in released} == released
    assert DeepseekV3Config.from_pretrained(tmp_path / "again") == config


def test_a_scale_format_that_is_not_used_is_kept(tmp_path):
    config = DeepseekV3Config.from_pretrained(write(tmp_path, FAMILY["V3.1"]))
    assert config.to_dict()["quantization_config"]["scale_fmt"] == "ue8m0"


def test_a_whole_file_without_yarn_and_mtp_has_neither():
    bare = {key: V3[key] for key in V3 if key not in ("rope_scaling", "num_nextn_predict_layers")}
    config = DeepseekV3Config(**bare)
    assert config.rope_scaling is None
    assert config.num_nextn_predict_layers == 0


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 2, "new_key": [1, {"a": None}]}])
def test_round_trip(changes, tmp_path):
    config = tiny(**changes)
    config.save_pretrained(tmp_path)
    again = DeepseekV3Config.from_pretrained(tmp_path)
    assert again == config
    assert again.to_dict() == config.to_dict()


def test_overrides_win_over_the_file(tmp_path):
    config = DeepseekV3Config.from_pretrained(write(tmp_path, V3), num_hidden_layers=2)
    assert config.num_hidden_layers == 2
    assert config.hidden_size == 7168


def test_the_tiny_preset_has_every_mechanism():
    config = DeepseekV3Config.tiny(vocab_size=99)
    assert config.vocab_size == 99
    assert config.n_group > 1
    assert config.q_lora_rank
    assert config.num_nextn_predict_layers
    assert 0 < config.first_k_dense_replace < config.num_hidden_layers
    assert (config.n_routed_experts, config.n_group, config.topk_group) == (16, 4, 2)
    assert config.num_experts_per_tok == 4
    assert config.max_position_embeddings == 4096
    assert config.rope_scaling is None


def test_the_tiny_preset_has_3_6_million_parameters():
    """And its cache 64 + 16 numbers a token and layer, a twentieth of keys and values of 4 heads."""
    config = DeepseekV3Config.tiny()
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == 3_590_688
    assert (config.kv_lora_rank, config.qk_rope_head_dim) == (64, 16)


def test_two_configs_share_no_dict():
    DeepseekV3Config().rope_scaling["factor"] = 1
    assert DeepseekV3Config().rope_scaling["factor"] == 40


def test_reading_a_dict_leaves_it_as_it_was():
    given = V3 | {"rope_parameters": YARN | {"rope_theta": 10000}}
    del given["rope_scaling"], given["rope_theta"]
    before = copy.deepcopy(given)
    DeepseekV3Config(**given)
    assert given == before


# ---- RoPE in all its spellings ----


def yarn_numbers(**rope):
    """What the model makes of RoPE settings: frequencies, factor on cos and sin, softmax scale."""
    small = tiny().to_dict()
    del small["rope_scaling"], small["rope_theta"]
    config = DeepseekV3Config(**(small | rope))
    rotary = DeepseekV3Model(config).rotary_emb
    return rotary.inv_freq.tolist(), rotary.magnitude, config.softmax_scale


RENAMED = {"rope_type" if key == "type" else key: value for key, value in YARN.items()}
SPELLINGS = {
    "type": dict(rope_theta=10000.0, rope_scaling=YARN),
    "rope_type": dict(rope_theta=10000.0, rope_scaling=RENAMED),
    "both types": dict(rope_theta=10000.0, rope_scaling=YARN | RENAMED),
    "integers": dict(rope_theta=10000, rope_scaling=YARN | {"mscale": 1, "mscale_all_dim": 1}),
    "floats": dict(rope_theta=1e4, rope_scaling=YARN | {"factor": 40.0, "beta_fast": 32.0}),
    "rope_parameters": dict(rope_parameters=RENAMED | {"rope_theta": 10000.0}),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_yarn_means_the_same(spelling):
    assert yarn_numbers(**SPELLINGS[spelling]) == yarn_numbers(**SPELLINGS["type"])


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_theta=50000.0),
        dict(rope_theta=50000, rope_scaling=None),
        dict(rope_parameters={"rope_type": "default", "rope_theta": 50000.0}),
        dict(rope_theta=50000.0, rope_scaling={"type": "default"}),
    ],
)
def test_every_spelling_of_no_yarn_means_the_same(rope):
    frequencies, magnitude, scale = yarn_numbers(**rope)
    assert frequencies == pytest.approx([50000 ** (-2 * pair / 8) for pair in range(4)])
    assert magnitude == 1
    assert scale == pytest.approx(14**-0.5)


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"rope_parameters": RENAMED}, "rope_theta", 10000.0),  # what transformers leaves out
        ({"rope_parameters": {"rope_theta": 7.0}}, "rope_scaling", None),
        ({"rope_parameters": None}, "rope_scaling", None),
        ({"rope_parameters": None}, "rope_theta", 10000.0),
        ({"num_mtp_layers": 2}, "num_nextn_predict_layers", 2),
        ({"num_mtp_layers": 0}, "num_nextn_predict_layers", 0),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "num_labels", 3),
        ({"id2label": {"0": "a"}, "num_labels": 5}, "num_labels", 5),
        ({"id2label": None}, "num_labels", 2),
        ({"num_key_value_heads": None}, "num_key_value_heads", 128),
        ({"num_attention_heads": 16}, "num_key_value_heads", 16),
    ],
    ids=str,
)
def test_other_spellings_are_read(given, field, value):
    assert getattr(DeepseekV3Config(**given), field) == value


# ---- What cannot work is refused, by field and value ----

REFUSED = [
    ("n_routed_experts", 250),  # not divisible by 8 groups
    ("topk_group", 9),  # more groups picked than exist
    ("num_experts_per_tok", 129),  # 4 groups hold 128
    ("n_group", 256),  # one expert a group
    ("num_key_value_heads", 8),
    ("qk_rope_head_dim", 63),
    ("scoring_func", "softmax"),
    ("topk_method", "greedy"),
    ("hidden_act", "gelu"),
    ("model_type", "llama"),
    ("rms_norm_eps", 0.0),
    ("rms_norm_eps", math.nan),
    ("rope_theta", math.nan),
    ("rope_theta", math.inf),
    ("routed_scaling_factor", math.nan),
    ("initializer_range", math.inf),
    ("hidden_size", "7168"),
    ("hidden_size", 7168.0),
    ("hidden_size", None),
    ("hidden_size", True),
    ("n_shared_experts", True),
    ("num_nextn_predict_layers", False),
    ("norm_topk_prob", 1),
    ("tie_word_embeddings", "false"),
    ("rope_theta", "10000"),
    ("rope_theta", True),
    ("q_lora_rank", "none"),
    ("rope_scaling", "yarn"),
    ("rope_scaling", [40]),
    ("eos_token_id", "</s>"),
    ("num_nextn_predict_layers", -1),
    ("first_k_dense_replace", -1),
    ("n_shared_experts", -1),
]
SIZES = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank"]
SIZES += ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_group"]
SIZES += ["intermediate_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok"]
SIZES += ["topk_group", "max_position_embeddings", "num_labels"]
REFUSED += [(size, value) for size in SIZES for value in (0, -1)]


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_the_error_names_the_field_and_its_value(field, value):
    with pytest.raises(ValueError, match=field) as error:
        DeepseekV3Config(**{field: value})
    assert str(value) in str(error.value)


REMEDIES = [
    ("n_routed_experts", 250, "divisible by n_group=8"),
    ("n_group", 256, "1, or leave 2 experts or more"),
    ("topk_group", 9, "at most n_group=8"),
    ("num_experts_per_tok", 129, "at most 128"),  # 4 groups of 32
    ("num_key_value_heads", 8, "128"),
    ("qk_rope_head_dim", 63, "even"),
    ("hidden_size", 0, "1 or more"),
    ("n_shared_experts", -1, "0 or more"),
    ("hidden_size", "7168", "int"),
    ("q_lora_rank", "none", "int | None"),
    ("norm_topk_prob", 1, "bool"),
    ("rms_norm_eps", 0.0, "above 0"),
    ("rope_theta", 1, "above 1"),
    ("rope_theta", 1.0, "above 1"),
    ("routed_scaling_factor", 0, "above 0"),
    ("initializer_range", -0.01, "0 or more"),
    ("scoring_func", "softmax", "'sigmoid'"),
    ("topk_method", "greedy", "'noaux_tc'"),
    ("hidden_act", "gelu", "'silu'"),
    ("attention_dropout", 0.1, "0.0"),
    ("moe_layer_freq", 2, "1"),
    ("rope_interleave", False, "True"),
    ("model_type", "llama", "'deepseek_v3'"),
]


@pytest.mark.parametrize(("field", "value", "right"), REMEDIES)
def test_the_error_says_what_would_be_right(field, value, right):
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r}: must be {right}") + r"(?!\.)"):
        DeepseekV3Config(**{field: value})


@pytest.mark.parametrize(
    "given",
    [
        {"rope_theta": 1.001},
        {"initializer_range": 0},
        {"routed_scaling_factor": 1},
        {"rms_norm_eps": 1},
        {"first_k_dense_replace": 0},
        {"num_nextn_predict_layers": 0},
        {"n_shared_experts": 0},
        {"n_shared_experts": None},
        {"num_experts_per_tok": 128},  # all that 4 groups of 32 hold
        {"topk_group": 8},
        {"n_group": 128, "topk_group": 128},  # 2 experts a group
        {"hidden_size": 1, "num_labels": 1, "q_lora_rank": 1},
        {"bos_token_id": None, "eos_token_id": None, "pad_token_id": -1},
        {"eos_token_id": [1, 2], "bos_token_id": 0},
        {"moe_layer_freq": 1, "rope_interleave": True, "attention_dropout": 0.0},
        {"model_type": "kimi_k2"},
        {"model_type": "deepseek_v3"},
    ],
    ids=str,
)
def test_the_last_value_that_works_is_taken(given):
    config = DeepseekV3Config(**given)
    kept = vars(config) | config.extra
    assert {key: kept[key] for key in given} == given


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("type", "linear"),
        ("type", "longrope"),
        ("type", None),
        ("factor", 0),
        ("factor", -40),
        ("factor", math.nan),
        ("factor", "40"),
        ("factor", True),
        ("factor", None),
        ("original_max_position_embeddings", 0),
        ("original_max_position_embeddings", None),
        ("beta_fast", -32),
        ("beta_slow", -1),
        ("mscale", -1.0),
        ("mscale_all_dim", math.inf),
        ("attention_factor", -0.5),
        ("attention_factor", "1"),
        ("truncate", False),
    ],
)
def test_yarn_that_cannot_work_is_named(key, value):
    with pytest.raises(ValueError, match="rope_scaling") as error:
        DeepseekV3Config(rope_scaling=YARN | {key: value})
    assert key in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("empty", [None, 0])
def test_yarn_settings_left_open_take_their_usual_values(empty):
    """beta 32 and 1, no mscale, no attention_factor."""
    needed = {key: YARN[key] for key in ("type", "factor", "original_max_position_embeddings")}
    keys = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")
    usual = yarn_numbers(rope_scaling=needed | {"beta_fast": 32, "beta_slow": 1})
    assert yarn_numbers(rope_scaling=needed) == usual
    left_open = dict.fromkeys(keys, empty) | {"truncate": True}
    assert yarn_numbers(rope_scaling=needed | left_open) == usual
    assert usual[1] == pytest.approx(0.1 * math.log(40) + 1)  # all of it on cos and sin
    assert usual[2] == pytest.approx(14**-0.5)


@pytest.mark.parametrize("key", ["type", "factor", "original_max_position_embeddings"])
def test_yarn_that_misses_a_key_is_named(key):
    with pytest.raises(ValueError, match=key):
        DeepseekV3Config(rope_scaling={k: v for k, v in YARN.items() if k != key})


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("n_routed_expert", "n_routed_experts"), ("hiden_size", "hidden_size")],
)
def test_a_misspelt_field_is_not_taken_for_an_unknown_key(typed, meant):
    with pytest.raises(ValueError, match=f"{typed}.*{meant}"):
        DeepseekV3Config(**{typed: 8})


def test_one_group_needs_no_second_expert():
    config = DeepseekV3Config(n_group=1, topk_group=1, n_routed_experts=1, num_experts_per_tok=1)
    assert config.n_routed_experts == 1


@pytest.mark.parametrize("content", ["{", "", "[1, 2]", "null", '"text"', "[" * 100_000])
def test_a_broken_file_is_named(content, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        DeepseekV3Config.from_pretrained(write(tmp_path, content))


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ValueError, match=r"config\.json"):
        DeepseekV3Config.from_pretrained(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        DeepseekV3Config.from_pretrained(tmp_path)


def test_a_wrong_value_in_a_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="topk_group=3"):
        DeepseekV3Config.from_pretrained(write(tmp_path, MOONLIGHT | {"topk_group": 3}))


def test_experts_of_all_layers_together_have_a_bound():
    """A checkpoint has a tensor for each expert of each layer: a million of them is far beyond use."""
    sizes = {"num_hidden_layers": 9, "num_nextn_predict_layers": 1, "n_group": 1, "topk_group": 1}
    assert DeepseekV3Config(**sizes, n_routed_experts=100_000).n_routed_experts == 100_000
    with pytest.raises(ValueError, match="n_routed_experts=100001: must be at most 100000"):
        DeepseekV3Config(**sizes, n_routed_experts=100_001)


@pytest.mark.parametrize("quantization", ["fp8", {"quant_method": "int4"}, {"weight_block_size": [64, 64]}])
def test_a_quantization_that_is_not_the_released_one_is_refused(quantization):
    with pytest.raises(ValueError, match="quantization_config=.*as released.*128"):
        DeepseekV3Config.tiny(quantization_config=quantization)


@pytest.mark.parametrize(("factor", "works"), [(1e-6, True), (1e9, True), (9e-7, False), (1.1e9, False)])
def test_yarn_numbers_have_bounds(factor, works):
    with contextlib.nullcontext() if works else pytest.raises(ValueError, match="factor"):
        DeepseekV3Config(rope_scaling=YARN | {"factor": factor})
