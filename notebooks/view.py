# SPDX-License-Identifier: MIT
"""See inside a checkpoint: routing, attention and prediction of a text, as one HTML page.

    python notebooks/view.py out "def area(r):" -o page.html     # or page.png; --corpus FILE adds a panel
    view(model, tokenizer, text)                                 # in a notebook: the same page, inline
    view(model, tokenizer, text, checkpoints=["out/states/step-00000250"])    # a slider over a run

Without the page: routing_table, attention_summary, prediction_table, expert_lift return plain tensors;
each takes token ids, or what `look` returned, so that one pass serves all of them.

The page holds one JSON object, <script id="data" type="application/json">:
  version     1; it changes when a field changes its meaning or goes
  model       name and sizes: layers, heads, experts, groups, kept (groups per token), chosen (experts
              per token), mtp, moe_layers (the layers that have experts, by the model's numbers)
  notes       what a reader must know, such as a text that was cut
  vocabulary  ids, and pieces: their visible spelling; other fields hold places in these two
  tokens      (T) the text
  open        what the page opens with: token, layer, head, moe (a place in moe_layers), colour
  sources     who predicts: name, and ahead: how far behind the last token read the predicted one is
  states      one for each checkpoint: name and, for l of moe_layers, layers i, heads h, sources s,
              score (l, T, E), bias (l, E), expert and gate and by_bias (l, T, K), cut (l, T, G),
              sink and distance (i, h), attention (i, h, T (T + 1) / 2: rows of the lower triangle; of
              long texts only the first heads), best and probability (s, T, 5), loss (s, T), entropy (T)
  corpus      null, or tokens (how many were read) and, for "trained" and "untrained": load (l, E),
              together (l, E, E), words and lift (l, E, 10)
An array is {shape, type, offset, scale, power, data}: `data` is base64 of a zlib stream of little-endian
unsigned integers, type u1, u2 or u4; value = (offset + scale * integer) ** power. `unpack` reads one.
"""

import copy
import html
import itertools
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # run as a command
import deepseek_v3 as ds  # noqa: E402
from viewparts import Bytes, deflate, draw, pack, spell, unpack  # noqa: E402

LONGEST, CORPUS, CELLS = 512, 16384, 20_000_000  # tokens of a page, of a corpus; attention numbers

# ---- Tables: plain tensors, usable without the page ------------------------------------------------

class Seen(NamedTuple):
    """A text's ids (T) and all that the model returned for it."""

    ids: torch.Tensor
    out: Any

@torch.no_grad()
def look(model, ids):
    """One pass over a text, ids (T), with everything that the model can show -> Seen."""
    ids = torch.as_tensor(ids).reshape(1, -1).to(model.device)
    asked = ("attentions", "hidden_states", "routing", "mtp")
    with ds.evaluating(model):
        return Seen(ids[0].cpu(), model(ids, **{f"output_{name}": True for name in asked}))

def as_seen(model, text):
    return text if isinstance(text, Seen) else look(model, text)

def routers(model):
    """{layer number: its router} of the layers that have experts."""
    layers = model.model.layers[: model.config.num_hidden_layers]
    return {i: layer.mlp.gate for i, layer in enumerate(layers) if hasattr(layer.mlp, "gate")}

@torch.no_grad()
def routing_table(model, text):
    """For each MoE layer and token: score, biased = score + bias, gate (0 where not chosen) (l, T, E),
    by_bias (l, T, E): chosen, and would not have been without the bias; cut (l, T, G): group dropped;
    layers: the layer numbers."""
    routing, found = as_seen(model, text).out.routing or (), routers(model)
    config, rows = model.config, {name: [] for name in ("score", "biased", "gate", "by_bias", "cut")}
    for router, seen in zip(found.values(), routing, strict=True):
        score, chosen = seen.scores[0].float(), seen.indices[0]
        biased = score + router.e_score_correction_bias
        reach = router.limit_groups(biased).unflatten(-1, (config.n_group, -1))
        unbiased = router.limit_groups(score).topk(chosen.shape[-1]).indices
        hit, free = (torch.zeros_like(score).scatter(-1, where, 1).bool() for where in (chosen, unbiased))
        gate = torch.zeros_like(score).scatter(-1, chosen, seen.weights[0].float())
        values = (score, biased, gate, hit & ~free, reach.isinf().all(-1))
        for name, value in zip(rows, values, strict=True):
            rows[name].append(value.cpu())
    T, E = routing[0].scores.shape[1:] if routing else (0, 0)
    return {"layers": list(found)} | {n: torch.stack(r) if r else torch.zeros(0, T, E) for n, r in rows.items()}

