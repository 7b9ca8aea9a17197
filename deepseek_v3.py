# SPDX-License-Identifier: MIT
"""DeepSeek-V3 in one file: the model of arXiv 2412.19437, to read in an afternoon and to run for real.

What is unusual here, if you know GPT-2 or Llama:
  * attention caches one small latent vector per token, shared by all heads, not keys and values (MLA);
  * position lives in a few extra channels of query and key, so that the rest can stay compressed;
  * most feed-forward layers are 256 small experts of which a token visits 8, and one that all visit;
  * experts are kept busy by a bias on the *choice* of experts, moved after each step, not by a loss;
  * extra blocks learn to predict the token after next; at inference they draft (MTP).

Reading map, top to bottom. Each part uses only what stands above it; exceptions name their section.
  1 config   2 positions   3 linear maps   4 memory and masks   5 attention   6 experts   7 blocks
  8 model and heads   9 losses and balancing
  What a training step and a cached forward execute ends there. Behind it:
  10 looking inside, checking input   11 generation   12 checkpoints   13 training   14 commands
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
  NOTE(checkpoint) group-score: groups rank by the sum of their two best *biased* scores; the text
    says K_r/M of the unbiased ones.
  NOTE(checkpoint) eh-order: the MTP projection takes [embedding; hidden], Eq. 21 the reverse.
  NOTE(checkpoint) mtp-input: MTP depth 1 takes the state after the final norm, deeper ones the state
    after shared_head.norm; Eq. 21 does not say which.
  NOTE(hf) latent-eps: the latent norms use eps 1e-6 even where rms_norm_eps differs (Moonlight).
  NOTE(hf) gate-epsilon: 1e-20 in Eq. 13's denominator, so that underflowing scores give no NaN.
  NOTE(hf) init-std: initializer_range is 0.02 in the released config, 0.006 in the report (§4.2).
  NOTE(report) eq-24-mean: the MTP loss is the mean over the targets there are; Eq. 24 divides by T.

References: DeepSeek-V3 arXiv 2412.19437 (equations and sections are its), DeepSeek-V2 2405.04434,
YaRN 2309.00071, loss-free balancing 2408.15664.
"""

import argparse
import copy
import dataclasses
import fnmatch
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.decoders import DecodeStream
from tokenizers.processors import TemplateProcessing
from torch import Tensor, library, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ---- 1. Config — the released config.json, report §4.2 -----------------------------------------

YARN_V3 = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
YARN_V3 |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}

@dataclass(init=False)
class DeepseekV3Config:
    """Every size and switch, named as in the released config.json; the defaults are the 671B model.

    Other keys of a config.json are kept in `extra` and written back. Both spellings of the RoPE
    settings are read, and the model types that compute this very model (TWINS, section 12). Without
    `model_type`, missing fields are V3's; with it, the keywords are taken for a whole config.json, in
    which missing YaRN and MTP settings mean off. ValueError names a field that cannot work and says
    what would.
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
    first_k_dense_replace: int = 3  # this many first layers are dense
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
    rms_norm_eps: int | float = 1e-6
    initializer_range: int | float = 0.02  # NOTE(hf) init-std
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | list | None = 1
    pad_token_id: int | None = None
    num_labels: int = 2  # of the classification heads
    mtp_loss_weight: int | float = 0.3  # λ, Eq. 25: 0.3 for 10T tokens, then 0.1
    balance_loss_weight: int | float = 0.0001  # α, Eq. 17

    def __init__(self, /, **given: Any) -> None:
        for name, value in config_values(given).items():  # section 12: the spellings in use
            setattr(self, name, value)
        check_config(self)

    def __getattr__(self, name: str) -> Any:
        """A kept key reads like a field."""
        try:
            return vars(self)["extra"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no {name}") from None

    @classmethod
    def tiny(cls, **changes: Any) -> Self:
        """The small model that the demos train: every mechanism of the large one."""
        sizes = dict(vocab_size=2048, hidden_size=128, num_hidden_layers=4, first_k_dense_replace=1)
        heads = dict(num_attention_heads=4, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
        latents = dict(q_lora_rank=96, kv_lora_rank=64, max_position_embeddings=4096)
        experts = dict(n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2)
        widths = dict(intermediate_size=384, moe_intermediate_size=96, rope_scaling=None)
        config = cls(**(sizes | heads | latents | experts | widths | changes))
        if config.extra:
            raise ValueError(f"tiny(…): {', '.join(config.extra)}: no field of the config")
        return config

    @property
    def softmax_scale(self) -> float:
        """1/√(d_h + d_h^R) of Eq. 10 times YaRN's temperature; 0.1352338 as released."""
        yarn = self.rope_scaling or {}
        mscale = yarn_mscale(yarn.get("factor", 1), yarn.get("mscale_all_dim") or 0)  # section 2
        # NOTE(checkpoint) mscale: squared, once for the query and once for the key.
        return (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5 * mscale**2

    @property
    def kind(self) -> str:
        """The model_type of config.json."""
        return self.extra.get("model_type", "deepseek_v3")

    @property
    def model_type(self) -> str:
        """What other libraries ask for. Of "deepseek_v3" peft expects the stacks of transformers' class."""
        return "deepseek_v3_file"

    def get_text_config(self, **_: Any) -> Self:
        """This one: other libraries ask for it, since models of pictures have two."""
        return self

    def to_dict(self) -> dict:
        """Every field and every kept key, as config.json has them."""
        known = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"model_type": self.kind} | FIXED_KEYS | known | self.extra | layer_types(self)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, **overrides: Any) -> Self:
        """Read a folder's config.json, or that file; an error names what is wrong."""
        return load_config(cls, directory, overrides)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write directory/config.json, in one step."""
        write_json(as_path(directory) / "config.json", self.to_dict())

Maybe = Tensor | None  # what may be absent

# ---- 2. Positions — RoPE, §2.1.1, and YaRN, §4.3 ------------------------------------------------

def upcast(x: Tensor) -> Tensor:
    """x in float32 (float64 stays): the precision of every sensitive step."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def rope_frequencies(config: DeepseekV3Config) -> tuple[Tensor, float]:
    """Radians per position of each rotary pair, (R/2), and the factor on cos and sin."""
    pair = torch.arange(config.qk_rope_head_dim // 2, dtype=torch.float32, device="cpu")
    inv_freq = 1.0 / config.rope_theta ** (2 * pair / config.qk_rope_head_dim)  # (R/2)
    return (inv_freq, 1.0) if config.rope_scaling is None else yarn(inv_freq, config)

def yarn(inv_freq: Tensor, config: DeepseekV3Config) -> tuple[Tensor, float]:
    """Slow the slow pairs to fit a longer context; inv_freq (R/2) -> the same, factor on cos, sin."""
    settings = config.rope_scaling
    s, over, under = settings["factor"], settings.get("mscale"), settings.get("mscale_all_dim")
    low, high = yarn_correction_range(config)
    pair = torch.arange(len(inv_freq), dtype=torch.float32, device="cpu")
    slowed = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)  # 0 for fast pairs, 1 for slow
    inv_freq = inv_freq * (1 - slowed) + inv_freq / s * slowed  # (R/2)
    # softmax_scale applies the temperature (mscale_all_dim); cos and sin carry only the remaining
    # factor, which is 1 in every released config.
    factor = yarn_mscale(s, over if over and under else 1)
    factor = factor / yarn_mscale(s, under) if over and under else factor
    return inv_freq, settings.get("attention_factor") or factor

def yarn_correction_range(config: DeepseekV3Config) -> tuple[int, int]:
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

def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature, 0.1 · mscale · ln s + 1, for a context stretched s = factor times."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

