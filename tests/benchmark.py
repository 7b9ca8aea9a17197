"""Speed and memory beside transformers: same weights, same dtype, same threads, in one process.

    python tests/benchmark.py [--quick] [--only decode,prefill,…] [--device cpu] [--dtype float32]

Runs alternate, ours and theirs; a ratio is the median over pairs (above 1: we are faster), with the
smallest and largest pair behind it. The machine's own limits, a matrix product and a copy, are
measured in the same run, so that a figure means something on any machine. On a GPU the sizes are the
released ones, two layers of them, in bfloat16, and decoding is repeated with FP8 weights.
"""

import argparse
import contextlib
import gc
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")  # as `train` does, before torch computes
import deepseek_v3  # noqa: E402
from deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM, LatentCache  # noqa: E402

# 201M parameters: small enough for two cores, large enough that arithmetic and not Python decides.
SIZES = {
    "vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 16,
    "q_lora_rank": 256, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
    "v_head_dim": 64, "intermediate_size": 2048, "moe_intermediate_size": 256,
    "n_routed_experts": 64, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "rope_theta": 10000.0,
    "max_position_embeddings": 32768,
}  # fmt: skip
# A dense layer and one with experts, 13.9B parameters: 28 GB in bfloat16, which a GPU holds twice.
RELEASED = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}


@contextlib.contextmanager
def built_as(arguments):
    """Parameters are made where and as they stay, since twice as many bytes might not fit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, arguments.dtype))
    try:
        with torch.device(arguments.device):
            yield
    finally:
        torch.set_default_dtype(before)


def ours(arguments, **changes):
    torch.manual_seed(0)
    sizes = SIZES if arguments.device == "cpu" else RELEASED
    with built_as(arguments):
        return DeepseekV3ForCausalLM(DeepseekV3Config(**(sizes | changes))).eval()


def theirs(arguments, model):
    """transformers' model with the same weights."""
    import transformers

    config = transformers.DeepseekV3Config(**model.config.to_dict())
    with built_as(arguments):
        twin = transformers.DeepseekV3ForCausalLM(config).eval()
    state = model.state_dict()
    for name in [name for name in state if name.endswith("experts.gate_proj")]:
        gate, up = state.pop(name), state.pop(name.replace("gate_proj", "up_proj"))
        state[name.replace("gate_proj", "gate_up_proj")] = torch.cat([gate, up], 1)
    twin.load_state_dict(state)
    return twin


def clock(work, device):
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def pairs(mine, other, count, device):
    """Seconds of both, `count` times, alternating, after a warm-up."""
    clock(mine, device), clock(other, device)
    return [(clock(mine, device), clock(other, device)) for _ in range(count)]


def report(name, timed, work, unit, note=""):
    """One row of the table; `work` units were done in each timing."""
    mine, other = (statistics.median(side) for side in zip(*timed, strict=True))
    ratios = sorted(b / a for a, b in timed)
    spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"
    rates = f"{work / mine:,.1f} | {work / other:,.1f}"
    print(f"| {name} | {rates} {unit} | {spread} | {note} |", flush=True)


def limits(arguments):
    """The machine's matrix products, FLOP/s, and copies, bytes read and written a second."""
    size = 8192 if arguments.device == "cuda" else 2048
    a = torch.randn(size, size, device=arguments.device).to(getattr(torch, arguments.dtype))
    product = min(clock(lambda: a @ a, arguments.device) for _ in range(5))
    source = torch.empty(1 << 30, dtype=torch.uint8, device=arguments.device)  # beyond any cache
    target = torch.empty_like(source)
    copy = min(clock(lambda: target.copy_(source), arguments.device) for _ in range(5))
    return 2 * size**3 / product, 2 * source.numel() / copy


def activated_bytes(model):
    """Bytes of the weights that one token reads."""
    config, total = model.config, 0
    for name, p in model.named_parameters():
        share = config.num_experts_per_tok / config.n_routed_experts if ".experts." in name else 1
        total += 0 if "embed_tokens" in name else p.nbytes * share
    return total


def filled_caches(model, length, batch):
    """Caches of both sides that hold `length` random tokens."""
    import transformers

    config, dtype, device = model.config, model.dtype, model.device
    mine, other = LatentCache(length + 64), transformers.DynamicCache()
    C, R = config.kv_lora_rank, config.qk_rope_head_dim
    for layer in range(config.num_hidden_layers):
        latent = torch.randn(batch, length, C + R, dtype=dtype, device=device)
        mine.append(layer, latent)
        other.update(latent[:, None, :, :C].clone(), latent[:, None, :, C:].clone(), layer)
    mine.length = length
    return mine, other