def attention_summary(model, text):
    """For each layer and head, means over all tokens but the first: sink, the share of attention on the
    first token, and distance, how many tokens back attention looks (layers, H)."""
    rows = torch.stack([a[0].float().cpu() for a in as_seen(model, text).out.attentions])  # (layers, H, T, T)
    places = torch.arange(rows.shape[-1])
    back = (places[:, None] - places).clamp(min=0)
    later = slice(1, None) if len(places) > 1 else slice(None)
    return {"sink": rows[..., later, 0].mean(-1), "distance": (rows * back).sum(-1)[..., later].mean(-1)}

@torch.no_grad()
def prediction_table(model, text, best=5):
    """What each source expects after each token: sources [(name, ahead)], ids and probability
    (s, T, best), loss of what came in nats (s, T; nan: nothing came), entropy of the model (T).

    Sources: model; mtp-1, …, which predicts `ahead` = 2, … tokens on and has read those before; and
    layer-n, …, layer-0: the state behind each layer, put through final norm and head as if it were the last.
    """
    (ids, out), depths = as_seen(model, text), model.config.num_nextn_predict_layers
    T, best = len(ids), min(best, model.config.vocab_size)
    states = out.hidden_states[1:]
    last = len(states) - 1  # the last state is normed
    normed = ((i, s if i == last else model.model.norm(s)) for i, s in reversed(list(enumerate(states))))
    lens = ((f"layer-{i}", 1, model.lm_head(state)) for i, state in normed)
    ahead = [(f"mtp-{k}", k + 1, logits) for k, logits in enumerate(out.mtp_logits or (), 1)][:depths]
    table = {"sources": [], "ids": [], "probability": [], "loss": [], "entropy": None}
    for name, distance, logits in itertools.chain([("model", 1, out.logits)], ahead, lens):
        logs = logits[0].float().log_softmax(-1).cpu()  # (T, vocab), fewer rows of MTP
        probability, likeliest = logs.exp().topk(best)
        came, loss = ids[distance:], torch.full((T,), torch.nan)
        loss[: len(came)] = -logs[: len(came)].gather(-1, came[:, None])[:, 0]
        if name == "model":
            table["entropy"] = -(logs.exp() * logs.clamp(min=-1e4)).sum(-1)
        room = (0, 0, 0, T - len(logs))
        parts = ((name, distance), *(torch.nn.functional.pad(x, room) for x in (likeliest, probability)), loss)
        for column, part in zip(("sources", "ids", "probability", "loss"), parts, strict=True):
            table[column].append(part)
    return {name: torch.stack(v) if isinstance(v, list) and name != "sources" else v for name, v in table.items()}

@torch.no_grad()
def visits(model, ids, window=256):
    """Who reads what in a corpus, ids (N), in windows: words (U), the different ids; seen (U), how often
    each; counts (l, E, U), visits of each to each expert; together (l, E, E), tokens two experts share."""
    words, place = torch.unique(torch.as_tensor(ids).flatten(), return_inverse=True)
    L, E = len(routers(model)), model.config.n_routed_experts
    counts, together = torch.zeros(L, E, len(words)), torch.zeros(L, E, E)
    with ds.evaluating(model):
        for where in place.split(window):
            routing = model.model(words[where][None].to(model.device), output_routing=True).routing
            for layer, seen in enumerate(routing or ()):
                chosen = seen.indices[0].cpu()
                hit = torch.zeros(len(where), E).scatter(-1, chosen, 1)
                counts[layer].index_add_(1, where, hit.T)
                together[layer] += hit.T @ hit
    return {"words": words, "seen": place.bincount().float(), "counts": counts, "together": together}