class RotaryEmbedding(nn.Module):
    """cos and sin of all angles; position_ids (B or 1, T) -> two (B or 1, T, 1, R/2)."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        inv_freq, self.factor = rope_frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        inv_freq = self.inv_freq.to(position_ids.device)
        angles = position_ids[:, :, None, None].float() * inv_freq  # (B or 1, T, 1, R/2)
        return angles.cos() * self.factor, angles.sin() * self.factor

    def _apply(self, fn, recurse=True):
        """Follow the model to a device, but keep the numbers: no cast and no to_empty() spoils them."""
        super()._apply(fn, recurse)
        self.inv_freq = rope_frequencies(self.config)[0].to(self.inv_freq.device)
        return self

def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent channels, the RoPE(·) of Eqs. 3 and 8; x (B, T, H or 1, R) -> the same."""
    # NOTE(checkpoint) rope-pairs: a pair is (even, odd) neighbours, not (first half, second half).
    even, odd = x.unflatten(-1, (x.shape[-1] // 2, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return turned.flatten(-2).to(x.dtype)

# ---- 3. Linear maps — plain, in FP8 blocks (§3.3), for groups of rows ---------------------------

# FP8 weights have one float32 scale per block of 128 x 128, which *multiplies* the block, in spite of
# the name weight_scale_inv; blocks at the lower and right edge may be smaller.
FP8, BLOCK = torch.float8_e4m3fn, 128

def dequantise(weight: Tensor, scale_inv: Maybe, dtype: torch.dtype) -> Tensor:
    """A weight (…, rows, columns) in dtype: from FP8 with its scales, or just cast if it has none."""
    if scale_inv is None:
        return weight if weight.dtype == dtype else weight.to(dtype)  # .to would cost decoding 2 %
    height, width = weight.shape[-2:]
    full, ragged = weight.float(), (0, -width % BLOCK, 0, -height % BLOCK)
    full = F.pad(full, ragged) if any(ragged) else full
    blocks = full.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    blocks.mul_(scale_inv[..., :, None, :, None])  # in place: dequantising is bound by memory traffic
    return full[..., :height, :width].to(dtype)

def linear(x: Tensor, weight: Tensor, scale_inv: Maybe = None, bias: Maybe = None) -> Tensor:
    """x @ weightᵀ + bias for any stored dtype; a few float32 rows on a CPU take a faster form."""
    weight = dequantise(weight, scale_inv, x.dtype)
    large = type(weight) in (Tensor, nn.Parameter) and weight.numel() >= 2**17
    if large and x.is_cpu and x.dtype == torch.float32 and not is_traced(x):
        return linear_on_a_cpu(x, weight, bias)
    return F.linear(x, weight, bias)

def linear_on_a_cpu(x: Tensor, weight: Tensor, bias: Maybe) -> Tensor:
    """F.linear in other steps where torch is slow: one to four rows by a large float32 weight.

    It multiplies so few rows on one core, and reads the weight at a third of the rate of its own
    sums; this way, decoding takes two thirds of the time (tests/benchmark.py).
    """
    rows, (n_out, n_in) = x.reshape(-1, x.shape[-1]), weight.shape
    if not 0 < rows.shape[0] <= 4:
        return F.linear(x, weight, bias)
    if rows.shape[0] == 1 and weight.numel() <= 2**20:  # so that the products stay in the cache
        y = (weight * rows).sum(-1)
    else:  # the outputs in parts, for the cores to share
        y = (rows @ weight.reshape(math.gcd(n_out, 8), -1, n_in).mT).transpose(0, 1)
    y = y.reshape(*x.shape[:-1], n_out)
    return y if bias is None else y + bias

class Linear(nn.Linear):
    """nn.Linear whose weight may be in FP8 blocks; it answers on the device of its input."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False) -> None:
        super().__init__(n_in, n_out, bias)
        self.register_parameter("weight_scale_inv", None)

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x.to(self.weight.device), self.weight, self.weight_scale_inv, self.bias)
        return y.to(x.device)

def is_traced(x: Tensor) -> bool:
    """Whether torch.compile or torch.func looks on: then no tensor's numbers may decide what is done."""
    return torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x)

def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that torch.autocast computes in on x's device; None outside of it."""
    device = x.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None

def home(module: nn.Module, x: Tensor) -> torch.device:
    """Where a module computes: at its weights or, if it has none or they are offloaded, at x."""
    device = next(module.parameters(), x).device
    return x.device if device.type == "meta" else device

def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether nobody replaced, hooked, parametrized or wrapped a module of ours.

    Only then may its weight be read directly, or its call be skipped, without anyone missing it.
    """
    hooked = module._forward_hooks or module._forward_pre_hooks
    hooked = hooked or module._backward_hooks or module._backward_pre_hooks
    plain = type(module) is kind and not hooked and "forward" not in module.__dict__
    return plain and type(module._parameters.get("weight")) in (nn.Parameter, NoneType)

@library.custom_op("deepseek_v3::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
    """Rows of x times the matrix of their group: (rows, in), (groups, in, out), offs (groups) their ends.

    F.grouped_mm, as an operator of our own under torch.compile, which knows its bfloat16 form alone.
    """
    return F.grouped_mm(x, weights, offs=offs)

@grouped_mm.register_fake
def grouped_mm_shape(x: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
    groups = (len(offs),) if weights.ndim == 2 else ()  # of a gradient of weights
    return x.new_empty(*groups, x.shape[0], weights.shape[-1])

def grouped_mm_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weights, offs = ctx.saved_tensors
    return grouped_mm(gradient, weights.mT, offs), grouped_mm(x.mT, gradient, offs), None

grouped_mm.register_autograd(
    grouped_mm_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)

# ---- 4. Memory — the latent cache, and what a query may see --------------------------------------

class LatentCache:
    """All that attention remembers: C + R numbers per token per layer (Eqs. 1, 3), nothing per head.

    `length` tokens are held. `documents` (B, length) tells the packed document that each is of, 0 at
    padding; None: they are all of one.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity  # tokens to make room for at once; beyond it, the cache grows
        self.length = 0
        self.documents: Maybe = None
        self.layers: dict[int, Tensor] = {}

    def append(self, layer: int, latent: Tensor) -> Tensor:
        """Store new latents (B, T, C + R) of a layer; return all of this layer's, (B, S, C + R)."""
        end = self.length + latent.shape[1]
        held = self.layers.get(layer, latent[:, :0].detach())
        if held.shape[1] < end:  # growing by half copies a number a few times, not once per token
            room = max(self.capacity, end, self.length * 3 // 2)
            held = F.pad(held[:, : self.length], (0, 0, 0, room - self.length))
        elif not is_traced(held) and held.is_inference() and not torch.is_inference_mode_enabled():
            held = held.clone()  # made under inference_mode, it cannot be written to outside
        self.layers[layer] = held
        held[:, self.length : end] = latent.detach()
        if torch.is_grad_enabled():  # backward needs these numbers, and the next call writes into `held`
            return torch.cat([held[:, : self.length], latent], 1)
        return held[:, :end]

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens; a negative length drops that many of the last ones."""
        keep = length + self.length if length < 0 else length
        if not (isinstance(length, int) and 0 <= keep <= self.length):
            raise ValueError(f"crop({length}): the cache holds {self.length} tokens")
        self.length = keep
        self.documents = None if self.documents is None else self.documents[:, :keep]

    def repeat_interleave(self, repeats: int) -> "LatentCache":
        """A cache of its own with each row `repeats` times, to go on from it in several ways."""
        branch = copy.copy(self)
        branch.layers = {i: held.repeat_interleave(repeats, 0) for i, held in self.layers.items()}
        if self.documents is not None:
            branch.documents = self.documents.repeat_interleave(repeats, 0)
        return branch

    def advance(self, documents: Maybe, T: int) -> None:
        """T tokens more are held, by every layer."""
        self.documents, self.length = documents, self.length + T

    @property
    def bytes(self) -> int:
        """Bytes of the tokens held, over all layers."""
        return sum(held[:, : self.length].nbytes for held in self.layers.values())

class Context:
    """What the layers of a forward share. A plain object: FSDP casts tensors that it finds in others.

    cos and sin (B or 1, T, 1, R/2); mask (B or 1, 1, T, S) or None, of `visible`; the cache or None,
    and under which number the layer that runs finds its latents there.
    """

    def __init__(self, cos: Tensor, sin: Tensor, mask: Maybe, cache: LatentCache | None, layer: int = 0) -> None:
        self.cos, self.sin, self.mask, self.cache, self.layer = cos, sin, mask, cache, layer

    def to(self, device: torch.device) -> "Context":
        mask = None if self.mask is None else self.mask.to(device)
        return Context(self.cos.to(device), self.sin.to(device), mask, self.cache, self.layer)

def locate(attention_mask: Maybe, position_ids: Maybe, cache: LatentCache | None, x: Tensor) -> tuple[Tensor, Maybe]:
    """Where new tokens x (B, T, D) stand: position_ids (B or 1, T), and documents of all keys (B, S).

    Documents count from 1, and 0 is padding; None stands for one document without padding. They come
    from a mask (B, S), else from positions that do not count on by one; else the last one goes on.
    """
    (B, T), past = x.shape[:2], 0 if cache is None else cache.length
    documents = None if cache is None else cache.documents
    starts, traced = x.new_zeros(B, T, dtype=torch.bool), is_traced(x)
    if position_ids is not None and attention_mask is None:
        first = (position_ids[:, :1] == 0) & (past > 0)
        starts = torch.cat([first, position_ids.diff(dim=-1) != 1], -1).expand(B, -1)  # (B, T)
    if attention_mask is not None and attention_mask.ndim == 2:
        # Without padding the plain-causal form is faster; asking costs one synchronisation.
        plain = T > 1 and not traced and bool(attention_mask.all())
        documents = None if plain else attention_mask.long()
    elif documents is not None or position_ids is not None and (traced or bool(starts.any())):
        held = starts.new_ones(B, past, dtype=torch.long) if documents is None else documents  # (B, S - T)
        newest = F.pad(held, (1, 0), value=1).amax(-1, keepdim=True)
        documents = torch.cat([held, newest + starts.cumsum(-1)], -1)  # (B, S)
    if position_ids is None and documents is None:
        position_ids = torch.arange(past, past + T, device=x.device).unsqueeze(0)
    elif position_ids is None:  # a document's first token has position 0, wherever padding puts it
        newest = documents == documents.amax(-1, keepdim=True)
        position_ids = (newest.cumsum(-1) - 1).clamp(min=0)[:, -T:]
    return position_ids, documents

def visible(documents: Maybe, given: Maybe, T: int, S: int, device: torch.device) -> Maybe:
    """Which keys a query sees, (B or 1, 1, T, S): True, or a number to be added to its score.

    None: plain causal, or a single query that sees every key. Made from positions, not from a square
    triangle, so that chunks behind a cache come out right. A mask of that shape is taken as `given`.
    """
    if documents is None and given is None and T in (1, S):
        return None
    query = torch.arange(S - T, S, device=device).unsqueeze(1)  # (T, 1)
    key = torch.arange(S, device=device)  # (S)
    if given is None:
        mask = (key <= query)[None, None]  # (1, 1, T, S)
        if documents is not None:  # padding sees padding alone
            mask = mask & (documents[:, None, -T:, None] == documents[:, None, None, :])  # (B, 1, T, S)
        return mask
    boolean = given.dtype == torch.bool
    sees = given if boolean else given > torch.finfo(given.dtype).min / 2
    blind = ~sees.any(-1, keepdim=True) & (key == query)  # such a query sees itself: no row is empty
    return given | blind if boolean else given.masked_fill(blind, 0.0)

def masked(scores: Tensor, mask: Maybe) -> Tensor:
    """Scores (B, H, T, S) in float32, -inf where a query does not see a key."""
    (T, S), scores = scores.shape[-2:], upcast(scores)
    if mask is None and T > 1:
        mask = torch.ones(T, S, dtype=torch.bool, device=scores.device).tril()  # T = S, see `visible`
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask

# ---- 5. Multi-head latent attention — §2.1.1, Eqs. 1–11 -----------------------------------------

class MLA(nn.Module):
    """Multi-head latent attention, Eqs. 1–11; x (B, T, D) -> (B, T, D), probabilities or None.

    x ─┬─ kv_a_proj_with_mqa ─┬─ c_kv ── norm ─┬─ cache ─┬─ kv_b_proj ─┬─ k_nope ─┬─ attend ─ o_proj
       │                      └─ k_rope ─ RoPE ┘         │             ├─ v ──────┤
       │                                                 └─ k_rope ────┴──────────┤
       └─ q_a_proj ─ c_q ─ norm ─ q_b_proj ─┬─ q_nope ────────────────────────────┤
                                            └─ q_rope ─ RoPE ─────────────────────┘
    """

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.H, self.C, self.V = config.num_attention_heads, config.kv_lora_rank, config.v_head_dim
        self.N, self.R = config.qk_nope_head_dim, config.qk_rope_head_dim
        D, self.Q, bias = config.hidden_size, config.q_lora_rank, config.attention_bias
        if self.Q is None:
            self.q_proj = Linear(D, self.H * (self.N + self.R))
        else:
            self.q_a_proj = Linear(D, self.Q, bias=bias)
            self.q_a_layernorm = nn.RMSNorm(self.Q, eps=1e-6)  # NOTE(checkpoint) latent-norms
            self.q_b_proj = Linear(self.Q, self.H * (self.N + self.R))
        self.kv_a_proj_with_mqa = Linear(D, self.C + self.R, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(self.C, eps=1e-6)  # NOTE(hf) latent-eps
        self.kv_b_proj = Linear(self.C, self.H * (self.N + self.V))
        self.o_proj = Linear(self.H * self.V, D, bias=bias)
        self.softmax = nn.Softmax(-1)  # a module, so that one can watch, change or replace it
        self.scale = config.softmax_scale

    def forward(self, x: Tensor, context: Context, output_attentions: bool = False) -> tuple[Tensor, Maybe]:
        q_nope, q_rope = self.queries(x, context)  # (B, T, H, N), (B, T, H, R)
        c_kv, k_rope = self.kv_a_proj_with_mqa(x).split([self.C, self.R], -1)  # (B, T, C), (B, T, R)
        c_kv = self.kv_a_layernorm(c_kv)  # (B, T, C) Eq. 1
        k_rope = apply_rope(k_rope.unsqueeze(2), context.cos, context.sin).squeeze(2)  # (B, T, R) Eq. 3
        latent = torch.cat([c_kv, k_rope.to(c_kv.dtype)], -1)  # (B, T, C + R)
        if context.cache is not None:
            latent = context.cache.append(context.layer, latent)  # (B, S, C + R)
        attend = self.form(x.shape[1], latent.shape[1], output_attentions)
        out, probs = attend(q_nope, q_rope, latent, context.mask)  # (B, T, H, V), (B, H, T, S)
        return self.o_proj(out.flatten(-2)), probs if output_attentions else None  # Eq. 11

    def queries(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Content and rotary queries, Eqs. 6–8; x (B, T, D) -> (B, T, H, N), (B, T, H, R)."""
        if self.Q is None:
            q = self.q_proj(x)
        else:
            c_q = self.q_a_layernorm(self.q_a_proj(x))  # (B, T, Q) Eq. 6
            q = self.q_b_proj(c_q)
        q = q.unflatten(-1, (self.H, self.N + self.R))  # (B, T, H, N + R)
        q_nope, q_rope = q.split([self.N, self.R], -1)  # (B, T, H, N), (B, T, H, R) Eq. 7
        return q_nope, apply_rope(q_rope, context.cos, context.sin)  # (B, T, H, N), (B, T, H, R) Eq. 8

    def form(self, T: int, S: int, output_attentions: bool) -> Callable:
        """Which of the three ways to attend below: they compute the same, each where it is best."""
        if output_attentions or not is_plain(self.softmax, nn.Softmax):
            return self.attend_eager
        if self.absorbing_is_cheaper(T, S) and is_plain(self.kv_b_proj, Linear):
            return self.attend_absorbed
        return self.attend_fused

    def absorbing_is_cheaper(self, T: int, S: int) -> bool:
        """Which order of the same products takes fewer multiply-adds per head.

        Expanded: T·S·(N + R + V), and S·C·(N + V) to make keys and values. Absorbed: T·S·(2C + R),
        and T·C·(N + V) to take queries into the latent space and results out. As released, with a
        long cache, absorbing wins below 171 new tokens: decoding absorbs, training (T = S) expands.
        """
        return T * S * (2 * self.C - self.N - self.V) < self.C * (self.N + self.V) * (S - T)

    def expand(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads -> (B, H, T, N + R), (B, H, S, N + R), (B, H, S, V)."""
        c_kv, k_rope = latent.split([self.C, self.R], -1)  # (B, S, C), (B, S, R)
        kv = self.kv_b_proj(c_kv).unflatten(-1, (self.H, self.N + self.V))  # (B, S, H, N + V)
        k_nope, v = kv.split([self.N, self.V], -1)  # (B, S, H, N), (B, S, H, V) Eqs. 2, 5
        k_rope = k_rope.unsqueeze(2).expand(-1, -1, self.H, -1)  # (B, S, H, R)
        k = torch.cat([k_nope, k_rope.to(k_nope.dtype)], -1)  # (B, S, H, N + R) Eq. 4
        q = torch.cat([q_nope, q_rope], -1)  # (B, T, H, N + R) Eq. 9
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attend_eager(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, mask: Maybe) -> tuple[Tensor, Maybe]:
        """softmax(q kᵀ · scale) v as the report writes it -> (B, T, H, V), probabilities (B, H, T, S)."""
        q, k, v = self.expand(q_nope, q_rope, latent)  # (B, H, T, N + R), (B, H, S, N + R), (B, H, S, V)
        scores = q @ k.mT * self.scale  # (B, H, T, S)
        probs = self.softmax(masked(scores, mask))  # (B, H, T, S)
        out = probs.to(v.dtype) @ v  # (B, H, T, V) Eq. 10
        return out.transpose(1, 2), probs

    def attend_fused(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, mask: Maybe) -> tuple[Tensor, Maybe]:
        """The same in a kernel that never forms the probabilities -> (B, T, H, V), None."""
        q, k, v = self.expand(q_nope, q_rope, latent)  # (B, H, T, N + R), (B, H, S, N + R), (B, H, S, V)
        # Fused kernels want values as wide as keys: widening by zeros is 4 times faster on a CPU.
        v = F.pad(v, (0, max(0, self.N + self.R - self.V)))
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        causal = True if mask is None and q.shape[2] > 1 else False  # noqa: SIM210 (bool() leaves a symbol)
        out = F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=self.scale)
        return out[..., : self.V].transpose(1, 2), None  # Eq. 10

    def attend_absorbed(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, mask: Maybe) -> tuple[Tensor, Maybe]:
        """The same inside the latent space (V2 App. C) -> (B, T, H, V), None.

        q·(W^UK c) = (W^UKᵀ q)·c: the up-projection of keys moves into the query, that of values into
        the output, and all heads share the cached latent as one key and value, read once.
        """
        w_kv = dequantise(self.kv_b_proj.weight, self.kv_b_proj.weight_scale_inv, latent.dtype)  # (H*(N + V), C)
        w_kv = w_kv.unflatten(0, (self.H, self.N + self.V))  # (H, N + V, C)
        w_uk, w_uv = w_kv.split([self.N, self.V], 1)  # (H, N, C), (H, V, C)
        q_latent = torch.einsum("bthn,hnc->bthc", q_nope, w_uk)  # (B, T, H, C)
        q = torch.cat([q_latent, q_rope], -1) * self.scale  # (B, T, H, C + R)
        # Latents first, and their rows s before heads: a CPU reads them a third faster than as columns.
        scores = torch.einsum("bsc,bthc->bsth", latent, q)  # (B, S, T, H)
        probs = masked(scores.permute(0, 3, 2, 1), mask).softmax(-1).to(latent.dtype)  # (B, H, T, S)
        o_latent = torch.einsum("bhts,bsc->bhtc", probs, latent[..., : self.C])  # (B, H, T, C)
        return torch.einsum("bhtc,hvc->bthv", o_latent, w_uv), None  # Eq. 10

# ---- 6. DeepSeekMoE — §2.1.2, Eqs. 12–16 --------------------------------------------------------

class FeedForward(nn.Module):
    """SwiGLU, down(silu(gate x) · up x); x (B, T, D) -> (B, T, D)."""

    def __init__(self, D: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(D, width)
        self.up_proj = Linear(D, width)
        self.down_proj = Linear(width, D)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.gate_proj(x)) * self.up_proj(x)  # (B, T, F)
        return self.down_proj(hidden)

class Routing(NamedTuple):
    """A router's decision: scores (B, T, E) before the bias, indices and weights (B, T, K)."""

    scores: Tensor
    indices: Tensor
    weights: Tensor

class Router(nn.Module):
    """Chooses K experts per token and weighs them, Eqs. 13–16; x (B, T, D) -> Routing.

    The bias decides only *which* are chosen; no gradient reaches it (section 9 moves it).
    """

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.E, self.K = config.n_routed_experts, config.num_experts_per_tok
        self.G, self.topk_group = config.n_group, config.topk_group
        self.normalise, self.scaling = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(self.E, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(self.E, dtype=torch.float32))
        # Visits since the bias moved; no buffer, since DDP sends the first process's buffers to all.
        self.load = torch.zeros(self.E, dtype=torch.int64, device="cpu")

    def forward(self, x: Tensor) -> Routing:
        # Autocast would round the scores to bfloat16, and choose other experts.
        with torch.autocast(x.device.type, enabled=False) if autocast_dtype(x) else nullcontext():
            scores = F.linear(upcast(x), upcast(self.weight)).sigmoid()  # (B, T, E) Eq. 15
        choice = self.limit_groups(scores.detach() + self.e_score_correction_bias)  # (B, T, E)
        indices = choice.topk(self.K, sorted=False).indices  # (B, T, K) Eq. 16
        weights = scores.gather(-1, indices)  # (B, T, K) Eq. 14: of the unbiased scores
        if self.normalise:  # NOTE(hf) gate-epsilon
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # (B, T, K) Eq. 13
        return Routing(scores, indices, weights * self.scaling)  # NOTE(checkpoint) routed-scaling

    def limit_groups(self, choice: Tensor) -> Tensor:
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

    def _apply(self, fn, recurse=True):
        """Whatever the model is cast to, the bias stays float32, bit for bit."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self

EXPERT_MAPS = ("gate_proj", "up_proj", "down_proj")

class Experts(nn.Module):
    """All routed experts of a layer, stacked along a first axis; x (B, T, D) -> (B, T, D)."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        E, D, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(E, width, D))
        self.up_proj = nn.Parameter(torch.empty(E, width, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, width))
        for name in EXPERT_MAPS:
            self.register_parameter(name + "_scale_inv", None)  # of FP8

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        # A visit is one (token, expert) pair; sorted by expert, those of one expert lie together.
        expert, order = indices.flatten().sort(stable=True)  # (B*T*K), (B*T*K)
        dtype = autocast_dtype(x) or x.dtype
        work = self.all_at_once if self.kernel_takes(x, dtype) else self.one_by_one
        out = work(x.flatten(0, 1).to(dtype), expert, order, weights.flatten(0, 1))  # (B*T, D)
        return out.to(x.dtype).view_as(x)

    def kernel_takes(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether the grouped kernel is the better one, for widths of whole 16 bytes, not in FP8.

        It is in training on a CPU; in inference the loop is as fast, and reads no expert that nobody
        visits. GPUs have it for bfloat16 since Hopper; others go through all experts, not the visited.
        """
        if x.is_cuda and not is_traced(x):
            better = dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
        else:
            better = x.requires_grad or is_traced(x)
        if not better:
            return False
        plain = self.gate_proj.dtype != FP8 and dtype in (torch.float32, torch.bfloat16)
        return plain and all(dtype.itemsize * width % 16 == 0 for width in self.gate_proj.shape[1:])

    def one_by_one(self, x: Tensor, expert: Tensor, order: Tensor, weights: Tensor) -> Tensor:
        """Eq. 12 as a loop over the experts that are visited; x (B*T, D), weights (B*T, K) -> (B*T, D)."""
        hit, counts = (found.tolist() for found in expert.unique_consecutive(return_counts=True))
        tokens = (order // weights.shape[-1]).split(counts)
        weights = weights.flatten()[order].unsqueeze(-1).split(counts)
        maps = [(getattr(self, name), getattr(self, name + "_scale_inv")) for name in EXPERT_MAPS]
        out = torch.zeros_like(x, dtype=weights[0].dtype)
        for e, token, weight in zip(hit, tokens, weights, strict=True):
            gate, up, down = ((w[e], None if s is None else s[e]) for w, s in maps)
            rows = x.index_select(0, token)
            visits = linear(F.silu(linear(rows, *gate)) * linear(rows, *up), *down)
            out.index_add_(0, token, visits * weight)  # Eq. 12
        return out

    def all_at_once(self, x: Tensor, expert: Tensor, order: Tensor, weights: Tensor) -> Tensor:
        """The same by three grouped products; x (B*T, D), weights (B*T, K) -> (B*T, D)."""
        every = torch.arange(len(self.gate_proj), device=x.device)
        ends = torch.searchsorted(expert, every, right=True, out_int32=True)  # (E) of its rows
        # index_select: the backward of x[...] adds rows up in another order each time.
        rows = x.index_select(0, order // weights.shape[-1])  # (B*T*K, D)
        product = grouped_mm if torch.compiler.is_compiling() else F.grouped_mm
        gate, up, down = (getattr(self, name).to(rows.dtype).mT for name in EXPERT_MAPS)
        hidden = F.silu(product(rows, gate, offs=ends)) * product(rows, up, offs=ends)  # (B*T*K, F)
        visits = product(hidden, down, offs=ends)  # (B*T*K, D)
        visits = torch.empty_like(visits).index_copy_(0, order, visits).unflatten(0, weights.shape)
        return (visits * weights.unsqueeze(-1)).sum(-2)  # (B*T, D) Eq. 12

class MoE(nn.Module):
    """Shared experts for every token, K routed ones by choice, Eq. 12; x (B, T, D) -> the same, Routing."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        width = (config.n_shared_experts or 0) * config.moe_intermediate_size
        # Several shared experts are one that is as wide as all of them.
        self.shared_experts = FeedForward(config.hidden_size, width) if width else None

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        routing = self.gate(x)
        out = self.experts(x, routing.indices, routing.weights)  # (B, T, D)
        if self.shared_experts is not None:
            out = self.shared_experts(x) + out
        return out, routing

# ---- 7. Decoder block and MTP module — §2.2, Eqs. 21–22 -----------------------------------------

def first_of(result: Any, count: int) -> tuple:
    """What a module returned, with None for what a stranger in its place leaves out."""
    values = result if isinstance(result, tuple) else (result,)
    return values + (None,) * (count - len(values))

BlockOutput = tuple[Tensor, Maybe, Routing | None]

class Block(nn.Module):
    """One decoder layer; x (B, T, D) -> the same, attention (B, H, T, S) or None, Routing or None."""

    def __init__(self, config: DeepseekV3Config, layer_idx: int) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(D, eps=eps)
        self.self_attn = MLA(config)
        self.post_attention_layernorm = nn.RMSNorm(D, eps=eps)
        dense = layer_idx < config.first_k_dense_replace
        self.mlp = FeedForward(D, config.intermediate_size) if dense else MoE(config)

    def forward(self, x: Tensor, context: Context, output_attentions: bool = False) -> BlockOutput:
        attended = self.self_attn(self.input_layernorm(x), context, output_attentions)
        update, attention = first_of(attended, 2)  # (B, T, D), (B, H, T, S)
        x = x + update
        update, routing = first_of(self.mlp(self.post_attention_layernorm(x)), 2)
        return x + update, attention, routing

class MTPBlock(Block):
    """MTP module of depth k: row i joins h_i with the embedding of token i+k, predicts token i+k+1.

        row         0  1  2  3  4
        token       a  b  c  d  e      main model: row 0 has read a, predicts b
        depth 1     b  c  d  e         embedded; row 0 predicts c; T - k rows remain

    hidden and embeds (B, T-k, D) -> (B, T-k, D), normed: for the shared head, and for depth k+1.
    """

    def __init__(self, config: DeepseekV3Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        D, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = nn.RMSNorm(D, eps=eps)
        self.hnorm = nn.RMSNorm(D, eps=eps)
        self.eh_proj = Linear(2 * D, D)
        self.shared_head = nn.ModuleDict({"norm": nn.RMSNorm(D, eps=eps)})  # the head is lm_head

    def forward(
        self, hidden: Tensor, embeds: Tensor, context: Context, output_attentions: bool = False
    ) -> BlockOutput:
        joined = torch.cat([self.enorm(embeds), self.hnorm(hidden)], -1)  # (B, T-k, 2*D)
        x = self.eh_proj(joined)  # (B, T-k, D) Eq. 21 NOTE(checkpoint) eh-order
        x, attention, routing = super().forward(x, context, output_attentions)  # Eq. 22
        return self.shared_head["norm"](x), attention, routing

# ---- 8. Model and heads — Eq. 23 ----------------------------------------------------------------

@dataclass
class ModelOutput:
    """What a forward returns, by name or as a tuple of what is not None; what does not apply is None."""

    loss: Maybe = None  # ()
    logits: Maybe = None  # (B, T, vocab), (B, num_labels) or (B, T, num_labels)
    last_hidden_state: Maybe = None  # (B, T, D), after the final norm
    past_key_values: LatentCache | None = None
    hidden_states: tuple | None = None  # layers + 1 of (B, T, D), last_hidden_state the last
    attentions: tuple | None = None  # (B, H, T, S) per layer, rows sum to 1
    routing: tuple | None = None  # a Routing for each MoE layer
    mtp_logits: tuple | None = None  # (B, T-k, vocab) for each depth k
    main_loss: Maybe = None  # the loss without the two below
    mtp_loss: Maybe = None  # Eq. 25 without λ
    balance_loss: Maybe = None  # Eq. 17 without α, all layers, in training; of each row (B) without a head
    documents: Maybe = None  # (B, T): see LatentCache
    inputs_embeds: Maybe = None  # (B, T, D): what entered the first layer

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return getattr(self, key)
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(value for value in values if value is not None)[key]

    def keys(self) -> list[str]:
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def to_tuple(self) -> tuple:
        return self[:]

    def as_asked(self, return_dict: bool | None) -> Self | tuple:
        """This, or with return_dict=False a plain tuple."""
        return self[:] if return_dict is False else self

# FSDP, DDP, torch.export and torch.func look for tensors in a model's output: they are in its fields.
torch.export.register_dataclass(ModelOutput, serialized_type_name="deepseek_v3.ModelOutput")

class PreTrainedModel(nn.Module):
    """What the model and its heads share; methods that call a function name its section."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        # generation_config.json of the folder that the model came from: generate stops on its ids.
        self.generation_config = SimpleNamespace(eos_token_id=None, pad_token_id=None)
        self.tokenizer_files: dict[str, bytes] = {}  # of that folder, to be saved along

    @torch.no_grad()
    def init_weights(self, *modules: nn.Module) -> None:
        """Of those modules, or all: matrices normal of std initializer_range, norms 1, biases 0 (§4.2)."""
        modules = modules or [self]
        for router in (part for module in modules for part in module.modules() if isinstance(part, Router)):
            router.e_score_correction_bias.zero_()
        named = (item for module in modules for item in module.named_parameters())
        std = self.config.initializer_range
        embedding_std = self.config.extra.get("embedding_initializer_range", std)  # Youtu's
        for name, parameter in named:
            if parameter.ndim > 1:
                parameter.normal_(0.0, embedding_std if name.endswith("embed_tokens.weight") else std)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    def tie_weights(self, _loaded: Any = None) -> None:
        """Make the head the embedding, where the config says so; also after weights were exchanged."""
        head = getattr(self, "lm_head", None)
        if self.config.tie_word_embeddings and type(head) is Linear:
            both = head._parameters, self.base_model.embed_tokens._parameters
            if all("weight" in parameters for parameters in both):  # else it is pruned or parametrized
                both[0]["weight"] = both[1]["weight"]

    @property
    def base_model(self) -> "DeepseekV3Model":
        return getattr(self, "model", self)

    @property
    def gradient_checkpointing(self) -> bool:
        """Set it to recompute layers in backward, which saves memory."""
        return self.base_model.recompute

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.base_model.recompute = value

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **_: Any) -> None:
        """transformers' way to set it; its keyword arguments change nothing, each layer is recomputed."""
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.gradient_checkpointing = False

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.embed_tokens

    def set_input_embeddings(self, embeddings: nn.Module) -> None:
        self.base_model.embed_tokens = embeddings

    def get_output_embeddings(self) -> nn.Module | None:
        return getattr(self, "lm_head", None)

    def enable_input_require_grads(self) -> None:
        """Let gradients reach what adapters add inside of frozen layers that are recomputed."""
        self.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())

    @torch.no_grad()
    def resize_token_embeddings(self, size: int) -> nn.Module:
        """Make room for `size` tokens; rows of new ones are the mean of the old."""
        for module in filter(None, (self.get_input_embeddings(), self.get_output_embeddings())):
            old = module.weight
            rows = torch.cat([old, old.mean(0, keepdim=True).expand(max(0, size - len(old)), -1)])[:size]
            module.weight = nn.Parameter(rows.contiguous(), old.requires_grad)
            module.num_embeddings = module.out_features = size
        self.config.vocab_size = size
        self.tie_weights()
        return self.get_input_embeddings()

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        left_out = {id(self.get_input_embeddings().weight)} if exclude_embeddings else ()
        counted = (p for p in self.parameters() if id(p) not in left_out)
        return sum(p.numel() for p in counted if p.requires_grad or not only_trainable)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def update_router_bias(self, gamma: float = 0.001, centred: bool = False) -> list[float]:
        """Loss-free balancing (§2.1.2): a busy expert's bias falls by gamma, an idle one's rises.

        Call it once per optimizer step: the loads that training-mode forwards counted since the last
        call are used, and forgotten. `centred` takes the mean step off, which changes no choice and
        keeps the biases from drifting. Returns MaxVio = max load / mean load - 1 of each MoE layer,
        the MTP modules' last. (Section 9 computes it.)
        """
        return update_router_bias(self, gamma, centred)

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike, device_map: Any = None, dtype: Any = None,
        num_hidden_layers: int | None = None, max_memory: dict | None = None, **overrides: Any,
    ) -> Self:  # fmt: skip
        """A model from a folder: config.json, and model.safetensors or an index with shards (section 12).

        device_map: a device (None: the CPU), {module path: device}, of which the longest path that
        fits counts, or "auto" (= "balanced") or "sequential", which split by bytes over the GPUs and
        then the CPU, or over max_memory, {0: "141GB", "cpu": "64GB"}.
        dtype: None or "auto" keeps what the checkpoint holds; a dtype dequantises FP8 while loading.
        num_hidden_layers: load only so many first layers, and open only the shards that hold them.
        Other keywords override fields of the config. FileNotFoundError or ValueError names the file or
        tensor that is missing, unexpected, mis-shaped or broken, before anything is loaded.
        """
        return load_pretrained(cls, directory, device_map, dtype, num_hidden_layers, max_memory, overrides)

    def save_pretrained(
        self, directory: str | os.PathLike, max_shard_size: str | int = "5GB", quantize: str | None = None
    ) -> None:
        """Write config.json and the weights, MTP modules included, in files of at most max_shard_size.

        quantize: "fp8" writes FP8 blocks for the matrices that the release has in FP8; None writes what
        is held. Killed at any moment, or out of disk, it leaves the older checkpoint or this one.
        (Section 12.)
        """
        save_pretrained(self, directory, max_shard_size, quantize)

    def _apply(self, fn, recurse=True):
        """nn.Module's own, but that a cast would take FP8 weights without their scales."""
        if holds_fp8(self) and fn(torch.empty(0, dtype=FP8)).dtype != FP8:
            raise ValueError("a model in FP8 cannot be cast: load it with dtype=")
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

class DeepseekV3Model(PreTrainedModel):
    """Embedding, decoder layers, final norm; input_ids (B, T) -> last_hidden_state (B, T, D)."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.recompute = False
        self.init_weights(self)

    def forward(
        self, input_ids: Maybe = None, attention_mask: Maybe = None, position_ids: Maybe = None,
        past_key_values: LatentCache | None = None, inputs_embeds: Maybe = None, use_cache: bool = False,
        output_attentions: bool = False, output_hidden_states: bool = False, output_routing: bool = False,
        return_dict: bool | None = None,
    ) -> ModelOutput:  # fmt: skip
        """Give tokens (B, T) or embeddings; attention_mask (B, S) is 0 at padding, on either side.

        With a cache the inputs are the new tokens only, and the cache remembers the mask. Without a
        mask, a position that is not the one before plus one begins another packed document. A mask of
        shape (B or 1, 1, T, S), boolean or to be added to the scores, is used as it is, for this call.
        `return_dict=False` asks for a plain tuple.
        """
        check_inputs(input_ids, inputs_embeds, self.config)  # section 10, as all checks
        x = embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, D)
        cache = LatentCache() if use_cache and past_key_values is None else past_key_values
        check_context(self, x, attention_mask, position_ids, cache)
        positions, documents = locate(attention_mask, position_ids, cache, x)
        context = self.context(positions, documents, attention_mask, cache)
        layers = self.layers[: self.config.num_hidden_layers]
        x, states, attentions, routings = self.run_all(layers, context, x, output_attentions, output_hidden_states)
        last = self.norm(x.to(home(self.norm, x))).to(embeds.device)  # (B, T, D)
        if cache is not None:
            cache.advance(documents, x.shape[1])
        return ModelOutput(
            last_hidden_state=last, past_key_values=cache, inputs_embeds=embeds,
            documents=None if documents is None else documents[:, -x.shape[1] :],
            hidden_states=(embeds, *states[:-1], last) if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
            routing=tuple(filter(None, routings)) if output_routing or self.training else None,
            balance_loss=balance(layers, routings, documents, last) if self.training else None,  # section 9
        ).as_asked(return_dict)  # fmt: skip

    def context(self, positions: Tensor, documents: Maybe, mask: Maybe, cache: LatentCache | None) -> Context:
        """What all layers share, from where the new tokens (B or 1, T) stand."""
        T, given = positions.shape[1], mask if mask is not None and mask.ndim == 4 else None
        S = T + (0 if cache is None else cache.length)
        cos, sin = self.rotary_emb(positions)  # (B or 1, T, 1, R/2), (B or 1, T, 1, R/2)
        return Context(cos, sin, visible(documents, given, T, S, positions.device), cache)

    def run_all(self, layers: nn.ModuleList, context: Context, x: Tensor, attentions: bool, states: bool) -> tuple:
        """x (B, T, D) through the layers, and a tuple each of what they return, as far as it is wanted."""
        results = []
        for context.layer, layer in enumerate(layers):
            x, attention, routing = self.run(layer, context, x, output_attentions=attentions)
            results.append((x if states else None, attention, routing))
        return x, *zip(*results, strict=True)

    def run(self, layer: nn.Module, context: Context, *inputs: Tensor, output_attentions: bool = False) -> tuple:
        """A layer, where its weights are; recomputed in backward if asked -> (B, T, D), …"""
        device, call = home(layer, inputs[0]), layer
        if self.recompute and self.training:
            call = partial(checkpoint, layer, use_reentrant=False)
            # Recomputed after a hook on softmax has gone, attention still has to take the same form.
            softmax = getattr(getattr(layer, "self_attn", None), "softmax", nn.Softmax())
            output_attentions = output_attentions or not is_plain(softmax, nn.Softmax)
        return first_of(call(*(x.to(device) for x in inputs), context.to(device), output_attentions), 3)

class DeepseekV3ForCausalLM(PreTrainedModel):
    """Language model: logits of the next token (B, T, vocab), and MTP modules that look further."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        self.model = DeepseekV3Model(config)
        L, depths = config.num_hidden_layers, config.num_nextn_predict_layers
        self.model.layers.extend(MTPBlock(config, L + i) for i in range(depths))
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.init_weights(*self.mtp_blocks, self.lm_head)
        self.tie_weights()
        self.register_load_state_dict_post_hook(PreTrainedModel.tie_weights)

    def forward(
        self, input_ids: Maybe = None, attention_mask: Maybe = None, position_ids: Maybe = None,
        past_key_values: LatentCache | None = None, inputs_embeds: Maybe = None, labels: Maybe = None,
        use_cache: bool = False, logits_to_keep: int = 0, num_items_in_batch: int | Maybe = None,
        output_attentions: bool = False, output_hidden_states: bool = False, output_routing: bool = False,
        output_mtp: bool = False, return_dict: bool | None = None,
    ) -> ModelOutput:  # fmt: skip
        """As DeepseekV3Model; logits of all tokens, or of the last `logits_to_keep`.

        labels (B, T): row i is scored on labels[i + 1], -100 is ignored. In training mode the loss
        adds λ · MTP loss and α · balance loss. `num_items_in_batch`, the labels that count in the
        whole global batch, makes losses sums over it. `output_mtp` asks for mtp_logits without labels.
        """
        past = getattr(past_key_values, "length", 0)
        check_request(labels, logits_to_keep, output_mtp, past)
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
            output_attentions, output_hidden_states, output_routing,
        )  # fmt: skip
        out.logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])  # (B, T, vocab)
        if output_mtp or labels is not None and not past:
            self.look_ahead(out, attention_mask, position_ids)
        if labels is not None:
            causal_losses(self, out, labels, num_items_in_batch)  # section 9
        return out.as_asked(return_dict)

    @property
    def mtp_blocks(self) -> nn.ModuleList:
        return self.model.layers[self.config.num_hidden_layers :]

    def look_ahead(self, out: ModelOutput, attention_mask: Maybe, position_ids: Maybe) -> None:
        """Run the MTP modules over a whole sequence, Eqs. 21–23, into out.mtp_logits."""
        embeds, logits, losses = out.inputs_embeds, [], out.balance_loss
        # NOTE(checkpoint) mtp-input: after the final norm, with which ROCm's ATOM measured more accepted drafts.
        hidden, T = out.last_hidden_state, embeds.shape[1]
        positions, documents = locate(attention_mask, position_ids, None, embeds)
        given = attention_mask is not None and attention_mask.ndim == 4
        for k, block in enumerate(self.mtp_blocks[: T - 1], 1):
            here, mask = None, attention_mask[..., :-k, :-k] if given else None
            if documents is not None:  # a row that would join two documents counts as padding
                here = documents[:, :-k].where(documents[:, :-k] == documents[:, k:], 0)  # (B, T-k)
            context = self.model.context(positions[:, :-k], here, mask, None)
            hidden, _, routing = self.model.run(block, context, hidden[:, :-1], embeds[:, k:])  # (B, T-k, D)
            hidden = hidden.to(embeds.device)
            if losses is not None:
                losses = losses + balance([block], [routing], here, hidden)
            logits.append(self.lm_head(hidden))  # Eq. 23
        out.mtp_logits, out.balance_loss = tuple(logits) or None, losses

    def generate(
        self, input_ids: Maybe = None, attention_mask: Maybe = None, max_new_tokens: int = 64,
        do_sample: bool = False, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
        min_p: float = 0.0, repetition_penalty: float = 1.0, num_return_sequences: int = 1,
        logits_processor: Callable | list[Callable] | None = None, eos_token_id: int | list[int] | None = None,
        past_key_values: LatentCache | None = None, inputs_embeds: Maybe = None, use_mtp: bool = False,
        num_draft_tokens: int | None = None, generator: torch.Generator | None = None,
        streamer: Callable | None = None, statistics: list | None = None,
    ) -> Tensor:  # fmt: skip
        """Continue input_ids (B, T) by up to max_new_tokens -> (B, T + new), padded behind a row's end.

        Prompts may be padded on either side if attention_mask (B, T) says where. inputs_embeds (B, T, D)
        are read in place of tokens; without input_ids, only the new tokens are returned.
        past_key_values: the cache of the first tokens of input_ids; the others are read, and it grows.
        logits_processor(ids (B, n), scores (B, vocab)) -> scores, or a list of them, as in transformers.
        num_return_sequences: so many rows for each prompt, which is read once; for do_sample.
        eos_token_id: an id or a list, -1 never stops, None: generation_config.json's, else the config's.
        streamer(ids (B)) is called for each column of new tokens.
        use_mtp drafts num_draft_tokens per step, by default one per module: the same tokens, or when
        sampling the same distribution, in fewer steps; a list `statistics` gains (drafted, accepted).
        """
        sampling = Sampling(
            do_sample, temperature, top_k, top_p, min_p, repetition_penalty, num_return_sequences,
            logits_processor, generator,
        )  # section 11  # fmt: skip
        prompt = Prompt(input_ids, attention_mask, inputs_embeds, past_key_values)
        sinks, drafts = (streamer, statistics), (use_mtp, num_draft_tokens)
        return generate(self, prompt, max_new_tokens, sampling, eos_token_id, drafts, sinks)

    def prepare_inputs_for_generation(self, input_ids: Maybe = None, **inputs: Any) -> dict[str, Any]:
        """What generate reads first. peft exchanges this method, to put a learned prompt in front."""
        return {"input_ids": input_ids, **inputs}