def stepping_on(model, cache, length, tokens, batch=1):
    """What is timed of ours: decoding `tokens` tokens behind `length` others, as often as called."""
    token = torch.ones(batch, 1, dtype=torch.long, device=model.device)

    def run():
        cache.crop(length)
        for _ in range(tokens):
            model(token, past_key_values=cache, logits_to_keep=1)

    return run


@torch.no_grad()
def decode(arguments, model, twin, length, batch=1, tokens=16, count=5):
    mine, other = filled_caches(model, length, batch)
    token = torch.ones(batch, 1, dtype=torch.long, device=model.device)

    def run_other():
        if other.get_seq_length() > length:
            other.crop(length - other.get_seq_length())
        for _ in range(tokens):
            twin(token, past_key_values=other, use_cache=True, logits_to_keep=1)

    run_mine = stepping_on(model, mine, length, tokens, batch)
    timed = pairs(run_mine, run_other, count, arguments.device)
    seconds = statistics.median(a for a, _ in timed) / tokens
    latents = sum(held[:, :length].nbytes for held in mine.layers.values())
    floor = (activated_bytes(model) + latents) / arguments.read_rate
    note = f"{seconds / floor:.1f}x the time to read weights and cache once" if batch == 1 else ""
    report(f"decode at {length:,}, batch {batch}", timed, tokens * batch, "tokens/s", note)
    return seconds


def prefill_flops(model, T):
    """Products of a forward over T tokens, with the causal half of attention."""
    config = model.config
    weights = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n)
    experts = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 3)
    weights += experts * config.num_experts_per_tok / config.n_routed_experts
    widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    heads = config.num_hidden_layers * config.num_attention_heads
    return 2 * T * weights + heads * widths * T * T


@torch.no_grad()
def prefill(arguments, model, twin, length, count=2):
    tokens = torch.randint(0, model.config.vocab_size, (1, length), device=model.device)
    mine = lambda: model(tokens, use_cache=True, logits_to_keep=1)  # noqa: E731
    other = lambda: twin(tokens, use_cache=True, logits_to_keep=1)  # noqa: E731
    timed = pairs(mine, other, count, arguments.device)
    rate = prefill_flops(model, length) / statistics.median(a for a, _ in timed)
    note = f"{rate / arguments.product_rate:.0%} of the matrix-product rate"
    report(f"prefill {length:,}", timed, length, "tokens/s", note)


