"""What several test files share: small models that exercise every mechanism, released configs."""

import torch

from deepseek_v3 import MLA, DeepseekV3Config, DeepseekV3ForCausalLM

FORMS = ["absorbed", "fused", "eager"]  # of attention

# YaRN with a short original context, so that a few tokens already feel it.
SHORT_YARN = {"type": "yarn", "factor": 8, "original_max_position_embeddings": 32}
SHORT_YARN |= {"beta_fast": 4, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}


def tiny(**changes):
    """A config of milliseconds, its sizes unlike each other: mixed-up axes cannot fit by chance."""
    sizes = dict(vocab_size=61, hidden_size=32, num_hidden_layers=3, first_k_dense_replace=1)
    heads = dict(num_attention_heads=3, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=5)
    latents = dict(q_lora_rank=17, kv_lora_rank=11, rope_scaling=dict(SHORT_YARN))
    experts = dict(n_routed_experts=12, num_experts_per_tok=4, n_group=3, topk_group=2)
    widths = dict(intermediate_size=48, moe_intermediate_size=16, initializer_range=0.2)
    return DeepseekV3Config(**(sizes | heads | latents | experts | widths | changes))


def build(cls=DeepseekV3ForCausalLM, seed=0, dtype=torch.float32, **changes):
    """A model in eval mode with random norms, and router biases that leave scores of both signs.

    Released biases are all near +5, and zeros are where training starts; both hide mistakes.
    """
    torch.manual_seed(seed)
    model = cls(tiny(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms: were they all one, no test could tell two apart
                parameter.copy_(torch.empty_like(parameter).uniform_(0.5, 1.5))
        for bias in router_biases(model):
            bias.copy_(torch.empty_like(bias).uniform_(-0.9, -0.3))
    return model.to(dtype).eval()


def router_biases(model):
    """The correction bias of each router, main layers first."""
    return [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]


def tokens(*shape, seed=1, vocab=61):
    """Random token ids."""
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def pad(rows, side, value=0):
    """Token lists of unequal lengths as one batch: ids (B, T) and their mask, padded on `side`."""
    T = max(len(row) for row in rows)
    ids = torch.full((len(rows), T), value)
    mask = torch.zeros(len(rows), T, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(T - len(row), T) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


def close(a, b, tolerance=1e-10):
    """Equal up to rounding: of float64, unless a tolerance is given."""
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def force(monkeypatch, form):
    """Make attention take one of its forms everywhere."""
    monkeypatch.setattr(MLA, "form", lambda self, *_: getattr(self, "attend_" + form))


@torch.no_grad()
def in_chunks(model, ids, sizes, mask=None, position_ids=None, always=True):
    """Logits of all tokens, fed through a cache in chunks of these sizes; and the cache.

    Not `always`: the mask is given where it has something to say, and else the cache remembers it.
    """
    cache, chunks, end = None, [], 0
    for size in sizes:
        begin, end = end, end + size
        where = None if position_ids is None else position_ids[:, begin:end]
        held = mask if mask is None or mask.ndim == 2 else mask[..., begin:end, :]
        if held is not None:
            held = held[..., :end] if always or not mask[:, begin:end].all() else None
        out = model(ids[:, begin:end], held, where, cache, use_cache=True)
        cache = out.past_key_values
        chunks.append(out.logits)
    return torch.cat(chunks, 1), cache


@torch.no_grad()
def greedy(model, row, new, stops=()):
    """Greedy decoding of one row (T) as it is defined: a pass over everything for each token."""
    for _ in range(new):
        row = torch.cat([row, model(row[None]).logits[0, -1:].argmax(-1)])
        if int(row[-1]) in stops:
            break
    return row


def filtered(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """A distribution (vocab) after the filters, token by token from the likeliest on."""
    p = (logits.double() / temperature).softmax(-1)
    order = sorted(range(len(p)), key=lambda i: -p[i])[: top_k or len(p)]
    total = sum(float(p[i]) for i in order)
    kept, before = torch.zeros_like(p), 0.0
    for i in order:
        share = float(p[i]) / total
        if before < top_p and share >= min_p * float(p[order[0]]) / total:
            kept[i] = share
        before += share
    return kept / kept.sum()


# Released config.json files, cut down to what the model is made from and a few keys that it keeps.

YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}
YARN |= {"original_max_position_embeddings": 4096, "type": "yarn"}

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
FP8 |= {"weight_block_size": [128, 128]}

V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": FP8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}

V31 = V3 | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}}

MOONLIGHT = V3 | {
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-05,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "vocab_size": 163840,
}
del MOONLIGHT["rope_scaling"], MOONLIGHT["quantization_config"]

KIMI_K2 = V3 | {
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}

FAMILY = {"V3": V3, "V3.1": V31, "Moonlight": MOONLIGHT, "Kimi-K2": KIMI_K2}
