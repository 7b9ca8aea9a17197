# SPDX-License-Identifier: MIT
"""DeepSeek-V3 in one file: the model of arXiv 2412.19437, to read in an afternoon and to run for real.

What is unusual here, if you know GPT-2 or Llama:
  * attention caches one small latent vector a token, shared by all heads, not keys and values (MLA);
  * position lives in a few extra channels of query and key, so that the rest can stay compressed;
  * most feed-forward layers are 256 small experts of which a token visits 8, and one that all visit;
  * experts are kept busy by a bias on the *choice* of experts, moved after each step, not by a loss;
  * extra blocks learn to predict the token after next; at inference they draft (MTP).

Reading map, top to bottom; what a part uses stands above it, but for helpers named with their section:
  1 config   2 RoPE   3 cache, masks   4 attention   5 experts   6 block, MTP   7 model, heads
  8 losses, balancing   9 YaRN   10 looking inside   11 generation   12 checkpoints
  tokens -> embed_tokens -> layers[:L] -> norm -> lm_head; layers[L:] are the MTP modules.

Letters in shape comments and einsum = report's symbol = config field (released value):
  B batch, T tokens of this call, S keys = cached + T, k MTP depth, vocab = vocab_size (129280)
  D = d = hidden_size (7168)              H = n_h = num_attention_heads (128)
  N = d_h = qk_nope_head_dim (128)        R = d_h^R = qk_rope_head_dim (64)
  V = d_h = v_head_dim (128)              C = d_c = kv_lora_rank (512)
  Q = d'_c = q_lora_rank (1536)           F = intermediate_size (18432), moe_intermediate_size (2048)
  E = N_r = n_routed_experts (256)        G = n_group (8)
  K = K_r = num_experts_per_tok (8)
Of the report's superscripts, C (content) is written _nope and R (rotary) _rope.

Precision: router, softmax, angles, norm statistics and losses are float32 whatever the weights are,
and the router bias is stored so. Weights are bfloat16 or float32; float16 overflows in this family.

Departures from the report's text; the tags stand where they happen:
  NOTE(checkpoint) latent-norms: RMSNorm after both latents (§4.2 says so, Eqs. 1 and 6 do not).
  NOTE(checkpoint) rope-pairs: rotary channels are adjacent pairs (0,1), (2,3), …, not two halves.
  NOTE(checkpoint) mscale: YaRN also scales the softmax, by (0.1 mscale_all_dim ln s + 1)² in Eq. 10.
  NOTE(checkpoint) routed-scaling: gates are multiplied by 2.5 (routed_scaling_factor) after Eq. 13.
  NOTE(checkpoint) group-score: the sum of a group's best 2 biased scores; the text: K_r/M, unbiased.
  NOTE(checkpoint) eh-order: the MTP projection takes [embedding; hidden], Eq. 21 the reverse.
  NOTE(checkpoint) mtp-input: MTP modules take states after a norm; Eq. 21 does not say which.
  NOTE(hf) latent-eps: the latent norms use eps 1e-6 even where rms_norm_eps differs (Moonlight).
  NOTE(hf) gate-epsilon: 1e-20 in Eq. 13's denominator, so that underflowing scores give no NaN.
  NOTE(hf) init-std: initializer_range is 0.02 in the released config, 0.006 in the report (§4.2).
  NOTE(report) eq-24-mean: the MTP loss is the mean over the targets there are; Eq. 24 divides by T.

References: DeepSeek-V3 arXiv 2412.19437 (equations and sections are its), DeepSeek-V2 2405.04434,
YaRN 2309.00071, loss-free balancing 2408.15664.
"""

import argparse
import dataclasses
import difflib
import fnmatch
import json
import math
import sys
import sysconfig
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ---- 1. Config — the released config.json, report §4.2 -----------------------------------------

YARN_V3 = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
YARN_V3 |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}

