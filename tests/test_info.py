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


def test_the_released_numbers(tmp_path, capsys):
    said = run(capsys, "info", written(tmp_path, V3))
    for number in (
        "671,026,404,352 total", "37,552,282,624 activated",
        "11,610,067,968 more", "2,541,458,432 activated",
        "684,868,123,200 bytes",  # 688,574,839,360 without MTP's copies of embedding and head
        "70,272 bytes a token", "250.46 GFLOP",
    ):  # fmt: skip
        assert number in said


def test_bytes_by_kind_add_up(tmp_path, capsys):
    said = run(capsys, "info", written(tmp_path, V3))
    total, kinds = re.search(r"weights +([\d,]+) bytes: (.*)", said).groups()
    numbers = [int(n.replace(",", "")) for n in re.findall(r"[A-Z]+\d+ ([\d,]+)", kinds)]
    assert len(numbers) == 3
    assert sum(numbers) == int(total.replace(",", ""))


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        (MOONLIGHT, ["15,960,108,544 total", "2,914,774,528", "31,104 bytes a token"]),
        (KIMI_K2, ["1,026,408,209,408", "32,861,477,888"]),
    ],
)
def test_other_members_of_the_family(tmp_path, capsys, config, numbers):
    said = run(capsys, "info", written(tmp_path, config))
    assert all(number in said for number in numbers)


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


@pytest.mark.parametrize(("gpus", "memory", "needed"), [(8, 80, 9), (1, 141, 5), (20, 24, None)])
def test_too_few_gpus_are_told_how_many_it_takes(tmp_path, capsys, gpus, memory, needed):
    said = run(capsys, "info", written(tmp_path, V3), "--gpus", gpus, "--gpu-memory", memory)
    assert f"{gpus} GPUs of {memory} GiB do not hold it" in said
    assert needed is None or f"it takes {needed}" in said


def test_a_gpu_too_small_for_a_layer_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(capsys, "info", written(tmp_path, V3), "--gpus", 1000, "--gpu-memory", 8)


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "llama"}'])
def test_a_bad_config_stops_the_command(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(SystemExit):
        run(capsys, "info", tmp_path / "config.json")


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
        RELEASED_STYLE,
        WITHOUT_BOS,
        [{"name": "tool_use", "template": "no"}, {"name": "default", "template": RELEASED_STYLE}],
    ],
    ids=["with bos", "without bos", "several"],
)
def test_a_chat_has_exactly_one_begin_of_sentence(tmp_path, monkeypatch, capsys, template):
    folder, tokenizer = folder_with(tmp_path, template)
    ids, said = prompt_of(monkeypatch, capsys, folder, "--chat")
    assert ids.count(0) == 1
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"{BOS}<｜User｜>Grüße<｜Assistant｜>"
    assert "User" not in said


def test_a_template_file_of_its_own_is_read(tmp_path, monkeypatch, capsys):
    folder, tokenizer = folder_with(tmp_path, None)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}file: {{ messages[0].content }}")
    ids, _ = prompt_of(monkeypatch, capsys, folder, "--chat")
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"{BOS}file: Grüße"


def test_a_plain_prompt_begins_a_sentence_too(tmp_path, monkeypatch, capsys):
    folder, tokenizer = folder_with(tmp_path, None)
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


@pytest.mark.parametrize(
    "template",
    [
        None,
        [{"name": "tool_use", "template": "no"}],
        "{{ messages[0].content.__class__.__mro__[1].__subclasses__() }}",  # the sandbox refuses
        "{% for %}",
        "{{ raise_exception('only system prompts') }}",
    ],
    ids=["none", "no default", "escape", "syntax", "raises"],
)
def test_a_template_that_is_missing_or_fails_is_an_error(tmp_path, capsys, template):
    folder, _ = folder_with(tmp_path, template)
    with pytest.raises(ValueError, match="chat template"):
        deepseek_v3.chat_prompt(folder, "hi")
