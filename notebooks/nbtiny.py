"""The small trained model of the notebooks, and ways to look at it; nbhelp hands these names on."""

import base64
import hashlib
import html
import importlib.util
import io
import json
import os
import sys
import sysconfig
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import display

import deepseek_v3 as ds

# Okabe and Ito's colours, told apart by colour-blind readers; lines and bars differ in style as well.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#555555"]
LINES, HATCHES = ["-", "--", ":", "-."], ["", "///", "...", "xxx", "\\\\\\", "++"]
FAST = os.environ.get("DSV3_NB_FAST") == "1"  # 20 training steps: tests of everything but figures

def show(fig, alt):
    """Display a figure with a description for readers who cannot see it, and close it."""
    png = io.BytesIO()
    fig.savefig(png, dpi=90, bbox_inches="tight", metadata={"Software": None})
    plt.close(fig)
    data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": alt}
    display(data, raw=True, metadata={"image/png": {"alt": alt}})

def stdlib_corpus():
    """The Python standard library's top-level *.py files, one after the other, as bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if len(files) > 50:
        return b"".join(file.read_bytes() for file in files)
    specs = filter(None, map(importlib.util.find_spec, sorted(sys.stdlib_module_names)))  # a zipped one
    return "".join(s.loader.get_source(s.name) or "" for s in specs if hasattr(s.loader, "get_source")).encode()

def batches(data, count, length, seed=0):
    """Endless random windows (count, length) of bytes as token ids."""
    tokens, generator = torch.tensor(bytearray(data), dtype=torch.long), torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - length, (count,), generator=generator)
        yield torch.stack([tokens[i : i + length] for i in starts.tolist()])

def tiny_config(**changes):
    """1.3 M parameters over bytes: one dense layer, two with 16 experts, one MTP module."""
    sizes = dict(vocab_size=256, hidden_size=96, num_hidden_layers=3, q_lora_rank=64, kv_lora_rank=32)
    sizes |= dict(intermediate_size=288, moe_intermediate_size=64)
    return ds.DeepseekV3Config.tiny(**(sizes | changes))

def train(model, steps=250, gamma=2e-3, lr=3e-3, seed=0, each=None):
    """Train on the corpus but its last twentieth; each(step, output, violations) after every step."""
    corpus = stdlib_corpus()
    data = batches(corpus[: len(corpus) * 19 // 20], 12, 96, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps + 1, pct_start=0.1)
    model.train()
    for step, tokens in zip(range(steps), data, strict=False):
        out = model(tokens, labels=tokens)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), optimizer.zero_grad(), schedule.step()
        violations = model.update_router_bias(gamma)
        if each:
            each(step, out, violations)
    return model.eval()

def trained_tiny(steps=250, seed=0, **changes):
    """A small trained model, frozen; the first call trains it, about 30 s, the next ones read .cache/."""
    steps, config = 20 if FAST else steps, tiny_config(**changes)
    told = Path(ds.__file__).read_text() + json.dumps(config.to_dict(), sort_keys=True) + f"{steps} {seed}"
    folder = Path(__file__).resolve().parent / ".cache" / f"tiny-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    if not (folder / "config.json").is_file():
        torch.manual_seed(seed)
        train(ds.DeepseekV3ForCausalLM(config), steps, seed=seed).save_pretrained(folder)
    return ds.DeepseekV3ForCausalLM.from_pretrained(folder).requires_grad_(False)

def shown(byte):
    """One visible character for a byte."""
    return {32: "␣", 10: "⏎", 9: "⇥"}.get(byte, chr(byte) if 32 < byte < 127 else f"{byte:02x}")

def token_strip(tokens, groups, labels, per_line=32, title="", ax=None):
    """A text as boxes, one per token: its group's colour, its label (the expert's number) below -> figure."""
    lines = -(-len(tokens) // per_line)
    if ax is None:
        _, ax = plt.subplots(figsize=(0.3 * per_line, 0.62 * lines + 0.4))
    for i, (token, group, label) in enumerate(zip(tokens, groups, labels, strict=True)):
        x, y = i % per_line, -1.3 * (i // per_line)
        ax.add_patch(plt.Rectangle((x, y), 0.96, 1.2, color=COLORS[group % 8], alpha=0.4, lw=0))
        ax.text(x + 0.48, y + 0.86, token, ha="center", va="center", family="monospace", fontsize=11)
        ax.text(x + 0.48, y + 0.3, label, ha="center", va="center", fontsize=9)
    ax.set(xlim=(0, per_line), ylim=(-1.3 * lines + 1.2, 1.3), title=title)
    ax.axis("off")
    return ax.figure

SAMPLE = "def area(r):\n    return 3.14 * r ** 2\n"

def explore(model, text=SAMPLE, layer=1, head=0, tokenizer=None):
    """The page of view.py about a text: experts, attention, prediction; in a live kernel about your own.

    Opens with this layer and head. The notebooks' models read bytes; others need their tokenizer.
    """
    from view import view

    page = view(model, tokenizer, text, layer=layer, head=head)
    if "DSV3_NB_STATIC" in os.environ:
        alt = f"{text!r}, one box per token, coloured and numbered by the token's heaviest expert; below it the "
        alt += f"gates of all experts, attention of layer {layer}, head {head}, and the loss of each token."
        return show(page.figure(), alt)
    import ipywidgets as widgets

    box = widgets.Textarea(text, description="your text", continuous_update=False, layout={"width": "100%"})
    below = widgets.HTML(page._repr_html_())

    def read(change):
        try:
            below.value = view(model, tokenizer, change.new, layer=layer, head=head)._repr_html_()
        except ValueError as error:
            below.value = html.escape(str(error))

    box.observe(read, "value")
    return widgets.VBox([box, below])