@dataclass(init=False)
class DeepseekV3Config:
    """Every size and switch, named as in the released config.json; the defaults are the 671B model.

    Other keys of a config.json are kept in `extra` and written back. Given `model_type`, the keywords
    are taken for a whole config.json: YaRN and MTP are off unless it names them. Both spellings of
    the RoPE settings are read. ValueError names a field that cannot work and says what would.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168  # D
    num_hidden_layers: int = 61  # L, MTP modules not counted
    num_nextn_predict_layers: int = 1  # MTP modules
    # Attention, §2.1.1
    num_attention_heads: int = 128  # H
    num_key_value_heads: int = 128  # H too: all heads read one latent
    q_lora_rank: int | None = 1536  # Q; None: queries straight from the hidden state
    kv_lora_rank: int = 512  # C
    qk_nope_head_dim: int = 128  # N
    qk_rope_head_dim: int = 64  # R
    v_head_dim: int = 128  # V
    attention_bias: bool = False
    # Feed-forward and experts, §2.1.2
    intermediate_size: int = 18432  # F of a dense layer
    moe_intermediate_size: int = 2048  # F of an expert
    first_k_dense_replace: int = 3  # so many first layers stay dense
    n_routed_experts: int = 256  # E
    n_shared_experts: int | None = 1
    num_experts_per_tok: int = 8  # K
    n_group: int = 8  # G
    topk_group: int = 4  # groups that a token may visit, the report's M nodes
    norm_topk_prob: bool = True
    routed_scaling_factor: int | float = 2.5
    # Positions, §4.3
    max_position_embeddings: int = 163840
    rope_theta: int | float = 10000.0
    rope_scaling: dict | None = None  # YaRN; DeepseekV3Config() has YARN_V3
    # Other
    rms_norm_eps: int | float = 1e-6
    initializer_range: int | float = 0.02  # NOTE(hf) init-std
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | list | None = 1
    pad_token_id: int | None = None
    num_labels: int = 2  # of the classification heads
    mtp_loss_weight: int | float = 0.3  # λ, Eq. 25: 0.3 for 10T tokens, then 0.1
    balance_loss_weight: int | float = 0.0001  # α, Eq. 17

    def __init__(self, **given):
        for name, value in config_values(given).items():  # section 12, as are the checks
            setattr(self, name, value)
        check_config(self)

    @classmethod
    def tiny(cls, **changes):
        """The small model that the demos train: every mechanism of the large one."""
        sizes = dict(vocab_size=2048, hidden_size=128, num_hidden_layers=4, first_k_dense_replace=1)
        heads = dict(num_attention_heads=4, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
        latents = dict(q_lora_rank=96, kv_lora_rank=64, max_position_embeddings=4096)
        experts = dict(n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2)
        widths = dict(intermediate_size=384, moe_intermediate_size=96, rope_scaling=None)
        return cls(**(sizes | heads | latents | experts | widths | changes))

    @property
    def softmax_scale(self):
        """1/√(d_h + d_h^R) of Eq. 10 times YaRN's temperature; 0.1352338 as released."""
        yarn = self.rope_scaling or {}
        mscale = yarn_mscale(yarn.get("factor", 1), yarn.get("mscale_all_dim") or 0)
        # NOTE(checkpoint) mscale: squared, once for the query and once for the key.
        return (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5 * mscale**2

# ---- 2. Rotary positions — RoPE, §2.1.1 ---------------------------------------------------------

def upcast(x):
    """x in float32 (float64 stays): the precision of every sensitive step."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def rope_frequencies(config):
    """Angle that a position turns each rotary pair, (R/2), and a factor on cos and sin."""
    pair = torch.arange(config.qk_rope_head_dim // 2, dtype=torch.float32, device="cpu")
    inv_freq = 1.0 / config.rope_theta ** (2 * pair / config.qk_rope_head_dim)  # (R/2)
    return (inv_freq, 1.0) if config.rope_scaling is None else yarn(inv_freq, config)  # section 9

class RotaryEmbedding(nn.Module):
    """cos and sin of all angles; position_ids (B, T) -> two (B, T, 1, R/2), 1 for all heads."""

    def __init__(self, config):
        super().__init__()
        # A plain attribute and no buffer, so that casting the model to bfloat16 leaves it alone.
        self.inv_freq, self.magnitude = rope_frequencies(config)

    def forward(self, position_ids):
        self.inv_freq = self.inv_freq.to(position_ids.device)
        angles = position_ids[:, :, None, None].float() * self.inv_freq  # (B, T, 1, R/2)
        return angles.cos() * self.magnitude, angles.sin() * self.magnitude

def apply_rope(x, rope):
    """Turn adjacent channels, the RoPE(·) of Eqs. 3 and 8; x (B, T, H or 1, R) -> the same."""
    cos, sin = rope
    # NOTE(checkpoint) rope-pairs: a pair is (even, odd) neighbours, not (first half, second half).
    even, odd = x.unflatten(-1, (x.shape[-1] // 2, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return turned.flatten(-2).to(x.dtype)

# ---- 3. What a query may see — latent cache and masks -------------------------------------------

class LatentCache:
    """All that attention remembers: C + R numbers a token a layer (Eqs. 1, 3), nothing per head.

    `length` tokens are held; `mask` (B, length) is False at padding, or None if there is none.
    """

    def __init__(self, capacity=0):
        self.capacity = capacity  # tokens to make room for at once; beyond it, the cache grows
        self.length = 0
        self.mask = None
        self.layers = {}

    def append(self, layer, latent):
        """Store new latents (B, T, C + R) of a layer; all that it has so far -> (B, S, C + R)."""
        end = self.length + latent.shape[1]
        held = self.layers.get(layer, latent[:, :0].detach())
        if held.shape[1] < end:  # growing by half copies a number a few times, not once a token
            room = max(self.capacity, end, self.length * 3 // 2)
            held = F.pad(held[:, : self.length], (0, 0, 0, room - self.length))
            self.layers[layer] = held
        held[:, self.length : end] = latent.detach()
        if latent.requires_grad:  # training through a cache: the new tokens keep their gradients
            return torch.cat([held[:, : self.length], latent], 1)
        return held[:, :end]

    def crop(self, length):
        """Forget the tokens from `length` on."""
        self.length = length
        self.mask = None if self.mask is None else self.mask[:, :length]

    @property
    def bytes(self):
        """Bytes of the tokens held, over all layers."""
        return sum(held[:, : self.length].nbytes for held in self.layers.values())

def key_mask(attention_mask, cache, B, T):
    """Which keys are real tokens, (B, S), or None if all are; the cache remembers it."""
    past, keys = (0, None) if cache is None else (cache.length, cache.mask)
    if attention_mask is not None:
        if attention_mask.shape != (B, past + T):
            found, right = tuple(attention_mask.shape), (B, past + T)
            raise ValueError(f"attention_mask of shape {found}: must be {right}, cached + new tokens")
        # Without padding the plain-causal form is faster; asking costs one synchronisation.
        keys = None if T > 1 and attention_mask.all() else attention_mask.bool()
    elif keys is not None:
        keys = F.pad(keys, (0, T), value=True)
    if cache is not None:
        cache.mask = keys
    return keys

def attention_pattern(keys, T, S, device):
    """True where a query sees a key, (B or 1, 1, T, S), or None: plain causal, or one query.

    Made from positions, not from a square triangle, so that chunks behind a cache come out right.
    """
    if keys is None and T in (1, S):
        return None
    query = torch.arange(S - T, S, device=device).unsqueeze(1)  # (T, 1)
    key = torch.arange(S, device=device)
    if keys is None:
        return (key <= query)[None, None]
    # A padded query sees itself: no softmax row is empty, and no real query sees it.
    return (key <= query) & keys[:, None, None, :] | (key == query)

class MaskedSoftmax(nn.Module):
    """Attention probabilities, a module so that one can watch them; (B, H, T, S) -> the same."""

    def forward(self, scores, pattern):
        T, S = scores.shape[-2:]
        if pattern is None and T > 1:
            pattern = torch.ones(T, S, dtype=torch.bool, device=scores.device).tril(S - T)
        if pattern is not None:
            scores = scores.masked_fill(~pattern, -math.inf)
        return upcast(scores).softmax(-1)

# ---- 4. Multi-head latent attention — §2.1.1, Eqs. 1–11 -----------------------------------------

class MLA(nn.Module):
    """Multi-head latent attention, Eqs. 1–11; x (B, T, D) -> (B, T, D).

    x ─┬─ kv_a_proj_with_mqa ─┬─ c_kv ── norm ─┬─ cache ─┬─ kv_b_proj ─┬─ k_nope ─┬─ attend ─ o_proj
       │                      └─ k_rope ─ RoPE ┘         │             ├─ v ──────┤
       │                                                 └─ k_rope ────┴──────────┤
       └─ q_a_proj ─ c_q ─ norm ─ q_b_proj ─┬─ q_nope ────────────────────────────┤
                                            └─ q_rope ─ RoPE ─────────────────────┘
    """

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.H, self.C, self.V = config.num_attention_heads, config.kv_lora_rank, config.v_head_dim
        self.N, self.R = config.qk_nope_head_dim, config.qk_rope_head_dim
        D, Q, bias = config.hidden_size, config.q_lora_rank, config.attention_bias
        if Q is None:
            self.q_proj = nn.Linear(D, self.H * (self.N + self.R), bias=False)
        else:
            self.q_a_proj = nn.Linear(D, Q, bias=bias)
            self.q_a_layernorm = nn.RMSNorm(Q, eps=1e-6)  # NOTE(checkpoint) latent-norms
            self.q_b_proj = nn.Linear(Q, self.H * (self.N + self.R), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, self.C + self.R, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(self.C, eps=1e-6)  # NOTE(hf) latent-eps
        self.kv_b_proj = nn.Linear(self.C, self.H * (self.N + self.V), bias=False)
        self.o_proj = nn.Linear(self.H * self.V, D, bias=bias)
        self.softmax = MaskedSoftmax()
        self.scale = config.softmax_scale

    def forward(self, x, rope, pattern, cache=None):
        q_nope, q_rope = self.queries(x, rope)  # (B, T, H, N), (B, T, H, R)
        c_kv, k_rope = self.kv_a_proj_with_mqa(x).split([self.C, self.R], -1)  # (B, T, C), (B, T, R)
        c_kv = self.kv_a_layernorm(c_kv)  # (B, T, C) Eq. 1
        k_rope = apply_rope(k_rope.unsqueeze(2), rope).squeeze(2)  # (B, T, R) Eq. 3
        latent = torch.cat([c_kv, k_rope], -1)  # (B, T, C + R)
        if cache is not None:
            latent = cache.append(self.layer_idx, latent)  # (B, S, C + R)
        absorb = self.absorbing_is_cheaper(x.shape[1], latent.shape[1])
        attend = self.attend_absorbed if absorb else self.attend_expanded
        out = attend(q_nope, q_rope, latent, pattern)  # (B, T, H, V)
        return self.o_proj(out.flatten(-2))  # Eq. 11

    def queries(self, x, rope):
        """Content and rotary queries, Eqs. 6–8; x (B, T, D) -> (B, T, H, N), (B, T, H, R)."""
        if hasattr(self, "q_proj"):
            q = self.q_proj(x)
        else:
            c_q = self.q_a_layernorm(self.q_a_proj(x))  # (B, T, Q) Eq. 6
            q = self.q_b_proj(c_q)
        q = q.unflatten(-1, (self.H, self.N + self.R))  # (B, T, H, N + R)
        q_nope, q_rope = q.split([self.N, self.R], -1)  # (B, T, H, N), (B, T, H, R) Eq. 7
        q_rope = apply_rope(q_rope, rope)  # (B, T, H, R) Eq. 8
        return q_nope, q_rope

    def absorbing_is_cheaper(self, T, S):
        """Which order of the same products takes fewer multiply-adds a head.

        Expanded: T·S·(N + R + V), and S·C·(N + V) to make keys and values. Absorbed: T·S·(2C + R),
        and T·C·(N + V) to take queries into the latent space and results out. As released, with a
        long cache, absorbing wins below 171 new tokens: decoding absorbs, training (T = S) expands.
        """
        saved = self.C * (self.N + self.V)
        return T * S * (2 * self.C - self.N - self.V) < saved * (S - T)

    def attend_expanded(self, q_nope, q_rope, latent, pattern):
        """Attention with keys and values made from the latents (B, S, C + R) -> (B, T, H, V)."""
        c_kv, k_rope = latent.split([self.C, self.R], -1)  # (B, S, C), (B, S, R)
        kv = self.kv_b_proj(c_kv).unflatten(-1, (self.H, self.N + self.V))  # (B, S, H, N + V)
        k_nope, v = kv.split([self.N, self.V], -1)  # (B, S, H, N), (B, S, H, V) Eqs. 2, 5
        k_rope = k_rope.unsqueeze(2).expand(-1, -1, self.H, -1)  # (B, S, H, R)
        k = torch.cat([k_nope, k_rope], -1).transpose(1, 2)  # (B, H, S, N + R) Eq. 4
        q = torch.cat([q_nope, q_rope], -1).transpose(1, 2)  # (B, H, T, N + R) Eq. 9
        if self.softmax._forward_hooks:  # watched: form the matrix that the kernel below never forms
            self.softmax(q @ k.transpose(-1, -2) * self.scale, pattern)
        # Fused kernels want values as wide as keys: widening by zeros is 4 times faster on a CPU.
        v = F.pad(v, (0, max(0, self.N + self.R - self.V))).transpose(1, 2)
        causal = pattern is None and q.shape[2] > 1
        out = F.scaled_dot_product_attention(q, k, v, pattern, 0.0, causal, scale=self.scale)
        out = out[..., : self.V].transpose(1, 2)  # (B, T, H, V) Eq. 10
        return out

    def attend_absorbed(self, q_nope, q_rope, latent, pattern):
        """The same inside the latent space (V2 App. C); latent (B, S, C + R) -> (B, T, H, V).

        q·(W^UK c) = (W^UKᵀ q)·c: the up-projection of keys moves into the query, that of values into
        the output, and all heads share the cached latent as one key and value, read once.
        """
        w_kv = self.kv_b_proj.weight.unflatten(0, (self.H, self.N + self.V))  # (H, N + V, C)
        w_uk, w_uv = w_kv.split([self.N, self.V], 1)  # (H, N, C), (H, V, C)
        q_latent = torch.einsum("bthn,hnc->bhtc", q_nope, w_uk)  # (B, H, T, C)
        q = torch.cat([q_latent, q_rope.transpose(1, 2)], -1)  # (B, H, T, C + R)
        scores = torch.einsum("bhtc,bsc->bhts", q, latent) * self.scale  # (B, H, T, S)
        probs = self.softmax(scores, pattern).to(latent.dtype)  # (B, H, T, S)
        o_latent = torch.einsum("bhts,bsc->bhtc", probs, latent[..., : self.C])  # (B, H, T, C)
        out = torch.einsum("bhtc,hvc->bthv", o_latent, w_uv)  # (B, T, H, V) Eq. 10
        return out

# ---- 5. DeepSeekMoE — §2.1.2, Eqs. 12–16 --------------------------------------------------------

class FeedForward(nn.Module):
    """SwiGLU, down(silu(gate x) · up x); x (B, T, D) -> (B, T, D)."""

    def __init__(self, D, width):
        super().__init__()
        self.gate_proj = nn.Linear(D, width, bias=False)
        self.up_proj = nn.Linear(D, width, bias=False)
        self.down_proj = nn.Linear(width, D, bias=False)

    def forward(self, x):
        hidden = F.silu(self.gate_proj(x)) * self.up_proj(x)  # (B, T, F)
        return self.down_proj(hidden)

class Routing(NamedTuple):
    """A router's decision: scores (B, T, E) before the bias, indices and weights (B, T, K)."""

    scores: Tensor
    indices: Tensor
    weights: Tensor

class Router(nn.Module):
    """Chooses K experts a token and weighs them, Eqs. 13–16; x (B, T, D) -> Routing.

    The bias decides only *which* are chosen; no gradient reaches it (section 8 moves it).
    """

    def __init__(self, config):
        super().__init__()
        self.E, self.K = config.n_routed_experts, config.num_experts_per_tok
        self.G, self.topk_group = config.n_group, config.topk_group
        self.normalise, self.scaling = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(self.E, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(self.E))
        visits = torch.zeros(self.E, dtype=torch.int64, device="cpu")
        self.register_buffer("load", visits, persistent=False)  # since the bias last moved

    def forward(self, x):
        scores = F.linear(upcast(x), upcast(self.weight)).sigmoid()  # (B, T, E) Eq. 15
        choice = self.limit_groups(scores.detach() + self.e_score_correction_bias)  # (B, T, E)
        indices = choice.topk(self.K, sorted=False).indices  # (B, T, K) Eq. 16
        weights = scores.gather(-1, indices)  # (B, T, K) Eq. 14: of the unbiased scores
        if self.normalise:
            # NOTE(hf) gate-epsilon
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # (B, T, K) Eq. 13
        return Routing(scores, indices, weights * self.scaling)  # NOTE(checkpoint) routed-scaling

    def _apply(self, fn, recurse=True):
        """Whatever the model is cast to, the bias stays float32, bit for bit."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self

    def limit_groups(self, choice):
        """Take experts outside a token's best groups out of reach; choice (B, T, E) -> the same."""
        if self.G == 1:
            return choice
        grouped = choice.unflatten(-1, (self.G, self.E // self.G))  # (B, T, G, E/G)
        # NOTE(checkpoint) group-score: 2 = K_r/M = 8/4 of the released model, kept at every size.
        group_scores = grouped.topk(2, -1).values.sum(-1)  # (B, T, G)
        best = group_scores.topk(self.topk_group, sorted=False).indices
        outside = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, best, False)
        # -inf and not 0: biased scores can be negative, and 0 would win.
        return grouped.masked_fill(outside.unsqueeze(-1), -math.inf).flatten(-2)

def grouped_linear(x, weight, ends):
    """Each expert's map on its own rows; x (rows, in) by expert, weight (E, out, in) -> (rows, out)."""
    aligned = all(x.element_size() * width % 16 == 0 for width in weight.shape[1:])
    if aligned and x.dtype in (torch.float32, torch.bfloat16):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    # What the kernel does not take, float64 and odd widths, runs as a product an expert.
    groups = x.tensor_split(ends[:-1].cpu())
    return torch.cat([group @ expert.T for group, expert in zip(groups, weight, strict=True)])

class Experts(nn.Module):
    """All routed experts of a layer, stacked along a first axis; x (B, T, D) -> (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        E, D, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(E, width, D))
        self.up_proj = nn.Parameter(torch.empty(E, width, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, width))

    def forward(self, x, indices, weights):
        # The visits, sorted by expert: each expert's rows lie together, as one grouped product.
        expert, order = indices.flatten().sort(stable=True)  # (B*T*K), (B*T*K)
        every = torch.arange(len(self.gate_proj), device=x.device)
        ends = torch.searchsorted(expert, every, right=True, out_int32=True)  # (E)
        rows = x.flatten(0, 1)[order // indices.shape[-1]]  # (B*T*K, D)
        gate = grouped_linear(rows, self.gate_proj, ends)  # (B*T*K, F)
        hidden = F.silu(gate) * grouped_linear(rows, self.up_proj, ends)  # (B*T*K, F)
        sorted_visits = grouped_linear(hidden, self.down_proj, ends)  # (B*T*K, D)
        visits = torch.empty_like(rows).index_copy(0, order, sorted_visits)
        visits = visits.unflatten(0, indices.shape)  # (B, T, K, D)
        out = (visits * weights.unsqueeze(-1)).sum(-2)  # (B, T, D) Eq. 12: the routed sum
        return out.to(x.dtype)

class MoE(nn.Module):
    """Shared experts for every token, K routed ones by choice, Eq. 12; x (B, T, D) -> (B, T, D)."""

    def __init__(self, config):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        width = (config.n_shared_experts or 0) * config.moe_intermediate_size
        # Several shared experts are one that is as wide as all of them.
        self.shared_experts = FeedForward(config.hidden_size, width) if width else None

    def forward(self, x):
        routing = self.gate(x)
        routed = self.experts(x, routing.indices, routing.weights)  # (B, T, D)
        return routed if self.shared_experts is None else self.shared_experts(x) + routed

# ---- 6. Decoder block and MTP module — §2.2, Eqs. 21–22 -----------------------------------------

class Block(nn.Module):
    """One decoder layer, attention and then feed-forward; x (B, T, D) -> (B, T, D)."""

    def __init__(self, config, layer_idx):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(D, eps=eps)
        self.self_attn = MLA(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(D, eps=eps)
        dense = layer_idx < config.first_k_dense_replace
        self.mlp = FeedForward(D, config.intermediate_size) if dense else MoE(config)

    def forward(self, x, rope, pattern, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, pattern, cache)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x

class MTPBlock(Block):
    """MTP module of depth k: row i joins h_i with the embedding of token i+k, predicts token i+k+1.

        row         0  1  2  3  4
        token       a  b  c  d  e      main model: row 0 has read a, predicts b
        depth 1     b  c  d  e         embedded; row 0 predicts c; T - k rows remain
        depth 2     c  d  e            embedded; row 0 predicts d

    hidden and embeds (B, T-k, D) -> (B, T-k, D), normed: for the shared head, and for depth k+1.
    """

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        D, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = nn.RMSNorm(D, eps=eps)
        self.hnorm = nn.RMSNorm(D, eps=eps)
        self.eh_proj = nn.Linear(2 * D, D, bias=False)
        self.shared_head = nn.ModuleDict({"norm": nn.RMSNorm(D, eps=eps)})  # the head is lm_head

    def forward(self, hidden, embeds, rope, pattern, cache=None):
        # NOTE(checkpoint) eh-order
        joined = torch.cat([self.enorm(embeds), self.hnorm(hidden)], -1)  # (B, T-k, 2*D)
        x = self.eh_proj(joined)  # (B, T-k, D) Eq. 21
        x = super().forward(x, rope, pattern, cache)  # (B, T-k, D) Eq. 22
        return self.shared_head["norm"](x)

# ---- 7. Model and heads — Eq. 23 ----------------------------------------------------------------

@dataclass
class ModelOutput:
    """What a forward returns; what does not apply is None."""

    loss: Tensor | None = None  # ()
    logits: Tensor | None = None  # (B, T, vocab), (B, num_labels) or (B, T, num_labels)
    last_hidden_state: Tensor | None = None  # (B, T, D), after the final norm
    past_key_values: LatentCache | None = None
    hidden_states: tuple | None = None  # layers + 1 of (B, T, D), last_hidden_state the last
    attentions: tuple | None = None  # (B, H, T, S) a layer, rows sum to 1
    routing: tuple | None = None  # a Routing for each MoE layer
    mtp_logits: tuple | None = None  # (B, T-k, vocab) for each depth k
    main_loss: Tensor | None = None  # the loss without the two below
    mtp_loss: Tensor | None = None  # Eq. 25 without λ
    balance_loss: Tensor | None = None  # Eq. 17 without α, summed over layers; in training mode

class PreTrainedModel(nn.Module):
    """What the model and its heads share; sections below attach the methods that they explain:

    update_router_bias (8), generate (11), from_pretrained, save_pretrained, device, dtype (12).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config

    @torch.no_grad()
    def init_weights(self):
        """Matrices from a normal distribution of std initializer_range, norms 1, biases 0 (§4.2)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, self.config.initializer_range)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)

class DeepseekV3Model(PreTrainedModel):
    """Embedding, decoder layers, final norm; input_ids (B, T) -> last_hidden_state (B, T, D)."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False  # True recomputes layers in backward, to save memory
        self.init_weights()

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
        inputs_embeds=None, use_cache=False, output_attentions=False, output_hidden_states=False,
        output_routing=False,
    ):  # fmt: skip
        """Give tokens (B, T) or embeddings; attention_mask (B, S) is 0 at padding, on either side.

        With a cache the inputs are the new tokens only, and the cache remembers the mask.
        """
        embeds = self.embed(input_ids, inputs_embeds)  # (B, T, D)
        cache = LatentCache() if use_cache and past_key_values is None else past_key_values
        keys, rope, pattern = self.context(embeds, attention_mask, position_ids, cache)
        layers = self.layers[: self.config.num_hidden_layers]
        routing = output_routing or self.training
        with observe(layers, output_attentions, output_hidden_states, routing) as out:
            last = self.norm(self.run(layers, embeds, rope, pattern, cache))  # (B, T, D)
        out.last_hidden_state, out.past_key_values = last, cache
        if output_hidden_states:  # the last layer's state is shown after the norm
            out.hidden_states = (embeds, *out.hidden_states[:-1], last)
        if self.training:
            out.balance_loss = balance(layers, out.routing, keys, embeds.shape[1])
        return out

    def embed(self, input_ids, inputs_embeds):
        """The first hidden state, (B, T, D)."""
        check_inputs(input_ids, inputs_embeds, self.config.vocab_size)
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def context(self, x, attention_mask, position_ids, cache):
        """What all layers share: real keys (B, S) or None, RoPE's cos and sin, attention pattern."""
        B, T = x.shape[:2]
        past = cache.length if cache is not None else 0
        keys = key_mask(attention_mask, cache, B, T)
        if position_ids is None and keys is None:
            position_ids = torch.arange(past, past + T, device=x.device).unsqueeze(0)
        elif position_ids is None:  # the first real token of a row has position 0
            position_ids = (keys.cumsum(-1) - 1).clamp(min=0)[:, -T:]
        elif position_ids.shape not in ((B, T), (1, T)):
            raise ValueError(f"position_ids of shape {tuple(position_ids.shape)}: must be {(B, T)}")
        return keys, self.rotary_emb(position_ids), attention_pattern(keys, T, past + T, x.device)

    def run(self, layers, x, rope, pattern, cache):
        """The decoder layers; x (B, T, D) -> (B, T, D)."""
        recompute = self.gradient_checkpointing and self.training
        for layer in layers:
            call = partial(checkpoint, layer, use_reentrant=False) if recompute else layer
            x = call(x, rope, pattern, cache)
        if cache is not None:
            cache.length += x.shape[1]
        return x

class DeepseekV3ForCausalLM(PreTrainedModel):
    """Language model: logits of the next token (B, T, vocab), and MTP modules that look further."""

    def __init__(self, config):
        super().__init__(config)
        self.model = DeepseekV3Model(config)
        L, depths = config.num_hidden_layers, config.num_nextn_predict_layers
        self.model.layers.extend(MTPBlock(config, L + i) for i in range(depths))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.init_weights()

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
        inputs_embeds=None, labels=None, use_cache=False, logits_to_keep=0, output_mtp=False,
        **observe,
    ):  # fmt: skip
        """As DeepseekV3Model; logits of all tokens, or of the last `logits_to_keep`.

        labels (B, T): row i is scored on labels[i + 1], -100 is ignored. In training mode the loss
        adds λ · MTP loss and α · balance loss. `output_mtp` asks for mtp_logits without labels.
        """
        past = past_key_values.length if past_key_values is not None else 0
        if labels is not None and logits_to_keep or output_mtp and past:
            raise ValueError("labels need all logits, output_mtp needs all tokens in this call")
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **observe
        )
        out.logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])  # (B, T, vocab)
        if output_mtp or labels is not None and not past:
            embeds = self.model.embed(input_ids, inputs_embeds)  # (B, T, D)
            self.look_ahead(out, embeds, attention_mask, position_ids)
        if labels is not None:
            causal_losses(self, out, labels)  # section 8
        return out

    @property
    def mtp_blocks(self):
        return self.model.layers[self.config.num_hidden_layers :]

    def look_ahead(self, out, embeds, attention_mask, position_ids):
        """Run the MTP modules over a whole sequence, Eqs. 21–23, into out.mtp_logits."""
        # NOTE(checkpoint) mtp-input: the state after the final norm, as the released code's hidden
        # state is, and as other implementations measured better acceptance with.
        hidden, logits = out.last_hidden_state, []
        for k, block in enumerate(self.mtp_blocks[: embeds.shape[1] - 1], 1):
            mask = None if attention_mask is None else attention_mask[:, :-k] * attention_mask[:, k:]
            positions = None if position_ids is None else position_ids[:, :-k]
            hidden = hidden[:, :-1]  # (B, T-k, D)
            keys, rope, pattern = self.model.context(hidden, mask, positions, None)
            with observe([block], routing=self.training) as seen:
                hidden = block(hidden, embeds[:, k:], rope, pattern)  # (B, T-k, D)
            if self.training:
                out.balance_loss = out.balance_loss + balance([block], seen.routing, keys)
            logits.append(self.lm_head(hidden))  # Eq. 23
        out.mtp_logits = tuple(logits) or None

