"""notebooks/view.py: its tables and page say what the model gave, in a real browser where there is one."""

import shutil
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch
from helpers import build

import deepseek_v3 as ds

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "notebooks"))
import view as v  # noqa: E402
from viewparts import Bytes, spell, unpack  # noqa: E402

TEXT = 'a </script><b>&amp;"$\\$ é😀\n\tend%DATA%'
KINDS = {"V3": {}, "dense first": {"num_hidden_layers": 4, "first_k_dense_replace": 2}}
KINDS["Moonlight"] = {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "num_nextn_predict_layers": 0}

@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
    if not chromium:
        pytest.skip("needs Chromium: apt-get install chromium")
    with driver.sync_playwright() as play:
        yield play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

@pytest.fixture
def show(browser, tmp_path):
    """Opens a page from its file; at the end the console must be empty, and nothing but the file fetched."""
    page, file, told = browser.new_page(), tmp_path / "page.html", []
    for event in ("console", "pageerror", "request"):
        page.on(event, lambda what: told.append(getattr(what, "url", str(what))))

    def opened(seen):
        seen.save(file)
        page.goto(file.as_uri())
        page.wait_for_selector("[data-ready]", timeout=15000)
        return page

    yield opened
    assert told == [file.as_uri()]

def found(page, selector):  # their data-*
    return page.eval_on_selector_all(selector, "nodes => nodes.map(node => ({...node.dataset}))")

@pytest.mark.parametrize("kind", KINDS)
def test_the_page_says_what_the_model_gave(kind, show):
    model, t = build(vocab_size=256, **KINDS[kind]), 7
    page, ids, config = show(v.view(model, None, TEXT)), torch.tensor(list(TEXT.encode())), model.config
    assert [int(token["id"]) for token in found(page, "[data-token]")] == ids.tolist()
    pieces = page.eval_on_selector_all("[data-token]", "nodes => nodes.map(node => node.firstChild.data)")
    assert pieces == spell(Bytes(), ids.tolist()) and "‹f0›" in pieces and "⏎" in pieces
    page.click(f'[data-token="{t}"]')
    with torch.no_grad():
        out = model(ids[None], output_routing=True, output_mtp=True, output_hidden_states=True)
        lens = model.lm_head(model.model.norm(out.hidden_states[1]))
    E, experts = config.n_routed_experts, found(page, "[data-expert]")
    assert len(experts) == E * len(out.routing)
    for (layer, router), routing in zip(v.routers(model).items(), out.routing, strict=True):
        shown = sorted((e for e in experts if int(e["layer"]) == layer), key=lambda e: int(e["expert"]))
        gate = torch.zeros(E).scatter(0, routing.indices[0, t], routing.weights[0, t])
        score = routing.scores[0, t]
        want = {"score": score, "gate": gate, "biased": score + router.e_score_correction_bias}
        for name, values in want.items():
            assert [float(e[name] or 0) for e in shown] == pytest.approx(values.tolist(), abs=1e-2)
        assert [e["gate"] != "" for e in shown] == (gate > 0).tolist()
        cut = {int(e["group"]) for e in shown if e["cut"] == "true"}
        assert len(cut) == config.n_group - config.topk_group
        assert not cut & {int(e["group"]) for e in shown if e["gate"]}
    assert len(found(page, "[data-head]")) == config.num_hidden_layers * config.num_attention_heads
    sources = {"model": out.logits, "layer-0": lens} | ({"mtp-1": out.mtp_logits[0]} if out.mtp_logits else {})
    for source, logits in sources.items():
        seen, best = found(page, f'[data-source="{source}"]'), logits[0, t].softmax(-1).topk(5)
        assert [int(one["candidate"]) for one in seen] == best.indices.tolist()
        assert [float(one["probability"]) for one in seen] == pytest.approx(best.values.tolist(), abs=1e-2)
    assert bool(found(page, '[data-source="mtp-1"]')) == bool(out.mtp_logits)