def training(arguments, model, twin, batch=4, length=256, count=3):
    tokens = torch.randint(0, model.config.vocab_size, (batch, length), device=model.device)

    def stepping(network):
        network.train()
        optimizer = torch.optim.AdamW(network.parameters(), 1e-5, fused=True)

        def step():
            network(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    timed = pairs(stepping(model), stepping(twin), count, arguments.device)
    report(f"training step {batch} x {length}", timed, batch * length, "tokens/s")
    if arguments.dtype == "float32" and arguments.device == "cpu":
        half = ours(arguments).bfloat16()
        timed = pairs(stepping(half), stepping(model), count, arguments.device)
        ratio = statistics.median(b / a for a, b in timed)
        print(f"| training step in bfloat16, ours | | | {ratio:.2f}x our float32 | |", flush=True)
    model.eval(), twin.eval()


@torch.no_grad()
def many_experts(arguments, length=1024, tokens=8, count=7):
    """Ours alone: four times the experts at the same top-k."""
    few, many = (ours(arguments, n_routed_experts=number) for number in (64, 256))
    caches = [LatentCache(length + 64) for _ in range(2)]
    context = torch.ones(1, length, dtype=torch.long, device=few.device)
    for network, cache in zip((few, many), caches, strict=True):
        network(context, past_key_values=cache, logits_to_keep=1)

    sides = [stepping_on(m, c, length, tokens) for m, c in zip((few, many), caches, strict=True)]
    timed = pairs(*sides, count, arguments.device)
    ratio = statistics.median(b / a for a, b in timed)
    print(f"| 256 experts instead of 64, decode at {length:,} | | | {ratio:.2f}x the time a token |")


@torch.no_grad()
def fp8(arguments, model, length=4096, tokens=16):
    """Decoding with the weights in FP8 that are released so, ours alone."""
    for module in model.modules():
        for leaf, weight in list(module._parameters.items()):
            name = leaf if isinstance(module, deepseek_v3.Experts) else f"a_proj.{leaf}"
            matrices = isinstance(module, (deepseek_v3.Linear, deepseek_v3.Experts)) and weight is not None
            if not matrices or module is model.lm_head or not deepseek_v3.released_in_fp8(name, weight):
                continue
            parts = [deepseek_v3.quantise(part) for part in (weight if weight.ndim == 3 else [weight])]
            codes, scale = (torch.stack(side) for side in zip(*parts, strict=True))
            codes, scale = (codes, scale) if weight.ndim == 3 else (codes[0], scale[0])
            setattr(module, leaf, torch.nn.Parameter(codes, requires_grad=False))
            setattr(module, leaf + "_scale_inv", torch.nn.Parameter(scale, requires_grad=False))
    cache = filled_caches(model, length, 1)[0]
    run = stepping_on(model, cache, length, tokens)
    seconds = statistics.median(clock(run, arguments.device) for _ in range(5)) / tokens
    share = activated_bytes(model) / arguments.read_rate / seconds
    print(f"| decode at {length:,}, FP8 weights | {1 / seconds:,.1f} tokens/s | | | {share:.0%} of the copy rate |")


def memory_of(side, arguments, length, prompt):
    """Peak memory, in a process of its own, of decoding at `length`, or of reading a prompt first."""
    words = [sys.executable, __file__, "--memory-of", side, "--length", str(length)]
    words += ["--dtype", arguments.dtype] + ["--prompt"] * prompt
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return [float(word) for word in printed.split()[-2:]]


def compare_memory(arguments, length):
    works = {f"decode at {length:,}": False, f"a prompt of {length:,}, then decode": True}
    for name, prompt in works.items():
        sides = [memory_of(side, arguments, length, prompt) for side in ("ours", "theirs")]
        for i, what in enumerate(("peak memory", "… beyond weights and cache")):
            mine, other = (side[i] for side in sides)
            ratio = f"{mine / other:.2f} of theirs"
            print(f"| {what}, {name} | {mine:.0f} | {other:.0f} MB | {ratio} | |", flush=True)


def memory_now(field):
    """A line of /proc/self/status in MB: VmRSS, or VmHWM, the peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024


@torch.no_grad()
def measure_memory(arguments):
    """The child of memory_of: prints the peak in MB while decoding, and what of it was not there before."""
    model = ours(arguments)
    network = model if arguments.memory_of == "ours" else theirs(arguments, model)
    mine, other = filled_caches(model, 0 if arguments.prompt else arguments.length, 1)
    cache = mine if network is model else other
    del model, mine, other
    gc.collect()
    held = memory_now("VmRSS")
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # the peak counts from here
    chunks = [torch.ones(1, 1, dtype=torch.long)] * 4
    if arguments.prompt:
        chunks[0] = chunks[0].expand(1, arguments.length)
    for chunk in chunks:
        network(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    peak = memory_now("VmHWM")
    print(peak, peak - held)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="float32, and bfloat16 on a GPU, unless given")
    parser.add_argument("--quick", action="store_true", help="short contexts only")
    parser.add_argument("--only", default="decode,prefill,training,experts,fp8,memory")
    parser.add_argument("--memory-of", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, default=4096, help=argparse.SUPPRESS)
    parser.add_argument("--prompt", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    if arguments.memory_of:
        return measure_memory(arguments)
    chosen = arguments.only.split(",")
    arguments.product_rate, arguments.read_rate = limits(arguments)
    model = ours(arguments)
    twin = theirs(arguments, model)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    threads = torch.get_num_threads()
    machine = f"{arguments.product_rate / 1e9:,.0f} GFLOP/s, copies {arguments.read_rate / 1e9:.1f} GB/s"
    print(f"{size:.0f}M parameters, {arguments.dtype}, {arguments.device}, {threads} threads; {machine}\n")
    print("| work | ours | transformers | ratio (spread) | |\n| --- | --: | --: | --: | --- |")
    lengths = (128, 1024) if arguments.quick else (128, 1024, 4096, 16384)
    if "decode" in chosen:
        for length in lengths:
            decode(arguments, model, twin, length, tokens=16 if length < 16384 else 8)
        decode(arguments, model, twin, 1024, batch=8, tokens=8, count=3)
    if "prefill" in chosen:
        for length in (512,) if arguments.quick else (2048, 4096):
            prefill(arguments, model, twin, length)
    if "training" in chosen and arguments.device == "cpu":
        training(arguments, model, twin)
    del twin
    if "fp8" in chosen and arguments.device != "cpu":
        fp8(arguments, model)
    del model
    if "training" in chosen and arguments.device != "cpu":  # with optimizer states beside, fewer fit
        model = ours(arguments, n_routed_experts=16)
        training(arguments, model, theirs(arguments, model))
        del model
    if "experts" in chosen:
        many_experts(arguments)
    if "memory" in chosen and arguments.device == "cpu":
        compare_memory(arguments, 4096)
    return None


if __name__ == "__main__":
    main()
