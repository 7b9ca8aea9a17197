"""The model in other people's programs: interventions, adapters, compile, autocast, sharding, torch.func."""

import copy
import fnmatch
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import build, in_chunks, pad, tokens
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from torch.utils._pytree import tree_map

from deepseek_v3 import DeepseekV3ForCausalLM, DeepseekV3ForSequenceClassification, Linear, Router, trace

IDS = tokens(2, 12)
FLAGS = ("output_attentions", "output_hidden_states", "output_routing", "output_mtp")
ALL = dict.fromkeys(FLAGS, True)
WIDTHS = dict(qk_nope_head_dim=8, v_head_dim=8, q_lora_rank=16, kv_lora_rank=16, vocab_size=64)

def small(cls=DeepseekV3ForCausalLM, seed=0, **changes):
    """Two layers and an MTP module, of widths that the grouped kernel takes."""
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    return build(cls, seed, **(WIDTHS | sizes | changes))

def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a.float(), b.float(), atol=tolerance, rtol=tolerance)

def differ(a, b):
    return (a - b).abs().max() > 1e-3

@torch.no_grad()
def decodes(model, ids=IDS, tolerance=1e-5):
    """Token by token and chunk by chunk as in one pass, whose logits it returns; drafts change nothing."""
    one = model(ids).logits
    close(in_chunks(model, ids, [8] + [1] * (ids.shape[1] - 8))[0], one, tolerance)
    close(in_chunks(model, ids, [5, 4, ids.shape[1] - 9])[0], one, tolerance)
    plain = model.generate(ids, max_new_tokens=5, eos_token_id=-1)
    assert torch.equal(model.generate(ids, max_new_tokens=5, eos_token_id=-1, use_mtp=True), plain)
    return one

def train(model, steps=3, lr=0.01, ids=IDS, **inputs):
    """Losses of a few steps on one batch; only what requires gradients moves."""
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr), []
    for _ in range(steps):
        out = model(ids, labels=ids, **inputs)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.detach())
    return torch.stack(losses)

def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

class Instead(nn.Module):
    """What stands in another module's place, and may call it."""

    def __init__(self, compute, old=None):
        super().__init__()
        self.compute, self.old = compute, old

    def forward(self, *inputs, **_):
        return self.compute(self.old, *inputs)

# ---- Interventions ----

def zero_head(_module, _inputs, probs):
    return probs.index_fill(1, torch.tensor([0]), 0.0)

def test_zero_a_head_with_a_hook_on_softmax():
    model = small()
    before = decodes(model)
    handle = model.model.layers[1].self_attn.softmax.register_forward_hook(zero_head)
    hooked = decodes(model)
    assert differ(hooked, before)
    width = model.config.v_head_dim  # the head's columns of o_proj have no effect now
    handle.remove()
    model.model.layers[1].self_attn.o_proj.weight.data[:, :width] = 0
    close(decodes(model), hooked)

# ---- Adapters, and what is put in a module's place ----

ADAPTERS = {name: dict(target_modules=[name]) for name in ("q_proj", "kv_b_proj", "eh_proj")}
ADAPTERS |= {
    "all-linear": dict(target_modules="all-linear"), "dora": dict(target_modules="all-linear", use_dora=True),
    "experts": dict(target_modules=[], target_parameters=["experts.up_proj", "experts.down_proj"]),
    "saved": dict(target_modules=["o_proj"], modules_to_save=["lm_head", "embed_tokens"]),
}

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_train_an_adapter_with_peft(kind, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    fresh = partial(small, q_lora_rank=None if kind == "q_proj" else 16)
    adapted = get_peft_model(fresh(), LoraConfig(r=2, lora_alpha=4, **ADAPTERS[kind])).train()
    assert train(adapted, lr=0.02).diff().max() < 0
    one, ahead = decodes(adapted.eval()), adapted(IDS, output_mtp=True).mtp_logits[0]
    assert differ(ahead, fresh()(IDS, output_mtp=True).mtp_logits[0])
    assert differ(one, fresh()(IDS).logits) or kind == "eh_proj"
    adapted.save_pretrained(tmp_path)
    close(PeftModel.from_pretrained(fresh(), tmp_path)(IDS).logits, one, 1e-6)
    merged = adapted.merge_and_unload()
    close(decodes(merged), one)
    close(merged(IDS, output_mtp=True).mtp_logits[0], ahead)

class LowRank(nn.Module):
    """An adapter of torch alone, for a weight of any shape."""

    def __init__(self, weight):
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, weight.shape[-1]) * 0.2)
        self.up = nn.Parameter(torch.randn(*weight.shape[:-1], 2) * 0.2)

    def forward(self, weight):
        return weight + self.up @ self.down

