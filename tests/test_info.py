"""The commands info and generate --chat: published numbers, splits over GPUs, one begin-of-sentence."""

import json
import re

import pytest
import torch
from checkpoints import ragged
from helpers import KIMI_K2, MOONLIGHT, V3, build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import deepseek_v3

def run(capsys, *arguments):
    deepseek_v3.main([str(argument) for argument in arguments])
    return capsys.readouterr().out

def written(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"

# ---- info ----

@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        (V3, [
            "671,026,404,352 total", "37,552,282,624 activated",
            "11,610,067,968 more", "2,541,458,432 activated",
            "684,868,123,200 bytes",  # 688,574,839,360 without MTP's copies of embedding and head
            "70,272 bytes per token", "250.46 GFLOP",
        ]),
        (MOONLIGHT, ["15,960,108,544 total", "2,914,774,528", "31,104 bytes per token"]),
        (KIMI_K2, ["1,026,408,209,408", "32,861,477,888"]),
    ],
)  # fmt: skip
def test_the_released_numbers(tmp_path, capsys, config, numbers):
    """And bytes by kind, which add up."""
    said = run(capsys, "info", written(tmp_path, config))
    assert all(number in said for number in numbers)
    total, kinds = re.search(r"weights +([\d,]+) bytes: (.*)", said).groups()
    each = [int(n.replace(",", "")) for n in re.findall(r"[A-Z]+\d+ ([\d,]+)", kinds)]
    assert len(each) > 1 and sum(each) == int(total.replace(",", ""))

@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_a_folder_is_read_from_its_headers(tmp_path, capsys, quantize):
    ragged().save_pretrained(tmp_path, quantize=quantize, max_shard_size="100KB")
    model = deepseek_v3.DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    tensors = (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("correction_bias")))
    said = run(capsys, "info", tmp_path)
    assert f"weights     {sum(t.nbytes for t in tensors):,} bytes" in said
    assert ("FP8" in said) == (quantize is not None)

def test_the_split_over_gpus_names_each_layer_once_in_order(tmp_path, capsys):
    said = run(capsys, "info", written(tmp_path, V3), "--gpus", 8, "--gpu-memory", 131.3)
    lines = [line for line in said.splitlines() if line.startswith("GPU")]
    assert len(lines) == 8
    firsts = [re.search(r"model\.layers\.(\d+) …", line) for line in lines[1:]]
    lasts = [re.search(r"… model\.layers\.(\d+)", line) for line in lines[:-1]]
    assert [int(last[1]) + 1 for last in lasts] == [int(first[1]) for first in firsts]
    for line in lines:
        used, free = re.search(r"([\d.]+) GiB used, +([\d.]+) free", line).groups()
        assert float(used) + float(free) == pytest.approx(131.3, abs=0.11)
        assert line.count("█") == pytest.approx(30 * float(used) / 131.3, abs=0.51)

def test_too_few_gpus_are_told_how_many_it_takes(tmp_path, capsys):
    said = run(capsys, "info", written(tmp_path, V3), "--gpus", 8, "--gpu-memory", 80)
    assert "8 GPUs of 80 GiB do not hold it: it takes 9" in said

# ---- generate --chat ----

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
WITHOUT_BOS = "{% for m in messages %}{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}{% endif %}"
WITHOUT_BOS += "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
RELEASED_STYLE = "{{ bos_token }}" + WITHOUT_BOS

def folder_with(tmp_path, template, **settings):
    """A tiny checkpoint with a byte tokenizer, whose own post-processor adds no token."""
    special = [BOS, EOS, "<｜User｜>", "<｜Assistant｜>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(special + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    build(vocab_size=len(special + alphabet)).save_pretrained(tmp_path)
    settings = {"bos_token": {"content": BOS, "lstrip": False}, "eos_token": EOS} | settings
    settings |= {} if template is None else {"chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path, tokenizer

def prompt_of(monkeypatch, capsys, folder, *options):
    """The ids that the command gives to the model, and what it prints for the two tokens it gets."""
    seen = []

    def generate(model, input_ids, streamer, **options):
        seen.append(input_ids)
        for token in (7, 8):
            streamer(torch.tensor([token]))

    monkeypatch.setattr(deepseek_v3.DeepseekV3ForCausalLM, "generate", generate)
    said = run(capsys, "generate", folder, "Grüße", *options)
    return seen[0][0].tolist(), said

@pytest.mark.parametrize(
    "template",
    [
        RELEASED_STYLE, WITHOUT_BOS,
        [{"name": "tool_use", "template": "no"}, {"name": "default", "template": RELEASED_STYLE}],
    ],
    ids=["with bos", "without bos", "several"],
)
def test_a_chat_begins_as_its_template_says(tmp_path, monkeypatch, capsys, template):
    folder, tokenizer = folder_with(tmp_path, template)
    ids, said = prompt_of(monkeypatch, capsys, folder, "--chat")
    begin = "" if template == WITHOUT_BOS else BOS
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"{begin}<｜User｜>Grüße<｜Assistant｜>"
    assert "User" not in said

def test_a_template_file_of_its_own_is_read(tmp_path, monkeypatch, capsys):
    folder, tokenizer = folder_with(tmp_path, None)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}file: {{ messages[0].content }}")
    ids, _ = prompt_of(monkeypatch, capsys, folder, "--chat")
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"{BOS}file: Grüße"

def test_a_plain_prompt_begins_a_sentence_too(tmp_path, monkeypatch, capsys):
    folder, tokenizer = folder_with(tmp_path, None, add_bos_token=True)  # as DeepSeek's say
    ids, said = prompt_of(monkeypatch, capsys, folder)
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"{BOS}Grüße"
    assert said.startswith("Grüße")

def test_a_chat_stops_at_the_end_of_sentence(tmp_path, capsys):
    folder, _ = folder_with(tmp_path, RELEASED_STYLE)
    model = deepseek_v3.DeepseekV3ForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.zero_()[1] = 1.0
        model.model.norm.weight.fill_(1.0)
    model.config.eos_token_id = list(range(model.config.vocab_size))  # whatever comes, it is the end
    model.save_pretrained(folder)
    assert len(run(capsys, "generate", folder, "hi", "--chat", "--max-new-tokens", 50).strip()) <= 1
