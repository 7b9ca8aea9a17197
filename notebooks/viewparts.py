# SPDX-License-Identifier: MIT
"""Parts of view.py that know no model: tokens as visible text, arrays as JSON, the still picture."""

import base64
import re
import zlib

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999"]  # Okabe and Ito's
PER_LINE = 110  # letters of the token strip

# ---- Tokens as visible text ------------------------------------------------------------------------

class Bytes:
    """The tokenizer of a model over bytes: 256 ids, one for each."""

    def encode(self, text):
        return list(text.encode())

def byte_letters():
    """Byte-level tokenizers write a byte as itself if it is a visible letter, the others as chr(256 + n)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(hidden)}

def visible(raw):
    """Bytes as letters: · ⏎ ⇥ for white space, ‹e2 82› for parts of a character, ‹U+200B› for unseen ones."""
    text = raw.decode("utf-8", errors="surrogateescape").translate({32: "·", 10: "⏎", 9: "⇥"})
    text = re.sub("[\udc80-\udcff]+", lambda m: f"‹{m[0].encode('utf-8', 'surrogateescape').hex(' ')}›", text)
    return "".join(c if c.isprintable() else f"‹U+{ord(c):04X}›" for c in text)

def spell(tokenizer, ids):
    """The visible spelling of each token: a piece of text, a marker, or part of a character."""
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)  # of transformers
    if isinstance(tokenizer, Bytes):
        return [visible(bytes([i])) for i in ids]
    if not hasattr(tokenizer, "id_to_token"):
        return [visible(tokenizer.decode([i]).encode()) for i in ids]
    letters, added = byte_letters(), tokenizer.get_added_tokens_decoder()
    byte_level = "ByteLevel" in repr(tokenizer.decoder)

    def one(i):
        token = tokenizer.id_to_token(i)
        if token is None:
            return f"‹{i}›"  # vocabularies of models are padded
        if i in added:
            return token
        if byte_level and all(letter in letters for letter in token):
            return visible(bytes(letters[letter] for letter in token))
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)  # sentencepiece
        return visible(bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode())

    return [one(i) for i in ids]

# ---- Arrays as JSON --------------------------------------------------------------------------------

def deflate(raw):
    """Bytes as base64 of a zlib stream; noise is shorter without a search for repeats."""
    streams = (zlib.compressobj(9, strategy=how) for how in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY))
    return base64.b64encode(min((stream.compress(raw) + stream.flush() for stream in streams), key=len)).decode()

def pack(values, levels=None, power=1):
    """An array of the page; numbers that are not whole are rounded to `levels` steps from least to most.

    The steps are those of the power's root: with 2, they are finer where numbers are small.
    """
    values = torch.as_tensor(values).detach().cpu().double().nan_to_num(0)
    root = values ** (1 / power)
    low, high = (float(root.min()), float(root.max())) if root.numel() else (0.0, 0.0)
    offset, scale = (low, (high - low) / levels or 1.0) if levels else (0, 1)
    whole = ((root - offset) / scale).round().numpy()
    size = next(size for size in (1, 2, 4) if whole.max(initial=0) < 256**size)
    found = {"shape": list(values.shape), "type": f"u{size}", "offset": offset, "scale": scale, "power": power}
    return found | {"data": deflate(whole.astype(f"<u{size}").tobytes())}

def unpack(array):
    """The numbers of an array of the page."""
    raw = np.frombuffer(zlib.decompress(base64.b64decode(array["data"])), "<" + array["type"]).astype(np.float64)
    return torch.from_numpy((array["offset"] + array["scale"] * raw) ** array["power"]).view(array["shape"])

# ---- The still picture -----------------------------------------------------------------------------

def draw(data):
    """A page's data -> Figure; no pyplot, so that nothing but the caller holds or closes it."""
    state, model, opened = data["states"][-1], data["model"], data["open"]
    tokens = spelled(data)
    places = lay_out(tokens)
    height = 0.42 * (places[-1][1] + 1) + 0.35
    figure = Figure(figsize=(11, 5 + height), layout="constrained")
    top, bottom = figure.subfigures(2, height_ratios=(height, 5))
    left, middle, right = bottom.subplots(1, 3, width_ratios=(1, 1.2, 0.55))
    moe = model["moe_layers"]
    if moe:  # the opened layer, or the nearest with experts
        at = opened["moe"]
        expert, gate = (unpack(state[name])[at] for name in ("expert", "gate"))
        heaviest = expert[:, 0].long().tolist()
        strip(top, model, tokens, places, heaviest, f"layer {moe[at]}: each token's heaviest expert; colour = its ")
        gates(figure, left, model, tokens, expert, gate, f"layer {moe[at]}: gate of each expert")
    else:
        strip(top, model, tokens, places, None, "")
        left.axis("off")
        left.text(0.5, 0.5, "no MoE layers", ha="center")
    attention(bottom, middle, state, tokens, opened)
    losses(right, data, state, len(tokens))
    return figure