class DeepseekV3ForTokenClassification(PreTrainedModel):
    """A label per token: logits (B, T, num_labels); labels (B, T) are not shifted, -100 is ignored."""

    score_bias = True

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        self.model = DeepseekV3Model(config)
        self.score = Linear(config.hidden_size, config.num_labels, bias=self.score_bias)
        self.init_weights(self.score)

    def forward(
        self, input_ids: Maybe = None, attention_mask: Maybe = None, position_ids: Maybe = None,
        past_key_values: LatentCache | None = None, inputs_embeds: Maybe = None, labels: Maybe = None,
        use_cache: bool = False, num_items_in_batch: int | Maybe = None,
        output_attentions: bool = False, output_hidden_states: bool = False, output_routing: bool = False,
        return_dict: bool | None = None,
    ) -> ModelOutput:  # fmt: skip
        """As DeepseekV3Model, with logits and, given labels, the loss."""
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
            output_attentions, output_hidden_states, output_routing,
        )  # fmt: skip
        out.logits = self.score(self.pool(out.last_hidden_state, input_ids, attention_mask))
        if labels is not None:
            classification_loss(self, out, labels, num_items_in_batch)  # section 9
        return out.as_asked(return_dict)

    def pool(self, hidden: Tensor, input_ids: Maybe, attention_mask: Maybe) -> Tensor:
        return hidden

class DeepseekV3ForSequenceClassification(DeepseekV3ForTokenClassification):
    """A label per sequence, read off its last real token under either padding: (B, num_labels)."""

    score_bias = False

    def pool(self, hidden: Tensor, input_ids: Maybe, attention_mask: Maybe) -> Tensor:
        last = last_real_token(hidden, input_ids, attention_mask, self.config.pad_token_id)  # (B)
        return hidden[torch.arange(len(last), device=last.device), last]

def last_real_token(hidden: Tensor, input_ids: Maybe, attention_mask: Maybe, pad_token_id: int | None) -> Tensor:
    """Each row's last real token, by the mask, else by the pad id, else the last of all -> (B)."""
    position = torch.arange(hidden.shape[1], device=hidden.device)
    real = torch.ones_like(hidden[..., 0])
    if attention_mask is not None and attention_mask.ndim == 2:
        real = attention_mask[:, -hidden.shape[1] :]
    elif input_ids is not None and pad_token_id is not None:
        real = input_ids != pad_token_id
    return (real.long() * position).argmax(-1)

# ---- 9. Losses and balancing — Eqs. 17–20, 24–25 ------------------------------------------------

def shifted_cross_entropy(logits: Tensor, labels: Tensor, shift: int, documents: Maybe, count: Any) -> Tensor:
    """Mean of -log P(labels[i + shift]) at row i, or sum / count; logits (B, rows, vocab) -> ().

    Left out are labels of -100, and targets in another document than row i.
    """
    targets = labels[:, shift:]
    if documents is not None:
        here, there = documents[:, :-shift], documents[:, shift:]
        targets = targets.masked_fill((here != there) & (here * there > 0), -100)
    rows = upcast(logits[:, : targets.shape[1]]).flatten(0, 1)
    total = F.cross_entropy(rows, targets.flatten(), ignore_index=-100, reduction="sum")
    return total / ((targets != -100).sum().clamp(min=1) if count is None else count)

def causal_losses(model: PreTrainedModel, out: ModelOutput, labels: Tensor, count: Any) -> None:
    """Cross-entropy, MTP loss and their weighted sum with the balance loss, into `out`."""
    check_labels(labels, out.logits.shape[:2], model.config.vocab_size, count)
    out.loss = out.main_loss = shifted_cross_entropy(out.logits, labels, 1, out.documents, count)
    if out.mtp_logits is not None:
        by_depth = enumerate(out.mtp_logits, 1)
        # NOTE(report) eq-24-mean: so that a depth weighs the same at every sequence length.
        losses = [shifted_cross_entropy(rows, labels, k + 1, out.documents, count) for k, rows in by_depth]  # Eq. 24
        out.mtp_loss = sum(losses) / len(losses)  # Eq. 25, λ below
        if model.training:
            out.loss = out.loss + model.config.mtp_loss_weight * out.mtp_loss
    add_balance_loss(model, out, labels[:, 1:], count)

def add_balance_loss(model: PreTrainedModel, out: ModelOutput, labels: Tensor, count: Any) -> None:
    """Add α · balance loss: the mean over rows or, of a part of a batch, each row by its labels."""
    if out.balance_loss is None:  # the trunk is not in training mode
        return
    rows = len(labels) if count is None else count / (labels != -100).sum(-1)  # each row's share, inverted
    out.balance_loss = (out.balance_loss / rows).sum()
    out.loss = out.loss + model.config.balance_loss_weight * out.balance_loss

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")

def classification_loss(model: PreTrainedModel, out: ModelOutput, labels: Tensor, count: Any) -> None:
    """Loss of a label per token or sequence, with the balance loss in training, into `out`.

    Labels of tokens are (B, T). Of sequences they are class ids (B), floats (B) for regression
    (num_labels 1), or floats (B, num_labels) where several labels may hold at once; a config's
    problem_type says which, if it is not as the labels look.
    """
    logits, kind = upcast(out.logits), model.config.extra.get("problem_type")
    if kind is None:
        several = isinstance(labels, Tensor) and labels.is_floating_point()
        kind = "regression" if logits.shape[-1] == 1 else PROBLEMS[1 + several]
    check_classes(labels, logits, kind, count)
    if logits.ndim == 3:
        out.main_loss = shifted_cross_entropy(logits, labels, 0, None, count)
    elif kind == "regression":
        out.main_loss = F.mse_loss(logits, labels.to(logits.dtype).view_as(logits))
    elif kind == "multi_label_classification":
        out.main_loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    else:
        out.main_loss = F.cross_entropy(logits, labels.flatten())
    out.loss = out.main_loss
    add_balance_loss(model, out, labels, count if logits.ndim == 3 else None)

def balance_loss(scores: Tensor, K: int, mask: Maybe = None) -> Tensor:
    """Sequence-wise balance loss of one layer without α, Eqs. 17–20; scores (B, T, E) -> (B).

    It counts the K best *unbiased* scores, as Eq. 18 is written; padding (mask False) is left out of
    every sum.
    """
    E = scores.shape[-1]
    real = torch.ones_like(scores[..., :1]) if mask is None else mask.unsqueeze(-1).to(scores.dtype)
    tokens = real.sum(1).clamp(min=1)  # (B, 1)
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(K).indices, 1.0)  # (B, T, E)
    f = (chosen * real).sum(1) * E / (K * tokens)  # (B, E) Eq. 18
    share = scores / (scores.sum(-1, keepdim=True) + 1e-20)  # (B, T, E) Eq. 19
    P = (share * real).sum(1) / tokens  # (B, E) Eq. 20
    return (f * P).sum(-1)  # (B) Eq. 17

