"""The README's picture, from what the first command wrote: `python tests/picture.py out`.

Left: the routed experts of every token of a line of Python, at the last MoE layer. Right: training.
"""

import json
import sys
from pathlib import Path

import matplotlib
import torch
from tokenizers import Tokenizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import deepseek_v3  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SNIPPET = 'def read(self, size=-1):\n    if self.closed:\n        raise ValueError("closed file")'


def draw(directory):
    model = deepseek_v3.DeepseekV3ForCausalLM.from_pretrained(directory)
    tokenizer = Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
    ids = tokenizer.encode(SNIPPET).ids
    with torch.no_grad():
        routing = model(torch.tensor([ids]), output_routing=True).routing[-1]
    E, G = model.config.n_routed_experts, model.config.n_group
    weights = torch.zeros(len(ids), E).scatter(-1, routing.indices[0], routing.weights[0])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.6), width_ratios=(1, 1.1))
    image = left.imshow(weights, cmap="cividis", aspect="auto", vmin=0)
    words = [repr(tokenizer.decode([i]) or "‹begin›")[1:-1].replace(" ", "·") for i in ids]
    left.set_yticks(range(len(ids)), words, family="monospace", fontsize=9)
    left.set_xticks(range(E))
    for edge in range(E // G, E, E // G):
        left.axvline(edge - 0.5, color="white", linewidth=1.5)
    left.set_xlabel(f"expert ({G} groups of {E // G}; a token may visit {model.config.topk_group} groups)")
    left.set_title("who reads which token: gate of each expert")
    figure.colorbar(image, ax=left, fraction=0.05)
    lines = [json.loads(x) for x in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    right.plot(steps, [line["main_loss"] for line in lines], color="#0072B2", label="next token")
    right.plot(steps, [line["mtp_loss"] for line in lines], color="#D55E00", ls=":", label="the one after (MTP)")
    right.set_xlabel("step")
    right.set_ylabel("training loss, nats per token")
    right.legend(loc="upper right", frameon=False)
    below = right.twinx()
    below.plot(steps, [line["max_violation"] for line in lines], color="#009E73", lw=0.8)
    below.set_ylim(0, 6)
    below.set_ylabel("load violation (green, mean of layers)")
    right.set_title("the training run")
    figure.tight_layout()
    figure.savefig(ROOT / "notebooks" / "routing.png", dpi=90)


if __name__ == "__main__":
    draw(sys.argv[1] if len(sys.argv) > 1 else "out")