class DeepseekV3ForTokenClassification(PreTrainedModel):
    """A label a token: logits (B, T, num_labels); labels (B, T) are not shifted, -100 is ignored."""

    score_bias = True

    def __init__(self, config):
        super().__init__(config)
        self.model = DeepseekV3Model(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=self.score_bias)
        self.init_weights()

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
        inputs_embeds=None, labels=None, use_cache=False, **observe,
    ):  # fmt: skip
        """As DeepseekV3Model, with logits and, given labels, the loss."""
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **observe
        )
        out.logits = self.score(self.pool(out.last_hidden_state, input_ids, attention_mask))
        if labels is not None:
            classification_loss(self, out, labels)  # section 8
        return out

    def pool(self, hidden, input_ids, attention_mask):
        return hidden

class DeepseekV3ForSequenceClassification(DeepseekV3ForTokenClassification):
    """A label a sequence, read off its last real token under either padding: logits (B, num_labels).

    labels: class ids (B), floats (B) for regression (num_labels 1), or (B, num_labels) multi-label.
    """

    score_bias = False

    def pool(self, hidden, input_ids, attention_mask):
        last = last_real_token(hidden, input_ids, attention_mask, self.config.pad_token_id)  # (B)
        return hidden[torch.arange(len(last), device=last.device), last]

