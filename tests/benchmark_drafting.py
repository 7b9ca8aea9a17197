# SPDX-License-Identifier: MIT
"""What drafting gains on a trained checkpoint: python tests/benchmark_drafting.py DIR

Prompts are held-out text (DIR/tokens.bin, as `train` leaves it), one at a time. Plain decoding and
each number of drafts take turns in one process, so that a busy machine slows all alike; speed is
also given in processor time, which other programs disturb less.

Acceptance at a position is of those drafts before which all were accepted. "not blank" leaves out
tokens that are white space alone, which code is full of and which are easy to foresee; there a
token costs 1/n of a step that gained n tokens.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
from deepseek_v3 import Corpus, DeepseekV3ForCausalLM, Sampling, token_dtype  # noqa: E402

DRAFTS = (0, 1, 2, 4)  # 0: plain decoding


class Tally:
    """Time of one setting, and what its verifications did."""

    def __init__(self):
        self.wall = self.processor = 0.0
        self.steps = []  # (drafted, accepted, tokens gained)

    def tokens_a_step(self, counts):
        costs = [1 / len(new) for _, _, new in self.steps for token in new if counts(token)]
        return len(costs) / (sum(costs) or 1)

    def acceptance(self, counts):
        """By position: of drafts for a token that counts, reached by verification, how many stood."""
        parts = []
        for i in range(max(drafted for drafted, *_ in self.steps)):
            reached = [step for step in self.steps if i < step[0] and i < len(step[2]) and counts(step[2][i])]
            stood = sum(accepted > i for _, accepted, _ in reached)
            parts.append(f"{stood / max(len(reached), 1):.0%}")
        return " ".join(parts)


def timed(model, tally, prompt, **settings):
    wall, processor = time.perf_counter(), time.process_time()
    out = model.generate(prompt, eos_token_id=-1, **settings)
    tally.wall += time.perf_counter() - wall
    tally.processor += time.process_time() - processor
    return out


def counted(model, tally, prompt, **settings):
    """The same, untimed, noting each verification but the first, which has no drafts yet."""
    accept, steps = Sampling.accept, []

    def noting(self, drafts, q, p):
        accepted, token = accept(self, drafts, q, p)
        n = int(accepted[0])
        steps.append((drafts.shape[1], n, [*drafts[0, :n].tolist(), int(token[0])]))
        return accepted, token

    Sampling.accept = noting
    try:
        model.generate(prompt, eos_token_id=-1, **settings)
    finally:
        Sampling.accept = accept
    tally.steps += steps[1:]


def measure(model, prompts, new, sampling):
    """{number of drafts: its tally} over all prompts, each once in turn."""
    tallies = {K: Tally() for K in DRAFTS}
    for i, prompt in enumerate(prompts):
        plain = None
        for K in DRAFTS:
            draft = dict(use_mtp=True, num_draft_tokens=K) if K else {}
            settings = sampling | draft | dict(max_new_tokens=new)
            seeded = [settings | dict(generator=torch.Generator().manual_seed(i)) for _ in range(2)]
            out = timed(model, tallies[K], prompt, **seeded[0])
            counted(model, tallies[K], prompt, **seeded[1])
            plain = out if plain is None else plain
            assert sampling or torch.equal(out, plain), "drafting changed a greedy text"
    return tallies


def report(title, tallies, tokens, blank):
    plain = tallies[0]
    print(f"\n{title}: plain decoding {tokens / plain.wall:.0f} tokens/s")
    print("       speed against plain   tokens a step      accepted by position")
    print(f"drafts  wall  processor      text  not blank    {'text':20} not blank")
    for K, tally in list(tallies.items())[1:]:
        speed = f"{plain.wall / tally.wall:6.2f}  {plain.processor / tally.processor:8.2f}"
        every, dense = (lambda token: True), (lambda token: token not in blank)
        steps = f"{tally.tokens_a_step(every):11.2f}  {tally.tokens_a_step(dense):8.2f}"
        print(f"{K:6}{speed}{steps}     {tally.acceptance(every):20} {tally.acceptance(dense)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(options.directory)
    model = DeepseekV3ForCausalLM.from_pretrained(folder).eval()
    tokenizer, config = Tokenizer.from_file(str(folder / "tokenizer.json")), model.config
    tokens = np.fromfile(folder / "tokens.bin", token_dtype(config.vocab_size))
    corpus = Corpus(tokens, config.bos_token_id, 1024)
    windows = corpus.read(corpus.held_out(1024 * options.prompts))["input_ids"]
    prompts = [window[None, : options.prompt_tokens] for window in windows]
    blank = {i for i in range(config.vocab_size) if not tokenizer.decode([i]).strip()}
    model.generate(prompts[0], max_new_tokens=16, use_mtp=True)  # warm up
    for title, sampling in {
        "greedy": {},
        "temperature 0.7": dict(do_sample=True, temperature=0.7),
        "temperature 1": dict(do_sample=True),
    }.items():
        tallies = measure(model, prompts, options.new_tokens, sampling)
        report(title, tallies, len(prompts) * options.new_tokens, blank)


if __name__ == "__main__":
    main()