def balance(layers: nn.ModuleList | list, routings: tuple | list, documents: Maybe, hidden: Tensor) -> Tensor:
    """Count each router's load, padding excluded, and sum the layers' balance losses -> (B).

    Called once per forward, outside the layers: recomputing one in backward does not count twice.
    """
    mask = None if documents is None else documents[:, -hidden.shape[1] :] > 0  # (B, T)
    loss = torch.zeros(len(hidden), device=hidden.device)  # (B)
    for layer, routing in zip(layers, routings, strict=True):
        gate = next((module for module in layer.modules() if isinstance(module, Router)), None)
        if gate is None or routing is None:  # a dense layer, or somebody else's experts
            continue
        scores, indices = routing.scores.to(loss.device), routing.indices.to(loss.device)
        visits = torch.ones_like(indices) if mask is None else mask.long().unsqueeze(-1).expand_as(indices)
        if torch.compiler.is_compiling() or not is_traced(indices):  # torch.func wants no side effects
            gate.load = gate.load.to(loss.device).scatter_add(0, indices.flatten(), visits.flatten())  # (E)
        loss = loss + balance_loss(scores, gate.K, mask)
    return loss

@torch.no_grad()
def update_router_bias(model: PreTrainedModel, gamma: float, centred: bool) -> list[float]:
    """Move each router's bias against its load; PreTrainedModel.update_router_bias says how to use it."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if not routers:
        return []
    loads = torch.stack([router.load.to(model.device) for router in routers])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(loads)  # of the global batch, on every rank
    total, E = loads.sum(-1, keepdim=True), loads.shape[-1]
    step = (total - loads * E).sign().float()  # whole numbers compare exactly
    step = step - step.mean(-1, keepdim=True) if centred else step
    for router, move in zip(routers, step, strict=True):
        router.e_score_correction_bias += (gamma * move).to(router.e_score_correction_bias)
        router.load = torch.zeros_like(router.load)
    return (loads.amax(-1) * E / total.squeeze(-1).clamp(min=1) - 1).clamp(min=0).tolist()

# ---- 10. Looking inside, checking input ---------------------------------------------------------

@contextmanager
def trace(model: nn.Module, *patterns: str) -> Iterator[dict[str, Any]]:
    """`with trace(model, "layers.*.mlp.gate") as seen:` fills seen, {name: what it returned last}.

    A shell-style pattern matches a module's whole name, or its end after a dot. Nothing else changes,
    but that attention forms its probabilities where its softmax is traced. ValueError if nothing
    matches, with names that would; RuntimeError if no module that matches ran.
    """
    if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
        raise ValueError("trace: a compiled model does not run hooks; trace the model that was compiled")
    names, seen = {name: module for name, module in model.named_modules() if name}, {}

    def record(name, _module, _inputs, output):
        seen[name] = output

    with ExitStack() as handles:
        for pattern in patterns:
            hits = fnmatch.filter(names, pattern) + fnmatch.filter(names, "*." + pattern)
            near = [name for name in names if pattern.rsplit(".", 1)[-1] in name] or list(names)
            require(hits, f"no module matches {pattern!r}; there are {', '.join(near[:12])}, …")
            for name in hits:
                handles.enter_context(names[name].register_forward_hook(partial(record, name)))
        yield seen
    if patterns and not seen:
        raise RuntimeError("trace: no matching module ran; compiled ones run no hooks, call the model itself")

def require(holds: Any, otherwise: str) -> None:
    """ValueError that says what is wrong, unless it `holds`."""
    if not holds:
        raise ValueError(otherwise)

IDS = (torch.int64, torch.int32)
FLOATS = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
MASKS = (torch.bool, torch.int64, torch.int32, torch.uint8, *FLOATS)

def check_tensor(name: str, given: Any, dtypes: tuple, *shapes: tuple) -> None:
    """ValueError unless `given` is a tensor of one of the dtypes and shapes; a letter is any size > 0."""
    for shape in shapes:
        fits = isinstance(given, Tensor) and given.dtype in dtypes and given.ndim == len(shape)
        if fits and all(n > 0 if isinstance(w, str) else n == w for n, w in zip(given.shape, shape, strict=True)):
            return
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    forms = " or ".join("(" + ", ".join(map(str, shape)) + ")" for shape in shapes)
    tensor = isinstance(given, Tensor)
    what = f"{given.dtype} of shape {tuple(given.shape)}" if tensor else type(given).__name__
    raise ValueError(f"{name}: {what}: must be a tensor of shape {forms}, {kinds}")

def check_inputs(input_ids: Any, inputs_embeds: Any, config: DeepseekV3Config) -> None:
    """ValueError unless there is exactly one of tokens (B, T) and embeddings (B, T, D)."""
    if torch.compiler.is_compiling():
        return
    require((input_ids is None) != (inputs_embeds is None), "give exactly one of input_ids and inputs_embeds")
    if input_ids is None:
        check_tensor("inputs_embeds", inputs_embeds, FLOATS, ("B", "T", config.hidden_size))
    else:
        check_tensor("input_ids", input_ids, IDS, ("B", "T"))
        check_ids("input_ids", input_ids, config.vocab_size)

def check_context(model: DeepseekV3Model, x: Tensor, attention_mask: Any, position_ids: Any, cache: Any) -> None:
    """ValueError for what does not go with x (B, T, D); a warning where it gets too long."""
    if torch.compiler.is_compiling():
        return
    (B, T), config, past = x.shape[:2], model.config, check_cache(cache)
    for held in cache.layers.values() if past else ():
        check_tensor("past_key_values", held, FLOATS, (B, "S", config.kv_lora_rank + config.qk_rope_head_dim))
    twice, length = cache is not None and model.recompute and model.training, past + T
    require(not twice, "gradient_checkpointing recomputes layers, and use_cache would store them twice")
    if attention_mask is not None:
        wide = [(rows, 1, T, length) for rows in (B, 1)]
        check_tensor("attention_mask", attention_mask, MASKS, (B, length), *wide)
        if attention_mask.ndim == 4:
            check_tensor("attention_mask", attention_mask, (torch.bool, *FLOATS), *wide)
        elif attention_mask.is_cpu and not is_traced(attention_mask):
            binary = ((attention_mask == 0) | (attention_mask == 1)).all()
            require(binary, "attention_mask: must hold nothing but 0 (padding) and 1")
    if position_ids is not None:
        check_tensor("position_ids", position_ids, IDS, (B, T), (1, T))
    if length > config.max_position_embeddings:
        what = f"{length} positions, but max_position_embeddings={config.max_position_embeddings}"
        warnings.warn(f"{what}: quality may drop", stacklevel=3)

def check_cache(cache: Any) -> int:
    """How many tokens it holds; ValueError unless it is a cache, or None."""
    what = f"past_key_values: {type(cache).__name__}: must be what a call before gave"
    require(isinstance(cache, LatentCache | None), what)
    return 0 if cache is None else cache.length

def check_request(labels: Any, logits_to_keep: Any, output_mtp: bool, past: int) -> None:
    """ValueError for what a causal LM cannot be asked for, or not together."""
    if torch.compiler.is_compiling():
        return
    require(type(logits_to_keep) is int and logits_to_keep >= 0, f"{logits_to_keep=}: must be 0 (all) or more")
    require(labels is None or not logits_to_keep, "labels need all logits: leave logits_to_keep at 0")
    require(not (output_mtp and past), "output_mtp needs all tokens in this call: leave past_key_values out")

def check_ids(name: str, ids: Tensor, vocab: int, ignored: int | None = None) -> None:
    """ValueError if a token or label id is outside the vocabulary (on a GPU its own check speaks)."""
    if ids.device.type != "cpu" or is_traced(ids):
        return
    ids = ids if ignored is None else ids[ids != ignored]
    low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
    require(low >= 0 and high < vocab, f"{name} hold {low if low < 0 else high}: must lie in 0..{vocab - 1}")

def check_labels(labels: Any, shape: tuple, classes: int, count: Any = None) -> None:
    """ValueError unless labels are ids of that shape, each of a class, or -100 to be ignored."""
    if not torch.compiler.is_compiling():
        counts = isinstance(count, Tensor | None) or isinstance(count, int) and count > 0
        require(counts, f"num_items_in_batch={count!r}: must be a whole number above 0, or a tensor")
        check_tensor("labels", labels, (torch.int64,), tuple(shape))
        check_ids("labels", labels, classes, ignored=-100)

def check_classes(labels: Any, logits: Tensor, kind: str, count: Any) -> None:
    """ValueError unless labels are what classification_loss takes with these logits, of that kind."""
    require(kind in PROBLEMS, f"problem_type={kind!r}: must be one of {', '.join(PROBLEMS)}")
    (B, *_), classes = logits.shape, logits.shape[-1]
    if logits.ndim == 2 and kind != PROBLEMS[1]:
        check_tensor("labels", labels, (*FLOATS, *IDS), (B, classes), *([(B,)] if classes == 1 else []))
    else:
        flat = isinstance(labels, Tensor) and logits.ndim == 2
        check_labels(labels.flatten() if flat else labels, logits.shape[:-1], classes, count)

# ---- 11. Generation -----------------------------------------------------------------------------

@dataclass
class Sampling:
    """How the next token is chosen from logits; greedy unless do_sample."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # keep the k likeliest, 0: all
    top_p: float = 1.0  # keep the fewest that hold this much probability
    min_p: float = 0.0  # keep those at least this fraction as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: less of the tokens that are there
    num_return_sequences: int = 1
    logits_processor: Callable | list[Callable] | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        several = lambda n: type(n) is int and (n == 1 or n > 1 and self.do_sample)  # noqa: E731
        rules = {
            "temperature": (lambda x: 0 < x < math.inf, "above 0; greedy is do_sample=False"),
            "top_k": (lambda k: k >= 0 and isinstance(k, int), "0 (off) or more"),
            "top_p": (lambda p: 0 < p <= 1, "in (0, 1]"),
            "min_p": (lambda p: 0 <= p <= 1, "in [0, 1]"),
            "repetition_penalty": (lambda x: 0 < x < math.inf, "above 0; 1 is off"),
            "num_return_sequences": (several, "1 or more; several need do_sample=True"),
        }
        for name, (holds, right) in rules.items():
            value = getattr(self, name)
            require(isinstance(value, int | float) and holds(value), f"{name}={value!r}: must be {right}")
        known = isinstance(self.generator, torch.Generator | None)
        require(known, f"generator={self.generator!r}: must be a torch.Generator")
        given = [] if self.logits_processor is None else self.logits_processor
        self.processors = list(given) if isinstance(given, list | tuple) else [given]
        called = all(callable(each) for each in self.processors)
        require(called, f"logits_processor={given!r}: must be a function of ids and scores, or a list of them")

    def process(self, logits: Tensor, drafts: Tensor, gained: "Continuation") -> Tensor:
        """Logits (B, T, vocab) as penalty and processors leave them; row t stands behind t of the drafts."""
        if not self.processors and self.repetition_penalty == 1:
            return logits
        (B, T, vocab), logits = logits.shape, upcast(logits).clone()
        for rows, ids in gained.histories():
            for t in range(T):
                before, scores = torch.cat([ids, drafts[rows, :t]], 1), logits[rows, t]  # of one row, or of all
                real = F.pad(gained.real[rows], (0, before.shape[1] - gained.real.shape[1]), value=True)
                seen = torch.zeros_like(scores).scatter_add(-1, before, real.to(scores.dtype)) > 0
                less = torch.where(scores > 0, scores / self.repetition_penalty, scores * self.repetition_penalty)
                scores = scores.where(~seen, less).expand(B, -1)
                for each in self.processors:  # one row alone stands at its place among its like
                    scores = each(before.expand(B, -1), scores)
                    check_tensor("what logits_processor returns", scores, FLOATS, (B, vocab))
                logits[rows, t] = scores[rows].to(logits)
        return logits

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities that a token is drawn from, logits (..., vocab) -> the same; greedy: all on one."""
        if not self.do_sample:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(upcast(logits).dtype)
        # In float32 extreme temperatures are 0 or infinite, and great logits over a low one too.
        heat, logits = min(max(self.temperature, 1e-9), 1e9), upcast(logits)
        probs = ((logits - logits.amax(-1, keepdim=True)) / heat).softmax(-1)
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

    def draw(self, probs: Tensor) -> Tensor:
        """A token from each distribution, normalised or not; (B, vocab) -> (B)."""
        if not self.do_sample:
            return probs.argmax(-1)
        try:
            return torch.multinomial(probs, 1, generator=self.generator).squeeze(-1)
        except RuntimeError as error:
            raise ValueError(f"the logits cannot be sampled from, is one NaN? ({error})") from None

    def accept(self, drafts: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
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

def special_id(model: PreTrainedModel, name: str) -> Any:
    """An id of generation_config.json, else of config.json."""
    found = getattr(model.generation_config, name, None)
    return getattr(model.config, name) if found is None else found

def stop_ids(model: PreTrainedModel, eos_token_id: int | list[int] | None) -> list[int]:
    """End-of-sequence ids as a list: those given, else the model's; -1 stands for none."""
    given = special_id(model, "eos_token_id") if eos_token_id is None else eos_token_id
    ids = given if isinstance(given, list | tuple) else [] if given is None else [given]
    whole = all(type(token) is int for token in ids)
    require(whole, f"eos_token_id={given!r}: must be a token id, a list of them, or None")
    return [] if -1 in ids else list(ids)

class Continuation:
    """The tokens that each row of ids (B, T) gains, up to `most`; a column is emitted once all reach it."""

    def __init__(self, ids: Tensor, real: Tensor, most: int, stops: list, pad: int | None, sinks: tuple) -> None:
        self.ids, self.real, self.most, self.stops = ids, real, most, stops
        self.streamer, self.statistics = streamer, _ = sinks
        require(streamer is None or callable(streamer), f"{streamer=}: must be a function of token ids")
        self.pad = (stops or [0])[0] if pad is None else pad
        self.rows, self.columns, self.finished = [[] for _ in ids], [], [most == 0] * len(ids)

    def add(self, drafts: Tensor, accepted: Tensor, token: Tensor) -> None:
        """Append each row's accepted drafts (B, T-1) and the token behind them, up to its end."""
        gains = zip(self.rows, drafts.tolist(), accepted.tolist(), token.tolist(), strict=True)
        for i, (row, drafted, count, behind) in enumerate(gains):
            if drafted and not self.finished[i] and self.statistics is not None:
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

    def histories(self) -> Iterator[tuple[slice, Tensor]]:
        """Prompts and gains, (B, n); where drafts made rows unlike in length, row by row, (1, n)."""
        longest, ends = max(map(len, self.rows)), zip(self.rows, self.finished, strict=True)
        alike = all(end or len(row) == longest for row, end in ends)
        size = len(self.rows) if alike else 1
        for i in range(0, len(self.rows), size):
            rows = self.rows[i : i + size]
            if alike:  # nobody looks at what stands behind a row's end
                rows = [row + row[-1:] * (longest - len(row)) for row in rows]
            gains = torch.tensor(rows, dtype=self.ids.dtype, device=self.ids.device)
            yield slice(i, i + size), torch.cat([self.ids[i : i + size], gains], 1)

def slots_of_depth(k: int, known: Tensor) -> Maybe:
    """Documents (see LatentCache) of depth k's rows, whose first stands at the k-th real token.

        known    0 1 1 0 1      a prompt padded on the left, and a draft that fell
        depth 1  0 1 1 0 1
        depth 2  0 0 1 0 1      known (B, S), True where the cache holds a token -> (B, S), or None: all
    """
    rows = known & (known.cumsum(-1) >= k)
    return None if rows.all() else rows.long()

