"""A checkpoint is data: none of its code runs, nothing outside its folder is read, no network is asked."""

import json
import pickle
import socket

import pytest
from helpers import build, tokens
from safetensors.torch import load_file, save_file

import deepseek_v3
from deepseek_v3 import DeepseekV3ForCausalLM

load = DeepseekV3ForCausalLM.from_pretrained

class Touch:
    """A pickle of it makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")

def test_code_and_pickles_beside_the_weights_stay_where_they_are(tmp_path):
    model, trap = build(), tmp_path / "trap"
    model.save_pretrained(tmp_path)
    code = f"open({str(trap)!r}, 'w')\n"
    for name in ("configuration_deepseek.py", "modeling_deepseek.py", "__init__.py", "conftest.py"):
        (tmp_path / name).write_text(code)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Touch(trap)))
    config = json.loads((tmp_path / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_deepseek.C", "AutoModelForCausalLM": "modeling_deepseek.M"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    again = load(tmp_path)
    assert (again(tokens(1, 5)).logits == model(tokens(1, 5)).logits).all()
    assert again.config.to_dict()["auto_map"] == auto_map  # kept, and no more
    assert not trap.exists()
    pickle.loads((tmp_path / "model.pkl").read_bytes())
    assert trap.exists()  # the traps do work

@pytest.mark.parametrize("place", ["../outside.json", "{root}/outside.json", "..", "/", "", "config.json\0"])
def test_a_file_cannot_name_a_config_outside_its_folder(tmp_path, place):
    folder, model = tmp_path / "checkpoint", build()
    model.save_pretrained(folder)
    (tmp_path / "outside.json").write_text("not even JSON")
    metadata = {"format": "pt", "config": place.format(root=tmp_path)}
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata=metadata)
    assert load(folder).config == model.config

@pytest.mark.parametrize(
    "template",
    [
        None, "{% for %}", "{{ raise_exception('only system prompts') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ self.__init__.__globals__ }}", "{{ (messages|attr('append')).__self__.__class__ }}",
        "{% set x = messages.append(1) %}", "{% include '/etc/hostname' %}", "{% import 'os' as os %}",
        "{{ open('/etc/hostname').read() }}", "{{ range(10 ** 9) | list }}", "{{ messages[0].content + 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", 5, [5], [{"name": "default"}],
        [{"name": "tool_use", "template": "no"}], {"name": "default"},
    ],
    ids=str,
)
def test_a_chat_template_escapes_and_breaks_nothing(tmp_path, template):
    """Nor does one that is not there, or fails."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(ValueError, match="chat template"):
        deepseek_v3.chat_prompt(tmp_path, "hi")

@pytest.mark.parametrize("token", [5, ["a"], {"lstrip": True}, {"content": 5}])
def test_tokens_of_a_chat_template_that_are_no_text_are_refused(tmp_path, token):
    settings = {"chat_template": "{{ bos_token + messages[0].content }}", "bos_token": token}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="chat template|bos_token"):
        deepseek_v3.chat_prompt(tmp_path, "hi")

def test_a_name_of_the_hub_is_a_folder_that_is_not_there(monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("the network was asked"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    with pytest.raises(FileNotFoundError, match="download it first: hf download deepseek-ai/DeepSeek-V3 --"):
        load("deepseek-ai/DeepSeek-V3")