def expert_lift(model, corpus, best=10, least=5):
    """The tokens that each expert reads far more often than chance: words, lift and count (l, E, best).

    Lift is visits over the visits there would be were all tokens spread like the expert's load. Tokens
    with fewer than `least` visits are left out, and rare ones come later: the order is that of lift less
    its standard error. Lift 0 means that there are no more.
    `corpus` is ids (N), or what `visits` returned.
    """
    found = corpus if isinstance(corpus, dict) else visits(model, corpus)
    counts, seen = found["counts"], found["seen"]
    expected = counts.sum(-1, keepdim=True) * (seen / seen.sum())
    lift = (counts / expected.clamp(min=1e-9)).masked_fill(counts < least, 0)
    sure = lift * (1 - counts.clamp(min=1).rsqrt())
    order = sure.topk(min(best, len(seen))).indices
    return {"words": found["words"][order], "lift": lift.gather(-1, order), "count": counts.gather(-1, order)}

# ---- The page's data -------------------------------------------------------------------------------

def read_text(model, tokenizer, text, length, window=None):
    """Ids of a text, or ids as they are, cut to what a page and the model can take -> ids (T), notes."""
    require = ds.require
    require(hasattr(model, "lm_head") and hasattr(model, "mtp_blocks"), "model: must be a DeepseekV3ForCausalLM")
    require(len(text), "the text is empty: give at least one token")
    if isinstance(text, str):
        text = tokenizer.encode(text)
        text = getattr(text, "ids", text)
    ids = torch.as_tensor(text, dtype=torch.int64).flatten()
    require(len(ids), "the text is empty: give at least one token")
    ds.check_ids("the text's tokens", ids, model.config.vocab_size)
    window = window or model.config.max_position_embeddings
    most, why = (window, "the model's window") if window < length else (length, "a page")
    cut = f"The text has {len(ids):,} tokens; only the first {most:,} are shown, the most that {why} can hold."
    return ids[:most], [cut] if len(ids) > most else []