# ---- 8. Losses and balancing — Eqs. 17–20, 24–25 ------------------------------------------------

def shifted_cross_entropy(logits, labels, shift):
    """Mean of -log P(labels[i + shift]) at row i, without -100; logits (B, rows, vocab) -> ()."""
    targets = labels[:, shift:]
    rows = upcast(logits[:, : targets.shape[1]]).flatten(0, 1)
    total = F.cross_entropy(rows, targets.flatten(), ignore_index=-100, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)

def causal_losses(model, out, labels):
    """Cross-entropy, MTP loss and their weighted sum with the balance loss, into `out`."""
    if labels.shape != out.logits.shape[:2]:
        raise ValueError(f"labels of shape {tuple(labels.shape)}: must be {tuple(out.logits.shape[:2])}")
    check_ids("labels", labels[labels != -100], model.config.vocab_size)
    out.loss = out.main_loss = shifted_cross_entropy(out.logits, labels, 1)
    if out.mtp_logits is not None:
        by_depth = enumerate(out.mtp_logits, 1)
        # NOTE(report) eq-24-mean: so that a depth weighs the same at every sequence length.
        losses = [shifted_cross_entropy(rows, labels, k + 1) for k, rows in by_depth]  # Eq. 24
        out.mtp_loss = sum(losses) / len(losses)  # Eq. 25, λ below
    if model.training and out.mtp_loss is not None:
        out.loss = out.loss + model.config.mtp_loss_weight * out.mtp_loss
    if model.training:
        out.loss = out.loss + model.config.balance_loss_weight * out.balance_loss

def last_real_token(hidden, input_ids, attention_mask, pad_token_id):
    """Each row's last real token, by the mask, else by the pad id, else the last of all -> (B)."""
    position = torch.arange(hidden.shape[1], device=hidden.device)
    real = torch.ones_like(hidden[..., 0])
    if attention_mask is not None:
        real = attention_mask[:, -hidden.shape[1] :]
    elif input_ids is not None and pad_token_id is not None:
        real = input_ids != pad_token_id
    return (real.long() * position).argmax(-1)

def classification_loss(model, out, labels):
    """Loss of a label a token or a sequence, with the balance loss in training, into `out`."""
    logits = upcast(out.logits)
    if logits.ndim == 3:
        out.main_loss = shifted_cross_entropy(logits, labels, 0)
    elif model.config.num_labels == 1:
        out.main_loss = F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).flatten())
    elif labels.is_floating_point():
        out.main_loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    else:
        out.main_loss = F.cross_entropy(logits, labels.flatten())
    out.loss = out.main_loss
    if model.training:  # fine-tuning keeps the experts balanced too
        out.loss = out.loss + model.config.balance_loss_weight * out.balance_loss

def balance_loss(scores, K, mask=None):
    """Sequence-wise balance loss of one layer without α, Eqs. 17–20; scores (B, T, E) -> ().

    It counts the K best *unbiased* scores, as Eq. 18 is written; padding, False in mask, nowhere.
    """
    E = scores.shape[-1]
    real = torch.ones_like(scores[..., :1]) if mask is None else mask.unsqueeze(-1).to(scores.dtype)
    tokens = real.sum(1).clamp(min=1)  # (B, 1)
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(K).indices, 1.0)  # (B, T, E)
    f = (chosen * real).sum(1) * E / (K * tokens)  # (B, E) Eq. 18
    share = scores / (scores.sum(-1, keepdim=True) + 1e-20)  # (B, T, E) Eq. 19
    P = (share * real).sum(1) / tokens  # (B, E) Eq. 20
    return (f * P).sum(-1).mean()  # Eq. 17

def balance(layers, routings, keys, T=None):
    """Count each router's load, padding excluded, and sum the layers' balance losses -> ().

    Called once a forward, outside the layers: recomputing one in backward does not count twice.
    """
    mask = None if keys is None else keys[:, -(T or keys.shape[1]) :]  # (B, T)
    loss = torch.zeros((), device=routings[0].scores.device) if routings else torch.zeros(())
    for gate, routing in zip(gates(layers), routings, strict=True):
        real = routing.indices if mask is None else routing.indices[mask]
        visits = torch.bincount(real.flatten(), minlength=gate.E)
        gate.load = gate.load.to(visits.device) + visits
        loss = loss + balance_loss(routing.scores, gate.K, mask)
    return loss

@torch.no_grad()
def update_router_bias(model, gamma=0.001, centred=False):
    """Loss-free balancing (§2.1.2): a busy expert's bias falls by gamma, an idle one's rises.

    Call it once an optimizer step: the loads that training-mode forwards counted since the last call
    are used, and forgotten. `centred` takes the mean step off, which changes no choice and keeps the
    biases from drifting. Returns MaxVio = max load / mean load - 1 of each MoE layer, MTP's last.
    """
    routers = gates(model.modules())
    if not routers:
        return []
    loads = torch.stack([router.load.to(model.device) for router in routers]).double()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(loads)  # of the global batch, on every rank
    mean = loads.mean(-1, keepdim=True)
    step = (mean - loads).sign()
    step = step - step.mean(-1, keepdim=True) if centred else step
    for router, move in zip(routers, step, strict=True):
        router.e_score_correction_bias += (gamma * move).to(router.e_score_correction_bias)
        router.load = torch.zeros_like(router.load)
    return (loads.amax(-1) / mean.squeeze(-1).clamp(min=1e-9) - 1).clamp(min=0).tolist()

PreTrainedModel.update_router_bias = update_router_bias

# ---- 9. Long context — YaRN, §4.3 ---------------------------------------------------------------

def yarn_mscale(factor, mscale):
    """YaRN's temperature, 0.1 · mscale · ln s + 1, for a context stretched s = factor times."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

def yarn_correction_range(config):
    """First and last rotary pair that YaRN blends; (10, 23) as released.

    Pairs that turn more than beta_fast times over the original context keep their frequency; those
    that turn less than beta_slow times are slowed `factor` times.
    """
    settings, R = config.rope_scaling, config.qk_rope_head_dim

    def pair_that_turns(times):
        length = settings["original_max_position_embeddings"]
        return R * math.log(length / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = math.floor(pair_that_turns(settings.get("beta_fast") or 32))
    high = math.ceil(pair_that_turns(settings.get("beta_slow") or 1))
    return max(low, 0), min(high, R - 1)

def yarn(inv_freq, config):
    """Slow the slow pairs to fit a longer context; inv_freq (R/2) -> the same, factor on cos, sin."""
    settings = config.rope_scaling
    s, over, under = settings["factor"], settings.get("mscale"), settings.get("mscale_all_dim")
    low, high = yarn_correction_range(config)
    pair = torch.arange(len(inv_freq), dtype=torch.float32, device="cpu")
    slowed = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)  # 0 for fast pairs, 1 for slow
    inv_freq = inv_freq * (1 - slowed) + inv_freq / s * slowed  # (R/2)
    # What the softmax scale takes in full (mscale_all_dim), cos and sin need not repeat: 1 as released.
    magnitude = yarn_mscale(s, over) / yarn_mscale(s, under) if over and under else yarn_mscale(s, 1)
    return inv_freq, settings.get("attention_factor") or magnitude

# ---- 10. Looking inside --------------------------------------------------------------------------

def gates(modules):
    """The routers of `modules`: of blocks with experts, or the routers themselves."""
    found = [getattr(getattr(module, "mlp", module), "gate", module) for module in modules]
    return [module for module in dict.fromkeys(found) if isinstance(module, Router)]

def check_inputs(input_ids, inputs_embeds, vocab):
    """ValueError unless there is exactly one of tokens (B, T) and embeddings (B, T, D)."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if input_ids is not None:
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            found = f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
            raise ValueError(f"input_ids are {found}: must be integers (B, T)")
        check_ids("input_ids", input_ids, vocab)

def check_ids(name, ids, vocab):
    """ValueError if a token or label id is outside the vocabulary (on a GPU its own check speaks)."""
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab:
            raise ValueError(f"{name} hold {low if low < 0 else high}: must lie in 0..{vocab - 1}")

