"""Figures of the notebooks that would take more lines there than they teach; each function returns the figure."""

import matplotlib.pyplot as plt
import torch

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
            ax.text(x + 0.47, y, shown(mark), ha="center", va="center", family="monospace", color=COLORS[5])
            ax.plot([x + 0.12, x + 0.82], [y, y], color=COLORS[5], lw=1.5)
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
    for i in (chosen[:, 1:] != chosen[:, :-1]).any(0).nonzero().flatten().tolist():
        x = (deltas[i] + deltas[i + 1]) / 2
        new, old = (set(chosen[:, j].nonzero().flatten().tolist()) for j in (i + 1, i))
        ax.axvline(x, color=COLORS[5], lw=1.5)
        told = "in " + ", ".join(map(str, sorted(new - old))) + "\nout " + ", ".join(map(str, sorted(old - new)))
        ax.text(x, -0.7, told, ha="center", va="bottom", fontsize=9, color=COLORS[5])
    for edge in range(experts // 4, experts, experts // 4):
        ax.axhline(edge - 0.5, color="0.6", lw=1, ls=":")
    ax.set(ylabel="expert (dotted: groups)", yticks=range(experts), xlabel=f"added to the bias of expert {expert}")
    ax.set_title(f"token {token!r}: its gates as the bias of expert {expert} moves", pad=34)
    ax.get_yticklabels()[expert].set_fontweight("bold")
    return fig

def groups_of_tokens(text, gates, allowed, touched):
    """Left: gates (T, E) of a text, groups out of reach grey. Right: histograms of groups touched, by name."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 5.4), width_ratios=(1.5, 1))
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
    axes[-1].set(xlabel="expert of layer 1 (black lines: groups); grey: under 1/8 of chance", xticks=range(table.shape[1]))
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