def test_keys_move_the_chosen_token_and_head(show):
    page = show(v.view(build(vocab_size=256), None, "one two three", layer=1, head=2))
    page.focus('[aria-selected="true"]')
    for key, token in (("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 12)):
        page.keyboard.press(key)
        assert page.get_attribute(':focus[aria-selected="true"]', "data-token") == str(token)
    page.focus('[data-head="2"][aria-pressed="true"]')
    page.keyboard.press("ArrowUp")
    assert page.get_attribute('[data-layer="0"][data-head="2"]', "aria-pressed") == "true"
    for colour in ("entropy", "attention", "loss"):
        page.select_option("select >> nth=0", colour)
    page.click("text=whole text")
    assert page.is_hidden("[data-expert] >> nth=0")

def test_pages_say_what_there_is_not_and_what_was_cut(show):
    model = build(vocab_size=256, max_position_embeddings=64, first_k_dense_replace=3, num_nextn_predict_layers=0)
    page = show(v.view(model, None, "x" * 80))
    for words in ("80 tokens; only the first 64", "no MoE layers: nothing is routed", "no MTP modules"):
        assert words in page.inner_text("main")
    assert len(found(page, "[data-token]")) == 64 and not found(page, "[data-expert]")
    v.view(model, None, "a").figure()  # one token

def test_a_run_and_a_corpus(show):
    model, earlier = build(vocab_size=256), build(seed=1, vocab_size=256)
    page = show(v.view(model, None, "text", checkpoints=[("step 1", earlier)], corpus="a corpus of text " * 40))
    page.fill("input[type=range]", "0")
    best = v.prediction_table(earlier, list(b"text"))["ids"][0, 2].tolist()
    assert [int(one["candidate"]) for one in found(page, "[data-source=model]")] == best
    assert page.inner_text("output") == "step 1" and "co-activation, untrained" in page.inner_text("main")

def test_tables_and_the_size_of_the_page():
    model, ids = build(vocab_size=256, num_hidden_layers=8, num_attention_heads=8), torch.arange(64) * 5 % 256
    seen, page = v.look(model, ids), v.view(model, None, ids)
    assert len(page.html.encode()) < 100_000 and page._repr_html_().startswith("<iframe")
    loss = v.prediction_table(model, seen)["loss"][0, :-1]
    torch.testing.assert_close(loss.mean(), model(ids[None], labels=ids[None]).main_loss)
    attention = torch.stack(seen.out.attentions)[:, 0][..., *torch.tril_indices(64, 64)]
    torch.testing.assert_close(unpack(page.data["states"][0]["attention"]).float(), attention, atol=1e-2, rtol=0)
    sinks = v.attention_summary(model, seen)["sink"]
    torch.testing.assert_close(sinks, torch.stack(seen.out.attentions)[:, 0, :, 1:, 0].mean(-1))
    routing = v.routing_table(model, seen)
    assert (routing["gate"] > 0)[routing["by_bias"]].all() and routing["by_bias"].any()
    visits = v.visits(model, ids.repeat(9))
    assert visits["counts"].sum() == visits["together"].diagonal(dim1=1, dim2=2).sum() == 9 * 64 * 7 * 4
    lift, of = v.expert_lift(model, visits), visits["counts"][0, 3]
    share = of[visits["words"] == lift["words"][0, 3, 0]] / of.sum()
    assert float(lift["lift"][0, 3, 0]) == pytest.approx(float(share) * 64, rel=1e-4)

def test_the_command_and_its_errors(tmp_path, capsys):
    source, folder, picture = tmp_path / "text.py", str(tmp_path / "m"), tmp_path / "p.png"
    source.write_text("def area(r):\n    return 3.14 * r ** 2  # é😀\n" * 30, encoding="utf-8")
    build(vocab_size=300).save_pretrained(folder)
    wrong = {"no tokenizer": [folder, "a"], "text is empty": [folder, ""], "must end in": [folder, "a", "-o", "p.gif"]}
    wrong |= {"x.py": [folder, "a", "--corpus", "x.py"], "layer=9: must": [folder, "a", "--layer", "9"]}
    for told, arguments in wrong.items():
        with pytest.raises(SystemExit, match="2"):
            v.main(arguments)
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
        ds.train_tokenizer([source], 300).save(folder + "/tokenizer.json")
    v.main([folder, "text é", "-o", str(picture), "--corpus", str(source)])
    assert picture.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="tokenizer: give"):
        v.view(build(), None, "text")

def test_explore_in_a_live_kernel(tmp_path, monkeypatch):
    monkeypatch.delenv("DSV3_NB_STATIC", raising=False)
    build(vocab_size=256).save_pretrained(tmp_path)
    code = f"""import sys; sys.path[:0] = {[str(ROOT), str(ROOT / "notebooks")]}; import deepseek_v3 as ds, nbhelp as nb
seen = nb.explore(ds.DeepseekV3ForCausalLM.from_pretrained({str(tmp_path)!r}), 'ab', 2, 1); box, page = seen.children
box.value = 'hé<'; assert '‹c3›' in page.value and '&quot;layer&quot;:2,&quot;head&quot;:1' in page.value
box.value = ''; assert 'the text is empty' in page.value
seen"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert "application/vnd.jupyter.widget-view+json" in notebook.cells[0].outputs[-1].data