@contextmanager
def hooked(hooks):
    """[(module, function of its output)] are forward hooks while the block runs."""
    handles = [module.register_forward_hook(lambda m, a, out, f=f: f(out)) for module, f in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

@contextmanager
def observe(layers, attentions=False, hidden_states=False, routing=False):
    """A ModelOutput whose asked-for fields hold, after the block, what the layers returned."""
    out = ModelOutput()
    lists = {"attentions": [], "hidden_states": [], "routing": []}
    hooks = [(layer.self_attn.softmax, lists["attentions"].append) for layer in layers if attentions]
    hooks += [(layer, lists["hidden_states"].append) for layer in layers if hidden_states]
    hooks += [(gate, lists["routing"].append) for gate in gates(layers) if routing]
    with hooked(hooks):
        yield out
    out.attentions = tuple(lists["attentions"]) if attentions else None
    out.hidden_states = tuple(lists["hidden_states"]) if hidden_states else None
    out.routing = tuple(lists["routing"]) if routing else None

@contextmanager
def trace(model, *patterns):
    """`with trace(model, "layers.*.mlp.gate") as seen:` fills seen, {name: what it returned last}.

    A shell-style pattern matches a module's whole name, or its end after a dot; all else stays as it
    is, bit for bit. ValueError if nothing matches, with names that would.
    """
    names = dict(model.named_modules())
    seen, hooks = {}, []
    for pattern in patterns:
        hits = [n for n in names if fnmatch.fnmatch(n, pattern) or fnmatch.fnmatch(n, "*." + pattern)]
        if not hits:
            last = pattern.rsplit(".", 1)[-1]
            near = [name for name in names if last in name] or list(names)[1:]
            raise ValueError(f"no module matches {pattern!r}; there are {', '.join(near[:12])}, …")
        hooks += [(names[name], partial(seen.__setitem__, name)) for name in hits]
    with hooked(hooks):
        yield seen

# ---- 11. Generation -----------------------------------------------------------------------------

@dataclass
class Sampling:
    """How the next token is chosen from logits; greedy unless do_sample."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # keep the k likeliest, 0: all
    top_p: float = 1.0  # keep the fewest that hold this much probability
    min_p: float = 0.0  # keep those at least this fraction as likely as the likeliest
    generator: torch.Generator | None = None

    def __post_init__(self):
        rules = {
            "temperature": (self.temperature > 0, "above 0; greedy is do_sample=False"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
        }
        for name, (holds, right) in rules.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be {right}")

    def distribution(self, logits):
        """Probabilities that a token is drawn from, logits (..., vocab) -> the same; greedy: all on one."""
        if not self.do_sample:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(upcast(logits).dtype)
        probs = (upcast(logits) / self.temperature).softmax(-1)
        if self.top_k:
            likeliest = probs.topk(min(self.top_k, probs.shape[-1])).indices
            probs = probs * torch.zeros_like(probs).scatter(-1, likeliest, 1.0)
            probs = probs / probs.sum(-1, keepdim=True)
        if self.top_p < 1:
            falling, order = probs.sort(descending=True, stable=True)
            enough = falling.cumsum(-1) - falling >= self.top_p  # what stands before holds top_p
            probs = probs.masked_fill(enough.scatter(-1, order, enough), 0.0)
        probs = probs.masked_fill(probs < self.min_p * probs.amax(-1, keepdim=True), 0.0)
        return probs / probs.sum(-1, keepdim=True)

    def draw(self, probs):
        """A token from each distribution, normalised or not; (B, vocab) -> (B)."""
        if not self.do_sample:
            return probs.argmax(-1)
        return torch.multinomial(probs, 1, generator=self.generator).squeeze(-1)

    def accept(self, drafts, q, p):
        """Speculative sampling: how many drafts stand (B), and the token behind them (B).

        drafts (B, T-1) were drawn from q (B, T-1, vocab); p (B, T, vocab) is the model's, of one more.
        """
        # Draft x stands with probability min(1, p(x) / q(x)). Behind the last that stands, the token
        # is drawn from max(p - q, 0), normalised: what p has more of than drafting offered; where
        # all stand, nothing was offered, q = 0. So every token is distributed exactly as p.
        chance = torch.zeros_like(q[..., 0])
        if self.do_sample:
            chance.uniform_(generator=self.generator)
        p_x, q_x = (probs.gather(-1, drafts.unsqueeze(-1)).squeeze(-1) for probs in (p[:, :-1], q))
        accepted = (chance * q_x < p_x).cumprod(-1).sum(-1)  # (B)
        row = torch.arange(len(p), device=p.device)
        p, q = p[row, accepted], F.pad(q, (0, 0, 0, 1))[row, accepted]  # (B, vocab), (B, vocab)
        residual = (p - q).clamp(min=0)  # (B, vocab)
        # Where p and q differ by rounding only, nothing may be left to draw from: then p is right.
        return accepted, self.draw(residual.where(residual.sum(-1, keepdim=True) > 0, p))

def stop_ids(config, eos_token_id):
    """End-of-sequence ids as a list: those given, else the config's; -1 stands for none."""
    given = config.eos_token_id if eos_token_id is None else eos_token_id
    ids = given if isinstance(given, list | tuple) else [] if given is None else [given]
    return [] if -1 in ids else list(ids)

class Continuation:
    """What each row has gained, up to `most` tokens; a column is made once every row has it."""

    def __init__(self, config, rows, most, eos_token_id, streamer, statistics):
        self.most, self.streamer = most, streamer
        self.statistics = [] if statistics is None else statistics
        self.stops = stop_ids(config, eos_token_id)
        self.pad = (self.stops or [0])[0] if config.pad_token_id is None else config.pad_token_id
        self.rows, self.columns, self.finished = [[] for _ in range(rows)], [], [most == 0] * rows

    def add(self, drafts, accepted, token):
        """Append each row's accepted drafts (B, T-1) and the token behind them, up to its end."""
        gains = zip(self.rows, drafts.tolist(), accepted.tolist(), token.tolist(), strict=True)
        for i, (row, drafted, count, behind) in enumerate(gains):
            if drafted and not self.finished[i]:
                self.statistics.append((len(drafted), count))
            for new in [*drafted[:count], behind]:
                if not self.finished[i]:
                    row.append(new)
                    self.finished[i] = new in self.stops or len(row) == self.most
        longest, ends = max(map(len, self.rows)), zip(self.rows, self.finished, strict=True)
        for i in range(len(self.columns), min(longest if end else len(row) for row, end in ends)):
            column = [row[i] if i < len(row) else self.pad for row in self.rows]
            self.columns.append(torch.tensor(column, device=token.device))
            if self.streamer is not None:
                self.streamer(self.columns[-1])

def slots_of_depth(k, mask):
    """Depth k's rows begin at the k-th real token: its part of mask (B, S), or None if that is all."""
    mask = mask & (mask.cumsum(-1) >= k)
    return None if mask.all() else mask

class Drafter:
    """The MTP modules at inference: draft k is what depth k says behind the last token known.

    Row i of depth k (see MTPBlock) stands where token i + k - 1 stands in the main cache. Of n tokens
    known, rows to n - k are made from these alone, and stay; the k - 1 behind them are made from
    drafts, and again in the next call. Beyond its depth the last module goes on from its own output.
    """

    def __init__(self, model, sampling, most_drafts, capacity):
        self.model, self.sampling, self.blocks = model, sampling, model.mtp_blocks[:most_drafts]
        self.caches = [LatentCache(capacity) for _ in self.blocks]
        self.above = {}  # by depth, the last row to stay of the depth above

    def draft(self, window, hidden, known, last, token, count):
        """Draft `count` tokens behind `token` (B) -> drafts (B, count), their q (B, count, vocab).

        window (B, T) holds the main cache's newest tokens, hidden (B, T, D) the states there, last (B)
        each row's newest column of it; known (B, S) is False where the cache holds no token.
        """
        row, column = torch.arange(len(last), device=last.device), last.unsqueeze(1)
        ahead = F.pad(window[:, 1:], (0, 1)).scatter(1, column, token.unsqueeze(1))  # (B, T)
        mask, start, drafts, q = known, known.shape[1] - window.shape[1], [], []
        for i in range(count):
            if 0 < i < len(self.blocks):
                above = self.above.get(i, torch.zeros_like(hidden[:, :1]))  # (B, 1, D)
                self.above[i] = hidden[row, last].unsqueeze(1)
                hidden = torch.cat([above, hidden], 1)
            if i < len(self.blocks):
                hidden = self.run(i, hidden, ahead, slots_of_depth(i + 1, mask))
                newest = hidden[row, last + i].unsqueeze(1)  # (B, 1, D)
            else:
                newest = self.run(-1, newest, drafts[-1], None)
            q.append(self.sampling.distribution(self.model.lm_head(newest)))
            drafts.append(self.sampling.draw(q[-1].squeeze(1)).unsqueeze(1))
            ahead = F.pad(ahead, (0, 1)).scatter(1, column + i + 1, drafts[-1])
            mask = F.pad(mask, (0, 1)).scatter(1, start + column + i + 1, True)
        for k, cache in enumerate(self.caches[:count], 1):
            cache.crop(known.shape[1])
            cache.mask = slots_of_depth(k, known)
        return torch.cat(drafts, 1), torch.cat(q, 1)

    def run(self, i, hidden, tokens, mask):
        """New rows of module i: hidden (B, T, D) with the embeddings of tokens (B, T) -> (B, T, D)."""
        cache, main = self.caches[i], self.model.model
        _, rope, pattern = main.context(hidden, mask, None, cache)
        hidden = self.blocks[i](hidden, main.embed_tokens(tokens), rope, pattern, cache)  # (B, T, D)
        cache.length += tokens.shape[1]
        return hidden

def decode(model, window, attention_mask, sampling, most_drafts, text):
    """Lengthen `text` to its end: draft, verify all drafts in one pass, forget those that fell."""
    cache = LatentCache(window.shape[1] + text.most)
    drafter = Drafter(model, sampling, most_drafts, cache.capacity)
    hidden = model.model(window, attention_mask, past_key_values=cache).last_hidden_state  # (B, T, D)
    known = (torch.ones_like(window) if attention_mask is None else attention_mask).bool()  # (B, T)
    last = last_real_token(hidden, None, attention_mask, None)  # (B)
    newest = hidden[torch.arange(len(last), device=last.device), last].unsqueeze(1)
    p = sampling.distribution(model.lm_head(newest))
    drafts, none = window[:, :0], (window[:, :0], None)
    while True:
        if drafts.shape[1]:
            accepted, token = sampling.accept(drafts, q, p)
        else:
            accepted, token = torch.zeros_like(last), sampling.draw(p[:, 0])
        text.add(drafts, accepted, token)
        if all(text.finished):
            return
        if drafts.shape[1]:
            # Rows that accept less than others keep holes in the cache. A step takes as many slots as
            # its best row gains tokens: in all at most min(B, drafts + 1) for each token of a row.
            last = accepted.masked_fill(torch.tensor(text.finished, device=last.device), 0)  # (B)
            stands = torch.arange(int(last.max()) + 1, device=last.device) <= last.unsqueeze(1)
            known = torch.cat([known, stands], 1)
            cache.crop(known.shape[1])
            cache.mask = slots_of_depth(1, known)
            window, hidden = window[:, : stands.shape[1]], hidden[:, : stands.shape[1]]
        count = min(most_drafts, text.most - 1 - min(map(len, text.rows)))
        drafts, q = drafter.draft(window, hidden, known, last, token, count) if count else none
        window = torch.cat([token.unsqueeze(1), drafts], 1)
        hidden = model.model(window, past_key_values=cache).last_hidden_state
        p = sampling.distribution(model.lm_head(hidden))

@torch.no_grad()
def generate(
    model, input_ids, attention_mask=None, max_new_tokens=64, do_sample=False, temperature=1.0,
    top_k=0, top_p=1.0, min_p=0.0, eos_token_id=None, use_mtp=False, num_draft_tokens=None,
    generator=None, streamer=None, statistics=None,
):  # fmt: skip
    """Continue input_ids (B, T) by up to max_new_tokens -> (B, T + new), padded behind a row's end.

    eos_token_id: an id or a list, None for the config's, -1 never stops. Prompts may be padded on
    either side if attention_mask (B, T) says where. streamer(token_ids (B)) is called for each column.
    use_mtp drafts num_draft_tokens a step, by default one a module: the same tokens, or when sampling
    the same distribution, in fewer steps; a list `statistics` gains (drafted, accepted) of each.
    """
    sampling = Sampling(do_sample, temperature, top_k, top_p, min_p, generator)
    check_inputs(input_ids, None, model.config.vocab_size)
    if input_ids.shape[1] == 0 or max_new_tokens < 0:
        raise ValueError(f"a prompt of {input_ids.shape[1]} tokens, {max_new_tokens=}: too few")
    if use_mtp and not model.mtp_blocks:
        hint = "train one with num_nextn_predict_layers=1, or load a checkpoint that has them"
        raise ValueError(f"use_mtp=True, but the model has no MTP modules: {hint}")
    if num_draft_tokens is not None and (num_draft_tokens < 1 or not use_mtp):
        raise ValueError(f"{num_draft_tokens=}, {use_mtp=}: must be 1 or more, with use_mtp=True")
    most_drafts = (num_draft_tokens or len(model.mtp_blocks)) if use_mtp else 0
    sinks = streamer, statistics
    text = Continuation(model.config, len(input_ids), max_new_tokens, eos_token_id, *sinks)
    was_training = model.training
    model.eval()
    try:
        decode(model, input_ids, attention_mask, sampling, most_drafts, text)
    finally:
        model.train(was_training)
    return torch.cat([input_ids, *(column.unsqueeze(1) for column in text.columns)], 1)

DeepseekV3ForCausalLM.generate = generate

# ---- 12. Checkpoints, in the released layout ----------------------------------------------------

# Switches that the whole family has in one position; other positions are refused.
FIXED_KEYS = {"model_type": "deepseek_v3", "hidden_act": "silu", "attention_dropout": 0.0}
FIXED_KEYS |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}