def state_data(model, ids):
    """What the page shows of one checkpoint, and its sources; `best` still holds ids."""
    seen, K = look(model, ids), model.config.num_experts_per_tok
    routing, prediction, summary = (f(model, seen) for f in (routing_table, prediction_table, attention_summary))
    T, layers, H = len(ids), len(seen.out.attentions), model.config.num_attention_heads
    heads = max(1, min(H, CELLS // (layers * T * (T + 1) // 2)))
    rows, columns = torch.tril_indices(T, T)
    attention = torch.stack([a[0, :heads, rows, columns].float().cpu() for a in seen.out.attentions])
    # A page of 64 tokens, 8 layers and 8 heads is to stay small; longer texts have smaller shares.
    steps = (100, 2) if T > 64 else (int(min(255, max(50, 6e6 // attention.numel()))), 1)
    state = {"attention": pack(attention, *steps)}
    state |= {name: pack(values, 65535) for name, values in summary.items()}
    state |= {"best": prediction["ids"], "probability": pack(prediction["probability"], 255, 2)}
    state |= {name: pack(prediction[name], 65535) for name in ("loss", "entropy")}
    if routing["layers"]:
        gate, expert = routing["gate"].topk(K)
        state |= {"expert": pack(expert), "gate": pack(gate, 255), "score": pack(routing["score"], 100)}
        state |= {"by_bias": pack(routing["by_bias"].gather(-1, expert)), "cut": pack(routing["cut"])}
        state["bias"] = pack(torch.stack([r.e_score_correction_bias.cpu() for r in routers(model).values()]), 65535)
    return state, [{"name": name, "ahead": ahead} for name, ahead in prediction["sources"]]

def corpus_data(model, ids):
    """Load, lift and co-activation over a corpus; `words` still hold ids."""
    found = visits(model, ids)
    load, pairs, N = found["counts"].sum(-1), found["together"], found["seen"].sum()
    both = pairs * N / (load[:, :, None] * load[:, None]).clamp(min=1)  # 1: as if the two were independent
    lift, K = expert_lift(model, found), model.config.num_experts_per_tok
    data = {"load": pack(load / (N * K / load.shape[-1]), 65535), "together": pack(both.clamp(max=8), 255)}
    return data | {"words": lift["words"], "lift": pack(lift["lift"], 65535)}

def untrained(model):
    """A model of the same sizes with random weights: what of a pattern needs no training?"""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return type(model)(copy.deepcopy(model.config)).to(model.device, model.dtype)

def at_checkpoint(model, given):
    """(name, model) of a model, a checkpoint folder, or a run's folder states/step-…, its own files."""
    if isinstance(given, tuple):
        return given[0], at_checkpoint(model, given[1])[1]
    if isinstance(given, torch.nn.Module):
        return "model", given
    folder = Path(given)
    if not (folder / ".metadata").is_file():
        return folder.name, type(model).from_pretrained(folder)
    import torch.distributed.checkpoint as dcp

    model = copy.deepcopy(model)
    numbers = {"model_state_dict": model.state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        dcp.load(numbers, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(numbers["model_state_dict"])
    return re.sub("^step-0*", "step ", folder.name), model

def summary(model):
    """The model's sizes in a sentence."""
    config, moe = model.config, len(routers(model))
    groups = f" in {config.topk_group} of {config.n_group} groups" if config.n_group > 1 else ""
    experts = f"{config.n_routed_experts} experts, of which a token visits {config.num_experts_per_tok}{groups}"
    kinds = f"{moe} of them MoE layers with {experts}" if moe else "all dense: no MoE layers"
    depths = config.num_nextn_predict_layers
    modules = f"{depths or 'no'} MTP module{'' if depths == 1 else 's'}"
    return f"{config.num_hidden_layers} layers of {config.num_attention_heads} attention heads, {kinds}; {modules}."

def page_data(model, tokenizer, ids, checkpoints, corpus, name):
    """The JSON object of the module's docstring, but `notes` and `open`."""
    sizes, config = ("vocab_size", "num_hidden_layers", "num_attention_heads", "n_routed_experts"), model.config
    states, sources = [], []
    for each in [*checkpoints, ("model", model)]:
        title, other = at_checkpoint(model, each)
        same = all(getattr(other.config, size) == getattr(config, size) for size in sizes)
        ds.require(same, f"checkpoints: {title}: its sizes are not those of the model")
        state, sources = state_data(other, ids)
        states.append({"name": title} | state)
    read, found = None, {}
    if corpus is not None and routers(model):
        found = {"trained": corpus_data(model, corpus)}
        if sum(p.numel() for p in model.parameters()) < 2e9:  # a second model of that size may not fit
            found["untrained"] = corpus_data(untrained(model), corpus)
        read = {"tokens": len(corpus)} | found
    held = [ids, *(state["best"] for state in states), *(part["words"] for part in found.values())]
    vocabulary = torch.cat([part.flatten() for part in held]).unique()
    for state in states:
        state["best"] = pack(torch.searchsorted(vocabulary, state["best"]))
    for part in found.values():
        part["words"] = pack(torch.searchsorted(vocabulary, part["words"]))
    about = {"name": name, "layers": config.num_hidden_layers, "heads": config.num_attention_heads}
    about |= {"experts": config.n_routed_experts, "groups": config.n_group, "kept": config.topk_group}
    about |= {"chosen": config.num_experts_per_tok, "mtp": config.num_nextn_predict_layers}
    about |= {"moe_layers": list(routers(model)), "summary": summary(model)}
    words = {"ids": pack(vocabulary), "pieces": spell(tokenizer, vocabulary.tolist())}
    return {
        "version": 1, "model": about, "vocabulary": words,
        "tokens": pack(torch.searchsorted(vocabulary, ids)), "sources": sources, "states": states, "corpus": read,
    }  # fmt: skip

# ---- The page and the picture ----------------------------------------------------------------------

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>%TITLE%</title>
<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';
script-src 'unsafe-inline';style-src 'unsafe-inline';img-src data:"><link rel="icon" href="data:,">
</head><body><noscript>This page needs JavaScript.</noscript>
<script id="data" type="application/json">%DATA%</script>
<script>// view.css and view.js of the same folder, deflated
const inflate = data => new Response(new Blob([Uint8Array.from(atob(data), letter => letter.charCodeAt(0))])
  .stream().pipeThrough(new DecompressionStream("deflate")));
async function add(kind, data) {
  const node = document.createElement(kind);
  node.textContent = await inflate(data).text();
  document.head.append(node);
}
if (self.DecompressionStream) add("style", "%STYLE%").then(() => add("script", "%SCRIPT%"));
else document.body.append("This page needs a browser of 2023 or later.");
</script></body></html>
"""

class View:
    """A page about one text: `html`, `save(path)`, `figure()`, `data`, `notes`; Jupyter shows it inline."""

    def __init__(self, data):
        self.data, self.notes = data, data["notes"]

    @property
    def html(self):
        numbers = json.dumps(self.data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        style, script = (deflate((HERE / f"view.{kind}").read_bytes()) for kind in ("css", "js"))
        parts = {"STYLE": style, "SCRIPT": script, "DATA": numbers, "TITLE": html.escape(self.data["model"]["name"])}
        return re.sub("%(STYLE|SCRIPT|DATA|TITLE)%", lambda part: parts[part[1]], PAGE)

    def _repr_html_(self):
        frame = 'style="width:100%;height:860px;border:1px solid #8888;resize:vertical" title="inside the model"'
        return f'<iframe {frame} srcdoc="{html.escape(self.html)}"></iframe>'

    def save(self, path):
        """Write the page (.html) or the picture (.png)."""
        if suffix(path) == ".png":
            self.figure().savefig(path, dpi=110, metadata={"Software": None})
        else:
            Path(path).write_text(self.html, encoding="utf-8")

    def figure(self):
        """The page as a still picture, a matplotlib Figure: tokens, routing, attention, loss."""
        return draw(self.data)

def suffix(path):
    kind = Path(path).suffix.lower()
    ds.require(kind in (".html", ".htm", ".png"), f"{path}: must end in .html or .png")
    return kind

def view(model, tokenizer, text, checkpoints=None, corpus=None, layer=None, head=0, name="model", length=LONGEST):
    """The page of a text, or of its ids -> View, which Jupyter shows.

    checkpoints: models or folders of saved states to move through, before the model itself. corpus:
    a text, or ids, whose routing is summed up. layer, head: what the page opens with. tokenizer: of
    tokenizers or transformers; None is for models over bytes, those of 256 ids.
    """
    config = model.config
    bytewise = tokenizer is None and config.vocab_size == 256
    ds.require(bytewise or tokenizer is not None, "tokenizer: give the one that the model learnt with")
    tokenizer = Bytes() if bytewise else tokenizer
    layer = config.num_hidden_layers - 1 if layer is None else layer
    for what, value, count in (("layer", layer, config.num_hidden_layers), ("head", head, config.num_attention_heads)):
        ds.require(value in range(count), f"{what}={value}: must lie in 0..{count - 1}")
    ids, notes = read_text(model, tokenizer, text, length)
    if corpus is not None:
        corpus, _ = read_text(model, tokenizer, corpus, CORPUS, CORPUS)
    data = page_data(model, tokenizer, ids, checkpoints or [], corpus, name)
    near = [abs(each - layer) for each in data["model"]["moe_layers"]]  # layers with experts
    opened = {"token": len(ids) // 2, "layer": layer, "head": head, "moe": near.index(min(near)) if near else 0}
    return View(data | {"notes": notes, "open": opened | {"colour": "group" if near else "loss"}})

def parser():
    """The command line."""
    command = ds.Parser(prog="view.py", description="See inside a checkpoint: routing, attention, prediction.")
    add = command.add_argument
    add("directory", help="checkpoint folder with its tokenizer")
    add("text")
    add("-o", "--out", default="page.html", help="page.html or page.png")
    add("--corpus", metavar="FILE", help=f"text file whose first {CORPUS:,} tokens show what each expert reads")
    add("--checkpoints", metavar="DIR", nargs="+", default=[], help="earlier states of the run, for the slider")
    add("--layer", type=ds.within(0, 1e6), help="layer that the page opens with (default: the last)")
    add("--head", type=ds.within(0, 1e6), default=0)
    return command

def run(options):
    """Write what the command asks for, and say what was written."""
    suffix(options.out)
    folder, tokenizer = Path(options.directory), ds.read_tokenizer(options.directory)
    ds.require(options.text, "the text is empty: give at least one token")
    ids, corpus = ds.text_ids(folder, tokenizer, options.text), None
    if options.corpus:
        corpus = "".join(itertools.islice(ds.read_pieces(options.corpus), 1))  # a million letters
        ds.require(corpus, f"--corpus {options.corpus}: holds no text")
    model = ds.DeepseekV3ForCausalLM.from_pretrained(folder)
    name = folder.resolve().name
    page = view(model, tokenizer, ids, options.checkpoints, corpus, options.layer, options.head, name)
    page.save(options.out)
    for note in page.notes:
        print(note, file=sys.stderr)
    print(f"{options.out}: {os.path.getsize(options.out):,} bytes, {unpack(page.data['tokens']).numel()} tokens")

def main(arguments=None):
    command = parser()
    options = command.parse_args(arguments)
    try:
        run(options)
    except (ValueError, OSError) as error:
        command.error(error)

if __name__ == "__main__":
    main()