class Drafter:
    """The MTP modules at inference: draft k is what depth k says behind the last token known.

        slot          0     1     2     3     4     e is the newest token, which the main model has not read
        main cache    a     b     c     d           a>b: a row made from the state at a and token b
        depth 1      a>b   b>c   c>d   d>e          its newest row drafts f
        depth 2            a>c   b>d   c>e   d>f    its newest row drafts g; d>f was made from a draft:
                                                    it is cropped, and made again in the next call
    Past the last module, that module goes on from its own output.
    """

    def __init__(self, model: DeepseekV3ForCausalLM, sampling: Sampling, most_drafts: int, capacity: int) -> None:
        self.model, self.sampling, self.blocks = model, sampling, model.mtp_blocks[:most_drafts]
        self.caches = [LatentCache(capacity) for _ in self.blocks]
        self.above = {}  # by depth, the last row to stay of the depth above

    def draft(
        self, window: Tensor, hidden: Tensor, known: Tensor, last: Tensor, token: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
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
            cache.documents = slots_of_depth(k, known)
        return torch.cat(drafts, 1), torch.cat(q, 1)

    def run(self, i: int, hidden: Tensor, tokens: Tensor, mask: Maybe) -> Tensor:
        """New rows of module i: hidden (B, T, D) with the embeddings of tokens (B, T) -> (B, T, D)."""
        cache, main = self.caches[i], self.model.model
        positions, documents = locate(mask, None, cache, hidden)
        context = main.context(positions, documents, None, cache)
        hidden, *_ = main.run(self.blocks[i], context, hidden, main.embed_tokens(tokens))  # (B, T, D)
        cache.advance(documents, tokens.shape[1])
        return hidden.to(tokens.device)

PREFILL = 4096  # tokens of a prompt that are read at once

@dataclass
class Prompt:
    """What generate continues: tokens (B, T) or embeddings (B, T, D), their padding, a cache of the first."""

    input_ids: Maybe
    attention_mask: Maybe = None
    inputs_embeds: Maybe = None
    cache: LatentCache | None = None

    def check(self, config: DeepseekV3Config, pad: int | None, stops: list[int]) -> None:
        """ValueError for what cannot be continued. Without tokens, input_ids are (B, 0) afterwards.

        Where nobody said what pad ids are, they are taken for padding, as in transformers.
        """
        ids, embeds, held = self.input_ids, self.inputs_embeds, check_cache(self.cache)
        check_inputs(ids if embeds is None else None, embeds, config)
        B, T = (ids if embeds is None else embeds).shape[:2]
        if ids is not None:
            check_tensor("input_ids", ids, IDS, (B, T))
        self.input_ids = ids = (embeds.new_empty(B, 0) if ids is None else ids).long()
        require(held < T, f"past_key_values holds {held} tokens of {T}: one or more must be left to read")
        if self.attention_mask is not None:
            check_tensor("attention_mask", self.attention_mask, MASKS, (B, T))
        elif pad is not None and pad not in stops and not held and bool((ids == pad).any()):
            warnings.warn(f"no attention_mask: pad_token_id={pad} in input_ids is taken for padding", stacklevel=4)
            self.attention_mask = (ids != pad).long()

    def read(self, model: DeepseekV3ForCausalLM, rows: int, room: int) -> tuple[Tensor, LatentCache]:
        """The forward over it -> states (B * rows, T, D), and the cache, with room for so many more."""
        cache, embeds = self.cache or LatentCache(self.input_ids.shape[1] + room), self.inputs_embeds
        given = {"input_ids": self.input_ids} if embeds is None else {"inputs_embeds": embeds}
        new = {name: x[:, cache.length :] for name, x in given.items()}
        inputs = model.prepare_inputs_for_generation(**new, attention_mask=self.attention_mask)
        new = {name: inputs.pop(name) for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None}
        mask, states, (T, *_) = inputs.pop("attention_mask", None), [], [x.shape[1] for x in new.values()]
        for start in range(0, T, PREFILL):  # in parts, so that what attention needs stays bounded
            part = {name: x[:, start : start + PREFILL] for name, x in new.items()}
            seen = None if mask is None else mask[:, : cache.length + min(PREFILL, T - start)]
            states.append(model.model(**part, **inputs, attention_mask=seen, past_key_values=cache).last_hidden_state)
        hidden = torch.cat(states, 1)  # (B, T, D)
        if rows > 1:
            hidden, cache = hidden.repeat_interleave(rows, 0), cache.repeat_interleave(rows)
        return hidden, cache

def aligned(hidden: Tensor, tokens: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """States (B, T, D) and tokens (B, T), padded to the slots of the cache -> the same, known (B, S).

    MTP modules leave out the slots whose token or state is not at hand: embeddings, or what a call
    before has read. `real` (B, S) is False at padding.
    """
    S, held = real.shape[1], min(hidden.shape[1], tokens.shape[1])
    known = real & (torch.arange(S, device=real.device) >= S - held)
    return F.pad(hidden, (0, 0, S - hidden.shape[1], 0)), F.pad(tokens, (S - tokens.shape[1], 0)), known

def decode(
    model: DeepseekV3ForCausalLM, prompt: Prompt, sampling: Sampling, most_drafts: int, gained: Continuation
) -> None:
    """Make `gained` as long as it gets: draft, verify all drafts in one pass, forget those that fell."""
    rows, room = sampling.num_return_sequences, min(gained.most, 4096)  # an early end is likely before
    hidden, cache = prompt.read(model, rows, room)  # (B, T, D)
    drafter = Drafter(model, sampling, most_drafts, cache.capacity)
    documents = torch.ones(len(hidden), cache.length, dtype=torch.long, device=gained.ids.device)
    documents = documents if cache.documents is None else cache.documents  # (B, S)
    known, window, start = documents > 0, gained.ids, cache.length  # (B, S), (B, T)
    if most_drafts:
        hidden, window, known = aligned(hidden, window, known)
    last = last_real_token(hidden, None, documents, None)  # (B)
    newest = hidden[torch.arange(len(last), device=last.device), last].unsqueeze(1)
    logits = model.lm_head(newest)  # (B, 1, vocab)
    drafts, q = none = gained.ids[:, :0], logits[:, :0]
    while True:
        p = sampling.distribution(sampling.process(logits, drafts, gained))
        accepted, token = sampling.accept(drafts, q, p)
        gained.add(drafts, accepted, token)
        if all(gained.finished):
            if most_drafts:  # what fell is no part of the text: rows of their own lengths keep the prompt
                cache.crop(start + (max(len(gained.rows[0]), 1) - 1 if len(known) == 1 else 0))
            return
        if drafts.shape[1]:
            # Rejected slots stay in the cache as masked holes. Each step takes as many slots as its
            # best row gains tokens, so a row holds at most min(B, drafts + 1) slots per token.
            last = accepted.masked_fill(torch.tensor(gained.finished, device=last.device), 0)  # (B)
            stands = torch.arange(int(last.max()) + 1, device=last.device) <= last.unsqueeze(1)
            known = torch.cat([known, stands], 1)
            documents = torch.cat([documents, documents.amax(-1, keepdim=True) * stands], 1)
            cache.crop(known.shape[1])
            cache.documents = None if (documents == 1).all() else documents
            window, hidden = window[:, : stands.shape[1]], hidden[:, : stands.shape[1]]
        count = min(most_drafts, gained.most - 1 - min(map(len, gained.rows)))
        drafts, q = drafter.draft(window, hidden, known, last, token, count) if count else none
        window = torch.cat([token.unsqueeze(1), drafts], 1)
        hidden = model.model(window, past_key_values=cache).last_hidden_state
        logits = model.lm_head(hidden)

@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every submodule is in eval mode while the block runs, and in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

@torch.no_grad()
def generate(
    model: DeepseekV3ForCausalLM, prompt: Prompt, max_new_tokens: int, sampling: Sampling,
    eos_token_id: int | list[int] | None, drafts: tuple, sinks: tuple,
) -> Tensor:  # fmt: skip
    """DeepseekV3ForCausalLM.generate, whose settings come grouped by what they are for."""
    stops, pad = stop_ids(model, eos_token_id), special_id(model, "pad_token_id")
    prompt.check(model.config, pad, stops)
    whole = type(max_new_tokens) is int and max_new_tokens >= 0
    require(whole, f"{max_new_tokens=}: must be a whole number, 0 or more")
    ids, mask = prompt.input_ids, prompt.attention_mask
    real = torch.ones_like(ids) if mask is None else mask[:, : ids.shape[1]]
    ids, real = (x.repeat_interleave(sampling.num_return_sequences, 0) for x in (ids, real.bool()))
    gained = Continuation(ids, real, max_new_tokens, stops, pad, sinks)
    use_mtp, num_draft_tokens = drafts
    hint = "train one with num_nextn_predict_layers=1, or load a checkpoint that has them"
    require(model.mtp_blocks or not use_mtp, f"use_mtp=True, but the model has no MTP modules: {hint}")
    possible = num_draft_tokens is None or type(num_draft_tokens) is int and num_draft_tokens >= 1 and use_mtp
    require(possible, f"{num_draft_tokens=}, {use_mtp=}: must be 1 or more, with use_mtp=True")
    most_drafts = num_draft_tokens or (len(model.mtp_blocks) if use_mtp else 0)
    with evaluating(model):
        decode(model, prompt, sampling, most_drafts, gained)
    return torch.cat([ids, *(column.unsqueeze(1) for column in gained.columns)], 1)

# ---- 12. Checkpoints, in the released layout ----------------------------------------------------

# Keys that have one value in the whole family; others are refused.
FIXED_KEYS = {"hidden_act": "silu", "attention_dropout": 0.0, "scoring_func": "sigmoid"}
FIXED_KEYS |= {"topk_method": "noaux_tc"}

# The model types that compute this very model: the prefix of their classes, and what other fields
# are where a config.json leaves them out.
TWINS = {
    "deepseek_v3": ("DeepseekV3", {}),
    "kimi_k2": ("DeepseekV3", {}),
    "glm4_moe_lite": ("Glm4MoeLite", {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
    "youtu": ("Youtu", {"tie_word_embeddings": True}),  # dense layers alone
}

def twin_values(kind, given, values):
    """Into `given`, what GLM and Youtu say otherwise, or leave to be computed; `values` are the defaults."""
    if kind == "glm4_moe_lite" and given.get("mlp_layer_types"):
        types = given.pop("mlp_layer_types")
        given["first_k_dense_replace"] = dense = (*types, "sparse").index("sparse")
        ordered = types == ["dense"] * dense + ["sparse"] * (len(types) - dense)
        require(ordered, f"mlp_layer_types={types!r}: must be 'dense' layers, then 'sparse' ones")
    if kind == "youtu":
        given["first_k_dense_replace"] = given.get("num_hidden_layers", values["num_hidden_layers"])
        width = given.get("hidden_size", values["hidden_size"])
        if given.get("initializer_range") is None and isinstance(width, int) and width > 0:
            given["initializer_range"] = 2 / (5 * width) ** 0.5
        if given.get("embedding_initializer_range") is None and "initializer_range" in given:
            given["embedding_initializer_range"] = 2 * given["initializer_range"]

def config_values(given):
    """The fields of a config and `extra`, from keywords in any of the spellings in use."""
    kind = given.get("model_type")
    right = f"{', '.join(TWINS)}: other models compute something else"
    require(kind in (None, *TWINS), f"model_type={kind!r}: must be one of {right}")
    values = {field.name: field.default for field in dataclasses.fields(DeepseekV3Config)}
    values |= {"rope_scaling": dict(YARN_V3)} if kind is None else {"num_nextn_predict_layers": 0} | TWINS[kind][1]
    if "rope_parameters" in given:  # transformers 5 has both RoPE settings in one dict
        rope = given.pop("rope_parameters") or {}
        require(isinstance(rope, dict), f"rope_parameters={rope!r}: must be a dict")
        apart = ("rope_theta", "partial_rotary_factor")
        given["rope_scaling"] = {key: value for key, value in rope.items() if key not in apart} or None
        given |= {key: rope[key] for key in apart if key in rope}
    if "num_mtp_layers" in given:  # transformers' name
        given["num_nextn_predict_layers"] = given.pop("num_mtp_layers")
    if isinstance(given.get("id2label"), dict):
        values["num_labels"] = len(given["id2label"])
    if given.get("num_key_value_heads") is None:
        given["num_key_value_heads"] = given.get("num_attention_heads", values["num_attention_heads"])
    twin_values(kind, given, values)
    values = {name: given.pop(name, default) for name, default in values.items()}
    scaling = values["rope_scaling"]
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "default":
        values["rope_scaling"] = None
    return values | {"extra": given}

def layer_types(config):
    """How GLM's config.json tells dense layers, {} for other models."""
    dense, L = config.first_k_dense_replace, config.num_hidden_layers
    types = ["dense"] * min(dense, L) + ["sparse"] * (L - dense)
    return {"mlp_layer_types": types} if config.kind == "glm4_moe_lite" else {}

def check_overrides(overrides):
    """ValueError for a keyword of from_pretrained that is no field of the config."""
    hints = {"torch_dtype": "use dtype", "device": "use device_map", "token": "nothing is downloaded"}
    hints |= {"attn_implementation": "it is chosen by itself", "trust_remote_code": "no code of the folder runs"}
    for name in overrides.keys() - DeepseekV3Config.__dataclass_fields__.keys():
        raise ValueError(f"from_pretrained({name}=…): {hints.get(name, 'no argument, no field of the config')}")

def load_config(cls, path, overrides):
    """A config from a folder's config.json, or from that file."""
    path = existing(path)
    check_overrides(overrides)
    file = path / "config.json" if os.path.isdir(path) else path
    return cls(**({"model_type": "deepseek_v3"} | read_json(file) | overrides))

def check_config(config):
    """ValueError for a config that cannot work, naming field, value and what would be right."""
    for field in dataclasses.fields(config):
        check_field(field.name, field.type, getattr(config, field.name))
    heads, E, G = config.num_attention_heads, config.n_routed_experts, config.n_group
    reach = config.topk_group * (E // G)
    fp8 = config.extra.get("quantization_config") or QUANTIZATION
    released = isinstance(fp8, dict) and QUANTIZATION.items() <= (QUANTIZATION | fp8).items()
    rules = {
        "num_key_value_heads": (config.num_key_value_heads == heads, f"{heads}, as other heads"),
        "qk_rope_head_dim": (config.qk_rope_head_dim % 2 == 0, "even: RoPE turns pairs"),
        "n_routed_experts": (E % G == 0, f"divisible by n_group={G}"),
        "n_group": (G == 1 or E // G >= 2, "1, or leave 2 experts or more per group"),
        "topk_group": (config.topk_group <= G, f"at most n_group={G}"),
        "num_experts_per_tok": (config.num_experts_per_tok <= reach, f"at most {reach}"),
        "rope_theta": (config.rope_theta > 1, "above 1"),
        "quantization_config": (released, f"as released, {QUANTIZATION}"),
    }
    others = {"moe_layer_freq": 1, "rope_interleave": True, "partial_rotary_factor": 1.0}
    for name, only in (FIXED_KEYS | others).items():
        rules[name] = config.extra.get(name, only) == only, f"{only!r}, as in this whole family"
    values = vars(config) | config.extra
    for name, (holds, right) in rules.items():
        require(holds, f"{name}={values.get(name)!r}: must be {right}")
    if config.rope_scaling is not None:
        check_yarn(config.rope_scaling)

LARGEST = 10**6  # of whole numbers: sizes beyond it overflow in torch
MAY_BE_ZERO = ("num_nextn_predict_layers", "first_k_dense_replace", "n_shared_experts")
MAY_BE_ZERO += ("initializer_range", "mtp_loss_weight", "balance_loss_weight")

def check_field(name, kind, value):
    """The type and the bounds of one field."""
    given, boolean = f"{name}={value!r}: must be", isinstance(value, bool)
    require(isinstance(value, kind) and boolean == (kind is bool), f"{given} {getattr(kind, '__name__', kind)}")
    if name.endswith("token_id"):
        ids = value if isinstance(value, list) else [] if value is None else [value]
        valid = all(type(token) is int and -1 <= token < 2**31 for token in ids)
        require(valid, f"{given} a token id or None, eos_token_id also a list of them")
    elif isinstance(value, int | float) and not boolean:
        zero, whole = name in MAY_BE_ZERO, kind != int | float and name != "max_position_embeddings"
        require(value > 0 or zero and value == 0, f"{given} {'0 or more' if zero else 'above 0'}")
        most = 1000 if name.endswith("_layers") else LARGEST if whole else 1e12
        require(value <= most, f"{given} at most {most:,.0f}")

def check_yarn(scaling):
    """ValueError for YaRN settings that cannot work; all but two may be left open, as None or 0."""
    kind = scaling.get("rope_type", scaling.get("type"))
    require(kind == "yarn", f"rope_scaling={scaling!r}: its type must be 'yarn' or 'default'")
    require(scaling.get("truncate", True), "rope_scaling['truncate']=False: must be true, as in this family")
    needed = ("factor", "original_max_position_embeddings")
    for key in (*needed, "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"):
        value = scaling.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool) and 1e-6 <= value <= 1e9
        left_open = key not in needed and value in (None, 0)
        require(number or left_open, f"rope_scaling[{key!r}]={value!r}: must be a number in 1e-6..1e9")

HUB_ID = r"[\w.-]+/[\w.-]+"

def as_path(directory):
    """A Path; ValueError for what names no folder."""
    names = isinstance(directory, str | os.PathLike) and str(directory) != ""
    require(names, f"directory={directory!r}: must be the path of a folder")
    return Path(directory)

def existing(path):
    """The Path of what is to be read; FileNotFoundError says how a hub id becomes a folder."""
    if not os.path.exists(as_path(path)):
        hub = f"; of the hub, download it first: hf download {path} --local-dir FOLDER"
        raise FileNotFoundError(f"{path}: no such folder{hub if re.fullmatch(HUB_ID, str(path)) else ''}")
    return as_path(path)

def read_json(path):
    """The object in a file; FileNotFoundError or ValueError names the file."""
    if not os.path.isfile(path):  # Path.is_file raises OSError for a name that is too long
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    require(isinstance(content, dict), f"{path}: holds {type(content).__name__}, must be a JSON object")
    return content

def write_json(path, content):
    """Write a file in one step: a reader sees the old one or the new one."""
    text, beside = json.dumps(content, indent=2) + "\n", path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)

SCALE = "_scale_inv"  # what the scales of a weight are called, behind its name
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
QUANTIZATION |= {"activation_scheme": "dynamic"}
KINDS = {"F8_E4M3": FP8, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}

def blocks_of(shape):
    """Shape of the scales of a weight; (576, 7168) -> (5, 56)."""
    return (*shape[:-2], *(-(-size // BLOCK) for size in shape[-2:]))

def quantise(weight, rows=BLOCK):
    """The reverse of dequantise: FP8, and scales that map the largest of each block to 448, FP8's largest.

    Blocks are rows x 128: 128 x 128 of a weight, 1 x 128 of activations and gradients (§3.3.2).
    """
    (*_, height, width), weight = weight.shape, weight.detach().float()
    padded = F.pad(weight, (0, -width % BLOCK, 0, -height % rows))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, rows))
    scale = blocks.abs().amax((-3, -1)) / 448
    scale = torch.where(scale == 0, 1.0, scale)  # a block of zeros
    codes = (blocks / scale[..., :, None, :, None]).clamp(-448, 448).to(FP8)
    return codes.flatten(-4, -3).flatten(-2)[..., :height, :width].contiguous(), scale

def released_in_fp8(name, tensor):
    """Whether the release has a weight in FP8: the matrices of attention and feed-forward."""
    return tensor.ndim > 1 and "_proj" in name and "eh_proj" not in name

def holds_fp8(model):
    return any(parameter.dtype == FP8 for parameter in model.parameters())

GENERATION = "generation_config.json"
TOKENIZER_FILES = ("tokenizer*", "tokenization_*.py", "tiktoken.model", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES += ("vocab.json", "merges.txt", "chat_template*")
INDEX, SINGLE, SHARD = "model.safetensors.index.json", "model.safetensors", r"[^/\\]+\.safetensors"
STAGING, JOURNAL = ".saving", ".saving.json"  # of a save in progress: its files, and the names they will get

class Checkpoint:
    """The tensors of a folder by name; a file is opened when something in it is asked for."""

    def __init__(self, directory):
        self.directory, self.found, self.newest = existing(directory), {}, (None, None)
        self.config = DeepseekV3Config.from_pretrained(directory)  # another kind of model is said first
        if os.path.isfile(self.directory / SINGLE):  # it goes before an index, as in transformers
            whole = self.open(SINGLE)
            self.files, metadata = dict.fromkeys(whole.keys(), SINGLE), whole.metadata()
        elif os.path.isfile(self.directory / INDEX):
            index = read_json(self.directory / INDEX)
            self.files, metadata = index.get("weight_map"), index.get("metadata")
            for name, file in self.files.items() if isinstance(self.files, dict) else [("", None)]:
                what = f"{self.directory / INDEX}: weight_map[{name!r}]={file!r}"
                require(re.fullmatch(SHARD, str(file)), f"{what}: must be a .safetensors file beside it")
        else:
            raise FileNotFoundError(f"{directory}: no {SINGLE}, no {INDEX} (pickles are not read)")
        # transformers saves a model without a head under names that begin inside of `model.`
        self.within = "model." if "embed_tokens.weight" in self.files else ""
        self.files = {self.within + name: file for name, file in self.files.items()}
        # Behind a save that was killed, config.json may be an older one: the weights have their own.
        if os.path.isfile(self.directory / JOURNAL) and isinstance(metadata, dict) and "config" in metadata:
            self.config = DeepseekV3Config(**json.loads(metadata["config"]))

    def open(self, file):
        """A file. Only the newest stays open, since its pages stay in memory as long as it does."""
        if self.newest[0] != file:
            path = self.directory / file
            if not os.path.isfile(path):
                raise FileNotFoundError(f"{path}: no such file")
            try:
                self.newest = file, safe_open(path, framework="pt")  # checks names, sizes and offsets
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
        return self.newest[1]

    def find(self, name):
        """Dtype and shape of a tensor; ValueError if its file and the index disagree."""
        if name not in self.found:
            file, place = self.open(self.files[name]), self.files[name]
            listed = {each for each, where in self.files.items() if where == place}
            inside = {self.within + each for each in file.keys()}  # noqa: SIM118 (no dict)
            for odd in sorted(listed ^ inside):
                raise ValueError(f"{self.directory / place}: {INDEX} disagrees with it about {odd}")
            for each in listed:
                there = file.get_slice(each.removeprefix(self.within))
                self.found[each] = KINDS.get(there.get_dtype(), there.get_dtype()), tuple(there.get_shape())
        return self.found[name]

    def read(self, name):
        """A tensor, its numbers still in the file that it is of."""
        return self.open(self.files[name]).get_tensor(name.removeprefix(self.within))

    def copy_to(self, name, weight, scale):
        """Fill `weight` with a tensor, and `scale` with its scales; without `scale`, FP8 is dequantised."""
        given = self.read(name)
        if given.dtype == FP8:
            scales = self.read(name + SCALE).float()
            require(scales.isfinite().all(), f"{name + SCALE}: holds a NaN or an infinity")
            if scale is None:
                given = dequantise(given.to(weight.device), scales.to(weight.device), weight.dtype)
            else:
                scale.copy_(scales)
        weight.copy_(given)

def owner(model, name):
    """The module that holds the parameter or buffer of a dotted name, and its name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf

def find_tensor(model, name):
    """The parameter or buffer of that dotted name."""
    return getattr(*owner(model, name))

WRAPPERS = r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."  # of torch, around a part

def released_names(model, depth=None):
    """{parameter name: {name of a tensor in a checkpoint: the part of the parameter that it is}}.

    A stack of experts is one tensor for each; any other parameter is one whole tensor, `...`.
    `depth`: decoder layers of the checkpoint, if the model has only the first of them.
    """
    names, kept = {}, model.config.num_hidden_layers
    prefix = "model." if isinstance(model, DeepseekV3Model) else ""
    biases = [item for item in model.named_buffers() if item[0].endswith("e_score_correction_bias")]
    for name, tensor in (*model.named_parameters(), *biases):
        *path, leaf = re.sub(WRAPPERS, "", prefix + name).split(".")
        if path[1:2] == ["layers"] and int(path[2]) >= kept:  # an MTP module: it stands behind all layers
            path[2] = str(int(path[2]) + (depth or kept) - kept)
        if not name.endswith(SCALE):
            head, experts = ".".join(path), range(len(tensor) if tensor.ndim == 3 else 0)
            names[name] = {f"{head}.{e}.{leaf}.weight": e for e in experts} or {f"{head}.{leaf}": ...}
    return names

def mtp_copies(model, depth=None):
    """{name: name} of the embedding and head that a checkpoint repeats in each MTP module.

    One that is read, of `depth` layers, may also hold the head that is tied to the embedding.
    """
    copies, first, head = {}, depth or model.config.num_hidden_layers, "lm_head.weight"
    if model.config.tie_word_embeddings:
        head = "model.embed_tokens.weight"
        copies |= {"lm_head.weight": head} if depth and hasattr(model, "lm_head") else {}
    for layer in range(first, first + len(getattr(model, "mtp_blocks", ()))):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"model.layers.{layer}.shared_head.head.weight"] = head
    return copies

def load_pretrained(cls, directory, device_map, dtype, num_hidden_layers, max_memory, overrides):
    """PreTrainedModel.from_pretrained: names and shapes are checked before anything is loaded."""
    known = {str(kind).removeprefix("torch."): kind for kind in KINDS.values() if kind != FP8}
    right = f"must be None, 'auto' or {', '.join(known)}"
    require(dtype in (None, "auto", *known, *known.values()), f"{dtype=}: {right}")
    dtype = known.get(str(dtype).removeprefix("torch."))
    check_overrides(overrides)
    stored = Checkpoint(directory)
    with torch.device("meta"):
        model = cls(config_to_load(cls, stored, dtype, num_hidden_layers, overrides))
    depth = stored.config.num_hidden_layers
    sources = released_names(model, depth)
    check_coverage(model, stored, sources, stored.config)
    for double, of in mtp_copies(model, depth).items():
        both = (stored.read(name).view(torch.uint8) for name in (double, of) if double in stored.files)
        same = double not in stored.files or torch.equal(*both)
        require(same, f"{double}: differs from {of}, of which it must be a copy")
    kinds = held_kinds(model, sources, stored, dtype)
    sizes = {name: held_bytes(find_tensor(model, name), kind) for name, kind in kinds.items()}
    devices = assign_devices(model, sizes, device_map, max_memory)
    for name, pieces in tqdm(sources.items(), desc="loading", disable=None):  # silent without a terminal
        weight, scale = hold(model, name, kinds[name], devices[name])
        for piece, part in pieces.items():
            if piece in stored.files:
                stored.copy_to(piece, weight[part], None if scale is None else scale[part])
            else:  # a new head
                weight.normal_(0, model.config.initializer_range if weight.ndim > 1 else 0)
        stored.newest = (None, None)  # closed, a file lets go of the pages that were read
    model.tie_weights()
    model.base_model.rotary_emb.to(model.device)  # positions, and so angles, are made where the embedding is
    if (stored.directory / GENERATION).is_file():
        vars(model.generation_config).update(read_json(stored.directory / GENERATION))
    files = (path for pattern in TOKENIZER_FILES for path in stored.directory.glob(pattern) if path.is_file())
    model.tokenizer_files = {path.name: path.read_bytes() for path in files}
    return model.eval()

def config_to_load(cls, stored, dtype, kept, overrides):
    """The stored config with `overrides`, cut to `kept` layers and to the MTP modules that are there."""
    config = DeepseekV3Config(**(stored.config.to_dict() | overrides))
    depth, mtp = config.num_hidden_layers, config.num_nextn_predict_layers
    possible = kept is None or type(kept) is int and 1 <= kept <= depth
    require(possible, f"num_hidden_layers={kept!r}: must be in 1..{depth}, as stored")
    config.num_hidden_layers = kept or depth
    if config.first_k_dense_replace <= depth:  # MTP modules keep experts
        config.first_k_dense_replace = min(config.first_k_dense_replace, config.num_hidden_layers)
    layers = {".".join(name.split(".")[:3]) for name in stored.files}
    held = next(k for k in range(mtp + 1) if k == mtp or f"model.layers.{depth + k}" not in layers)
    if held < mtp and issubclass(cls, DeepseekV3ForCausalLM):
        warnings.warn(f"{stored.directory}: announces {mtp} MTP modules, but holds {held}", stacklevel=4)
        config.num_nextn_predict_layers = held
    if dtype is not None:
        config.extra.pop("quantization_config", None)
    return config

def check_coverage(model, stored, sources, whole):
    """ValueError unless every tensor of the model is stored, in its shape, and nothing else is."""
    wanted, depth = {}, whole.num_hidden_layers
    stacks = sorted({found[0] for name in stored.files if (found := re.search(r"experts\.[a-z_]+$", name))})
    hint = "a state_dict; save its model by save_pretrained, in transformers or here"
    require(not stacks, f"{stored.directory}: experts are stacked, as {', '.join(stacks)}: {hint}")
    for name, pieces in sources.items():
        if name.startswith("score.") and not pieces.keys() & stored.files.keys():
            warnings.warn(f"{name}: not in the checkpoint, newly initialised", stacklevel=4)
        else:
            wanted |= dict.fromkeys(pieces, tuple(find_tensor(model, name).shape[-2:]))
    wanted |= {n: wanted[of] for n, of in mtp_copies(model, depth).items() if n in stored.files}
    in_fp8 = (name for name in wanted if name in stored.files and stored.find(name)[0] == FP8)
    scales = {name + SCALE: blocks_of(wanted[name]) for name in in_fp8 if len(wanted[name]) > 1}
    wanted |= scales
    wrong = [f"{name}: missing" for name in wanted.keys() - stored.files.keys()]
    for name in wanted.keys() & stored.files.keys():
        (kind, found), shape = stored.find(name), wanted[name]
        if kind not in KINDS.values() or kind == FP8 and name + SCALE not in scales:
            wrong.append(f"{name}: {kind}, must be BF16, F16, F32, F64 or, a matrix, F8_E4M3")
        elif found != shape:
            wrong.append(f"{name}: of shape {found}, must be {shape}")
    layers = [f"model.layers.{i}." for i in range(depth + max(whole.num_nextn_predict_layers, 1))]
    unused = [layer for layer in layers if not any(name.startswith(layer) for name in wanted)]
    unused += [] if isinstance(model, DeepseekV3ForCausalLM) else ["lm_head."]
    odd = (name for name in stored.files.keys() - wanted.keys() if not name.startswith(tuple(unused)))
    wrong += [f"{name}: unexpected" for name in odd if not name.endswith("rotary_emb.inv_freq")]
    more = f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""
    require(not wrong, f"{stored.directory}: {'; '.join(sorted(wrong)[:10])}{more}")

def held_kinds(model, sources, stored, dtype=None):
    """{name: dtype it is held in}: `dtype`, or the widest stored; FP8 where there is room for scales."""
    kinds = {}
    for name, pieces in sources.items():
        module, leaf = owner(model, name)
        found = pieces.keys() & stored.files.keys() or {"model.norm.weight"}  # a new head
        kind = dtype or max((stored.find(piece)[0] for piece in found), key=lambda kind: kind.itemsize)
        kind = torch.bfloat16 if kind == FP8 and not hasattr(module, leaf + SCALE) else kind
        kinds[name] = torch.float32 if leaf == "e_score_correction_bias" else kind
    return kinds

def held_bytes(tensor, kind):
    """Bytes of a tensor held in a dtype, with its scales."""
    return tensor.numel() * kind.itemsize + (4 * math.prod(blocks_of(tensor.shape)) if kind == FP8 else 0)

def hold(model, name, kind, device):
    """Give a parameter or buffer memory of its own -> it, to be filled, and its scales or None."""
    module, leaf = owner(model, name)
    shape, trained = getattr(module, leaf).shape, leaf in module._parameters
    weight, scale = torch.empty(shape, dtype=kind, device=device), None
    if kind == FP8:
        scale = torch.empty(blocks_of(shape), dtype=torch.float32, device=device)
        setattr(module, leaf + SCALE, nn.Parameter(scale, requires_grad=False))
    setattr(module, leaf, nn.Parameter(weight, requires_grad=kind != FP8) if trained else weight)
    return weight, scale

def unit_of(name):
    """What is placed as a whole: a layer, or the module that a parameter outside of layers is in."""
    return re.match(r"(?:model\.)?layers\.\d+|.*(?=\.)", name)[0]

def assign_devices(model, sizes, device_map, max_memory):
    """{tensor name: device} by the rules of from_pretrained."""
    if device_map in ("auto", "balanced", "sequential"):
        units, work = unit_sizes(model, sizes)
        left = {device: size - work for device, size in free_memory(max_memory).items()}
        device_map = plan_devices(units, left, device_map != "sequential")
    elif not isinstance(device_map, dict):
        device_map = {"": "cpu" if device_map is None else device_map}
    for path in device_map.keys() - dict(model.named_modules()).keys() - sizes.keys():
        raise ValueError(f"device_map: {path!r} is no part of the model")
    devices, homes = {}, {}
    for name in sizes:
        covering = [path for path in device_map if not path or f"{name}.".startswith(f"{path}.")]
        require(covering, f"device_map: no path in it covers {name}")
        devices[name] = here = parse_device(device_map[max(covering, key=len)])
        home = homes.setdefault(unit_of(name), here)
        require(home == here, f"device_map: {unit_of(name)} would be split over {home} and {here}")
    return devices

def parse_device(device, asked_by="device_map"):
    """A torch.device; ValueError if there is no such device."""
    try:
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device.type != "cuda":
            torch.empty(0, device=device)
        elif (device.index or 0) >= torch.cuda.device_count():  # asked without starting CUDA
            raise RuntimeError(f"there are {torch.cuda.device_count()} GPUs")
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        why = str(error).split("\n")[0]
        raise ValueError(f"{asked_by}: {device} is no device here ({why})") from None
    return device

def memory_size():
    """Bytes of memory that this process may use: the machine's, or its container's; inf if nobody says."""
    limits, limit = [math.inf], Path("/sys/fs/cgroup/memory.max")  # "max": none
    if hasattr(os, "sysconf"):  # not on Windows
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        limits.append(int(text))
    return min(limits)

def free_memory(max_memory):
    """{device: bytes to use}: as given, or what GPUs and memory have free."""
    if max_memory is None:  # a tenth of each GPU is for activations
        gpus = range(torch.cuda.device_count())
        return {i: torch.cuda.mem_get_info(i)[0] * 9 // 10 for i in gpus} | {"cpu": memory_size() * 0.8}
    require(isinstance(max_memory, dict), f"{max_memory=}: must be a dict, like {{0: '141GB', 'cpu': '64GB'}}")
    return {device: parse_size("max_memory", size) for device, size in max_memory.items()}

def unit_sizes(model, sizes):
    """Bytes of each unit, a layer's with a cache of full length, and what dequantising takes beside."""
    cache = 2 * (model.config.kv_lora_rank + model.config.qk_rope_head_dim)
    units, largest = {}, 0
    for name, size in sizes.items():
        unit, tensor = unit_of(name), find_tensor(model, name)
        full_cache = cache * model.config.max_position_embeddings * ("layers." in unit)
        units[unit] = units.get(unit, full_cache) + size
        if released_in_fp8(name, tensor):
            largest = max(largest, tensor.shape[-2:].numel())
    # Weight and scales of one matrix in float32, and the result: 10 bytes per number for a moment.
    return units, 10 * largest

def plan_devices(sizes, room, balanced=True):
    """{path: device} from {path: bytes} and {device: bytes}, in order; the CPU comes last.

    Balanced: the fullest GPU is as empty as it can be. Otherwise a GPU is filled before the next.
    """
    gpus = [device for device in room if device != "cpu"]

    def fill(cap, devices):
        left = {device: min(size, cap if device in gpus else size) for device, size in room.items()}
        left, queue, plan = left | {None: math.inf}, [*devices, None], {}  # None: behind the last
        for path, size in sizes.items():
            while size > left[queue[0]]:
                queue.pop(0)
            plan[path] = queue[0]
            left[queue[0]] -= size
        return plan

    cap = max((room[gpu] for gpu in gpus), default=0)
    if balanced:  # the smallest that is enough without the CPU, if there is one
        cap = bisect_left(range(cap), True, key=lambda least: None not in fill(least, gpus).values())
    plan = fill(cap, [*gpus, *(room.keys() & {"cpu"})])
    require(None not in plan.values(), f"{sum(sizes.values()):,} bytes do not fit in {room}: add more")
    return plan

def stored_tensors(model, quantize):
    """Each (name, tensor) as a checkpoint holds it: experts apart, scales, MTP's copies."""
    copies = mtp_copies(model)
    for name, pieces in released_names(model).items():
        module, leaf = owner(model, name)
        weight, scale = getattr(module, leaf).detach(), getattr(module, leaf + SCALE, None)
        for piece, part in pieces.items():
            one, its_scale = weight[part], None if scale is None else scale.detach()[part]
            if quantize is not None and scale is None and released_in_fp8(name, weight):
                one, its_scale = quantise(one)
            yield piece, one.contiguous()
            if its_scale is not None:
                finite = its_scale.isfinite().all()
                require(finite, f"{piece}: holds a NaN or an infinity, which FP8 blocks cannot")
                yield piece + SCALE, its_scale.contiguous()
        yield from ((double, weight.clone()) for double, of in copies.items() if of in pieces)

def in_shards(tensors, limit):
    """Dicts of tensors, of at most `limit` bytes or of one tensor."""
    held, size = {}, 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > limit:
            yield held
            held, size = {}, 0
        held[name] = tensor
        size += tensor.nbytes
    yield held

def check_savable(model):
    """ValueError for a model that its config does not describe, or that has no numbers to write."""
    ours = next(kind for kind in type(model).__mro__ if kind.__module__ == __name__)
    L, mtp = model.config.num_hidden_layers, model.config.num_nextn_predict_layers
    def shapes(each):
        names = released_names(each).items()
        return {piece: find_tensor(each, name).shape[-2:] for name, pieces in names for piece in pieces}

    with torch.device("meta"):
        wanted, held = shapes(ours(model.config)), shapes(model)
    odd = sorted(name for name in wanted.keys() | held.keys() if wanted.get(name) != held.get(name))
    if ours is DeepseekV3Model:  # a causal model's own has MTP modules behind its layers
        odd = [name for name in odd if not name.startswith(tuple(f"model.layers.{L + k}." for k in range(mtp)))]
    undo = "take out what was put into the model (of peft: merge_and_unload()), or change its config"
    require(not odd, f"{', '.join(odd[:5])}: not as the config says; {undo}")
    for name, parameter in model.named_parameters():
        require(not parameter.is_meta, f"{name}: on the meta device, without numbers")

def save_pretrained(model, directory, max_shard_size, quantize):
    """PreTrainedModel.save_pretrained: new files get names of their own, and count from one renaming on."""
    limit, directory = parse_size("max_shard_size", max_shard_size), as_path(directory)
    require(quantize in (None, "fp8"), f"{quantize=}: must be None or 'fp8'")
    check_savable(model)
    architecture = type(model).__name__.replace("DeepseekV3", TWINS[model.config.kind][0])
    config = model.config.to_dict() | {"architectures": [architecture]}
    dtype = "dtype" if "dtype" in config else "torch_dtype"  # transformers has used both names
    config[dtype] = str(model.dtype).removeprefix("torch.")
    given = config.pop("quantization_config", None)
    if quantize or holds_fp8(model):
        config["quantization_config"] = given if given and holds_fp8(model) else QUANTIZATION
    metadata = {"format": "pt", "config": json.dumps(config, sort_keys=True)}
    staging, parts = directory / STAGING, []
    staging.mkdir(parents=True, exist_ok=True)
    try:
        for tensors in in_shards(stored_tensors(model, quantize), limit):
            part = staging / str(len(parts))
            save_file(tensors, part, metadata=metadata)
            part.chmod(staging.stat().st_mode & 0o666)  # as the umask wants files to be, unlike safetensors
            parts.append({name: tensor.nbytes for name, tensor in tensors.items()})
        for name, content in model.tokenizer_files.items():
            if not (directory / name).exists():  # another's, or changed since
                (directory / name).write_bytes(content)
        given = {name: value for name, value in vars(model.generation_config).items() if value is not None}
        if given:
            write_json(directory / GENERATION, given)
        put_in_place(directory, parts, config, metadata)
    except SafetensorError as error:
        raise OSError(f"{directory}: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)

def put_in_place(directory, parts, config, metadata):
    """Exchange an older checkpoint for the staged files, in five steps that each leave one whole.

    The one that counts is model.safetensors, else the index. No file of the older one is touched until
    the new one counts, after step 1 or 3; while there is a journal, the config in its metadata counts.
    """
    names, older = [SINGLE], files_of_older(directory)
    if len(parts) > 1:
        numbers = [f"-{i + 1:05d}-of-{len(parts):06d}.safetensors" for i in range(len(parts))]
        choices = ([f"model{'_' * turn}{number}" for number in numbers] for turn in itertools.count())
        names = next(choice for choice in choices if not any((directory / name).exists() for name in choice))
    write_json(directory / JOURNAL, {"weight_map": dict(enumerate([*older, *names]))})
    for i, name in enumerate(names):  # 1
        (directory / STAGING / str(i)).replace(directory / name)
    if len(parts) > 1:  # 2
        places = {name: file for file, part in zip(names, parts, strict=True) for name in part}
        total = {"total_size": sum(sum(part.values()) for part in parts)}
        write_json(directory / INDEX, {"metadata": metadata | total, "weight_map": places})
    (directory / (SINGLE if len(parts) > 1 else INDEX)).unlink(missing_ok=True)  # 3
    write_json(directory / "config.json", config)  # 4
    for name in (*older - {*names}, JOURNAL):  # 5
        (directory / name).unlink(missing_ok=True)

def files_of_older(directory):
    """The shards that the folder's index lists, and files of a save that was killed: no others are ours."""
    found = []
    for name in (INDEX, JOURNAL):
        with suppress(OSError, ValueError, KeyError, AttributeError):  # there is none, or it is broken
            found += read_json(directory / name)["weight_map"].values()
    return {name for name in found if re.fullmatch(SHARD, str(name))} - {SINGLE}

def parse_size(name, size):
    """Bytes of "5GB", "200MB", "16GiB" or a number; ValueError names the argument."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*(?:([KMGT])(I?)B)?", str(size).strip().upper())
    unit = (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " ") if match else 0
    number = float(match[1]) * unit if match else 0
    require(1 <= number < math.inf, f"{name}={size!r}: must be bytes, or like '5GB' or '200MB'")
    return int(number)

# ---- 13. Training — §2.1.2, §4.2 ----------------------------------------------------------------

BOS, EOS = "<|begin_of_sentence|>", "<|end_of_sentence|>"
UNTYPICAL = {"__pycache__", "site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}

def corpus_files(data, out=None):
    """The text files of a file or folder, or of the standard library: files, how many are left out, a digest.

    Left out are hidden files, files that are not UTF-8 text, and what is inside of the folder `out`.
    """
    root, files, left_out = Path(sysconfig.get_path("stdlib") if data is None else data), [], 0
    skipped, digest = UNTYPICAL if data is None else {"__pycache__"}, hashlib.sha256()
    inside = None if out is None or root.is_file() else Path(out).resolve()
    for path in [root] if root.is_file() else sorted(root.rglob("*.py" if data is None else "*")):
        parts = path.relative_to(root).parts  # a folder above the root may be called as it likes
        if not path.is_file() or inside is not None and root.resolve().joinpath(*parts).is_relative_to(inside):
            continue
        text = not skipped & {*parts} and not any(part.startswith(".") for part in parts)
        try:
            digest.update(repr((parts, path.stat().st_size)).encode())
            for piece in read_pieces(path) if text else ():
                digest.update(piece.encode())
        except ValueError:
            require(path != root, f"{path}: not UTF-8 text")
            text = False
        if text:
            files.append(path)
        left_out += not text
    hint = "no text file there" if data else "this Python came without its sources, give --data"
    require(files, f"{root}: {hint}")
    return files, left_out if data else 0, digest.hexdigest()

def read_pieces(path, size=1 << 20):
    """The text of a file in pieces of whole lines, so that it need not fit in memory."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            while lines := file.readlines(size):
                yield "".join(lines)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None

def train_tokenizer(files, vocab_size):
    """A byte-level BPE tokenizer of at most vocab_size tokens; ids 0 and 1 begin and end a text."""
    bpe, pieces = ByteLevelBPETokenizer(), (p for file in files for p in read_pieces(file))
    bpe.train_from_iterator(pieces, vocab_size, show_progress=False, special_tokens=[BOS, EOS])
    tokenizer = Tokenizer.from_str(bpe.to_str())
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer

def read_tokenizer(directory):
    """The tokenizer.json of a folder; its own errors name neither the file nor their kind."""
    path = Path(directory) / "tokenizer.json"
    if not path.is_file() and (path.parent / "tiktoken.model").is_file():
        hint = "encode with its own tokenizer (transformers, trust_remote_code=True), and call model.generate"
        raise ValueError(f"{directory}: has tiktoken.model and no tokenizer.json: {hint}")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        raise ValueError(f"{path}: no tokenizer ({error})") from None

def token_bytes(tokenizer):
    """Bytes of text behind each id, (ids): byte-level tokens have a letter per byte, markers have none."""
    require(type(tokenizer.decoder).__name__ == "ByteLevel", "the tokenizer is not byte-level: bytes are unknown")
    sizes = torch.zeros(1 + max(tokenizer.get_vocab().values()), dtype=torch.int64)
    for token, i in tokenizer.get_vocab().items():
        sizes[i] = len(token)
    for i, added in tokenizer.get_added_tokens_decoder().items():
        sizes[i] = 0 if added.special else len(added.content.encode())
    return sizes

def document(tokenizer, path, begin, end):
    """The ids of a file in lists, between those of the markers; a marker that is spelt in it stays text."""
    tokenizer.encode_special_tokens = True
    pieces = read_pieces(path)
    yield begin
    while some := list(itertools.islice(pieces, 16)):  # encoded side by side
        yield from (encoding.ids for encoding in tokenizer.encode_batch_fast(some, add_special_tokens=False))
    yield end

def token_dtype(vocab_size):
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32

class Corpus:
    """Windows of T tokens of an array of documents, each begun by `bos`; the last `share` is held out.

    Every epoch visits the windows in another order, fixed by the seed, so that the number of windows
    seen so far is all that a resumed run has to know. `isolate`: documents do not see each other.
    """

    def __init__(self, tokens, bos, T, seed=0, isolate=False, share=1 / 20):
        self.tokens, self.bos, self.T, self.seed, self.isolate = tokens, bos, T, seed, isolate
        cut, self.epoch = len(tokens) - int(len(tokens) * share), None
        starts = np.flatnonzero(tokens[cut : cut + len(tokens) // 40] == bos)
        near = len(starts) and cut + int(starts[0]) + T <= len(tokens)
        self.cut = cut + int(starts[0]) if near else cut  # where a document begins, if near
        self.windows = self.cut // T
        enough = share == 1 or self.windows >= 1 and len(tokens) - self.cut >= T
        require(enough, f"a corpus of {len(tokens)} tokens is too short: 20 x {T} needed")
        require(not isolate or bos is not None, "--isolate: no begin token tells where a document begins")

    def batch(self, position, count):
        """Windows position .. position + count of the run, as `read` gives them."""
        starts = []
        for i in range(position, position + count):
            epoch, place = divmod(i, self.windows)
            if epoch != self.epoch:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                self.epoch, self.order = epoch, torch.randperm(self.windows, generator=generator)
            starts.append(int(self.order[place]) * self.T)
        return self.read(starts)

    def held_out(self, tokens=math.inf):
        """Starts of windows spread over the held-out part, of so many tokens, or all there are.

        One begins with the last token of the one before, so that every token is scored once.
        """
        starts = range(self.cut, max(len(self.tokens) - 1, self.cut + 1), self.T - 1)
        count = min(len(starts), max(1, tokens // self.T)) if tokens < math.inf else len(starts)
        return [starts[int(i)] for i in np.linspace(0, len(starts) - 1, count)]

    def read(self, starts):
        """Inputs of the model, (windows, T) each; no document has to predict the next one's begin."""
        place, last = np.arange(self.T), len(self.tokens) - 1
        where = np.array(starts)[:, None] + place  # the text's last window may be shorter
        rows = np.where(where <= last, self.tokens[where.clip(max=last)], 0).astype(np.int64)
        labels = np.where((where <= last) & (rows != self.bos), rows, -100)
        inputs = {"input_ids": rows, "labels": labels}
        if self.isolate:  # positions count from where a document begins
            inputs["position_ids"] = place - np.maximum.accumulate(np.where(rows == self.bos, place, 0), 1)
        return {name: torch.from_numpy(array) for name, array in inputs.items()}

@torch.no_grad()
def evaluate(model, corpus, starts, sizes, rank=0, world=1):
    """Loss on windows of text: nats per token with their standard error, and bits per byte of text.

    sizes (ids): bytes behind each id. The processes share the windows, and all get the result.
    """
    sums = torch.zeros(len(starts), 3, dtype=torch.float32)  # of each window: nats, tokens, bytes
    bar = partial(tqdm, desc="evaluating", leave=False, disable=rank > 0 or None)
    with evaluating(model):
        for first in bar(range(8 * rank, len(starts) + 8 * rank, 8 * world)):
            some = starts[first : first + 8]  # with nothing left, it helps others: FSDP wants all of them
            inputs = {name: x.to(model.device) for name, x in corpus.read(some or starts[:1]).items()}
            targets = inputs.pop("labels")[:, 1:]
            logits = upcast(model(**inputs).logits[:, :-1])
            losses = F.cross_entropy(logits.mT, targets, ignore_index=-100, reduction="none")
            real = (targets != -100).cpu()
            weights = sizes[targets.cpu().clamp(min=0)] * real
            found = torch.stack([losses.cpu().sum(1), real.sum(1), weights.sum(1)], 1)
            sums[first : first + 8] = found[: len(some)]
    sums = sums.to(model.device)
    if world > 1:
        torch.distributed.all_reduce(sums)
    sums = sums.cpu().double()
    (nats, count, size), n = sums.sum(0).tolist(), len(starts)
    mean = nats / max(count, 1)
    squares = float((sums[:, 0] - mean * sums[:, 1]).square().sum())  # windows are the independent part
    error = None if n == 1 else math.sqrt(squares * n / (n - 1)) / max(count, 1)
    found = {"val_loss": mean, "val_bits_per_byte": nats / math.log(2) / max(size, 1)}
    return found | {"val_tokens": int(count), "val_standard_error": error}

def learning_rate_factor(progress, warmup):
    """§4.2's schedule by progress 0..1: linear up, constant, cosine to a tenth, then two steps."""
    if progress < warmup:
        return progress / warmup
    if progress < 10 / 14.8:  # trillions of tokens
        return 1.0
    if progress < 14.3 / 14.8:
        return 0.55 + 0.45 * math.cos(math.pi * (progress * 14.8 - 10) / 4.3)
    return 0.1 if progress < 14.633 / 14.8 else 0.0332

def start_processes(device):
    """This process's rank, how many there are, and its device; one process on a CPU starts none."""
    dist, device = torch.distributed, parse_device(device, "--device")
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group(backend)
    elif device.type == "cuda":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return (dist.get_rank(), dist.get_world_size(), device) if dist.is_initialized() else (0, 1, device)

def shard(model, device):
    """Split parameters and optimizer state over the processes; on a GPU, compute in bfloat16 too."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not torch.distributed.is_initialized():
        return model.to(device)
    mesh = torch.distributed.init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    kinds = (torch.bfloat16, torch.float32) if device.type == "cuda" else (None, None)
    for part in (*model.model.layers, model):  # each is split, and only its share moves to the device
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(*kinds))
    return model

def adamw(model, lr):
    """The optimizer of §4.2, which lets matrices decay, and vectors not."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), fused=True)

def training_config(options):
    """The config to train, of --from, --config or the tiny one, and the keys that a file gives."""
    if options.source:
        config = DeepseekV3Config.from_pretrained(options.source)
        return config, set(config.to_dict())
    given, ids = {}, {"bos_token_id": 0, "eos_token_id": 1}  # of the tokenizer that is trained
    if options.config:
        path = existing(options.config)
        given = read_json(path / "config.json" if path.is_dir() else path)
    ids |= {"vocab_size": options.vocab_size} if options.vocab_size else {}
    clash = options.vocab_size and given.get("vocab_size", options.vocab_size) != options.vocab_size
    require(not clash, f"--vocab-size {options.vocab_size}: --config says {given.get('vocab_size')}")
    rope = {"rope_parameters", "rope_scaling"} & given.keys()
    tiny = DeepseekV3Config.tiny(num_nextn_predict_layers=int(given.get("model_type") != "youtu")).to_dict()
    base = {name: value for name, value in tiny.items() if not (rope and name.startswith("rope_"))}
    base = {name: value for name, value in base.items() if name != "num_key_value_heads"}  # follows the heads
    config = DeepseekV3Config(**(base | given | ids))
    require(config.vocab_size >= 258, f"vocab_size={config.vocab_size}: must be at least 258, bytes and two markers")
    return config, set(given)

def check_training(options, config, world):
    """ValueError for options that cannot work together or on this machine, before anything is written."""
    require(not (options.source and (options.config or options.vocab_size)), "--from brings its config and tokenizer")
    apart = options.source is None or Path(options.source).resolve() != Path(options.out).resolve()
    require(apart, f"--out {options.out}: must be another folder than --from")
    parts = world * options.accumulate
    require(options.batch % parts == 0, f"--batch {options.batch}: must be a multiple of {parts}, its parts")
    with torch.device("meta"):  # every process builds the whole model before it is split
        size = sum(4 * parameter.numel() for parameter in DeepseekV3ForCausalLM(config).parameters())
    size, have = size * int(os.environ.get("LOCAL_WORLD_SIZE", 1)), memory_size()
    require(size <= have, f"--config: {size / 2**30:.0f} GiB of weights, but {have / 2**30:.0f} GiB of memory")

# What a run or a checkpoint consists of; one that is somebody's is not touched.
RUN_FILES = ("tokens.bin", "run.json", "metrics.jsonl", "training.png", "states", "config.json", GENERATION)
RUN_FILES += (SINGLE, INDEX, *TOKENIZER_FILES)

def run_files(folder):
    """Those of RUN_FILES that are there."""
    found = [path for pattern in RUN_FILES for path in sorted(Path(folder).glob(pattern))]
    return [path for path in found if path.is_file() or path.name == "states"]

def prepare_data(folder, options, config, files):
    """Make tokenizer.json and tokens.bin: all files as one array of tokens, each between two markers."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if options.source:
        tokenizer = read_tokenizer(options.source)
        for path in (path for pattern in (*TOKENIZER_FILES, GENERATION) for path in Path(options.source).glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
        begin = text_ids(options.source, tokenizer, "")  # as inference does
    else:
        tokenizer, begin = train_tokenizer(files, config.vocab_size), [config.bos_token_id]
        tokenizer.save(str(folder / "tokenizer.json"))
        # What transformers' AutoTokenizer wants beside it.
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
        write_json(folder / "tokenizer_config.json", settings | {"clean_up_tokenization_spaces": False})
    end = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    end = [token for token in end if token is not None][:1]
    with open(folder / "tokens.bin", "wb") as sink:
        for file in tqdm(files, desc="tokenising", unit="file"):
            for ids in document(tokenizer, file, begin, end):
                np.array(ids, token_dtype(config.vocab_size)).tofile(sink)

class Trainer:
    """One run: model, optimizer, data, and what it writes to options.out.

    Nothing in it is random but the first weights and the order of the data, which the seed fixes: with
    the model's and the optimizer's numbers, `step` is all that a resumed run needs.
    """

    def __init__(self, options):
        self.options, self.out, self.step, self.score = options, Path(options.out), 0, None
        self.seconds = dict.fromkeys(("data", "forward and backward", "optimizer", "evaluation", "saving"), 0.0)
        self.config, self.given = training_config(options)
        self.rank, self.world, self.device = start_processes(options.device)
        check_training(options, self.config, self.world)
        self.resumed, new = options.resume and (self.out / "tokens.bin").exists(), self.out / ".new"
        made = [] if self.rank else [path for path in (self.out, *self.out.parents) if not path.exists()]
        try:
            self.settings = self.prepare(new) if self.rank == 0 else {}
            self.wait(timedelta(days=7))  # a large corpus takes its time
            self.open_data(self.out if self.resumed else new)
        except BaseException:  # what is refused or stopped leaves nothing behind
            if self.rank == 0:
                shutil.rmtree(new, ignore_errors=True)
            for path in made:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
            raise
        self.wait()
        if self.rank == 0 and not self.resumed:
            self.replace_run(new)
        self.wait()
        self.open_data(self.out)
        torch.manual_seed(options.seed)
        read = partial(DeepseekV3ForCausalLM.from_pretrained, options.source, dtype=torch.float32)
        self.model = shard(read() if options.source else DeepseekV3ForCausalLM(self.config), self.device)
        self.model.gradient_checkpointing = options.recompute
        self.optimizer = adamw(self.model, options.lr)
        load_state(self)

    def prepare(self, new):
        """Make the data in the folder `new`, or compare with the run that is resumed -> its settings."""
        options, held = self.options, [path.name for path in run_files(self.out)]
        used = f"--out {options.out}: holds {', '.join(held[:6])}"
        require(self.resumed or not (held and options.resume), f"{used}, and no run to resume")
        free = self.resumed or options.overwrite or not held
        require(free, f"{used}: --resume goes on with a run, --overwrite replaces it")
        files, left_out, digest = corpus_files(options.data, self.out)
        if left_out:
            print(f"{options.data}: {left_out} files left out: hidden, or not UTF-8 text", file=sys.stderr)
        names = "batch length seed steps lr warmup gamma centred isolate vocab_size".split()
        now = {"from": options.source} | {name: getattr(options, name) for name in names}
        now |= self.config.to_dict() | {"data": digest}
        if self.resumed:
            then = read_json(self.out / "run.json")
            require(then.get("data") == digest, "--resume: --data is other text than that of the run")
            for name in (name for name in {**now, **then} if name != "steps"):
                same = then.get(name) == now.get(name)
                require(same, f"--resume: {name} is {now.get(name)}, but was {then.get(name)}")
        else:
            order = torch.randperm(len(files), generator=torch.Generator().manual_seed(options.seed))
            prepare_data(new, options, self.config, [files[i] for i in order])
            write_json(new / "run.json", now)
        return now

    def open_data(self, folder):
        """Tokenizer and corpus of a folder; ValueError if they do not go with the options."""
        self.tokenizer = read_tokenizer(folder)
        if "vocab_size" not in self.given:  # a small text has fewer tokens than asked for
            self.config.vocab_size = self.tokenizer.get_vocab_size()
        tokens, options = np.memmap(folder / "tokens.bin", token_dtype(self.config.vocab_size), "r"), self.options
        self.corpus = Corpus(tokens, self.config.bos_token_id, options.length, options.seed, options.isolate)
        windows, self.sizes = self.corpus.windows, token_bytes(self.tokenizer)  # a batch holds none twice
        require(options.batch <= windows, f"--batch {options.batch}: the text has {windows} windows")

    def replace_run(self, new):
        """Put the new data in the place of what --overwrite lets go."""
        older = {self.out / name for name in files_of_older(self.out)}
        for path in (*run_files(self.out), *older):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self.corpus = None  # Windows moves no file that is open
        for path in sorted(new.iterdir()):  # tokens.bin, which makes it a run, behind run.json
            path.replace(self.out / path.name)
        new.rmdir()

    def run(self, stop=()):
        """Train to options.steps, or until `stop` is true; log every step, evaluate, save states."""
        options = self.options
        bar = tqdm(total=options.steps, initial=self.step, unit="step", disable=self.rank > 0)
        with bar, open(self.out / "metrics.jsonl", "a", encoding="utf-8") as log:
            while self.step < options.steps and not self.any(stop):
                line = self.train_step()
                last = self.step == options.steps
                if last or self.step % options.eval_every == 0:
                    line |= self.evaluate(math.inf if last else options.eval_tokens)
                if self.rank == 0:
                    print(json.dumps(line), file=log, flush=True)
                if self.rank == 0 and options.plot and "val_loss" in line:
                    plot_run(self.out)
                bar.set_postfix(loss=line["loss"], violation=line["max_violation"])
                bar.update()
                if last or self.step % options.save_every == 0:
                    save_state(self)
        if self.step == options.steps and self.score is None:  # all steps had been done
            self.evaluate()

    def train_step(self):
        """One optimizer step over the global batch -> its line of metrics."""
        options, began, progress = self.options, time.perf_counter(), (self.step + 1) / self.options.steps
        self.model.train()
        if "mtp_loss_weight" not in self.given:
            self.config.mtp_loss_weight = 0.3 if progress < 10 / 14.8 else 0.1  # λ, §4.2
        losses = self.backward()
        with self.timed("optimizer"):
            lr = options.lr * learning_rate_factor(progress, options.warmup)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            norm = float(getattr(norm, "full_tensor", lambda: norm)())
            if not math.isfinite(losses["loss"] + norm):
                states = sorted((self.out / "states").glob("step-????????"))
                where = f"the last good state is {states[-1]}" if states else "no state was saved yet"
                what = f"the loss is {losses['loss']}, the gradient's norm {norm}"
                raise FloatingPointError(f"step {self.step + 1}: {what}; {where}")
            self.optimizer.step()
            self.optimizer.zero_grad()
            gamma = options.gamma if progress < 14.3 / 14.8 else 0.0
            violations = self.model.update_router_bias(gamma, centred=options.centred)
        self.step += 1
        speed = options.batch * options.length / (time.perf_counter() - began)
        line = {"step": self.step, **losses, "max_violation": sum(violations) / max(len(violations), 1)}
        return line | {"lr": lr, "grad_norm": norm, "tokens_per_second": speed, "layer_violations": violations}

    def backward(self):
        """Gradients of the global batch, in options.accumulate parts -> its losses, means over its labels."""
        options, names = self.options, ("loss", "main_loss", "mtp_loss", "balance_loss")
        share = options.batch // (self.world * options.accumulate)
        with self.timed("data"):  # of the whole batch: a label weighs the same in whatever part it is
            batch = self.corpus.batch(self.step * options.batch, options.batch)
            count = int((batch["labels"][:, 1:] != -100).sum())
        sums = torch.zeros(len(names), device=self.device)
        for part in range(options.accumulate):
            place = (part * self.world + self.rank) * share
            inputs = {name: x[place : place + share].to(self.device) for name, x in batch.items()}
            with self.timed("forward and backward"):
                out = self.model(**inputs, num_items_in_batch=max(count, 1))
                (out.loss * self.world).backward()  # FSDP takes the mean over processes
                losses = [getattr(out, name) for name in names]  # None: no MTP modules
                sums += torch.stack([sums.new_zeros(()) if x is None else x.detach() for x in losses])
        if self.world > 1:
            torch.distributed.all_reduce(sums)
        return dict(zip(names, sums.tolist(), strict=True))

    def evaluate(self, tokens=math.inf):
        """Losses on the held-out text, or on so many tokens of it."""
        with self.timed("evaluation"):
            starts = self.corpus.held_out(tokens)
            found = evaluate(self.model, self.corpus, starts, self.sizes, self.rank, self.world)
        self.score = found if tokens == math.inf else None
        return found

    @contextmanager
    def timed(self, what):
        """Add the time that the block takes to self.seconds."""
        began = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - began

    def wait(self, timeout=None):
        """Until every process is here."""
        if self.world > 1:
            group = torch.distributed.new_group(backend="gloo", timeout=timeout) if timeout else None
            torch.distributed.barrier(group)

    def any(self, stop):
        """Whether some process was asked to stop; so that all of them stop behind the same step."""
        asked = torch.tensor(float(bool(stop)), device=self.device)
        if self.world > 1:
            torch.distributed.all_reduce(asked)
        return bool(asked)

def run_state(trainer):
    """The numbers of model and optimizer, as torch.distributed.checkpoint takes them."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = get_state_dict(trainer.model, trainer.optimizer)
    return {"model_state_dict": model, "optim_state_dict": optimizer}

def save_state(trainer):
    """A folder for this step, which appears whole or not at all, and the model in the released layout."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    folder = trainer.out / "states" / f"step-{trainer.step:08d}"
    beside = folder.with_suffix(".tmp")
    with trainer.timed("saving"):
        try:
            dcp.save(run_state(trainer), checkpoint_id=beside, no_dist=trainer.world == 1)
        except (RuntimeError, dcp.api.CheckpointException) as error:  # a full disk
            shutil.rmtree(beside, ignore_errors=True)
            why = str(error).strip().splitlines()[-1]
            raise OSError(f"{beside}: cannot be written, older states are kept ({why})") from None
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        numbers = get_model_state_dict(trainer.model, options=whole)  # of all processes, on the first
        if trainer.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            beside.rename(folder)
            for old in sorted(folder.parent.glob("step-????????"))[: -trainer.options.keep]:
                shutil.rmtree(old)
            with torch.device("meta"):
                model = DeepseekV3ForCausalLM(trainer.config)
            model.load_state_dict(numbers, assign=True)
            model.save_pretrained(trainer.out)
        trainer.wait()

def load_state(trainer):
    """With --resume, go on from the newest state, if there is one, and cut the log back to it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    states = sorted((trainer.out / "states").glob("step-????????"))
    if trainer.options.resume and states:
        step, steps = int(states[-1].name.removeprefix("step-")), trainer.options.steps
        require(step <= steps, f"--resume: --steps {steps}, but the run is at step {step}")
        state = run_state(trainer)
        dcp.load(state, checkpoint_id=states[-1], no_dist=trainer.world == 1)
        set_state_dict(trainer.model, trainer.optimizer, **state)
        trainer.step = step
        then = read_json(trainer.out / "run.json")["steps"]
        trainer.wait()
        if then != steps and trainer.rank == 0:
            now, was = (learning_rate_factor((step + 1) / n, trainer.options.warmup) for n in (steps, then))
            note = f"the learning rate goes on at {now:.0%} of --lr, where it would have been at {was:.0%}"
            print(f"--resume: {then} steps become {steps}: {note}", file=sys.stderr)
    if trainer.rank == 0:
        write_json(trainer.out / "run.json", trainer.settings)
        metrics = trainer.out / "metrics.jsonl"
        held = trainer.step and metrics.is_file()
        lines = metrics.read_text(encoding="utf-8").splitlines(True) if held else []
        metrics.write_text("".join(lines[: trainer.step]), encoding="utf-8")

# ---- 14. Commands -------------------------------------------------------------------------------

def train_command(options):
    """Train, and end with a sample, the next command to type, and where the time went."""
    # A CPU compiles bfloat16 products for each number of rows, and experts have another one each time:
    # with room for so many (1,024 without), a training step takes three quarters of the time.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")
    trainer, stop = Trainer(options), []
    # Ctrl-C lets the step that is running end: a state from inside of it would be half a step.
    before = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    try:
        trainer.run(stop)
        if trainer.step < options.steps:
            save_state(trainer)
    finally:
        signal.signal(signal.SIGINT, before)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if trainer.rank > 0:
        return
    if trainer.step < options.steps:
        sys.exit(f"stopped at step {trainer.step}; the same command with --resume goes on")
    print_end(trainer)

def plot_run(folder):
    """Draw folder/training.png from its metrics.jsonl: losses, load violation, learning rate, by step."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    figure, steps = Figure(figsize=(8, 8), layout="constrained"), [line["step"] for line in lines]
    losses, loads, rates = figure.subplots(3, sharex=True, height_ratios=(3, 2, 1))
    losses.plot(steps, [line["main_loss"] for line in lines], label="training text")
    held_out = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    losses.plot(*zip(*held_out, strict=True), "o-", label="held-out text")
    losses.set_ylabel("loss, nats per token")
    for layer, values in enumerate(zip(*(line["layer_violations"] for line in lines), strict=True), 1):
        loads.plot(steps, values, label=f"MoE layer {layer}")
    loads.set_ylabel("load violation (MaxVio)")
    rates.plot(steps, [line["lr"] for line in lines])
    rates.set(xlabel="step", ylabel="learning rate")
    for axes in (losses, loads) if any(line["layer_violations"] for line in lines) else (losses,):
        axes.legend(frameon=False)
    figure.savefig(folder / "training.png", dpi=100)

def score_line(found):
    """What `evaluate` found, in words."""
    error = found["val_standard_error"]
    loss = f"{found['val_loss']:.4f}" + ("" if error is None else f" ± {error:.4f}")
    bits, tokens = found["val_bits_per_byte"], found["val_tokens"]
    return f"{loss} nats per token, {bits:.4f} bits per byte, over {tokens:,} tokens"

def print_end(trainer):
    """What the run came to, a sample of it, and the next command."""
    whole, corpus, tokenizer = sum(trainer.seconds.values()), trainer.corpus, trainer.tokenizer
    print("held out:", score_line(trainer.score))
    parts = ", ".join(f"{what} {took / whole:.0%}" for what, took in trainer.seconds.items())
    print(f"{whole:.0f} s: {parts}\n")
    text = tokenizer.decode(corpus.tokens[corpus.cut : corpus.cut + 200].tolist())
    lines = (line.strip()[:40].strip("\ufffd") for line in text.splitlines() if BOS not in line and EOS not in line)
    prompt = next((line for line in lines if line and line[0] != "-"), "a")  # how unseen text begins
    model = DeepseekV3ForCausalLM.from_pretrained(trainer.out)
    sampling = {"do_sample": True, "temperature": 0.7}
    stream_text(model, tokenizer, text_ids(trainer.out, tokenizer, prompt), 100, trainer.options.seed, prompt, sampling)
    program = [shown(sys.executable), shown(__file__), "generate", str(trainer.options.out), prompt]
    print(f"\n\nNext: {shlex.join(program)}")

def shown(path):
    """A path as one would type it here."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else str(path)

def evaluate_command(options):
    """Loss of a folder's model on text."""
    folder, tokenizer = Path(options.directory), read_tokenizer(options.directory)
    files, left_out, _ = corpus_files(options.data)
    model = DeepseekV3ForCausalLM.from_pretrained(folder, device_map=options.device)
    sizes, begin, eos = token_bytes(tokenizer), text_ids(folder, tokenizer, ""), stop_ids(model, None)[:1]
    parts = (ids for file in files for ids in document(tokenizer, file, begin, eos))
    tokens = np.array(list(itertools.chain.from_iterable(parts)))
    require(sizes[torch.from_numpy(tokens)].sum() > 0, f"--data {options.data}: holds no text")
    bos = begin[0] if begin else None
    corpus = Corpus(tokens, bos, min(options.length, len(tokens)), isolate=options.isolate, share=1)
    found = evaluate(model, corpus, corpus.held_out(), sizes)
    print(f"{score_line(found)} of {len(files)} files, {left_out} left out")

def generate_command(options):
    """Continue a prompt, or answer it, with the model of a folder; with drafts, say how they did."""
    folder, prompt, steps = Path(options.directory), options.prompt, []
    tokenizer = read_tokenizer(folder)
    if options.chat:  # the template has written all markers
        ids = tokenizer.encode(chat_prompt(folder, prompt), add_special_tokens=False).ids
    else:
        ids = text_ids(folder, tokenizer, prompt)
    model = DeepseekV3ForCausalLM.from_pretrained(folder, device_map=options.device)
    settings = {name: getattr(options, name) for name in ("top_k", "top_p", "min_p")}
    settings |= {"do_sample": options.temperature > 0, "temperature": options.temperature or 1.0}
    settings |= {"use_mtp": options.mtp, "num_draft_tokens": options.draft_tokens, "statistics": steps}
    echo = "" if options.chat else prompt
    stream_text(model, tokenizer, ids, options.max_new_tokens, options.seed, echo, settings)
    print()
    if steps:  # (drafted, accepted) of each
        gain = 1 + sum(accepted for _, accepted in steps) / len(steps)
        positions = range(max(drafted for drafted, _ in steps))
        stood = [[accepted > i for drafted, accepted in steps if drafted > i] for i in positions]
        parts = ", ".join(f"{sum(those) / len(those):.0%}" for those in stood)
        print(f"{gain:.2f} tokens per step; drafts accepted by position: {parts}", file=sys.stderr)

def text_ids(directory, tokenizer, text):
    """Ids of a raw text, begun as tokenizer_config.json says, or else as the tokenizer does by itself."""
    beside = Path(directory) / "tokenizer_config.json"
    settings = read_json(beside) if beside.is_file() else {}
    ids, begin = tokenizer.encode(text, add_special_tokens=False).ids, settings.get("add_bos_token")
    if begin is None:
        return tokenizer.encode(text).ids
    bos = DeepseekV3Config.from_pretrained(directory).bos_token_id
    return [bos, *ids] if begin and bos is not None else ids

def chat_prompt(directory, text):
    """The text of a user as the folder's own chat template puts it to the model, as transformers does."""
    from jinja2 import ext, sandbox  # the template is a stranger's code

    class Generation(ext.Extension):
        tags = frozenset({"generation"})  # noqa: RUF012

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise ValueError(message)

    file, settings = Path(directory) / "chat_template.jinja", {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings |= read_json(Path(directory) / name) if (Path(directory) / name).is_file() else {}
    template = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {str(each.get("name")): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    require(isinstance(template, str), f"{directory}: no chat template in its tokenizer_config.json")
    markers = {n: value for n, value in settings.items() if n.endswith("_token") and not isinstance(value, bool)}
    markers = {n: value.get("content") if isinstance(value, dict) else value for n, value in markers.items()}
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": datetime.now().strftime}
    try:
        chat, messages = environment.from_string(template), [{"role": "user", "content": text}]
        return chat.render(messages=messages, tools=None, documents=None, add_generation_prompt=True, **markers)
    except Exception as error:  # a template can raise anything
        raise ValueError(f"{directory}: its chat template fails ({error})") from None

def stream_text(model, tokenizer, ids, max_new_tokens, seed, echo, settings):
    """Print `echo` and, as it comes, what the model writes behind ids; whole characters only."""
    stream = DecodeStream(skip_special_tokens=True)

    def show(token):
        print(stream.step(tokenizer, int(token[0])) or "", end="", flush=True)

    print(echo, end="", flush=True)
    require(ids, "the prompt holds no token")
    start, generator = torch.tensor([ids], device=model.device), torch.Generator(model.device).manual_seed(seed)
    model.generate(start, max_new_tokens=max_new_tokens, streamer=show, generator=generator, **settings)

def info_command(options):
    """Parameters, bytes and FLOPs of a config.json or a folder, and its split over GPUs."""
    config = DeepseekV3Config.from_pretrained(options.path)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    kinds = assumed_kinds(model)
    if any((Path(options.path) / name).is_file() for name in (SINGLE, INDEX)):
        stored, sources = Checkpoint(options.path), released_names(model)
        check_coverage(model, stored, sources, config)
        kinds = held_kinds(model, sources, stored)
    sizes = {name: held_bytes(find_tensor(model, name), kind) for name, kind in kinds.items()}
    print_sizes(model, kinds, sizes)
    if options.gpus:
        print_split(model, sizes, options.gpus, options.gpu_memory)

def assumed_kinds(model):
    """{name: dtype} of a model without files: as released, in FP8 if its config says so."""
    fp8, kinds = "quantization_config" in model.config.extra, {}
    for name in released_names(model):
        matrix = fp8 and released_in_fp8(name, find_tensor(model, name))
        plain = torch.float32 if name.endswith("correction_bias") else torch.bfloat16
        kinds[name] = FP8 if matrix else plain
    return kinds

def count_parameters(module, config):
    """Parameters of a module, and how many of them one token visits."""
    total = sum(parameter.numel() for parameter in module.parameters())
    experts = sum(stack.numel() for stack in module.parameters() if stack.ndim == 3)
    return total, total - experts + experts * config.num_experts_per_tok // config.n_routed_experts

def print_sizes(model, kinds, sizes):
    """What parameters, weights, cache and training take."""
    config, by_kind = model.config, dict.fromkeys(KINDS.values(), 0)
    for name, kind in kinds.items():
        plain = find_tensor(model, name).numel() * kind.itemsize
        by_kind[kind] += plain
        by_kind[torch.float32] += sizes[name] - plain  # scales
    labels = zip(("FP8", "BF16", "F16", "F32", "F64"), by_kind.values(), strict=True)
    split = ", ".join(f"{label} {size:,}" for label, size in labels if size)
    total, active = count_parameters(model, config)
    mtp_total, mtp_active = count_parameters(model.mtp_blocks, config)
    L, T, context = config.num_hidden_layers, 4096, config.max_position_embeddings
    embedding = config.vocab_size * config.hidden_size
    cache = 2 * L * (config.kv_lora_rank + config.qk_rope_head_dim)
    widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    flop = 6 * (active - mtp_active - embedding)
    flop += 3 * L * config.num_attention_heads * widths * T  # causal: half of a square
    print(f"parameters  {total - mtp_total:,} total, {active - mtp_active:,} activated per token")
    mtp_active += 2 * embedding * (mtp_total > 0)
    print(f"MTP         {mtp_total:,} more, {mtp_active:,} activated with embedding and head")
    print(f"weights     {sum(sizes.values()):,} bytes: {split}")
    print(f"cache       {cache:,} bytes per token, {cache * context:,} at {context:,} tokens (BF16)")
    print(f"training    {flop / 1e9:.2f} GFLOP per token at {T:,} tokens")

def print_split(model, sizes, gpus, gib):
    """Which layers each GPU would hold, with bars; or how many GPUs it would take."""
    units, work = unit_sizes(model, sizes)
    room, least = int(gib * 2**30) - work, max(units.values())
    require(least <= room, f"--gpu-memory {gib:g}: one layer takes {(least + work) / 2**30:.1f} GiB")
    needed = 1 + max(plan_devices(units, dict.fromkeys(range(len(units)), room), False).values())
    if needed > gpus:
        print(f"{gpus} GPUs of {gib:g} GiB do not hold it: it takes {needed}")
        return
    plan = plan_devices(units, dict.fromkeys(range(gpus), room))
    for gpu in range(gpus):
        held = [unit for unit in units if plan[unit] == gpu] or ["nothing"]
        used = sum(units.get(unit, 0) for unit in held) / 2**30
        bar = "█" * round(30 * used / gib)
        line = f"GPU {gpu:<3} {bar:░<30} {used:6.1f} GiB used, {gib - used:6.1f} free"
        print(f"{line}  {held[0]} … {held[-1]}")

class Parser(argparse.ArgumentParser):
    """argparse's, which says what is wrong in one line."""

    def error(self, message):
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)

def within(least, most, kind=int):
    """A number of the command line that must be in least..most."""

    def number(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"{text}: must be in {least:g}..{most:g}")
        return kind(text)

    return number

COUNT, PART = within(1, 1e9), within(0, 1, float)

def parser():
    """The command line, a sub-command for each of four functions above."""
    main = Parser(prog="deepseek_v3.py")
    commands = main.add_subparsers(dest="command", required=True)
    add_training(commands.add_parser("train", help="train a model on text"))
    score = commands.add_parser("evaluate", help="loss of a model on text").add_argument
    score("directory", help="checkpoint folder")
    score("--data", required=True, help="text file or folder")
    score("--length", type=within(2, 1e9), default=1024, help="tokens that the model sees at once")
    score("--isolate", action="store_true", help="documents in one window do not see each other")
    score("--device", default="auto")
    run = commands.add_parser("generate", help="continue a prompt").add_argument
    run("directory", help="checkpoint folder")
    run("prompt")
    run("--chat", action="store_true", help="answer, by the model's chat template")
    run("--max-new-tokens", type=within(0, 1e12), default=200)
    run("--temperature", type=within(0, 1e6, float), default=0.7, help="0: greedy")
    run("--top-k", type=within(0, 1e9), default=0, help="draw from so many likeliest tokens")
    run("--top-p", type=within(1e-9, 1, float), default=1.0, help="from the likeliest of this probability")
    run("--min-p", type=PART, default=0.0, help="from those this likely, beside the likeliest")
    run("--seed", type=within(0, 1e12), default=0)
    run("--device", default="auto")
    run("--mtp", action="store_true", help="draft with the MTP modules: fewer steps")
    run("--draft-tokens", type=within(1, 1000), help="per step; default: one per module")
    info = commands.add_parser("info", help="parameters, bytes and FLOPs of a model").add_argument
    info("path", help="checkpoint folder or config.json")
    info("--gpus", type=within(1, 1e5), help="show how it would lie on so many GPUs")
    info("--gpu-memory", type=within(0.1, 1e6, float), default=80, help="GiB of each")
    return main

def add_training(train):
    """The options of `train`."""
    add = train.add_argument_group("what is trained").add_argument
    add("--data", help="text file or folder (default: Python's standard library)")
    add("--config", help="config.json of the model; what it leaves out is as in the tiny one, the default")
    add("--from", dest="source", metavar="DIR", help="go on from the weights and tokenizer of a checkpoint")
    add("--vocab-size", type=within(258, LARGEST), help="tokens to learn (default: the config's, 2048)")
    add("--isolate", action="store_true", help="documents in one window do not see each other")
    add("--seed", type=within(0, 1e12), default=0)
    add = train.add_argument_group("how").add_argument
    add("--steps", type=COUNT, default=550)
    add("--batch", type=COUNT, default=16, help="sequences of all processes")
    add("--length", type=within(4, 1e9), default=128, help="tokens per sequence")
    add("--lr", type=within(1e-9, 100, float), default=4e-3, help="highest learning rate")
    add("--warmup", type=PART, default=0.1, help="part of the steps over which it rises")
    add("--gamma", type=PART, default=0.002, help="step of the router bias, but 0 near the end")
    add("--centred", action="store_true", help="router bias steps of mean zero")
    add = train.add_argument_group("on which machine").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--accumulate", type=COUNT, default=1, help="parts a batch runs in")
    add("--recompute", action="store_true", help="recompute layers to save memory")
    add = train.add_argument_group("what is written").add_argument
    add("--out", default="out", help="folder for checkpoint, tokenizer, states, metrics.jsonl")
    add("--resume", action="store_true", help="go on from the newest state in --out")
    add("--overwrite", action="store_true", help="replace the run that --out holds")
    add("--save-every", type=COUNT, default=250, help="steps between states")
    add("--keep", type=COUNT, default=2, help="states to keep")
    add("--eval-every", type=COUNT, default=100, help="steps")
    add("--eval-tokens", type=COUNT, default=4096, help="of held-out text; at the end, all of it")
    add("--plot", action="store_true", help="draw training.png at each evaluation")

def main(arguments=None):
    """Run a command; a bad argument or file is one line on stderr and exit status 2."""
    commands = {"train": train_command, "evaluate": evaluate_command}
    commands |= {"generate": generate_command, "info": info_command}
    command_line = parser()
    options = command_line.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console of few characters shows ? for others
            stream.reconfigure(errors="replace")
    try:
        commands[options.command](options)
    except KeyboardInterrupt:  # what was printed so far ends with its line
        print()
        sys.exit(130)  # as a shell reports a program that Ctrl-C ended
    except FloatingPointError as error:
        sys.exit(f"deepseek_v3.py: {error}")
    except (ValueError, OSError) as error:
        command_line.error(error)

if __name__ == "__main__":
    main()