def config_values(given):
    """The fields of a config and `extra`, from keywords in any of the spellings in use."""
    whole_file = "model_type" in given
    if "rope_parameters" in given:  # transformers 5 has both RoPE settings in one dict
        rope = dict(given.pop("rope_parameters") or {})
        given |= {"rope_theta": rope.pop("rope_theta", 10000.0), "rope_scaling": rope or None}
    elif not whole_file:
        given.setdefault("rope_scaling", dict(YARN_V3))
    if "num_mtp_layers" in given:  # transformers' name
        given["num_nextn_predict_layers"] = given.pop("num_mtp_layers")
    if whole_file:
        given.setdefault("num_nextn_predict_layers", 0)
    if "num_labels" not in given and isinstance(given.get("id2label"), dict):
        given["num_labels"] = len(given["id2label"])
    if given.get("num_key_value_heads") is None:
        heads = given.get("num_attention_heads", DeepseekV3Config.num_attention_heads)
        given["num_key_value_heads"] = heads
    fields = dataclasses.fields(DeepseekV3Config)
    values = {field.name: given.pop(field.name, field.default) for field in fields}
    rope = values["rope_scaling"]
    if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "default":
        values["rope_scaling"] = None
    return values | {"extra": given}

def config_dict(config):
    """Every field and every kept key, as config.json has them."""
    known = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return FIXED_KEYS | known | config.extra

def load_config(cls, directory, **overrides):
    """Read directory/config.json; ValueError or FileNotFoundError names what is wrong."""
    return cls(**(FIXED_KEYS | read_json(directory, "config.json") | overrides))

def save_config(config, directory):
    """Write directory/config.json."""
    write_json(directory, "config.json", config.to_dict())

DeepseekV3Config.to_dict = config_dict
DeepseekV3Config.from_pretrained = classmethod(load_config)
DeepseekV3Config.save_pretrained = save_config

def check_config(config):
    """ValueError for a config that cannot work, naming field, value and what would be right."""

    def require(name, holds, right):
        if not holds:
            value = getattr(config, name) if hasattr(config, name) else config.extra[name]
            raise ValueError(f"{name}={value!r}: must be {right}")

    names = [field.name for field in dataclasses.fields(config)]
    for key in config.extra:
        for meant in difflib.get_close_matches(key, names, n=1, cutoff=0.9):
            raise ValueError(f"{key!r} is not a config field: did you mean {meant!r}?")
    can_be_zero = ("first_k_dense_replace", "num_nextn_predict_layers", "n_shared_experts")
    for field in dataclasses.fields(config):
        name, kind, value = field.name, field.type, getattr(config, field.name)
        boolean = isinstance(value, bool) == (kind is bool)
        finite = not isinstance(value, float) or math.isfinite(value)
        require(name, isinstance(value, kind) and boolean and finite, getattr(kind, "__name__", kind))
        if kind in (int, int | None) and value is not None and not name.endswith("token_id"):
            require(name, value >= (name not in can_be_zero), "1 or more, or 0 where that means none")
    G, per_group = config.n_group, config.n_routed_experts // config.n_group
    reach = config.topk_group * per_group
    heads = config.num_attention_heads
    require("num_key_value_heads", config.num_key_value_heads == heads, f"{heads}, as attention heads")
    require("qk_rope_head_dim", config.qk_rope_head_dim % 2 == 0, "even: RoPE turns pairs")
    require("n_routed_experts", config.n_routed_experts % G == 0, f"divisible by n_group={G}")
    require("n_group", G == 1 or per_group >= 2, "1, or leave 2 experts or more a group")
    require("topk_group", config.topk_group <= G, f"at most n_group={G}")
    require("num_experts_per_tok", config.num_experts_per_tok <= reach, f"at most {reach}")
    require("rms_norm_eps", config.rms_norm_eps > 0, "above 0")
    require("rope_theta", config.rope_theta > 1, "above 1")
    require("routed_scaling_factor", config.routed_scaling_factor > 0, "above 0")
    require("initializer_range", config.initializer_range >= 0, "0 or more")
    for name, only in (FIXED_KEYS | {"moe_layer_freq": 1, "rope_interleave": True}).items():
        allowed = (only, "kimi_k2") if name == "model_type" else (only,)
        require(name, config.extra.get(name, only) in allowed, f"{only!r}, as in this whole family")
    if config.rope_scaling is not None:
        check_yarn(config.rope_scaling)

def check_yarn(yarn):
    """ValueError for YaRN settings that cannot work."""
    if yarn.get("rope_type", yarn.get("type")) != "yarn":
        raise ValueError(f"rope_scaling={yarn!r}: its type must be 'yarn' or 'default'")
    needed = ("factor", "original_max_position_embeddings")
    for key in (*needed, "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"):
        value = yarn.get(key, None if key in needed else 1)
        optional = key not in needed and value in (None, 0)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not optional and not (number and 0 < value < math.inf):
            raise ValueError(f"rope_scaling[{key!r}]={value!r}: must be a number above 0")

def read_json(directory, name):
    """The object in directory/name; FileNotFoundError or ValueError names the file."""
    path = Path(directory) / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, must be a JSON object")
    return content