def test_parametrize_every_weight():
    model = small()
    before = model(IDS).logits
    modules = [m for m in model.modules() if isinstance(m, Linear | Router)]
    modules += [layer.mlp.experts for layer in model.model.layers[1:]]
    named = [(m, name) for m in modules for name, p in m.named_parameters(recurse=False) if p.ndim > 1]
    for module, name in named:
        register_parametrization(module, name, LowRank(getattr(module, name)))
    one = decodes(model)
    assert differ(one, before) and len(named) > 25
    for module, name in named:
        remove_parametrizations(module, name)
    close(decodes(model), one)

PLACES = {
    "layers.*.self_attn.softmax": lambda old, scores: (2 * scores).softmax(-1),
    "layers.*.mlp": lambda old, x: x.tanh(), "layers.*.self_attn": lambda old, x, *_: x.sin(),
    "layers.*.mlp.gate": lambda old, x: old(x)._replace(weights=old(x).weights * 0.5),
    "layers.*.mlp.experts": lambda old, x, indices, weights: x * weights.sum(-1, keepdim=True),
    "layers.*.self_attn.kv_b_proj": lambda old, latent: old(latent).cos(),
    "layers.*.input_layernorm": lambda old, x: F.layer_norm(x, x.shape[-1:]),
    "layers.0": lambda old, x, *_: x / 2, "lm_head": lambda old, x: old(x) ** 3,
    "embed_tokens": lambda old, ids: old((ids + 1) % 64),
}

@pytest.mark.parametrize("place", PLACES)
def test_put_another_module_in_a_module_s_place(place):
    """MTP's layer is one of layers.*"""
    model = small()
    before, drafted = model(IDS).logits, model(IDS, output_mtp=True).mtp_logits[0]
    for name in fnmatch.filter([name for name, _ in model.named_modules()], "*" + place):
        parent, _, last = name.rpartition(".")
        old = model.get_submodule(name)
        setattr(model.get_submodule(parent), last, Instead(PLACES[place], old))
    assert differ(decodes(model), before)
    assert differ(model(IDS, output_mtp=True).mtp_logits[0], drafted)
    assert train(model.train()).diff().max() < 0

# ---- torch.compile: the first test runs the C++ compiler, others stand-ins that only capture ----

PADDED = pad([IDS[0, :9], IDS[1]], "left")[1]

@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield partial(torch.compile, fullgraph=True)
    torch.compiler.reset()

@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs g++")
def test_train_with_the_real_compiler(compiler):
    sizes = dict(hidden_size=8, num_attention_heads=2, qk_rope_head_dim=4, num_nextn_predict_layers=0)
    sizes |= dict(intermediate_size=16, moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2)
    model, eager = (small(**sizes, n_group=2, topk_group=1).train() for _ in range(2))
    close(train(compiler(model), 1, attention_mask=PADDED), train(eager, 1, attention_mask=PADDED), 1e-4)
    for name, p in model.named_parameters():
        close(p, eager.get_parameter(name), 1e-4)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_train_a_captured_model(dtype, compiler):
    """With a mask, MTP and every output in float32, with labels alone in bfloat16."""
    full = dtype == torch.float32
    eager, model = (small(dtype=dtype, num_nextn_predict_layers=int(full)).train() for _ in range(2))
    wanted = ALL | {"attention_mask": PADDED} if full else {}
    losses = train(compiler(model, backend="aot_eager"), **wanted)
    close(losses, train(eager, **wanted), 1e-4 if full else 0.05)
    assert losses[-1] < losses[0]

@torch.no_grad()
def test_capture_decoding_and_prompts_of_several_lengths(compiler):
    model = small(num_nextn_predict_layers=0)
    close(in_chunks(compiler(model, backend="eager"), IDS, [8, 1, 1, 1, 1])[0], model(IDS).logits, 1e-4)
    model = small(num_hidden_layers=1, num_nextn_predict_layers=0)
    compiled = compiler(model, backend="eager", dynamic=True)
    for n in (7, 9, 12):
        close(compiled(IDS[:, :n]).logits, model(IDS[:, :n]).logits)

