"""The config: released files read as they are, and what cannot work is refused by name."""

import copy
import dataclasses
import json
import math
import re

import pytest
import torch
from helpers import FAMILY, V3, YARN, tiny

from deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV3Model

FIELDS = {field.name for field in dataclasses.fields(DeepseekV3Config)}

def write(directory, content):
    (directory / "config.json").write_text(json.dumps(content))
    return directory

# ---- Released members of the family ----

def test_the_defaults_are_the_released_671b_model():
    """What it leaves out: λ of the first 10T tokens and α (§4.2); no pad id, two labels."""
    config, left_out = DeepseekV3Config(), dict(mtp_loss_weight=0.3, balance_loss_weight=0.0001)
    expected = V3 | left_out | dict(pad_token_id=None, num_labels=2)
    assert {key: getattr(config, key) for key in expected.keys() & FIELDS} == {
        key: expected[key] for key in expected.keys() & FIELDS
    }

@pytest.mark.parametrize("name", FAMILY)
def test_a_released_config_reads_as_it_is_and_every_key_is_written_back(name, tmp_path):
    released = FAMILY[name]
    config = DeepseekV3Config.from_pretrained(write(tmp_path, released))
    for key in released.keys() & FIELDS:
        assert getattr(config, key) == released[key], key
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {key: written.get(key) for key in released} == released
    again = DeepseekV3Config.from_pretrained(tmp_path / "again", num_hidden_layers=2)  # which wins over the file
    assert again.to_dict() == config.to_dict() | {"num_hidden_layers": 2}

def test_a_whole_file_without_yarn_and_mtp_has_neither():
    bare = {key: V3[key] for key in V3 if key not in ("rope_scaling", "num_nextn_predict_layers")}
    config = DeepseekV3Config(**bare)
    assert config.rope_scaling is None
    assert config.num_nextn_predict_layers == 0

def test_the_tiny_preset_has_every_mechanism_and_3_6_million_parameters():
    """Its cache has 64 + 16 numbers a token and layer, a twentieth of keys and values of 4 heads."""
    config = DeepseekV3Config.tiny()
    assert config.q_lora_rank and config.num_nextn_predict_layers
    assert 0 < config.first_k_dense_replace < config.num_hidden_layers
    assert (config.n_routed_experts, config.n_group, config.topk_group) == (16, 4, 2)
    assert config.num_experts_per_tok == 4
    assert config.max_position_embeddings == 4096
    assert config.rope_scaling is None
    assert (config.kv_lora_rank, config.qk_rope_head_dim) == (64, 16)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == 3_590_688
    assert DeepseekV3Config.tiny(vocab_size=99).vocab_size == 99

@pytest.mark.parametrize("name", ["hiden_size", "n_layer", "dtype"])
def test_the_tiny_preset_takes_fields_alone(name):
    with pytest.raises(ValueError, match=f"{name}.*no field"):
        DeepseekV3Config.tiny(**{name: 8})

@pytest.mark.parametrize("key", ["self", "cls", "directory", "file", "given", "extra", "", "n_routed_expert"])
def test_every_other_key_of_a_file_is_taken_for_a_key(tmp_path, key):
    config = DeepseekV3Config.from_pretrained(write(tmp_path, V3 | {key: 1}))
    assert config.to_dict()[key] == 1
    config.save_pretrained(tmp_path / "again")
    assert DeepseekV3Config.from_pretrained(tmp_path / "again") == config

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
    return rotary.inv_freq.tolist(), rotary.factor, config.softmax_scale

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
        dict(rope_theta=50000.0), dict(rope_theta=50000, rope_scaling=None),
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

