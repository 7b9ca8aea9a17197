"""The training figures of the README, measured: `python tests/experiments.py NAME`.

balance  load violation and held-out loss without balancing, with the bias, with the balance loss
fp8      loss with products in simulated FP8 against the same run in float32
forward  held-out loss of a trained checkpoint (--checkpoint) with products in FP8 and without
dense    the tiny model against a dense one of the same activated size, in the same wall-clock time
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import deepseek_v3  # noqa: E402


# ---- FP8 in simulation, §3.3: what multiplies is rounded to E4M3, products add up in float32 ----


def through_fp8(x, rows):
    """x rounded to E4M3 in blocks of rows x 128 that have a scale each; gradients pass unrounded."""
    codes, scale = deepseek_v3.quantise(x, rows)
    height, width = x.shape[-2:]
    scale = scale.repeat_interleave(rows, -2)[..., :height, :]
    scale = scale.repeat_interleave(deepseek_v3.BLOCK, -1)[..., :width]
    return x + ((codes.float() * scale).to(x.dtype) - x).detach()


def round_gradient(x):
    """x, whose gradient is rounded to E4M3 in tiles of 1 x 128 when it comes."""
    if x.requires_grad:
        x.register_hook(lambda gradient: through_fp8(gradient, 1))
    return x


class FP8Linear(deepseek_v3.Linear):
    """A map in FP8: inputs and gradients have a scale for each 1 x 128, weights for each 128 x 128."""

    def forward(self, x):
        weight = through_fp8(self.weight, deepseek_v3.BLOCK).to(x.dtype)
        return round_gradient(F.linear(through_fp8(x, 1), weight, self.bias))


class FP8Experts(deepseek_v3.Experts):
    """Routed experts whose three maps are as FP8Linear's, by grouped products."""

    def forward(self, x, indices, weights):
        (expert, order), K = indices.flatten().sort(stable=True), indices.shape[-1]
        every = torch.arange(len(self.gate_proj), device=x.device)
        ends = torch.searchsorted(expert, every, right=True, out_int32=True)

        def product(rows, stack):
            stack = through_fp8(stack, deepseek_v3.BLOCK).mT
            return round_gradient(F.grouped_mm(through_fp8(rows, 1), stack, offs=ends))

        rows = x.flatten(0, 1).index_select(0, order // K)
        visits = product(F.silu(product(rows, self.gate_proj)) * product(rows, self.up_proj), self.down_proj)
        visits = torch.empty_like(visits).index_copy_(0, order, visits).unflatten(0, (-1, K))
        return (visits * weights.flatten(0, 1).unsqueeze(-1)).sum(-2).to(x.dtype).view_as(x)


def swap_in_fp8(model):
    """Put such modules in place of a model's maps, with the same parameters, and return the model.

    Embedding, head, router, norms and attention itself keep their precision, as in the release.
    """
    for name, module in list(model.named_modules()):
        with torch.device("meta"):
            if isinstance(module, deepseek_v3.Experts):
                new = FP8Experts(model.config)
            elif isinstance(module, deepseek_v3.Linear) and deepseek_v3.released_in_fp8(name, module.weight):
                new = FP8Linear(module.in_features, module.out_features, module.bias is not None)
            else:
                continue
        new.load_state_dict(module.state_dict(keep_vars=True), assign=True)
        model.set_submodule(name, new.train(module.training))
    return model


# ---- Runs ----


def start(out, seed=0, steps=250, config=None, flags=()):
    """A Trainer in folder `out`, on the standard library."""
    out.mkdir(parents=True, exist_ok=True)
    words = ["train", "--out", str(out), "--steps", str(steps), "--seed", str(seed), *flags]
    if config is not None:
        config = {name: value for name, value in config.items() if name != "mtp_loss_weight"}  # by the schedule
        (out / "given.json").write_text(json.dumps(config))
        words += ["--config", str(out / "given.json")]
    return deepseek_v3.Trainer(deepseek_v3.parser().parse_args(words))


def train(out, *arguments, change=lambda model: model, **options):
    """Train in folder `out`, the model changed before -> lines of metrics, the last with val_loss."""
    trainer, lines = start(out, *arguments, **options), []
    change(trainer.model)
    while trainer.step < trainer.options.steps:
        lines.append(trainer.train_step())
        print(f"\r{out.name} step {trainer.step} loss {lines[-1]['main_loss']:.3f}", end="", file=sys.stderr)
    print(file=sys.stderr)
    lines[-1] |= trainer.evaluate(math.inf)
    return lines


def step_ratio(folder, config, rival, count=30):
    """How often longer a step with `config` takes than one with `rival`, steps alternating."""
    sides = [start(folder / f"clock-{i}", config=c) for i, c in enumerate((config, rival))]
    seconds = [[1 / side.train_step()["tokens_per_second"] for side in sides] for _ in range(count)]
    return statistics.median(a / b for a, b in seconds[3:])


def spread(values):
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def balance(folder, steps, seeds):
    tiny = deepseek_v3.DeepseekV3Config.tiny().to_dict()
    ways = {
        "none": (0.0, "0"),
        "bias": (0.0, "0.002"),
        "balance loss": (0.01, "0"),
    }
    print(f"tiny config, {steps} steps, {seeds} seeds; violation: mean of the last 50 steps")
    print("| balancing | MaxVio | held-out loss |\n| --- | --: | --: |")
    for name, (alpha, gamma) in ways.items():
        violations, losses = [], []
        for seed in range(seeds):
            config = tiny | {"balance_loss_weight": alpha}
            flags = ("--gamma", gamma)
            lines = train(folder / f"{name}-{seed}", seed, steps, config=config, flags=flags)
            violations.append(statistics.mean(line["max_violation"] for line in lines[-50:]))
            losses.append(lines[-1]["val_loss"])
        print(f"| {name} | {spread(violations)} | {spread(losses)} |", flush=True)


def fp8(folder, steps, seeds):
    print(f"tiny config, {steps} steps, {seeds} seeds; loss: mean of the last 50 steps")
    print("| products in | main loss | against float32, by seed |\n| --- | --: | --: |")
    means, calm = {}, ("--lr", "0.001")  # at a higher rate any rounding sends a run its own way
    for name, change in (("float32", lambda model: model), ("FP8", swap_in_fp8)):
        runs = [train(folder / f"{name}-{s}", s, steps, flags=calm, change=change) for s in range(seeds)]
        means[name] = [statistics.mean(line["main_loss"] for line in r[-50:]) for r in runs]
        ratios = [a / b - 1 for a, b in zip(means[name], means["float32"], strict=True)]
        errors = ", ".join(f"{ratio * 100:+.2f} %" for ratio in ratios)
        print(f"| {name} | {statistics.mean(means[name]):.3f} | {errors} |", flush=True)


def forward(folder, steps, seeds, checkpoint="out"):
    model = deepseek_v3.DeepseekV3ForCausalLM.from_pretrained(checkpoint)
    tokens = np.fromfile(Path(checkpoint) / "tokens.bin", deepseek_v3.token_dtype(model.config.vocab_size))
    corpus = deepseek_v3.Corpus(tokens, model.config.bos_token_id, 128)
    inputs = corpus.read(corpus.held_out(4096))
    with torch.no_grad():
        plain = model(**inputs).main_loss.item()
        rounded = swap_in_fp8(model)(**inputs).main_loss.item()
    print(f"held-out loss {plain:.4f}, with products in FP8 {rounded:.4f}: {rounded / plain - 1:+.2%}")


def dense(folder, steps, seeds):
    tiny = deepseek_v3.DeepseekV3Config.tiny()
    layers, top = tiny.num_hidden_layers, tiny.num_experts_per_tok + tiny.n_shared_experts
    same = {"first_k_dense_replace": layers + 1, "intermediate_size": top * tiny.moe_intermediate_size}
    shapes = {"experts": tiny.to_dict(), "dense": tiny.to_dict() | same}
    ratio = step_ratio(folder, *shapes.values())
    print(f"a step with experts takes {ratio:.2f} times as long; both have the time of its {steps} steps")
    print("| model | parameters | steps | held-out bits a byte |\n| --- | --: | --: | --: |")
    for name, config in shapes.items():
        with torch.device("meta"):
            model = deepseek_v3.DeepseekV3ForCausalLM(deepseek_v3.DeepseekV3Config(**config))
        size = sum(p.numel() for p in model.parameters()) / 1e6
        count = steps if name == "experts" else round(steps * ratio)
        runs = [train(folder / f"{name}-{s}", s, count, config) for s in range(seeds)]
        bits = spread([lines[-1]["val_bits_per_byte"] for lines in runs])
        print(f"| {name} | {size:.2f}M | {count} | {bits} |", flush=True)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("name", choices=("balance", "fp8", "forward", "dense"))
    arguments.add_argument("--steps", type=int, default=250)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--checkpoint", default="out", help="of forward")
    chosen = arguments.parse_args()
    more = {"checkpoint": chosen.checkpoint} if chosen.name == "forward" else {}
    with tempfile.TemporaryDirectory() as directory:
        globals()[chosen.name](Path(directory), chosen.steps, chosen.seeds, **more)