def test_trace_a_compiled_model_says_that_it_cannot(compiler):
    model = small()
    with pytest.raises(ValueError, match="compile"), trace(compiler(model), "softmax"):
        pass
    model.model.layers[1].compile(backend="eager")
    model(IDS)
    with pytest.raises(RuntimeError, match="compile"), trace(model, "layers.1.mlp.gate"):
        model(IDS)

# ---- Precision: autocast, default dtype, inference mode ----

BF16 = partial(torch.autocast, "cpu", torch.bfloat16)

def test_train_and_decode_under_autocast_and_route_as_without():
    model, expected = small(), train(small().train())
    one, gate, inputs = model(IDS).logits, model.model.layers[1].mlp.gate, []
    handle = gate.register_forward_pre_hook(lambda m, x: inputs.append(x[0]))
    with BF16():
        (routed,) = model(IDS, output_routing=True).routing
        handle.remove()
        for sizes in ([12], [8, 1, 1, 1, 1], [5, 7]):
            assert (in_chunks(model, IDS, sizes)[0].float() - one).norm() < 0.1 * one.norm()
        assert model.generate(IDS, max_new_tokens=4, use_mtp=True, eos_token_id=-1).shape == (2, 16)
        close(train(model.train())[:2], expected[:2], 0.05)
    plain = small().model.layers[1].mlp.gate(inputs[0].float())
    assert routed.scores.dtype == routed.weights.dtype == torch.float32
    assert torch.equal(plain.indices, routed.indices) and torch.equal(plain.scores, routed.scores)

@pytest.mark.parametrize(("outside", "held"), [(torch.no_grad, 8), (torch.enable_grad, 7), (torch.enable_grad, 8)])
def test_go_on_outside_of_inference_mode(outside, held):
    """`held` 8: the cache has room for the next token, and is written to where it is."""
    model = small()
    with torch.inference_mode():
        cache = model(IDS[:, :7], use_cache=True).past_key_values
        model(IDS[:, 7:held], past_key_values=cache) if held == 8 else None
    with outside():
        parts = [model(part, past_key_values=cache).logits for part in IDS[:, held:].split(1, 1)]
    close(torch.cat(parts, 1), model(IDS).logits[:, held:])
    parts[-1].sum().backward() if outside is torch.enable_grad else None

# ---- Threads ----

def test_ask_one_model_from_several_threads():
    model, prompts = small(), [IDS[:1, :n] for n in (4, 7, 11)]

    @torch.no_grad()
    def ask(i):
        out = model(prompts[i], **ALL)
        return [out.logits, *out.attentions, *out.hidden_states, *(r.scores for r in out.routing)]

    def draft(i):
        return [model.generate(prompts[i], max_new_tokens=6, eos_token_id=-1, use_mtp=True)]

    with ThreadPoolExecutor(3) as pool:
        for work, calls in ((ask, 90), (draft, 12)):
            alone = [work(i) for i in range(3)]
            for call, result in enumerate(pool.map(work, (call % 3 for call in range(calls)))):
                assert all(map(torch.equal, result, alone[call % 3]))

# ---- Recomputing, frozen parts ----

def test_recompute_layers_with_every_output_and_a_trace():
    plain, model = small().train(), small().train()
    model.gradient_checkpointing = True
    outs = []
    for each in (plain, model):
        with trace(each, "softmax", "mlp.gate") as seen:
            out = each(IDS, PADDED, labels=IDS, **ALL)
        (out.loss + sum(a.square().sum() for a in out.attentions)).backward()  # when the hooks are gone
        outs.append(out)
        assert len(seen) == 5
    assert gradients(model).keys() == gradients(plain).keys() != set()
    for name, gradient in gradients(plain).items():
        close(gradients(model)[name], gradient)
    for name in ("attentions", "hidden_states", "mtp_logits"):
        assert all(map(torch.equal, outs[0][name], outs[1][name]))
    assert plain.update_router_bias() == model.update_router_bias()  # no visit is counted twice
    with pytest.raises(ValueError, match="gradient_checkpointing.*use_cache"):
        model(IDS, use_cache=True)

def test_train_the_heads_of_a_frozen_trunk():
    model = small().train()
    for part in (model.model.embed_tokens, model.model.norm, *model.model.layers[:2]):
        part.requires_grad_(False)
    model.model.eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad} and moved
    classifier = small(DeepseekV3ForSequenceClassification).train()
    classifier.model.eval().requires_grad_(False)
    classifier(IDS, labels=torch.tensor([0, 1])).loss.backward()
    assert gradients(classifier).keys() == {"score.weight"}