HUGE = 10**400  # an integer that no float holds
SIZES = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank"]
SIZES += ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_group"]
SIZES += ["intermediate_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok"]
SIZES += ["topk_group", "max_position_embeddings", "num_labels"]
REFUSED = [
    ("n_routed_experts", "divisible by n_group=8", 250),
    ("n_group", "1, or leave 2 experts or more", 256),
    ("topk_group", "at most n_group=8", 9),
    ("num_experts_per_tok", "at most 128", 129),  # 4 groups of 32
    ("num_key_value_heads", "128", 8),
    ("qk_rope_head_dim", "even", 63),
    ("hidden_size", "int", "7168", 7168.0, None, True, math.inf),
    ("n_shared_experts", "int | None", True, "1"),
    ("num_nextn_predict_layers", "int", False),
    ("q_lora_rank", "int | None", "none"),
    ("norm_topk_prob", "bool", 1),
    ("tie_word_embeddings", "bool", "false"),
    ("rope_scaling", "dict | None", "yarn", [40]),
    ("rope_theta", "int | float", "10000", True),
    ("rope_theta", "above 1", 1, 1.0),
    ("rms_norm_eps", "above 0", 0.0, math.nan, -math.inf),
    ("routed_scaling_factor", "above 0", 0, math.nan),
    ("initializer_range", "0 or more", -0.01, math.nan),
    ("scoring_func", "'sigmoid'", "softmax"),
    ("topk_method", "'noaux_tc'", "greedy"),
    ("hidden_act", "'silu'", "gelu"),
    ("attention_dropout", "0.0", 0.1),
    ("moe_layer_freq", "1", 2),
    ("rope_interleave", "True", False),
    ("model_type", "one of deepseek_v3, kimi_k2, glm4_moe_lite, youtu", "llama"),
    ("eos_token_id", "a token id or None", [1, "2"], [[1]], 2**63),
    ("eos_token_id", "int | list | None", "</s>"),
    ("pad_token_id", "a token id or None", -2),
    ("bos_token_id", "int | None", 0.0),
    ("rope_parameters", "a dict", "yarn", [1], 5),
    ("max_position_embeddings", "at most", 10**30),
    *((name, "at most", HUGE, math.inf, 1e300) for name in ("rope_theta", "rms_norm_eps", "mtp_loss_weight")),
    *((name, "at most", HUGE, 2**63, 2**31) for name in ("hidden_size", "n_routed_experts", "num_labels")),
    *((name, "0 or more", -1) for name in ("num_nextn_predict_layers", "n_shared_experts")),
    ("first_k_dense_replace", "0 or more", -1),
    *((size, "above 0", 0, -1) for size in SIZES),
]
REFUSED = [(field, right, value) for field, right, *values in REFUSED for value in values]

@pytest.mark.parametrize(("field", "right", "value"), REFUSED, ids=lambda x: str(x)[:30])
def test_the_error_names_the_field_and_its_value_and_says_what_would_be_right(field, right, value):
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r}: must be {right}") + r"(?!\.)"):
        DeepseekV3Config(**{field: value})

@pytest.mark.parametrize(
    "given",
    [
        {"rope_theta": 1.001},
        {"rope_scaling": YARN | {"factor": 1e-6}},
        {"rope_scaling": YARN | {"factor": 1e9}},
        {"vocab_size": 10**6, "max_position_embeddings": 10**12},
        {"initializer_range": 0, "routed_scaling_factor": 1, "rms_norm_eps": 1},
        {"first_k_dense_replace": 0, "num_nextn_predict_layers": 0, "n_shared_experts": 0},
        {"n_shared_experts": None},
        {"num_experts_per_tok": 128},  # all that 4 groups of 32 hold
        {"topk_group": 8},
        {"n_group": 128, "topk_group": 128},  # 2 experts a group
        {"n_group": 1, "topk_group": 1, "n_routed_experts": 1, "num_experts_per_tok": 1},
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

BAD_YARN = {
    "type": ["linear", "longrope", None], "factor": [0, -40, math.nan, "40", True, None, HUGE, 9e-7, 1.1e9],
    "original_max_position_embeddings": [0, None, HUGE], "beta_fast": [-32, 1e-320], "beta_slow": [-1],
    "mscale": [-1.0], "mscale_all_dim": [math.inf, 1e200], "attention_factor": [-0.5, "1", math.inf],
    "truncate": [False],
}

@pytest.mark.parametrize(
    ("key", "value"), [(k, v) for k, values in BAD_YARN.items() for v in values], ids=lambda x: str(x)[:20]
)
def test_yarn_that_cannot_work_is_named(key, value):
    absent = [{k: v for k, v in YARN.items() if k != key}] if value is None else []
    for yarn in (YARN | {key: value}, *absent):
        with pytest.raises(ValueError, match="rope_scaling") as error:
            DeepseekV3Config(rope_scaling=yarn)
        assert key in str(error.value)
        assert repr(value) in str(error.value) or absent

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

BROKEN = ["{", "", "[1, 2]", "null", '"text"', "[" * 100_000, b"\xff\xfe\x00{"]

@pytest.mark.parametrize("content", BROKEN, ids=lambda x: str(x)[:20])
def test_a_broken_file_is_named(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"config\.json"):
        DeepseekV3Config.from_pretrained(tmp_path)

OTHERS = ["fp8", {"quant_method": "gptq"}, {"fmt": "e5m2"}, {"weight_block_size": [64, 64]}]

@pytest.mark.parametrize("quantization", [*OTHERS, {"weight_block_size": None}], ids=str)
def test_a_quantization_that_is_not_the_released_one_is_refused(quantization):
    with pytest.raises(ValueError, match="quantization_config=.*as released.*128") as error:
        DeepseekV3Config(quantization_config=quantization)
    assert repr(quantization) in str(error.value)
