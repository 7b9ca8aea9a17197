"""Figures of the notebooks that would take more lines there than they teach; each function returns the figure."""

import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.colors import TwoSlopeNorm

from nbtiny import COLORS, HATCHES, LINES, shown

def drafted_text(rows, marks, lines=2):
    """Texts by name above each other; marks of each byte of the last: "accepted", a rejected draft, or None."""
    half = -(-len(marks) // lines)
    fig, ax = plt.subplots(figsize=(10, 1.9 * lines))
    for n, mark in enumerate(marks):
        x, line = n % half, n // half
        for row, (name, text) in enumerate(rows.items()):
            y = -3.7 * line - row
            accepted = mark == "accepted" and row == len(rows) - 1
            face = "#FFE3B3" if accepted else "white"
            ax.add_patch(plt.Rectangle((x, y - 0.42), 0.94, 0.84, fc=face, ec="#999999"))
            ax.text(x + 0.47, y, shown(text[n]), ha="center", va="center", family="monospace", fontsize=11)
            if accepted:
                ax.plot([x + 0.1, x + 0.84], [y - 0.32] * 2, color="black", lw=2)
            if x == 0:
                ax.text(-0.3, y, name, ha="right", va="center")
        if isinstance(mark, int):
            y = -3.7 * line - len(rows)
            look = {"family": "monospace", "fontsize": 12, "color": COLORS[5]}
            ax.text(x + 0.47, y, shown(mark), ha="center", va="center", **look)
            ax.plot([x + 0.15, x + 0.8], [y - 0.35, y + 0.35], color=COLORS[5], lw=1)
    for line in range(lines):
        ax.text(-0.3, -3.7 * line - len(rows), "rejected", ha="right", va="center", color=COLORS[5])
    ax.set(xlim=(-3.4, half + 0.2), ylim=(-3.7 * lines + 0.9, 0.7))
    ax.axis("off")
    return fig

def arrows(ax, boxes, pairs):
    """Arrows from box to box that end on the boxes' edges; boxes are texts with a frame, by name."""
    for start, end in pairs:
        a, b = boxes[start], boxes[end]
        style = {"arrowstyle": "->", "patchA": a.get_bbox_patch(), "patchB": b.get_bbox_patch(), "shrinkA": 0}
        ax.annotate("", b.get_position(), a.get_position(), arrowprops=style | {"shrinkB": 0})

def mla_shapes(size):
    """The parts of one MLA layer with the widths that they returned, by name; kept ones are shaded."""
    told = {
        "h": (0, 1, f"$h$\n{size['h']:,}"),
        "kv_a_proj": (1.9, 2, "kv_a_proj (Eqs. 1, 3)\n512 + 64"),
        "latent": (4.3, 2, f"$c^{{KV}}$, kept (Eq. 1)\n{size['kv_a_layernorm']:,}"),
        "kv_b_proj": (6.8, 2, "kv_b_proj (Eqs. 2, 5)\n128 × (128 + 128)"),
        "k_rope": (4.3, 1, "$k^R$, kept (Eq. 3)\n64, turned"),
        "q_a_proj": (1.9, 0, f"q_a_proj (Eq. 6)\n{size['q_a_proj']:,}"),
        "q_norm": (4.3, 0, f"$c^Q$ (Eq. 6)\n{size['q_a_layernorm']:,}"),
        "q_b_proj": (6.8, 0, "q_b_proj (Eqs. 7, 8)\n128 × (128 + 64)"),
        "softmax": (8.9, 1, "attention (Eq. 10)\n128 heads"),
        "o_proj": (10.9, 1, f"o_proj (Eq. 11)\n{size['o_proj']:,}"),
    }
    fig, ax = plt.subplots(figsize=(11.5, 3))
    boxes = {}
    for name, (x, y, text) in told.items():
        kept = name in {"latent", "k_rope"}
        frame = {"boxstyle": "round,pad=0.4", "fc": "#FFE3B3" if kept else "white", "lw": 2.2 if kept else 1}
        boxes[name] = ax.text(x, y, text, ha="center", va="center", fontsize=9, bbox=frame)
    ways = "h kv_a_proj latent kv_b_proj softmax o_proj", "h q_a_proj q_norm q_b_proj softmax"
    for way in (*ways, "kv_a_proj k_rope softmax"):
        names = way.split()
        arrows(ax, boxes, zip(names, names[1:], strict=False))
    ax.set(xlim=(-0.5, 11.7), ylim=(-0.5, 2.5))
    ax.axis("off")
    return fig

def singular_values(trained, free, rank):
    """Singular values relative to the first, of a map with a latent of this rank and of one without."""
    fig, ax = plt.subplots(figsize=(7, 3.4))
    numbers = torch.arange(1, len(trained) + 1)
    kept = trained / trained[0] > 1e-6
    ax.semilogy(numbers, free / free[0], LINES[1], marker="s", ms=4, color=COLORS[0])
    ax.semilogy(numbers[kept], (trained / trained[0])[kept], marker="o", ms=4, color=COLORS[5])
    ax.axhspan(1e-8, 1e-6, color="0.9")
    lost = len(trained) - int(kept.sum())
    ax.text(64, 1e-7, f"the other {lost} of trained MLA:\nzero, up to rounding", ha="center", va="center")
    ax.text(60, 1.3, "random matrix, no latent between", ha="center", va="bottom", color=COLORS[0])
    ax.text(14, 0.008, "trained MLA", ha="center", color=COLORS[5])
    ax.axvline(rank + 0.5, color="black", lw=0.8, ls=":")
    ax.text(rank + 1.5, 1e-4, f"$d_c$ = {rank}", va="center")
    ax.set(xlabel="number of the singular value", ylabel="relative to the first", ylim=(1e-8, 8))
    return fig

def one_token(s, b, group_score, survivors, gates):
    """A token's way to its experts: scores and biased scores on one axis, scores of groups, gates."""
    experts, groups = len(s), len(group_score)
    width, at, kept = experts // groups, torch.arange(experts), survivors.isfinite()
    fig, axes = plt.subplots(3, 1, figsize=(8.6, 6.8), sharex=True, height_ratios=(2, 1, 1.2))
    for group in range(groups):
        edge = group * width - 0.5
        if not kept[group * width]:
            for ax in (axes[0], axes[2]):
                ax.axvspan(edge, edge + width, color="0.9", zorder=0)
        word = "kept" if kept[group * width] else "out"
        axes[1].bar(edge + width / 2, group_score[group], width - 0.2, color="0.95", edgecolor="black")
        told = f"{group_score[group]:.3f}: {word}"
        axes[1].text(edge + width / 2, group_score[group] / 2, told, ha="center", va="center")
    axes[0].bar(at, s, 0.6, color=COLORS[4], edgecolor="black", label="s (Eq. 15)")
    axes[0].vlines(at, s, s + b, color="black", lw=1.2)
    axes[0].scatter(at, s + b, marker="D", color=COLORS[5], edgecolor="black", zorder=3, label="s + b (Eq. 16)")
    axes[0].set_ylim(0, 1.35 * float(torch.max(s, s + b).max()))
    axes[0].legend(loc="upper left", ncols=2)
    axes[0].set_title("scores, and what the choice sees; grey: groups out of reach", loc="left", fontsize=10)
    axes[1].set_title("score of a group: its two best s + b, summed", loc="left", fontsize=10)
    axes[2].bar(at, gates, 0.6, color=COLORS[5], edgecolor="black")
    for i in gates.nonzero().flatten().tolist():
        axes[2].text(i, gates[i] / 2, f"{gates[i]:.2f}", ha="center", va="center", color="white", fontsize=9)
    axes[2].set_title("gates: s alone of the chosen, summing to 2.5 (Eqs. 13, 14)", loc="left", fontsize=10)
    axes[2].set(xlabel="expert", xticks=range(experts))
    return fig

def gates_as_a_bias_moves(table, deltas, expert, token):
    """Gates of all experts (E, steps) while one expert's bias moves; each exchange is named."""
    experts, chosen = len(table), table > 0
    fig, ax = plt.subplots(figsize=(8.6, 4.8))
    ends = (deltas[0], deltas[-1], experts - 0.5, -0.5)
    image = ax.imshow(table.masked_fill(~chosen, torch.nan), aspect="auto", extent=ends, interpolation="nearest")
    fig.colorbar(image, ax=ax, label="gate (white: not chosen)")
    for n, i in enumerate((chosen[:, 1:] != chosen[:, :-1]).any(0).nonzero().flatten().tolist()):
        x = (deltas[i] + deltas[i + 1]) / 2
        new, old = (set(chosen[:, j].nonzero().flatten().tolist()) for j in (i + 1, i))
        ax.axvline(x, color=COLORS[5], lw=1.5)
        told = "in " + ", ".join(map(str, sorted(new - old))) + "\nout " + ", ".join(map(str, sorted(old - new)))
        side = ("right", "left")[n % 2]  # neighbours do not overlap
        ax.text(x, -0.7, told, ha=side, va="bottom", fontsize=9, color=COLORS[5])
    for edge in range(experts // 4, experts, experts // 4):
        ax.axhline(edge - 0.5, color="0.6", lw=1, ls=":")
    ax.set(ylabel="expert (dotted: groups)", yticks=range(experts), xlabel=f"added to the bias of expert {expert}")
    ax.set_title(f"token {token!r}: its gates as the bias of expert {expert} moves", pad=34)
    ax.get_yticklabels()[expert].set_fontweight("bold")
    return fig

def groups_of_tokens(text, gates, allowed, touched):
    """Left: gates (T, E) of a text, groups out of reach grey. Right: histograms of groups touched, by name."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 7.2), width_ratios=(1.5, 1))
    left.imshow(allowed, cmap="Greys_r", vmin=-3.5, vmax=1, aspect="auto")
    shown_gates = gates.masked_fill(gates == 0, torch.nan)
    image = left.imshow(shown_gates, vmin=0, aspect="auto", interpolation="nearest")
    fig.colorbar(image, ax=left, label="gate", shrink=0.7)
    left.set_xticks(range(0, gates.shape[1], 2))
    left.set_yticks(range(len(text)), [shown(ord(c)) for c in text], family="monospace", fontsize=10)
    left.set(xlabel="expert", ylabel="token", title="coloured: chosen; white: in reach; grey: out of reach")
    for i, (name, m) in enumerate(touched.items()):
        share = torch.bincount(m, minlength=9)[1:] / len(m)
        look = {"color": COLORS[i], "hatch": HATCHES[i], "edgecolor": "black", "label": name}
        bars = right.bar(torch.arange(1, 9) + 0.4 * i - 0.2, share, 0.38, **look)
        right.bar_label(bars, [f"{p:.0%}" if p > 0.005 else "" for p in share.tolist()], fontsize=9)
    right.set(xlabel="groups a token touches", ylabel="share of 20,000 random tokens")
    right.set(xticks=range(1, 9), ylim=(0, 1.05), title="released sizes, random router")
    right.legend(loc="upper left")
    return fig

def lifts(tables, classes, titles):
    """Maps of log2 lift (classes, experts), by name: orange above chance, written out from 2 times chance on."""
    fig, axes = plt.subplots(len(tables), 1, figsize=(9.4, 7.2), sharex=True)
    for ax, (name, table) in zip(axes, tables.items(), strict=True):
        ax.set_facecolor("0.85")
        rare = table < -3  # less than an eighth of chance
        image = ax.imshow(table.masked_fill(rare, torch.nan), cmap="PuOr_r", vmin=-3, vmax=3, aspect="auto")
        for i, j in (table >= 1).nonzero().tolist():
            ink = "white" if table[i, j] > 2 else "black"
            ax.text(j, i, f"{2 ** table[i, j]:.1f}×", ha="center", va="center", fontsize=9, color=ink)
        for edge in range(4, table.shape[1], 4):
            ax.axvline(edge - 0.5, color="black", lw=1)
        ax.set_title(titles[name])
        ax.set_yticks(range(len(classes)), classes)
    axes[-1].set_xlabel("expert of layer 1 (black lines: groups); grey: under 1/8 of chance")
    axes[-1].set_xticks(range(table.shape[1]))
    bar = fig.colorbar(image, ax=axes, label="visits relative to chance", shrink=0.7, ticks=range(-3, 4))
    bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "1", "2×", "4×", "8×"])
    return fig

def chosen_together(ratios, per_group):
    """log2 of how often two experts are chosen together relative to chance (E, E), by name."""
    fig, axes = plt.subplots(1, len(ratios), figsize=(9.6, 4.6), sharey=True)
    for ax, (name, ratio) in zip(axes, ratios.items(), strict=True):
        ax.set_facecolor("0.6")
        blank = torch.eye(len(ratio), dtype=torch.bool)
        image = ax.imshow(ratio.masked_fill(blank, torch.nan), cmap="PuOr_r", vmin=-3, vmax=3)
        for edge in range(per_group, len(ratio), per_group):
            ax.axhline(edge - 0.5, color="black", lw=1.4)
            ax.axvline(edge - 0.5, color="black", lw=1.4)
        ax.set(title=name, xlabel="expert", xticks=range(0, len(ratio), 2), yticks=range(0, len(ratio), 2))
    axes[0].set_ylabel("expert")
    bar = fig.colorbar(image, ax=axes, label="chosen together, relative to chance", shrink=0.8, ticks=range(-3, 4))
    bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "1", "2×", "4×", "8×"])
    return fig

def turns(inv_freq, last):
    """The angles of positions 0 to last - 1 of four rotary pairs, on unit circles."""
    fig, axes = plt.subplots(1, 4, figsize=(9, 2.6))
    for ax, i in zip(axes, (0, 10, 20, 31), strict=True):
        a = torch.arange(last) * inv_freq[i]
        ax.add_patch(plt.Circle((0, 0), 1, fill=False, color="0.7"))
        dots = ax.scatter(a.cos(), a.sin(), c=torch.arange(last), cmap="cividis", s=26, zorder=3)
        ax.plot([0, a[-1].cos()], [0, a[-1].sin()], color="black", lw=1)
        ax.text(0, -0.35, f"position {last - 1}", ha="center", fontsize=9)
        ax.text(1.15, 0, "0", va="center")
        ax.set(xlim=(-1.2, 1.4), ylim=(-1.2, 1.2), aspect="equal")
        ax.set_title(f"pair {i}\none turn: {2 * torch.pi / inv_freq[i]:,.0f} tokens")
        ax.axis("off")
    fig.colorbar(dots, label="position", shrink=0.7)
    return fig

OPERATIONS = {  # of a pipeline: name, colour, hatch
    "F": ("forward", "#0072B2", ""), "B": ("backward", "#F0E442", ""),
    "I": ("backward, inputs only", "#56B4E9", "..."), "W": ("weights only", "#FFFFFF", "xxx"),
    "FB": ("forward + backward, overlapped", "#009E73", "///"),
}

def schedules(named, ranks, idle):
    """Gantt charts of simulated events (rank, start, end, kind, direction), by name."""
    fig, axes = plt.subplots(len(named), 1, figsize=(10, 3.2 * len(named)), sharex=True)
    for ax, (name, events) in zip(axes, named.items(), strict=True):
        for rank, start, end, kind, way in events:
            _, color, hatch = OPERATIONS[kind]
            ax.barh(rank, end - start, left=start, color=color, hatch=hatch, edgecolor="black", lw=0.5)
            if kind in {"F", "B"}:
                arrow, ink = ("↓↑"[way], "white") if kind == "F" else ("↑↓"[way], "black")
                ax.text((start + end) / 2, rank, arrow, ha="center", va="center", fontsize=9, color=ink)
        whole = max(end for _, _, end, _, _ in events)
        ax.set(title=f"{name}: {whole:g} units, {idle(events, ranks) / whole:.0%} idle", ylabel="rank")
        ax.set(yticks=range(ranks), xlim=(0, 82))
        ax.invert_yaxis()
    axes[-1].set_xlabel("time (F = 1, B = 2, W = 1, overlapped pair = 3)")
    boxes = [plt.Rectangle((0, 0), 1, 1, fc=c, hatch=h, ec="black") for _, c, h in OPERATIONS.values()]
    fig.legend(boxes, [name for name, _, _ in OPERATIONS.values()], loc="outside lower center", ncols=3)
    return fig

RUNS = {"none": ("-", COLORS[5]), "bias": ("--", COLORS[0]), "loss": (":", COLORS[2])}  # line and colour

def three_runs(lines, ylabel, nudge, lowest):
    """Ten-step averages by run, with the last value written at the end of each line."""
    fig, ax = plt.subplots(figsize=(7.4, 3.4))
    for name, y in lines.items():
        style, color = RUNS[name]
        ax.plot(torch.arange(len(y)) + 10, y, style, color=color, lw=2)
        ax.text(len(y) * 1.05 + 4, float(y[-1]) + nudge.get(name, 0), f"{name} {float(y[-1]):.2f}", va="center")
    ax.set(xlabel="step", ylabel=ylabel, xlim=(0, (len(y) + 9) * 1.16))
    ax.set_ylim(bottom=lowest)
    return fig

def parameters_by_part(order, parts, active):
    """Parameters by part: all, and hatched those that one token uses."""
    fig, ax = plt.subplots(figsize=(8, 3.8))
    for i, part in enumerate(order):
        ax.barh(i + 0.2, parts[part], 0.38, color=COLORS[0])
        ax.barh(i - 0.2, active[part], 0.38, color=COLORS[1], hatch="///", edgecolor="white")
        same = parts[part] == active[part]
        told = f"{parts[part] / 1e9:,.2f} B"
        ax.text(parts[part] * 1.1, i + (0 if same else 0.2), told, va="center", fontsize=9)
        if not same:
            told = f"{active[part] / 1e9:,.2f} B: 8 of 256"
            ax.text(active[part] * 1.1, i - 0.2, told, va="center", fontsize=9)
    ax.set(xscale="log", xlim=(5e7, 8e12), xlabel="parameters", yticks=range(len(order)), yticklabels=order)
    ax.set_title("upper bar: all parameters · hatched: those that one token uses", loc="left", fontsize=10)
    return fig

def three_models(rows):
    """The table of three models; cells that differ from the column to their left are shaded."""
    fig, ax = plt.subplots(figsize=(9, 4.6))
    for column, title in enumerate(("", "GPT-2", "Llama 3", "DeepSeek-V3")):
        ax.text(column + 0.05, -0.55, title, va="center", fontsize=11, weight="bold")
    for y, row in enumerate(rows):
        for column, text in enumerate(row):
            new = column > 1 and text != row[column - 1]
            face = {"facecolor": "#FFE3B3", "hatch": ""} if new else {"facecolor": "white"}
            ax.add_patch(plt.Rectangle((column, y), 1, 1, edgecolor="0.6", lw=2 if new else 0.6, **face))
            ax.text(column + 0.05, y + 0.5, text, va="center", weight="bold" if column == 0 else "normal")
    ax.set(xlim=(-0.01, 4.02), ylim=(len(rows) + 0.03, -1))
    ax.axis("off")
    return fig

def work_of_a_token(work):
    """GFLOP of one token by part, from multiply-adds; attention is hatched."""
    fig, ax = plt.subplots(figsize=(9, 3.4))
    for i, (name, count) in enumerate(work.items()):
        color, hatch = (COLORS[5], "///") if "attention" in name else (COLORS[0], "")
        ax.bar(i, 2 * count / 1e9, color=color, hatch=hatch, edgecolor="white")
        ax.text(i, 2 * count / 1e9 + 0.6, f"{2 * count / 1e9:.1f}", ha="center")
    ax.set(ylabel="GFLOP for one token", xticks=range(len(work)), xticklabels=work)
    return fig

def scores_by_position(grid):
    """Scores of one query and one key at all positions, with one diagonal drawn in."""
    fig, ax = plt.subplots(figsize=(4.6, 3.9))
    limit = grid.abs().max()
    picture = ax.imshow(grid, cmap="PuOr", vmin=-limit, vmax=limit)
    fig.colorbar(picture, label="score of this q and k (white = 0)")
    ax.plot([0, 18], [5, 23], color="black", lw=1.2, ls="--")
    ax.text(9, 14, "distance 5", rotation=-45, rotation_mode="anchor", ha="center", va="center",
            bbox={"color": "white", "pad": 1})
    ax.set(xlabel="position of the key", ylabel="position of the query", title="one q, one k, all positions")
    return fig

def two_layouts(bars):
    """The permutation of 16 channels, and the relative errors of scores with and without it."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.5), width_ratios=(1, 1.25))
    left, middle = axes
    order = torch.cat([torch.arange(0, 16, 2), torch.arange(1, 16, 2)])
    left.imshow(F.one_hot(order, 16), cmap="Greys", vmax=1.3)
    left.set(xlabel="channel as released", ylabel="channel in half-split code")
    left.set(title="the permutation, 16 channels", xticks=range(0, 16, 3), yticks=range(0, 16, 3))
    for n, (name, values) in enumerate(bars.items()):
        shifted = [i + 0.38 * n for i in range(2)]
        middle.bar(shifted, values, 0.36, color=COLORS[n], hatch=HATCHES[n], edgecolor="white")
        for i, v in zip(shifted, values, strict=False):
            middle.text(i, v * 1.4, f"{name}\n{v:.2g}", ha="center", fontsize=9)
    middle.set(yscale="log", ylim=(1e-7, 200), ylabel="error / size of a score")
    middle.set_title("two ways to load the same weights")
    middle.set_xticks([0.19, 1.19], ["all pairs of tokens", "a token with itself"])
    return fig

def wavelengths(low, high, wavelength, pair):
    """Tokens for one turn of each rotary pair; between `low` and `high` YaRN blends."""
    fig, ax = plt.subplots(figsize=(7.4, 4.2))
    ax.axvspan(low, high, color="0.9")
    ax.text((low + high) / 2, 3, "blended\n11–22", ha="center", fontsize=10)
    ax.text(5, 3, "left alone\n0–10", ha="center", fontsize=10)
    ax.text(27.3, 3, "slowed 40×\n23–31", ha="center", fontsize=10)
    for n, y in enumerate(wavelength.values()):
        ax.semilogy(pair, y, LINES[(1, 3, 0)[n]], color=COLORS[(0, 1, 5)[n]], lw=(1.6, 1.6, 2.4)[n])
    ax.text(31.3, wavelength["RoPE"][31], "RoPE", va="center")
    ax.text(31.3, wavelength["YaRN"][31], "YaRN =\ninterpolation", va="center")
    ax.text(0, 7000, "position interpolation")
    for tokens, name in ((4096, "4,096 (trained)"), (163840, "163,840")):
        ax.axhline(tokens, color="black", lw=0.7, ls=":")
        ax.text(37, tokens, name, va="center", fontsize=9)
    ax.set(xlabel="rotary pair", ylabel="tokens for one turn", xlim=(-0.5, 36.8), ylim=(1.5, 6e6))
    ax.set_xticks(range(0, 32, 5))
    return fig

def cosines(curves, edges):
    """Mean cosine against distance, averaged in bins whose edges are given, by name."""
    fig, ax = plt.subplots(figsize=(7.4, 3.4))
    for n, (name, cosine) in enumerate(curves.items()):
        mean = [cosine[a - 1 : b - 1].mean() for a, b in zip(edges, edges[1:], strict=False)]
        centre = [math.sqrt(a * (b - 1)) for a, b in zip(edges, edges[1:], strict=False)]
        ax.semilogx(centre, mean, LINES[(1, 3, 0)[n]], color=COLORS[(0, 1, 5)[n]], lw=2, label=name)
    ax.axvline(4096, color="black", lw=0.7, ls=":")
    ax.text(4400, 0.95, "4,096", fontsize=9)
    ax.set(xlabel="distance in tokens", ylabel="mean cosine of the 32 pairs", xlim=(1, 1.3e5))
    ax.legend(loc="lower left")
    return fig

def entropies(bits, contexts):
    """Entropy of a softmax against the number of keys, by name."""
    fig, ax = plt.subplots(figsize=(7, 3.4))
    for n, (name, entropy) in enumerate(bits.items()):
        ax.semilogx(contexts, entropy, LINES[n], marker="os^"[n], color=COLORS[(0, 1, 5)[n]])
        ax.text(1.6e5, entropy[-1] + (0.25, 0, -0.25)[n], name, va="center")
    ax.set(xlabel="keys in the context", ylabel="entropy of the softmax (bits)", xlim=(50, 1.5e6))
    ax.set_xticks([1e2, 1e3, 1e4, 1e5])
    return fig

def numbers_kept(kept):
    """Bars of numbers kept per token per layer, by name; MLA's latent is hatched."""
    fig, ax = plt.subplots(figsize=(8, 3))
    for i, (name, count) in enumerate(kept.items()):
        mine = name == "MLA's latent"
        color, hatch = (COLORS[5], HATCHES[1]) if mine else (COLORS[4], "")
        ax.barh(i, count, color=color, hatch=hatch, edgecolor="white")
        ax.text(count * 1.1, i, f"{count:,}", va="center")
    ax.set(xscale="log", xlim=(100, 2e5), xlabel="numbers kept per token per layer", yticks=range(5))
    ax.set_yticklabels(kept)
    ax.invert_yaxis()
    return fig

def scores_of_heads(H, p, content, rotary, seen_keys, T):
    """Attention, content scores and rotary scores of each head, query by key."""
    fig, axes = plt.subplots(3, H, figsize=(9.5, 7.4), sharex=True, sharey=True)
    rows = (("attention", p, "cividis"), ("content score", content, "PuOr"), ("rotary score", rotary, "PuOr"))
    for i, (name, table, cmap) in enumerate(rows):
        shown = table[0].masked_fill(~seen_keys, torch.nan)
        limit = float(table[0][:, seen_keys].abs().quantile(0.99))
        for head, ax in enumerate(axes[i]):
            picture = ax.imshow(shown[head], cmap=cmap, vmin=0 if cmap == "cividis" else -limit, vmax=limit)
            ax.set(xticks=range(0, T, 10), yticks=range(0, T, 10), title=f"head {head}" if i == 0 else "")
        axes[i, 0].set_ylabel(f"{name}\nquery")
        fig.colorbar(picture, ax=axes[i], shrink=0.9)
    for ax in axes[2]:
        ax.set_xlabel("key")
    return fig

def error_by_distance(gap):
    """Relative error of a score against the distance of query and key."""
    fig, ax = plt.subplots(figsize=(7, 3.2))
    ax.plot(gap, marker="o", ms=4)
    ax.set(xlabel="distance of query and key", ylabel="error / size of the score", ylim=(0, None))
    return fig

def cache_sizes(kinds, contexts):
    """GiB of cache against context, of kinds that keep so many numbers per token per layer."""
    fig, ax = plt.subplots(figsize=(7.6, 4))
    for i, (name, numbers) in enumerate(kinds.items()):
        size = contexts * numbers * 61 * 2 / 2**30
        style = {"lw": 2.8 if name == "MLA" else 1.5, "color": COLORS[(0, 2, 5, 3)[i]]}
        ax.loglog(contexts, size, LINES[(1, 3, 0, 2)[i]], **style)
        ax.text(1.5e5, size[-1], f"{name}: {size[-1]:,.3g} GiB", va="center")
    ax.axhline(80e9 / 2**30, color="black", lw=0.8, ls=":")
    ax.text(110, 100, "one 80 GB card", fontsize=9)
    ax.set(xlabel="tokens of one sequence (up to 131,072)", ylabel="GiB of cache, bfloat16", xlim=(100, 3e6))
    ax.set_xticks([1e2, 1e3, 1e4, 1e5])
    return fig

def padded_batch(real, width, ids, positions, pattern):
    """Tokens with their positions in a left-padded batch, and who sees whom in each row."""
    fig, axes = plt.subplots(1, 4, figsize=(10, 2.9), width_ratios=(1.5, 1, 1, 1))
    axes[0].imshow(real, cmap="Greys", vmax=3, vmin=-0.2)
    for row in range(3):
        for i in range(width):
            shown = f"{chr(ids[row, i])}\n{positions[row, i]}" if real[row, i] else "pad"
            axes[0].text(i, row, shown.replace(" ", "␣"), ha="center", va="center", fontsize=9)
    axes[0].set(xticks=[], yticks=range(3), title="token and its position", ylabel="row of the batch")
    for row, ax in enumerate(axes[1:]):
        ax.imshow(pattern[row, 0], cmap="Greys", vmax=1.4)
        ax.set(title=f"row {row}: who sees whom", xlabel="key", ylabel="query" if row == 0 else "")
        ax.set(xticks=range(0, width, 2), yticks=range(0, width, 2))
    return fig

def differences(gaps):
    """Largest difference of a logit at each position, by number format."""
    fig, ax = plt.subplots(figsize=(7.6, 3))
    for i, (dtype, gap) in enumerate(gaps.items()):
        ax.semilogy(gap.clamp(min=1e-7), LINES[i], marker="os"[i], ms=4, color=COLORS[i])
        ax.text(len(gap) + 1, gap[-8:].median(), str(dtype).removeprefix("torch."), va="center")
    ax.set(xlabel="position", ylabel="largest |difference| of a logit", xlim=(-1, len(gap) + 9))
    return fig

def cheaper_order(new, old, ratio):
    """Map of new by kept tokens: log10 of the ratio of both orders' multiply-adds."""
    fig, ax = plt.subplots(figsize=(7.4, 4.2))
    picture = ax.pcolormesh(new, old, ratio, cmap="PuOr", vmin=-2.2, vmax=2.2, rasterized=True)
    ax.contour(new, old, ratio, levels=[0], colors="black")
    fig.colorbar(picture, label="log10 (expanded / absorbed)")
    ax.set(xscale="log", yscale="log", xlabel="new tokens in this call", ylabel="kept tokens, new ones included")
    ax.text(4, 2.2e4, "absorbing\nis cheaper", ha="center", color="white", fontsize=11)
    ax.text(3000, 5.5e4, "expanding\nis cheaper", ha="center", fontsize=11)
    ax.text(3000, 400, "more new than kept:\ndoes not occur", ha="center", fontsize=9)
    ax.plot([1, 3], [131072 * 0.8] * 2, "ko-", ms=4)
    ax.text(3.6, 131072 * 0.8, "decoding, and drafts of MTP", va="center", fontsize=9)
    return fig

def decoding_times(rows, contexts):
    """Milliseconds of one step against kept tokens, by name."""
    fig, ax = plt.subplots(figsize=(7.4, 3.6))
    for i, (name, times) in enumerate(rows.items()):
        ax.loglog(contexts, times, LINES[i], marker="os^"[i], color=COLORS[(0, 1, 5)[i]])
        ax.text(9000, times[-1] * (1.3, 1, 0.77)[i], name, va="center")
    ax.set(xlabel="kept tokens", ylabel="ms to attend with one new token", xlim=(220, 6e4), xticks=[])
    ax.set_xticks(contexts, [f"{c:,}" for c in contexts])
    ax.minorticks_off()
    return fig

def violations_by_rate(rates):
    """MaxVio after each step, by the step size of the bias."""
    fig, ax = plt.subplots(figsize=(7.4, 3.6))
    for n, (u, violations) in enumerate(rates.items()):
        ax.plot(violations, LINES[n], color=COLORS[(0, 5, 2, 3)[n]], lw=1.6, label=f"γ = {u}")
    ax.set(xlabel="step", ylabel="MaxVio", ylim=(0, 3.1), xlim=(0, 300))
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center")
    return fig

def loads(shares, idle):
    """Load of each expert after each step relative to its fair share, by run."""
    fig, axes = plt.subplots(3, 1, figsize=(8.6, 7.4), sharex=True)
    for ax, (name, share) in zip(axes, shares.items(), strict=True):
        colors = TwoSlopeNorm(1, 0, 4)  # white: the fair share
        image = ax.imshow(share, cmap="PuOr_r", norm=colors, aspect="auto", interpolation="nearest")
        for edge in (4, 8, 12):
            ax.axhline(edge - 0.5, color="black", lw=1)
        ax.set(title=f"{name}: {idle[name]} of 16 experts below a quarter of their share at the end", ylabel="expert")
        ax.set_yticks(range(0, 16, 3))
    axes[2].set_xlabel("step")
    fig.colorbar(image, ax=axes, label="load of an expert, 1 (white): its fair share", ticks=range(5), shrink=0.7)
    return fig

def bias_paths(biases, STEPS):
    """The biases of 16 experts (steps, 16); thin lines: the fastest that a bias can move."""
    fig, ax = plt.subplots(figsize=(7.4, 4))
    for i in range(16):
        ax.plot(biases[:, i], LINES[i // 4], color=COLORS[(0, 5, 2, 7)[i // 4]], lw=1.3)
    last_y = -9.0
    for i in biases[-1].argsort().tolist():
        last_y = max(float(biases[-1, i]), last_y + 0.055 * float(biases.max() - biases.min()))
        tip, line = (STEPS - 1, float(biases[-1, i])), {"arrowstyle": "-", "lw": 0.4, "color": "0.5"}
        ax.annotate(str(i), tip, (STEPS * 1.04, last_y), va="center", arrowprops=line)
    ax.set(xlabel="step", ylabel="bias", xlim=(0, STEPS * 1.1), title="layer 1, 16 experts; line style = group")
    steps = torch.arange(STEPS)
    ax.plot(steps, 0.002 * steps, color="black", lw=0.7)
    ax.plot(steps, -0.002 * steps, color="black", lw=0.7)
    ax.set_ylim(float(biases.min()) - 0.05, float(biases.max()) + 0.05)
    return fig

def information_bars(bits):
    """Bits about the class in layers 1 and 2, by run."""
    fig, ax = plt.subplots(figsize=(6.4, 2.8))
    for n, (name, heights) in enumerate(bits.items()):
        look = {"color": RUNS[name][1], "hatch": HATCHES[n], "edgecolor": "black", "label": name}
        ax.bar_label(ax.bar([i + 0.27 * n for i in (0, 1)], heights, 0.25, **look), fmt="%.2f")
    ax.set(xticks=[0.27, 1.27], xticklabels=["layer 1", "layer 2"], ylabel="bits about the class")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center")
    return fig

def alignment(word):
    """What each row of an MTP module gets and predicts, at depths 1 and 2."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 2.9), sharey=True)
    for ax, k in zip(axes, (1, 2), strict=False):
        for y, shift in enumerate((k - 1, k, k + 1)):
            for i in range(len(word)):
                there, useful = i + shift < len(word), i + k + 1 < len(word)
                face = {0: "white", 1: "#CFE8F7", 2: "#FFE3B3"}[y] if useful else "#D0D0D0"
                box = plt.Rectangle((i - 0.46, y - 0.4), 0.92, 0.8, fc=face, ec="black", lw=1 if useful else 0.3,
                                    hatch="" if useful else "///")
                ax.add_patch(box)
                label = "…" * (y == 0) + word[i + shift] if there else "–"
                ax.text(i, y, label, ha="center", va="center", family="monospace", fontsize=13)
        ax.set(xlim=(-0.6, 5.6), ylim=(2.6, -0.6), xticks=range(6), yticks=range(3), xlabel="row i")
        ax.set_title(f"depth {k}")
    axes[0].set_yticklabels(["state of the depth above", "embedding of $t_{i+k}$", "target $t_{i+k+1}$"])
    return fig

def two_losses(smooth):
    """Losses of the main model and of the MTP module, means of 10 steps."""
    fig, ax = plt.subplots(figsize=(8, 3.4))
    for i, (_name, values) in enumerate(smooth.items()):
        ax.plot(range(10, 10 + len(values)), values, LINES[i], color=COLORS[(0, 5)[i]], lw=2)
    ax.axhline(math.log(256), color="black", lw=0.7, ls=":")
    ax.text(98, math.log(256) + 0.06, "knowing nothing, ln 256", ha="right")
    ax.text(50, 4.3, "solid: main, the next byte\ndashed: MTP, the byte after next")
    ax.set(xlabel="step", ylabel="nats per byte, mean of 10 steps", ylim=(2, 6))
    return fig

def acceptance(share, counts):
    """Share of drafts accepted by position, for all bytes and without blanks."""
    fig, ax = plt.subplots(figsize=(8.5, 3.6))
    for i, name in enumerate(("all bytes", "without blanks and line ends")):
        places = torch.arange(4) + 0.4 * i - 0.2
        ax.bar(places, share[i], 0.38, color=COLORS[(4, 1)[i]], hatch=HATCHES[i], edgecolor="black", label=name)
        for x, a, n in zip(places.tolist(), share[i].tolist(), counts[i, :, 0].int().tolist(), strict=False):
            ax.text(x, a + 0.02, f"{a:.0%}\nn={n}", ha="center", va="bottom", fontsize=9)
    ax.set(ylim=(0, 1.2), xticks=range(4), xlabel="position of the draft (those before it were accepted)",
           ylabel="share accepted", yticks=[0, 0.25, 0.5, 0.75, 1])
    ax.set_xticklabels(range(1, 5))
    fig.legend(loc="outside upper center", ncols=2)
    return fig

def tokens_per_step(chain, per_step):
    """Tokens per step against drafts per step: measured, and from the chain of acceptances."""
    fig, ax = plt.subplots(figsize=(8, 3.4))
    ax.plot(range(5), [1, *chain], "--", color=COLORS[5])
    ax.plot(range(5), [1, *per_step], "o", ms=9, mfc="none", mew=2, color=COLORS[0])
    ax.plot(range(5), range(1, 6), ":", color="black", lw=0.9)
    ax.fill_between([0.8, 1.2], 1.85, 1.9, color=COLORS[2], ec="black", hatch="////")
    ax.annotate("report, K = 1: acceptance of\n85 to 90 % would be 1.85 to 1.90", (0.8, 1.88), (-0.1, 3.1),
                arrowprops={"arrowstyle": "->"})
    ax.text(3.05, 4.25, "all accepted", ha="right")
    ax.text(4.08, per_step[-1], "measured (circles),\n1 + a₁ + a₁a₂ + …\n(dashes)", va="center")
    ax.set(xlabel="K, drafts per step", ylabel="tokens per step", xticks=range(5), xlim=(-0.2, 5.1), ylim=(0.8, 5.1))
    return fig

def number_line(positive):
    """The positive numbers of E4M3 on a log scale."""
    fig, ax = plt.subplots(figsize=(9.5, 2.7))
    normal = positive >= 2**-6
    for part, y, color in ((normal, 0, COLORS[0]), (~normal, 0, COLORS[5])):
        ax.vlines(positive[part], 0, 1, color=color, lw=1.2, ls="-" if y == 0 and part is normal else ":")
    ax.set_xscale("log", base=2)
    ax.set(ylim=(0, 1.75), yticks=[], xlabel="positive numbers of E4M3, log scale", xlim=(2**-9.4, 2**9.2))
    ax.set_xticks([2.0**i for i in range(-9, 10, 2)])
    ax.spines["left"].set_visible(False)
    ax.text(2**-9.3, 1.1, "subnormal (dotted):\n7 steps of 2⁻⁹", va="bottom")
    ax.annotate("one octave: 8 numbers", (2.0**0.45, 1.02), (2.0**0.45, 1.35), ha="center",
                arrowprops={"arrowstyle": "-[, widthB=1.7"})
    ax.text(448, 1.1, "448", ha="center", va="bottom")
    return fig

def outlier_errors(sizes, found):
    """Error of the other channels against the size of an outlier, by way of scaling."""
    fig, ax = plt.subplots(figsize=(8.5, 3.6))
    look = {"int8": (5, "-", "s"), "e4m3": (0, "--", "o"), "tile": (3, ":", "^"), "others": (2, "-", "")}
    for name, (color, line, marker) in look.items():
        ax.plot(sizes, found[name], line, marker=marker or None, markevery=2, ms=5, color=COLORS[color])
    ax.set(xscale="log", yscale="log", ylim=(0.008, 2.2), xlim=(0.8, 1e7), xlabel="size of the outlier channel",
           ylabel="relative error of the others")
    ax.text(2.2, 0.3, "INT8,\none scale", ha="center")
    ax.text(2.5e4, 0.3, "E4M3, one scale (circles);\nthe outlier's tile (triangles)", ha="right")
    ax.text(1.3e6, 0.0255, "E4M3, the\nother tiles", va="center")
    return fig

def block_errors(grids, totals):
    """Relative error of each block, by way of scaling, with that of the whole tensor."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.9), sharey=True)
    for ax, (name, grid) in zip(axes, grids.items(), strict=False):
        picture = ax.imshow(grid.log10(), vmin=-2, vmax=0)
        for i in range(6):
            for j in range(8):
                shade = "black" if grid[i, j] > 0.12 else "white"
                told = f"{grid[i, j]:.2f}" if grid[i, j] < 1 else "lost"
                ax.text(j, i, told, ha="center", va="center", color=shade, fontsize=10)
        ax.set(title=f"{name}; whole tensor {totals[name]:.4f}", xlabel="block column", xticks=range(8))
    axes[0].set_ylabel("block row")
    bar = fig.colorbar(picture, ax=axes, shrink=0.85, ticks=[-2, -1, 0], label="relative error of a block")
    bar.ax.set_yticklabels(["0.01", "0.1", "1"])
    return fig

def ragged_blocks(rows, grid):
    """The blocks of kv_a_proj_with_mqa; the lowest row of them is half as high."""
    fig, ax = plt.subplots(figsize=(10, 2.9))
    for i, count in enumerate(rows.tolist()):
        for j in range(grid[1]):
            style = {"hatch": "////"} if count < 128 else {}
            face = COLORS[1] if count < 128 else COLORS[4]
            ax.add_patch(plt.Rectangle((128 * j, 128 * i), 128, count, fc=face, ec="white", lw=0.8, **style))
    ax.axhline(512, color="black", lw=1.5, xmax=7168 / 8300)
    ax.text(7230, 256, "512 rows:\nlatent, 4 × 56\nwhole blocks", va="center")
    ax.text(7230, 556, "64 rows: rotary key,\n56 half blocks", va="center")
    ax.set(xlim=(0, 8300), ylim=(610, 0), xticks=[*range(0, 7168, 1024), 7168], yticks=[*range(0, 577, 128), 576],
           xlabel="column of the weight", ylabel="row of the weight")
    return fig

def adder_errors(sums, lengths):
    """Error against the number of products added up, by how often the sum is moved."""
    fig, ax = plt.subplots(figsize=(8, 3.5))
    for i, (_promote, errors) in enumerate(sums.items()):
        ax.loglog(lengths, errors, LINES[i], marker="so"[i], color=COLORS[(5, 0)[i]])
    ax.text(1150, sums[0][3] * 1.9, "one running sum", ha="right")
    ax.text(lengths[-1], sums[128][-1] * 0.55, "moved to float32 every 128", ha="right", va="top")
    ax.set(xlabel="K, products added up", ylabel="relative error of the result", xticks=lengths)
    ax.set_xticklabels(lengths)
    ax.minorticks_off()
    ax.set_ylim(min(sums[128]) * 0.3, max(sums[0]) * 2)
    return fig

def scale_errors(curves, factors):
    """Error against the size of a matrix, with free scales and with powers of two."""
    fig, ax = plt.subplots(figsize=(8, 3.4))
    for _i, ((name, kind), values) in enumerate(curves.items()):
        ax.plot(factors, values, LINES[kind == "power"], color=COLORS[(0, 5)[name == "uniform"]],
                marker="s" if kind == "power" else None, ms=4)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="the same matrix, times", ylabel="relative error", xlim=(0.97, 5.4),
           ylim=(0, 1.3 * max(map(max, curves.values()))), xticks=[1, 1.41421, 2, 2.82843, 4])
    ax.set_xticklabels(["1", "1.41", "2", "2.83", "4"])
    for name, shift in (("Gaussian", 0.0013), ("uniform", -0.0013)):
        ax.text(4.1, curves[name, "free"][-1] + shift, name, va="center", color=COLORS[(0, 5)[name == "uniform"]])
    ax.text(1.0, 0.004, "lines: a free scale; dashes with squares: a power of two")
    return fig

def last_real_bytes(padded, rows):
    """A padded batch on either side; the last real byte of each row is outlined."""
    fig, axes = plt.subplots(2, 1, figsize=(7.4, 4.6))
    for ax, side in zip(axes, ("left", "right"), strict=False):
        ids, mask = padded(rows, side)
        place = (mask * torch.arange(mask.shape[1])).argmax(-1)
        for i, row in enumerate(ids.tolist()):
            for j, byte in enumerate(row):
                real, last = bool(mask[i, j]), j == int(place[i])
                ax.add_patch(plt.Rectangle((j, -i), 0.94, 0.9, fc="white" if real else "0.8", ec="0.6", lw=0.6))
                if last:
                    ax.add_patch(plt.Rectangle((j, -i), 0.94, 0.9, fc="none", ec=COLORS[5], lw=3.5, zorder=3))
                sign = chr(byte).replace(" ", "␣") if real else "pad"
                ax.text(j + 0.47, 0.45 - i, sign, ha="center", va="center", fontsize=10)
            if not mask[i, -1]:
                ax.annotate("index −1", (len(row), 0.45 - i), (len(row) + 0.7, 0.45 - i), va="center",
                            arrowprops={"arrowstyle": "->"})
        ax.set(xlim=(-0.1, len(row) + 2.3), ylim=(-2.15, 1.05), title=f"padding on the {side}")
        ax.axis("off")
    return fig

def accuracy_by_size(share, tag, kind):
    """Accuracy against trained parameters for two tasks, by way of fine-tuning."""
    fig, axes = plt.subplots(1, 2, figsize=(9.4, 3.6), sharex=True)
    chance = {"token": share.max().item(), "sequence": 0.5}
    for ax, (task, results) in zip(axes, {"token": tag, "sequence": kind}.items(), strict=False):
        for n, (how, result) in enumerate(results.items()):
            at = result["trained"], result["accuracy"]
            ax.plot(*at, "Xos^"[n], ms=9, color=COLORS[(7, 0, 1, 5)[n]], mec="black")
            rival = results["frozen" if how == "untrained" else "untrained"]["accuracy"]
            side = 7 if at[1] >= rival and n < 2 else -7  # the higher of the two has its name above
            ax.annotate(f"{how} {at[1]:.0%}", at, (9, side), textcoords="offset points", va="center")
        ax.axhline(chance[task], color="black", lw=0.7, ls=":")
        ax.text(1e8, chance[task], "commonest class", ha="right", va="bottom", fontsize=9)
        ax.set(xscale="log", xlim=(80, 1.2e8), ylim=(chance[task] - 0.04, 1.02), title=f"{task} classification")
        ax.set(xlabel="trained parameters")
    axes[0].set_ylabel("accuracy on other modules")
    return fig

def confusion_table(percent, CLASSES, confusion):
    """Confusion matrix in percent of each row, and bytes of each class."""
    fig, ax = plt.subplots(figsize=(6.4, 5.4))
    image = ax.imshow(percent, vmin=0, vmax=100)
    for i in range(9):
        for j in range(9):
            ink = "black" if percent[i, j] > 55 else "white"
            number = f"{percent[i, j]:.0f}" if percent[i, j] >= 0.5 else ""
            ax.text(j, i, number, ha="center", va="center", color=ink)
    names = [f"{name} ({int(n):,})" for name, n in zip(CLASSES, confusion.sum(1), strict=False)]
    ax.set_yticks(range(9), names)
    ax.set_xticks(range(9), CLASSES, rotation=45, ha="right", rotation_mode="anchor")
    ax.set(xlabel="predicted", ylabel="what tokenize says (bytes)")
    fig.colorbar(image, label="% of the row", shrink=0.8)
    return fig

def classified_text(ids, right, said, CLASSES):
    """A text, one box per byte with its predicted class; mistakes are hatched."""
    fig, ax = plt.subplots(figsize=(9.6, 2.2))
    for i, (byte, a, b) in enumerate(zip(ids[0].tolist(), right, said, strict=False)):
        x0, y0 = i % 34, -1.25 * (i // 34)
        look = dict(fc="white", ec="0.7") if a == b else dict(fc=COLORS[1], ec="black", hatch="//", alpha=0.35)
        ax.add_patch(plt.Rectangle((x0, y0), 0.94, 1.15, lw=0.7, **look))
        sign = {10: "⏎", 32: "␣"}.get(byte, chr(byte))
        ax.text(x0 + 0.47, y0 + 0.82, sign, ha="center", va="center", family="monospace")
        ax.text(x0 + 0.47, y0 + 0.28, CLASSES[b][:2], ha="center", va="center", fontsize=9)
    ax.set(xlim=(-0.1, 34), ylim=(-1.25 * ((len(right) - 1) // 34) - 0.1, 1.25))
    ax.set_title("below each byte: the predicted class; hatched: tokenize says otherwise", fontsize=10)
    ax.axis("off")
    return fig

def bytes_by_part(labels, families, parts):
    """GB by part and number format on a log scale."""
    fig, ax = plt.subplots(figsize=(9, 4.2))
    for j, kind in enumerate(labels.values()):
        for i, name in enumerate(families):
            gb = parts.get((name, kind), 0) / 1e9
            if gb:
                look = {"color": COLORS[(4, 1, 3)[j]], "hatch": HATCHES[j], "edgecolor": "black"}
                ax.barh(i + 0.27 * (j - 1), gb, 0.26, **look)
                ax.text(gb * 1.15, i + 0.27 * (j - 1), f"{kind} {gb:.3g}", va="center", fontsize=9)
    ax.set(xscale="log", xlabel="GB, log scale", yticks=range(len(families)), xlim=(1e-5, 2e4))
    ax.set_yticklabels(families)
    ax.invert_yaxis()
    return fig

def tensors_by_place(table, groups, rows):
    """How many tensors of a checkpoint are where, and what becomes of them."""
    fig, ax = plt.subplots(figsize=(7.5, 3))
    for i in range(4):
        for j in range(5):
            face = "white" if not table[i, j] else COLORS[5] if i == 3 else COLORS[4]
            hatch = "xx" if i == 3 and table[i, j] else ""
            ax.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, fc=face, ec="black", hatch=hatch))
            ax.text(j, i, str(int(table[i, j])), ha="center", va="center")
    ax.set(xlim=(-0.5, 4.5), ylim=(3.5, -0.5), xticks=range(5), yticks=range(4))
    ax.set_xticklabels(groups), ax.set_yticklabels(rows)
    return fig

def devices(order, held):
    """GB of each part on each GPU, stacked."""
    fig, ax = plt.subplots(figsize=(9.5, 4))
    for gpu in range(8):
        left = 0
        for j, part in enumerate(order):
            gb = held.get((gpu, part), 0)
            ax.barh(gpu, gb, left=left, color=COLORS[(4, 1, 2, 3, 0, 6)[j]], hatch=HATCHES[j], edgecolor="black",
                    lw=0.6, label=part if gpu == 0 else None)
            left += gb
        ax.text(left + 1, gpu, f"{left:.0f}", va="center")
    ax.axvline(141, color="black", ls="--")
    ax.text(140, -0.75, "141 GB", ha="right")
    ax.set(xlabel="GB", ylabel="GPU", yticks=range(8), xlim=(0, 150), ylim=(7.6, -1.1))
    fig.legend(loc="outside upper center", ncols=3)
    return fig

def what_fits(grid):
    """For numbers of GPUs and sizes of each: what fits on them."""
    fig, ax = plt.subplots(figsize=(7, 3.2))
    for (count, size), fits in grid.items():
        x, y = (80, 141, 192).index(size), (8, 16, 20, 24).index(count)
        told = "FP8 and BF16" if all(fits) else "FP8 only" if fits[0] else "neither"
        look = {"FP8 and BF16": ("#FFFFFF", "o o"), "FP8 only": ("#CFE8F7", "o"), "neither": ("#B0B0B0", "×")}[told]
        ax.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, fc=look[0], ec="black"))
        ax.text(x, y, f"{look[1]}\n{told}", ha="center", va="center")
    ax.set(xlim=(-0.5, 2.5), ylim=(3.5, -0.5), xticks=range(3), yticks=range(4), xlabel="memory of one GPU",
           ylabel="number of GPUs")
    ax.set_xticklabels(["80 GB", "141 GB", "192 GB"]), ax.set_yticklabels([8, 16, 20, 24])
    return fig

def bubbles_by_ranks(rows, ranks, simulated):
    """Idle time against ranks: Table 2's formulas (lines) and simulations (markers)."""
    fig, ax = plt.subplots(figsize=(6.4, 3.6))
    for (name, row), line, color in zip(rows.items(), LINES, COLORS, strict=False):
        ax.plot(ranks, row, line, color=color)
        ax.text(16.2, row[-1] + {"ZB1P": 1.4, "DualPipe": -1.4}.get(name, 0), name, va="center")
    ax.plot(ranks, simulated["1F1B"], "o", color=COLORS[0])
    ax.plot(ranks, simulated["DualPipe"], "s", color=COLORS[1])
    ax.set(xlabel="pipeline ranks", ylabel="idle time (units of F)", xlim=(3.5, 18.5), xticks=ranks)
    return fig

def machines_visited(M, kB):
    """How many machines tokens visit, and the kB that this sends between machines."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    left, right = axes
    for i, (_name, m) in enumerate(M.items()):
        share = torch.bincount(m, minlength=9)[1:].double() / len(m)
        look = dict(color=COLORS[i], hatch=HATCHES[i], edgecolor="black")
        left.bar(torch.arange(1, 9) + 0.4 * i - 0.2, share, 0.38, **look)
    left.set(xlabel="machines a token visits", ylabel="share of tokens", xticks=range(1, 9), ylim=(0, 1.15))
    left.set_title("20,000 random tokens")
    left.legend(["no limit", "4 groups of 8"], loc="upper left")
    look = dict(color=COLORS[:2], hatch=HATCHES[:2], edgecolor="black")
    bars = right.barh(["no limit", "4 groups of 8"], kB, **look)
    right.bar_label(bars, fmt="%.0f kB", padding=4)
    right.set(xlabel="between machines, per token per layer", xlim=(0, 145))
    right.set_title("7,168 numbers: 1 byte out, 2 bytes back")
    return fig

def flops_by_length(T, weights, attention_flops):
    """GFLOP per trained token against the length of the sequence."""
    fig, ax = plt.subplots(figsize=(6.4, 3.6))
    flat, all_in = torch.full_like(T, weights / 1e9), (weights + attention_flops(T)) / 1e9
    ax.fill_between(T, 0, flat, color=COLORS[4], alpha=0.5, hatch="..", edgecolor="black", lw=0.5)
    ax.fill_between(T, flat, all_in, color=COLORS[1], alpha=0.5, hatch="///", edgecolor="black", lw=0.5)
    box = dict(facecolor="white", edgecolor="none", pad=2)
    ax.text(1.3e3, 100, "weights: the same at every length", bbox=box)
    ax.text(5.2e4, 420, "attention", bbox=box)
    ax.plot(4096, (weights + attention_flops(4096)) / 1e9, "ko")
    ax.annotate("250.46 at 4,096", (4096, 255), (1500, 480), arrowprops={"arrowstyle": "->"})
    ax.set(xscale="log", xlabel="sequence length (tokens)", ylabel="GFLOP per trained token", ylim=(0, 1500))
    return fig