# ---- Several processes: FSDP2 and DDP, on gloo ----

def in_process(rank, folder):
    """What each of two processes finds with a row of the batch, into a file of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    ids, model = IDS[rank : rank + 1], small().train()
    found = {"fsdp": sharded(model, ids) | {"violations": model.update_router_bias()}}
    model = small().train()
    wrapped = nn.parallel.DistributedDataParallel(model, static_graph=True)
    found["ddp"] = {"loss": train(wrapped, ids=ids), "violations": model.update_router_bias()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()

def sharded(model, ids):
    """FSDP2 by layer, in bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy, angles = MixedPrecisionPolicy(param_dtype=torch.bfloat16), []
    for part in (*model.model.layers, model):
        fully_shard(part, mp_policy=policy)
    register_fsdp_forward_method(model, "generate")
    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(lambda m, inputs: angles.append(inputs[1].cos))
    out = model(ids, labels=ids, output_routing=True)
    out.loss.backward()
    found = {"loss": out.loss.detach(), "angles": angles[0], "hidden": out.last_hidden_state.dtype}
    found["scores"] = [routing.scores.dtype for routing in out.routing]
    found["gradients"] = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    found["generated"] = model.generate(ids, max_new_tokens=3, eos_token_id=-1, use_mtp=True).shape
    return found

def test_shard_with_fsdp2_in_bfloat16_and_replicate_with_ddp(tmp_path):
    """DDP as one process over the whole batch; visits are counted over both, and over three steps."""
    torch.multiprocessing.spawn(in_process, (tmp_path,), nprocs=2)
    processes = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    model, whole = small().train(), small().train()
    model(IDS, labels=IDS).loss.backward()
    close(sum(found["ddp"]["loss"] for found in processes) / 2, train(whole), 1e-4)
    violations = whole.update_router_bias()
    for rank, (found, ddp) in enumerate((each["fsdp"], each["ddp"]) for each in processes):
        assert found["hidden"] == torch.bfloat16 and set(found["scores"]) == {torch.float32}
        assert torch.equal(found["angles"], model.model.rotary_emb(torch.arange(12)[None])[0])
        assert found["loss"].dtype == torch.float32 and found["generated"] == (1, 15)
        row = IDS[rank : rank + 1]
        close(found["loss"], small().train()(row, labels=row).loss, 0.05)
        for name, gradient in gradients(model).items():
            assert found["gradients"][name].norm() > 0.8 * gradient.norm() > 0, name
        assert found["violations"] == processes[0]["fsdp"]["violations"]
        assert ddp["violations"] == pytest.approx(violations)

# ---- Copies, files, pytrees, export, offloading ----

def test_take_an_output_apart_as_a_pytree_and_retain_gradients_of_its_parts():
    out = small().train()(IDS, labels=IDS, output_routing=True, output_attentions=True)
    again = tree_map(lambda x: 2 * x, out)
    assert torch.equal(again.loss, 2 * out.loss) and torch.equal(again.attentions[1], 2 * out.attentions[1])
    assert torch.equal(again.routing[0].scores, 2 * out.routing[0].scores)
    for attention in out.attentions:
        attention.retain_grad()
    out.loss.backward()
    assert all(attention.grad.abs().max() > 0 for attention in out.attentions)

@pytest.mark.parametrize("inputs", [{}, {"attention_mask": PADDED}], ids=["plain", "padded"])
def test_export_the_forward_and_run_it_at_other_shapes(inputs):
    model, auto = small(num_nextn_predict_layers=0), torch.export.Dim.AUTO
    given = {"input_ids": IDS} | inputs
    shapes = {name: {0: auto, 1: auto} for name in given}
    exported = torch.export.export(model, (), given, dynamic_shapes=shapes).module()
    for take in (slice(0, 12), slice(3, 12)):
        now = {name: value[:, take] for name, value in given.items()}
        real = PADDED[:, take].bool()
        close(exported(**now).logits[real], model(**now).logits[real])

def test_copy_a_model_with_tied_embeddings():
    model = small(tie_word_embeddings=True)
    expected = model(IDS).logits
    with torch.device("meta"):
        empty = DeepseekV3ForCausalLM(model.config)
    torch.use_deterministic_algorithms(True)  # then what is empty is full of large numbers
    empty.to_empty(device="cpu")
    torch.use_deterministic_algorithms(False)
    empty.load_state_dict(model.state_dict())
    for each in (copy.deepcopy(model).double().float(), pickle.loads(pickle.dumps(model)), empty):
        assert each.lm_head.weight is each.model.embed_tokens.weight
        close(each.eval()(IDS).logits, expected)
    assert not empty.model.layers[1].mlp.gate.load.any()