def spelled(data):
    """The text's tokens in letters that the font has."""
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans Mono"))
    pieces = [data["vocabulary"]["pieces"][int(i)] for i in unpack(data["tokens"])]
    pieces = ["".join(c if font.get_char_index(ord(c)) else "▯" for c in piece) for piece in pieces]
    return [piece if len(piece) <= 14 else piece[:13] + "…" for piece in pieces]

def lay_out(tokens):
    """(x, line, width) of each token's box, in letters."""
    places, x, line = [], 0, 0
    for token in tokens:
        width = max(len(token), 2) + 0.3
        if x and x + width > PER_LINE:
            x, line = 0, line + 1
        places.append((x, line, width))
        x += width + 0.3
    return places

def strip(figure, model, tokens, places, heaviest, title):
    """The text in boxes, coloured by the group of each token's heaviest expert, its number below."""
    ax, grouped = figure.subplots(), model["groups"] > 1
    ax.set(xlim=(-0.3, PER_LINE + 1), ylim=(places[-1][1] + 1, -0.05))
    ax.set_title(title + ("group" if grouped else "number") if title else "", fontsize=10, loc="left")
    ax.axis("off")
    share = model["experts"] // model["groups"] if grouped else 1
    how = {"ha": "center", "va": "center", "family": "monospace", "parse_math": False}
    for i, (token, (x, line, width)) in enumerate(zip(tokens, places, strict=True)):
        color = COLORS[heaviest[i] // share % 8] if heaviest else COLORS[7]
        ax.add_patch(Rectangle((x, line), width, 0.92, color=color, alpha=0.4, lw=0))
        ax.text(x + width / 2, line + 0.34, token, fontsize=9, **how)
        ax.text(x + width / 2, line + 0.74, heaviest[i] if heaviest else "", fontsize=7, **how)

def gates(figure, ax, model, tokens, expert, gate, title):
    """Tokens by experts: who reads what, and how much it counts."""
    table = gate.new_zeros(len(tokens), model["experts"]).scatter(-1, expert.long(), gate)
    image = ax.imshow(table.numpy(), cmap="cividis", aspect="auto", vmin=0, interpolation="nearest")
    share = model["experts"] // model["groups"]
    for edge in range(share, model["experts"], share):
        ax.axvline(edge - 0.5, color="white", lw=1.2)
    groups = f"; {model['groups']} groups of {share}" if model["groups"] > 1 else ""
    ax.set_xlabel(f"expert ({model['chosen']} of {model['experts']} per token{groups})", fontsize=9)
    ax.set_title(title, fontsize=10)
    label(ax.yaxis, tokens)
    figure.colorbar(image, ax=ax, fraction=0.05)

def attention(figure, ax, state, tokens, opened):
    """The opened head: rows are queries, columns keys."""
    T, cells, layer = len(tokens), unpack(state["attention"]), opened["layer"]
    head = min(opened["head"], cells.shape[1] - 1)
    table = cells.new_full((T, T), float("nan"))
    rows, columns = table.isnan().tril().nonzero(as_tuple=True)
    table[rows, columns] = cells[layer, head]
    image = ax.imshow(table.numpy(), cmap="cividis", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    sink, distance = (float(unpack(state[name])[layer, head]) for name in ("sink", "distance"))
    told = f"{sink:.0%} on the first,\n{distance:.1f} tokens back on average"
    ax.set_title(f"layer {layer}, head {head}: attention; {told}", fontsize=10)
    ax.set_xlabel("key: token that is read", fontsize=9)
    ax.set_ylabel("query: token that reads", fontsize=9)
    label(ax.xaxis, tokens, 90)
    label(ax.yaxis, tokens)
    figure.colorbar(image, ax=ax, fraction=0.05, shrink=0.8)

def losses(ax, data, state, T):
    """Loss of each token as it came, by the model and the MTP modules."""
    loss = unpack(state["loss"])
    for (row, source), color in zip(enumerate(data["sources"]), COLORS, strict=False):
        if source["name"].startswith("layer") or source["ahead"] >= T:
            continue
        values = loss[row, : T - source["ahead"]]
        places = range(source["ahead"], T)
        told = f"{source['name']}: mean {float(values.mean()):.2f}"
        ax.plot(values.numpy(), places, color=color, ls="-" if row == 0 else ":", marker=".", ms=4, lw=1, label=told)
    ax.set(ylim=(T - 0.5, -0.5), xlim=(0, None))
    ax.set_xlabel("nats", fontsize=9)
    ax.set_ylabel("token", fontsize=9)
    ax.set_title("loss of each token", fontsize=10)
    ax.tick_params(labelsize=8)
    if T > 1:
        ax.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, -0.32), frameon=False)

def label(axis, tokens, rotation=0):
    """Name the ticks by tokens where there is room; else leave their numbers."""
    if len(tokens) <= 64:
        how = {"family": "monospace", "rotation": rotation, "fontsize": 7 if len(tokens) > 32 else 8}
        axis.set_ticks(range(len(tokens)), tokens, parse_math=False, **how)