def write_json(directory, name, content):
    """Write directory/name in one step: a reader sees the old file or the new one."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    beside = Path(directory) / f".{name}.tmp"
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    beside.replace(Path(directory) / name)

INDEX = "model.safetensors.index.json"

class Checkpoint:
    """The tensors of a folder by name, read from model.safetensors or from the shards of its index."""

    def __init__(self, directory):
        self.directory, self.opened = Path(directory), {}
        single = self.directory / "model.safetensors"
        if (self.directory / INDEX).is_file():
            self.files = read_json(self.directory, INDEX).get("weight_map")
            if not isinstance(self.files, dict) or not all(map(self.is_plain, self.files.values())):
                raise ValueError(f"{self.directory / INDEX}: weight_map must map names to files beside it")
        elif single.is_file():
            self.files = dict.fromkeys(self.open(single.name).keys(), single.name)
        else:
            raise FileNotFoundError(f"{self.directory}: no {single.name} and no {INDEX} (pickles are not read)")

    @staticmethod
    def is_plain(file):
        return isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")

    def open(self, file):
        if file not in self.opened:
            path = self.directory / file
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file, but {INDEX} names it")
            try:
                self.opened[file] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
        return self.opened[file]

    def shape(self, name):
        handle = self.open(self.files[name])
        try:
            return tuple(handle.get_slice(name).get_shape())
        except SafetensorError:
            raise ValueError(f"{name}: not in {self.files[name]}, where {INDEX} says it is") from None

    def get(self, name):
        return self.open(self.files[name]).get_tensor(name)

def released_names(model, depth=None):
    """{parameter name: names of its tensors in a checkpoint}; a stack of experts is a name for each.

    `depth`: decoder layers of the checkpoint, if the model has only the first of them.
    """
    prefix = "model." if isinstance(model, DeepseekV3Model) else ""
    shift = (depth or model.config.num_hidden_layers) - model.config.num_hidden_layers
    names = {}
    for name, tensor in (*model.named_parameters(), *persistent_buffers(model)):
        parts = (prefix + name).split(".")
        if shift and parts[1] == "layers" and int(parts[2]) >= model.config.num_hidden_layers:
            parts[2] = str(int(parts[2]) + shift)  # an MTP module
        head, stack, leaf = ".".join(parts[:-1]), parts[-2], parts[-1]
        experts = range(len(tensor)) if stack == "experts" else ()
        names[name] = [f"{head}.{e}.{leaf}.weight" for e in experts] or [f"{head}.{leaf}"]
    return names

def persistent_buffers(model):
    """The router biases, by name: the only buffers that a checkpoint holds."""
    return [item for item in model.named_buffers() if item[0].endswith("e_score_correction_bias")]

def mtp_copies(config, depth=None):
    """{name: name} of the embedding and head that a checkpoint repeats in each MTP module."""
    first = depth or config.num_hidden_layers
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    copies = {}
    for layer in range(first, first + config.num_nextn_predict_layers):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"model.layers.{layer}.shared_head.head.weight"] = head
    return copies

def load_pretrained(
    cls, directory, device_map=None, dtype=None, num_hidden_layers=None, **overrides
):  # fmt: skip
    """A model from a checkpoint folder: config.json, and model.safetensors or an index with shards.

    device_map: the device to load to (None: the CPU). dtype: None keeps what the checkpoint holds.
    num_hidden_layers: load only so many first layers, and open only the shards that hold them.
    Other keywords override the config. FileNotFoundError or ValueError names the file or tensor that
    is missing, unexpected, mis-shaped or broken; nothing is loaded then.
    """
    config = DeepseekV3Config.from_pretrained(directory, **overrides)
    depth, stored = config.num_hidden_layers, Checkpoint(directory)
    config.num_hidden_layers = depth if num_hidden_layers is None else num_hidden_layers
    if not 1 <= config.num_hidden_layers <= depth:
        raise ValueError(f"{num_hidden_layers=}: must be between 1 and the checkpoint's {depth}")
    mtp_layers = tuple(f"model.layers.{depth + k}." for k in range(config.num_nextn_predict_layers))
    if mtp_layers and not any(name.startswith(mtp_layers) for name in stored.files):
        warnings.warn(f"{directory}: its config announces MTP modules, it holds none", stacklevel=2)
        config.num_nextn_predict_layers = 0
    with torch.device("meta"):
        model = cls(config)
    sources = released_names(model, depth)
    check_coverage(model, stored, sources, depth)
    device = torch.device("cpu" if device_map is None else device_map)
    for name, pieces in sources.items():
        put_tensor(model, name, read_tensor(model, name, pieces, stored, device, dtype))
    if config.tie_word_embeddings and isinstance(model, DeepseekV3ForCausalLM):
        model.lm_head.weight = model.model.embed_tokens.weight
    for name, of in mtp_copies(config, depth).items():
        if isinstance(model, DeepseekV3ForCausalLM) and name in stored.files:
            if not torch.equal(stored.get(name), stored.get(of)):
                raise ValueError(f"{name}: differs from {of}, of which it must be a copy")
    return model.to(device).eval()

def check_coverage(model, stored, sources, depth):
    """ValueError unless every tensor of the model is stored, in its shape, and nothing else is."""
    config, kept = model.config, model.config.num_hidden_layers
    wanted, wrong = mtp_copies(config, depth).keys() | set(), []
    for name, pieces in sources.items():
        shape = tuple(find_tensor(model, name).shape[len(pieces) > 1 :])
        missing = [piece for piece in pieces if piece not in stored.files]
        if missing and name.startswith("score."):  # a new head on a trained trunk
            warnings.warn(f"{name}: not in the checkpoint, newly initialised", stacklevel=3)
            continue
        wrong += [f"{piece}: missing" for piece in missing]
        wanted |= set(pieces)
        for piece in set(pieces) - set(missing):
            if stored.shape(piece) != shape:
                wrong.append(f"{piece}: of shape {stored.shape(piece)}, must be {shape}")
    skipped = [f"model.layers.{i}." for i in range(kept, depth)]
    skipped += [] if config.num_nextn_predict_layers else [f"model.layers.{depth}."]
    skipped += [] if isinstance(model, DeepseekV3ForCausalLM) else ["lm_head.", f"model.layers.{depth}."]
    for name in stored.files.keys() - wanted:
        if not name.startswith(tuple(skipped)) and not name.endswith("rotary_emb.inv_freq"):
            wrong.append(f"{name}: unexpected")
    if wrong:
        more = f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(f"{stored.directory}: {'; '.join(sorted(wrong)[:10])}{more}")

def find_tensor(model, name):
    """The parameter or buffer of that dotted name."""
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)

def put_tensor(model, name, tensor):
    """Put a loaded tensor where the parameter or buffer of that name is."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    is_parameter = leaf in module._parameters
    setattr(module, leaf, nn.Parameter(tensor) if is_parameter else tensor)

def read_tensor(model, name, pieces, stored, device, dtype):
    """A parameter or buffer from its pieces, one, or one for each expert of a stack."""
    meta = find_tensor(model, name)
    if pieces[0] not in stored.files:  # a new head
        return torch.empty_like(meta, device=device, dtype=dtype).normal_(0, model.config.initializer_range)
    dtype = torch.float32 if name.endswith("e_score_correction_bias") else dtype
    first = stored.get(pieces[0])
    if len(pieces) == 1:
        return first.to(device, dtype or first.dtype)
    stack = torch.empty(meta.shape, dtype=dtype or first.dtype, device=device)
    for place, piece in zip(stack, pieces, strict=True):
        place.copy_(stored.get(piece))
    return stack

def stored_tensors(model):
    """{name: tensor} as a checkpoint holds them, experts apart and MTP copies repeated."""
    tensors = {}
    for name, pieces in released_names(model).items():
        tensor = find_tensor(model, name).detach()
        tensors |= dict(zip(pieces, tensor if len(pieces) > 1 else [tensor], strict=True))
    if isinstance(model, DeepseekV3ForCausalLM):
        tensors |= {name: tensors[of].clone() for name, of in mtp_copies(model.config).items()}
    return tensors