def test_parametrize_or_prune_tied_embeddings():
    changed = [small(tie_word_embeddings=True) for _ in range(3)]
    register_parametrization(changed[0].lm_head, "weight", LowRank(changed[0].lm_head.weight))
    prune.l1_unstructured(changed[1].lm_head, "weight", 0.3)
    changed[2].model.embed_tokens = nn.Sequential(changed[2].model.embed_tokens, nn.Dropout(0.0))
    for model in changed:
        expected = model(IDS).logits
        close(model.double()(IDS).logits, expected)
        model.load_state_dict(model.state_dict())
        close(decodes(model), expected)

@pytest.mark.filterwarnings("ignore")
def test_offload_weights_with_accelerate():
    from accelerate import cpu_offload  # peft needs accelerate

    model = small()
    expected, generated = model(IDS).logits, model.generate(IDS, max_new_tokens=4, use_mtp=True)
    cpu_offload(model, execution_device="cpu")
    with torch.no_grad():
        close(model(IDS).logits, expected)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, use_mtp=True), generated)

# ---- Derivatives: gradient penalty, torch.func ----

def test_penalise_a_gradient():
    """Double backward, against differences of the gradient."""
    model, step = small(dtype=torch.float64), 1e-5
    x = model.model.embed_tokens(IDS).detach().requires_grad_()

    def slope(x, **more):
        return torch.autograd.grad(model(inputs_embeds=x).logits.square().mean(), x, **more)[0]

    with sdpa_kernel(SDPBackend.MATH):
        gradient = slope(x, create_graph=True)
        (product,) = torch.autograd.grad(gradient.square().sum() / 2, x)
        difference = slope(x + step * gradient.detach()) - slope(x - step * gradient.detach())
    close(product, difference / (2 * step), 1e-6)

def test_take_gradients_with_torch_func():
    model = small()
    named = {name: p.detach() for name, p in model.named_parameters()}

    def loss(named, ids):
        return functional_call(model, named, (ids[None],), {"labels": ids[None]}).loss

    with sdpa_kernel(SDPBackend.MATH):
        alone = [torch.func.grad(loss)(named, row) for row in IDS]
        value, pull = torch.func.vjp(lambda named: loss(named, IDS[0]), named)
        batched = torch.func.vmap(torch.func.grad(loss), (None, 0))(named, IDS)
    model(IDS[:1], labels=IDS[:1]).loss.backward()
    for name, gradient in gradients(model).items():
        close(alone[0][name], gradient)
        close(pull(torch.ones_like(value))[0][name], gradient)
        close(batched[name], torch.stack([each[name] for each in alone]))

def test_take_gradients_through_several_cached_steps():
    """The last queries alone are trained: what a step read from the cache outlives the next one's writing."""
    model = small(num_nextn_predict_layers=0)
    model.requires_grad_(False)
    weight = model.model.layers[-1].self_attn.q_b_proj.weight.requires_grad_()
    expected, = torch.autograd.grad(model(IDS).logits.square().sum(), weight)
    cache, parts = None, []
    for part in IDS.split([8, 1, 1, 1, 1], 1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache, parts = out.past_key_values, [*parts, out.logits]
    found, = torch.autograd.grad(torch.cat(parts, 1).square().sum(), weight)
    close(found, expected, 1e-5 * expected.abs().max().item())

@torch.no_grad()
def test_repeat_a_layer_by_copying_it():
    model = small(num_nextn_predict_layers=0)
    layers = list(model.model.layers)
    model.model.layers = torch.nn.ModuleList([*layers, copy.deepcopy(layers[-1])])
    model.config.num_hidden_layers = len(layers) + 1
    close(in_chunks(model, IDS, [8, 1, 1, 2])[0], model(IDS).logits)

def test_keep_a_model_whole_after_torch_func():
    """torch.func.grad in training mode leaves no wrapped tensor behind in the routers' loads."""
    model = small().train()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    call = partial(torch.func.functional_call, model)
    torch.func.grad(lambda p: call(p, (IDS,), {"labels": IDS}).loss)(parameters)
    copy.deepcopy(model)
    model(IDS, labels=IDS)
    assert len(model.update_router_bias()) > 0
