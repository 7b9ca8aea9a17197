"""Checkpoint folders for the tests: small ones with real numbers, and the released one as holes."""

import json
import re

import torch
from helpers import V3, build
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"

# Widths that no block of 128 divides; 576 rows of the release are 4.5 blocks, 136 are 1.06.
RAGGED = dict(hidden_size=136, intermediate_size=272, moe_intermediate_size=144)
RAGGED |= dict(q_lora_rank=130, kv_lora_rank=132, initializer_range=0.05)


def ragged(**changes):
    """A bfloat16 model with MTP whose matrices all have ragged blocks."""
    return build(**({"dtype": torch.bfloat16} | RAGGED | changes))


def read(directory):
    """{name: tensor} of all safetensors files of a folder."""
    return {k: v for path in sorted(directory.glob("model*.safetensors")) for k, v in load_file(path).items()}


def write(directory, tensors, config=None, shards=1):
    """A folder with an index, tensors dealt to its shards in turn."""
    directory.mkdir(exist_ok=True)
    files = [f"model-{i + 1:05d}-of-{shards:06d}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        part = {name: tensors[name].clone() for name in tensors if weight_map[name] == file}
        save_file(part, directory / file)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def released_layout(layers=61):
    """{name: (dtype, shape)} of the released V3 checkpoint, written down from its description."""
    D, tensors = 7168, {}

    def matrix(name, rows, columns):
        tensors[f"{name}.weight"] = "F8_E4M3", (rows, columns)
        tensors[f"{name}.weight_scale_inv"] = "F32", (-(-rows // 128), -(-columns // 128))

    def vector(name, size):
        tensors[f"{name}.weight"] = "BF16", (size,)

    def feed_forward(name, width):
        matrix(f"{name}.gate_proj", width, D)
        matrix(f"{name}.up_proj", width, D)
        matrix(f"{name}.down_proj", D, width)

    for i in range(layers + 1):
        layer = f"model.layers.{i}"
        matrix(f"{layer}.self_attn.q_a_proj", 1536, D)
        vector(f"{layer}.self_attn.q_a_layernorm", 1536)
        matrix(f"{layer}.self_attn.q_b_proj", 24576, 1536)
        matrix(f"{layer}.self_attn.kv_a_proj_with_mqa", 576, D)
        vector(f"{layer}.self_attn.kv_a_layernorm", 512)
        matrix(f"{layer}.self_attn.kv_b_proj", 32768, 512)
        matrix(f"{layer}.self_attn.o_proj", D, 16384)
        vector(f"{layer}.input_layernorm", D)
        vector(f"{layer}.post_attention_layernorm", D)
        if i < 3:
            feed_forward(f"{layer}.mlp", 18432)
            continue
        tensors[f"{layer}.mlp.gate.weight"] = "BF16", (256, D)
        tensors[f"{layer}.mlp.gate.e_score_correction_bias"] = "F32", (256,)
        feed_forward(f"{layer}.mlp.shared_experts", 2048)
        for e in range(256):
            feed_forward(f"{layer}.mlp.experts.{e}", 2048)
    mtp = f"model.layers.{layers}"
    vector(f"{mtp}.enorm", D)
    vector(f"{mtp}.hnorm", D)
    vector(f"{mtp}.shared_head.norm", D)
    tensors[f"{mtp}.eh_proj.weight"] = "BF16", (D, 2 * D)
    tensors[f"{mtp}.embed_tokens.weight"] = "BF16", (129280, D)
    tensors[f"{mtp}.shared_head.head.weight"] = "BF16", (129280, D)
    tensors["model.embed_tokens.weight"] = "BF16", (129280, D)
    tensors["lm_head.weight"] = "BF16", (129280, D)
    vector("model.norm", D)
    return tensors


def nbytes(dtype, shape):
    return torch.Size(shape).numel() * {"F8_E4M3": 1, "BF16": 2, "F32": 4}[dtype]


def by_layer(name):
    """Embedding first, then layer by layer, then norm and head: the order of the released shards."""
    match = re.match(r"model\.layers\.(\d+)", name)
    return int(match[1]) if match else -1 if "embed" in name else 1000


def write_sparse(directory, tensors, config=V3, limit=4_300_000_000):
    """The folder in its real size, with real headers, and holes in place of the numbers."""
    shards, room = [], 0
    for name in sorted(tensors, key=by_layer):
        size = nbytes(*tensors[name])
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):06d}.safetensors"
        header, end = {}, 0
        for name in names:
            dtype, shape = tensors[name]
            begin, end = end, end + nbytes(dtype, shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(directory / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config))
    return len(shards)