def save_pretrained(model, directory, max_shard_size="5GB"):
    """Write config.json and the weights, MTP modules included, in files of at most max_shard_size.

    Files are written beside the old ones and take their place when all are whole.
    """
    limit, directory = parse_size(max_shard_size), Path(directory)
    shards, room = [], 0
    for name, tensor in stored_tensors(model).items():
        if not shards or tensor.nbytes > room:
            shards.append({})
            room = limit
        shards[-1][name] = tensor.contiguous()
        room -= tensor.nbytes
    directory.mkdir(parents=True, exist_ok=True)
    older = {path.name for path in directory.glob("model*.safetensors")}
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):06d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, directory / f".{name}.tmp", metadata={"format": "pt"})
    for name in names:
        (directory / f".{name}.tmp").replace(directory / name)
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_json(directory, INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    else:
        (directory / INDEX).unlink(missing_ok=True)
    for name in older - set(names):
        (directory / name).unlink()
    model.config.extra |= {"architectures": [type(model).__name__]}
    model.config.extra |= {"torch_dtype": str(model.dtype).removeprefix("torch.")}
    model.config.save_pretrained(directory)

def parse_size(size):
    """Bytes of "5GB", "200MB" or a number; ValueError otherwise."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    text = str(size).strip().upper()
    number, unit = (text[:-2], units[text[-2:]]) if text[-2:] in units else (text, 1)
    try:
        count = float(number) * unit
    except ValueError:
        count = 0
    if not 1 <= count < math.inf:
        raise ValueError(f"max_shard_size={size!r}: must be bytes, or like '5GB' or '200MB'")
    return int(count)

PreTrainedModel.device = property(lambda self: next(self.parameters()).device)
PreTrainedModel.dtype = property(lambda self: next(self.parameters()).dtype)
PreTrainedModel.from_pretrained = classmethod(load_pretrained)
PreTrainedModel.save_pretrained = save_pretrained

# ---- 13. Training — §2.1.2, §4.2 ----------------------------------------------------------------

BOS, EOS = "<|begin_of_sentence|>", "<|end_of_sentence|>"

def corpus_files(data):
    """The text files to train on: those of a file or folder, or the Python standard library's own."""
    root = Path(sysconfig.get_path("stdlib") if data is None else data)
    if root.is_file():
        return [root]
    others = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
    files = [path for path in sorted(root.rglob("*.py" if data is None else "*")) if path.is_file()]
    files = [path for path in files if data is not None or not others & set(path.parts)]
    if not files:
        hint = "this Python ships without its sources: give --data" if data is None else "no files in it"
        raise ValueError(f"{root}: {hint}")
    return files

def read_pieces(path, size=1 << 20):
    """The text of a file in pieces of whole lines, so that it need not fit in memory."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            while lines := file.readlines(size):
                yield "".join(lines)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start} of a piece)") from None

def train_tokenizer(files, vocab_size):
    """A byte-level BPE tokenizer of at most vocab_size tokens; ids 0 and 1 begin and end a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((piece for file in files for piece in read_pieces(file)), trainer)
    return tokenizer

def write_tokens(files, tokenizer, path):
    """All files as one array of tokens on disk, each file ended by the end-of-sentence token."""
    dtype = token_dtype(tokenizer.get_vocab_size())
    with open(path, "wb") as sink:
        for file in tqdm(files, desc="tokenising", unit="file", disable=None):
            for encoding in tokenizer.encode_batch(list(read_pieces(file))):
                np.array(encoding.ids, dtype).tofile(sink)
            np.array([tokenizer.token_to_id(EOS)], dtype).tofile(sink)

def token_dtype(vocab_size):
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32

class Corpus:
    """Windows of T tokens from the array at `path`; the last twentieth is held out for validation.

    Windows are visited in a new order every epoch, fixed by the seed: `position` windows in, the next
    ones are known, so that the position is all that a resumed run needs.
    """

    def __init__(self, path, vocab_size, eos, T, seed):
        self.tokens = np.memmap(path, token_dtype(vocab_size), "r")
        self.eos, self.T, self.seed = eos, T, seed
        cut = len(self.tokens) * 19 // 20
        ends = np.flatnonzero(self.tokens[cut : cut + len(self.tokens) // 40] == eos)
        self.cut = cut + int(ends[0]) + 1 if len(ends) else cut  # at the end of a document, if near
        self.windows = self.cut // T
        if self.windows < 1 or len(self.tokens) - self.cut < 2:
            raise ValueError(f"a corpus of {len(self.tokens)} tokens: too short for windows of {T}")

    def batch(self, position, count):
        """Windows `position` .. `position + count`; (count, T) tokens and labels."""
        orders, starts = {}, []
        for i in range(position, position + count):
            epoch, place = divmod(i, self.windows)
            if epoch not in orders:
                generator = torch.Generator().manual_seed(self.seed + epoch)
                orders[epoch] = torch.randperm(self.windows, generator=generator)
            starts.append(int(orders[epoch][place]) * self.T)
        return self.read(starts)

    def held_out(self, count):
        """The first `count` windows of the held-out part, or as many as it has."""
        return self.read(range(self.cut, len(self.tokens) - self.T + 1, self.T)[:count])

    def read(self, starts):
        windows = np.stack([self.tokens[start : start + self.T] for start in starts])
        input_ids = torch.from_numpy(windows.astype(np.int64))
        labels = input_ids.clone()
        labels[:, 1:][input_ids[:, :-1] == self.eos] = -100  # no document predicts the next one
        return input_ids, labels

def learning_rate_factor(progress, warmup):
    """§4.2's schedule over a run's progress 0..1: linear up, constant, cosine to a tenth, two steps."""
    if progress < warmup:
        return progress / warmup
    if progress < 10 / 14.8:
        return 1.0
    if progress < 14.3 / 14.8:
        return 0.55 + 0.45 * math.cos(math.pi * (progress * 14.8 - 10) / 4.3)
    return 0.1 if progress < 14.633 / 14.8 else 0.033

class Trainer:
    """One training run: model, optimizer, data, and what it writes to options.out."""

    def __init__(self, options):
        self.options, self.out, self.step = options, Path(options.out), 0
        self.rank, self.world, self.device = start_processes(options.device)
        self.tokenizer, tokens = self.prepare_data()
        config = self.make_config()
        T, seed = options.length, options.seed
        self.corpus = Corpus(tokens, config.vocab_size, config.eos_token_id, T, seed)
        torch.manual_seed(seed)
        self.model = shard(DeepseekV3ForCausalLM(config), self.device, self.world)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, options.lr, betas=(0.9, 0.95))

    def make_config(self):
        """The config of --config or the tiny one, with the tokenizer's vocabulary."""
        vocabulary = {"vocab_size": self.tokenizer.get_vocab_size()}
        vocabulary |= {"bos_token_id": self.tokenizer.token_to_id(BOS)}
        vocabulary |= {"eos_token_id": self.tokenizer.token_to_id(EOS)}
        if self.options.config is None:
            return DeepseekV3Config.tiny(**vocabulary)
        path = Path(self.options.config)
        return DeepseekV3Config(**(FIXED_KEYS | read_json(path.parent, path.name) | vocabulary))

    def prepare_data(self):
        """The tokenizer, and the path of the token array; the first process makes both."""
        vocabulary, tokens = self.out / "tokenizer.json", self.out / "tokens.bin"
        if self.rank == 0:
            files = corpus_files(self.options.data)
            self.out.mkdir(parents=True, exist_ok=True)
            tokenizer = train_tokenizer(files, self.options.vocab_size)
            write_tokens(files, tokenizer, tokens)
            save_tokenizer(tokenizer, self.out)
        barrier(self.world)
        return Tokenizer.from_file(str(vocabulary)), tokens

    def run(self):
        """Train to options.steps with a progress bar, then write the checkpoint."""
        options, metrics = self.options, self.out / "metrics.jsonl"
        metrics.write_text("")
        with tqdm(total=options.steps, unit="step", disable=self.rank > 0) as bar:
            while self.step < options.steps:
                line = self.train_step()
                bar.set_postfix(loss=line["loss"], violation=line["max_violation"])
                bar.update()
                if self.step % options.eval_every == 0 or self.step == options.steps:
                    line |= self.evaluate()
                with open(metrics, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        self.model.save_pretrained(self.out)
        return line

    def train_step(self):
        """One optimizer step over the global batch -> its line of metrics."""
        options, began, progress = self.options, time.perf_counter(), self.step / self.options.steps
        self.model.train()
        self.model.config.mtp_loss_weight = 0.3 if progress < 10 / 14.8 else 0.1
        losses = self.backward()
        lr = options.lr * learning_rate_factor(progress, options.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        gamma = options.gamma if progress < 14.3 / 14.8 else 0.0
        violations = self.model.update_router_bias(gamma)
        self.step += 1
        speed = options.batch * options.length / (time.perf_counter() - began)
        line = {"step": self.step, **losses, "max_violation": sum(violations) / max(len(violations), 1)}
        line |= {"lr": lr, "grad_norm": float(norm), "tokens_per_second": speed}
        return line | {"layer_violations": violations}

    def backward(self):
        """Gradients of the global batch, in options.accumulate parts -> the means of its losses."""
        options, names = self.options, ("loss", "main_loss", "mtp_loss", "balance_loss")
        share = options.batch // (self.world * options.accumulate)  # sequences at once
        means = torch.zeros(len(names), device=self.device)
        for part in range(options.accumulate):
            position = self.step * options.batch + (part * self.world + self.rank) * share
            input_ids, labels = (t.to(self.device) for t in self.corpus.batch(position, share))
            out = self.model(input_ids, labels=labels)
            (out.loss / options.accumulate).backward()
            losses = [getattr(out, name) for name in names]
            means += torch.stack([means[0] * 0 if x is None else x.detach() for x in losses])
        means = mean_over_ranks(means / options.accumulate, self.world)
        return dict(zip(names, means.tolist(), strict=True))

    @torch.no_grad()
    def evaluate(self, windows=32):
        """Loss of the held-out text, a token and in bits a byte."""
        self.model.eval()
        input_ids, labels = self.corpus.held_out(windows)
        parts = zip(input_ids.split(8), labels.split(8), strict=True)
        losses = [self.model(x.to(self.device), labels=y.to(self.device)).main_loss for x, y in parts]
        loss = float(torch.stack(losses).mean())
        text = self.tokenizer.decode_batch(input_ids.tolist(), skip_special_tokens=False)
        bytes_a_token = sum(len(window.encode()) for window in text) / input_ids.numel()
        return {"val_loss": loss, "val_bits_per_byte": loss / math.log(2) / bytes_a_token}

def save_tokenizer(tokenizer, directory):
    """tokenizer.json, and what transformers' AutoTokenizer wants beside it."""
    tokenizer.save(str(Path(directory) / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    write_json(directory, "tokenizer_config.json", settings | {"clean_up_tokenization_spaces": False})

def start_processes(device):
    """This process's rank, how many there are, and its device; joins the others under torchrun."""
    return 0, 1, torch.device(device)

def shard(model, device, world):
    return model.to(device)

def barrier(world):
    pass

def mean_over_ranks(values, world):
    return values

# ---- 14. Commands -------------------------------------------------------------------------------

def train_command(options):
    """Train, and end with a sample and the next command."""
    trainer = Trainer(options)
    line = trainer.run()
    print(f"held-out loss {line['val_loss']:.3f}, {line['val_bits_per_byte']:.3f} bits a byte")
    prompt = "def "
    stream_text(trainer.model, trainer.tokenizer, prompt, 100, 0.7, options.seed)
    print(f"\nNext: python deepseek_v3.py generate {options.out} {json.dumps(prompt)}")

def generate_command(options):
    """Continue a prompt with the model of a folder."""
    model = DeepseekV3ForCausalLM.from_pretrained(options.directory)
    tokenizer = Tokenizer.from_file(str(Path(options.directory) / "tokenizer.json"))
    steps, draft = [], {"use_mtp": options.mtp, "num_draft_tokens": options.draft_tokens}
    length, temperature, seed = options.max_new_tokens, options.temperature, options.seed
    stream_text(model, tokenizer, options.prompt, length, temperature, seed, statistics=steps, **draft)
    print()
    if steps:
        print(draft_report(steps), file=sys.stderr)

def draft_report(steps):
    """What generate's `statistics` say: tokens a step, acceptance by position in the draft."""
    tokens_a_step = 1 + sum(accepted for _, accepted in steps) / len(steps)
    positions = range(max(drafted for drafted, _ in steps))
    asked = [[accepted > i for drafted, accepted in steps if drafted > i] for i in positions]
    parts = ", ".join(f"{sum(stood) / len(stood):.0%}" for stood in asked)
    return f"{tokens_a_step:.2f} tokens a step; drafts accepted by position: {parts}"

def stream_text(model, tokenizer, prompt, max_new_tokens, temperature, seed, **drafting):
    """Print the prompt and, as it comes, its continuation; whole characters only."""
    ids = [tokenizer.token_to_id(BOS), *tokenizer.encode(prompt, add_special_tokens=False).ids]
    stream, new = DecodeStream(skip_special_tokens=True), []
    print(prompt, end="", flush=True)
    model.generate(
        torch.tensor([ids], device=model.device),
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        generator=torch.Generator(model.device).manual_seed(seed),
        streamer=lambda token: print(stream.step(tokenizer, int(token[0])) or "", end="", flush=True),
        **drafting,
    )

def parser():
    """The command line: one sub-command for each function above."""
    main = argparse.ArgumentParser(prog="deepseek_v3.py", description="Train and run DeepSeek-V3.")
    commands = main.add_subparsers(required=True)
    train = commands.add_parser("train", help="train a model from scratch, on text")
    train.set_defaults(run=train_command)
    train.add_argument("--data", help="text file or folder (default: Python's standard library)")
    train.add_argument("--config", help="config.json of the model (default: the tiny one)")
    train.add_argument("--out", default="out", help="folder for the checkpoint and metrics.jsonl")
    train.add_argument("--steps", type=int, default=400)
    train.add_argument("--batch", type=int, default=16, help="sequences a step, over all processes")
    train.add_argument("--length", type=int, default=128, help="tokens a sequence")
    train.add_argument("--accumulate", type=int, default=1, help="parts that a step's batch runs in")
    train.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    train.add_argument("--warmup", type=float, default=0.05, help="part of the run")
    train.add_argument("--gamma", type=float, default=0.002, help="step of the router bias")
    train.add_argument("--vocab-size", type=int, default=2048, help="of the tokenizer to train")
    train.add_argument("--eval-every", type=int, default=100, help="steps")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run = commands.add_parser("generate", help="continue a prompt")
    run.set_defaults(run=generate_command)
    run.add_argument("directory", help="checkpoint folder")
    run.add_argument("prompt")
    run.add_argument("--max-new-tokens", type=int, default=200)
    run.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--mtp", action="store_true", help="draft with the MTP modules: fewer steps")
    run.add_argument("--draft-tokens", type=int, help="drafted a step (default: one an MTP module)")
    return main

def main(arguments=None):
    """Run a command; a bad argument or file is one line on stderr and exit status 2."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        sys.exit(str(error))

if __name__ == "__main__":
    main()
