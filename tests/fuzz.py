"""Load mutated checkpoints, in a process of its own: python tests/fuzz.py FOLDER CASES; test_fuzz.py does so.

So a crash is seen, and a hook of Python's watches what is opened.
"""

import collections
import copy
import json
import os
import random
import resource
import signal
import sys
import traceback
import warnings
from pathlib import Path

SECONDS_A_CASE, MEMORY = 10, 12 << 30  # of address space: a wish for more is an error at once
INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-000002.safetensors"

# ---- Mutations ----

NUMBERS = [0, -0.0, 1, -1, 2, 3, 0.5, 1e-320, 1e308, float("inf"), float("nan"), 2**31, 2**63, 2**64, -(10**30)]
NUMBERS += [10**30, 10**400, 10**6, 10**9, 1.0000000000000002, 64]
STRINGS = ["", "x" * 5000, "\0", "\ud800", "é\n", "F64", "F8_E4M3", "BF16", "I64", "BOOL", "yarn", "self", "extra"]
STRINGS += ["../outside.safetensors", "{root}/outside.safetensors", "/etc/passwd", "/dev/zero", "..", ".", "//"]
STRINGS += ["a.safetensors\0", "y" * 300 + ".safetensors", SHARD, "config.json", "sub/../../outside.safetensors"]
STRINGS += ["model.norm.weight", "model.layers.999999999.x", "__metadata__", "weight_map", "fp8", "rope_parameters"]
OTHERS = [None, True, False, [], {}, [[]], [0], [1, 2], ["F32"], {"": None}, {"F32": None}, ["F32", [1], [0, 4]]]

def nested(depth, inside=0):
    for level in range(depth):
        inside = [inside] if level % 3 else {"a": inside}
    return inside

def anything(rng):
    """A value that few would expect."""
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(NUMBERS)
    if kind < 0.45:
        return rng.randrange(-3, 70)
    if kind < 0.7:
        return rng.choice(STRINGS)
    if kind < 0.95:
        return copy.deepcopy(rng.choice(OTHERS))  # which the next change may be to
    return nested(rng.choice([2, 30, 90, 110, *range(300, 1000, 13), 5000]))

def places(value):
    """Every dict and list inside a value, itself included."""
    found = [value]
    for here in found:  # which grows
        inner = here.values() if isinstance(here, dict) else here if isinstance(here, list) else []
        found += [each for each in inner if isinstance(each, dict | list)]
    return found if isinstance(value, dict | list) else []

def mutate_json(content, rng):
    """Change a value, a key or the order somewhere inside, or put something else for all of it."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        here = rng.choice(places(content) or [None])
        kind = rng.random()
        if kind < 0.02 or here is None:
            content = anything(rng)
        elif isinstance(here, list):
            here[:] = rng.choice([here[:-1], [*here, anything(rng)], [anything(rng) for _ in here], here[::-1]])
        elif not here or kind < 0.15:
            here[rng.choice([*STRINGS, *KEYS])] = anything(rng)
        else:
            key = rng.choice([*here])
            if kind < 0.7:
                here[key] = anything(rng)
            elif kind < 0.8:
                del here[key]
            elif kind < 0.9:
                here[rng.choice([*here])] = here[key]
            else:
                here[rng.choice(STRINGS)] = here.pop(key)
    return content

KEYS = ["rope_parameters", "num_mtp_layers", "id2label", "quantization_config", "self", "cls", "moe_layer_freq"]
KEYS += ["auto_map", "directory", "rope_scaling", "hidden_size", "n_routed_experts", "num_hidden_layers", "config"]

def mutate_bytes(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, n = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 8, 100])
        head = rng.random() < 0.5  # where what means most stands
        at = min(at, rng.randrange(400)) if head else at
        new = rng.choice([b"", rng.randbytes(n), b"\xff" * n, b"\0" * n, bytes(data[at : at + n]) * 2, b"9" * n])
        data[at : at + rng.choice([0, n])] = new
    return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data)

def dumped(value):
    """As JSON; deeper than Python's own writer goes, if need be."""
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 5000 + "]" * 5000

def mutate_header(data, rng):
    """A safetensors file with another header, whose length is right but for now and then."""
    size = int.from_bytes(data[:8], "little")
    header = dumped(mutate_json(json.loads(data[8 : 8 + size]), rng)).encode("utf-8", "surrogatepass")
    header += b" " * (-len(header) % 8)
    length = len(header)
    if rng.random() < 0.1:
        length = rng.choice([0, 1, length - 1, length + 8, 2**31, 2**63, 2**64 - 1, 10**8, 99 * 10**6])
    return length.to_bytes(8, "little") + header + data[8 + size :]

def mutate(kind, data, rng):
    if kind == "header":
        return mutate_header(data, rng)
    if kind == "bytes" or rng.random() < 0.1:
        return mutate_bytes(data, rng)
    text = dumped(mutate_json(json.loads(data), rng))
    return text.encode("utf-8", "surrogatepass")

# ---- The process that loads them ----

NEVER = ("exec", "compile", "pickle.", "socket.", "subprocess.", "os.system", "os.exec", "ctypes.dlopen", "import")

class Watch:
    """What happens inside a case that must not: files opened outside its folder, code, the network."""

    def __init__(self, folder):
        self.folder, self.on, self.seen = str(folder), False, []
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if self.on and event.startswith(NEVER):
            self.seen.append(f"{event} {args}"[:200])
        elif self.on and event == "open":
            self.path(args[0])

    def path(self, path):
        """A path, however it is opened; the compiled readers of safetensors tell no hook."""
        inside = isinstance(path, int) or os.path.realpath(os.fsdecode(path)).startswith(self.folder)
        if not inside and not str(path).endswith((".py", ".pyc")):  # of tracebacks
            self.seen.append(f"opens {path}")

def outcome(load, watch):
    """How a load ends, and a complaint if it must not end so."""
    watch.seen, watch.on = [], True
    signal.alarm(SECONDS_A_CASE)
    try:
        load()
        name, complaint = "loaded", None
    except (ValueError, FileNotFoundError) as error:
        name, complaint = type(error).__name__, None
        if type(error) not in (ValueError, FileNotFoundError) or not str(error):
            complaint = f"{type(error).__name__}: {error}"
        name = name if isinstance(error, FileNotFoundError) else "ValueError"
    except BaseException:  # whatever else it is, it must not come
        name, complaint = "other", traceback.format_exc(limit=-4)
    watch.on = False
    signal.alarm(0)
    return name, complaint or ("; ".join(watch.seen) or None)

def checkpoints(root):
    """Two tiny good ones, in one file and in two with FP8 and MTP; and a decoy beside them."""
    from helpers import build

    small = dict(n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, num_hidden_layers=2)
    small |= dict(rope_scaling=None) | dict(vocab_size=7, hidden_size=8, intermediate_size=8)
    build(**small, num_nextn_predict_layers=0).save_pretrained(root / "one")
    yarn = {"type": "yarn", "factor": 2, "original_max_position_embeddings": 8, "mscale_all_dim": 1.0}
    model = build(**small | {"num_hidden_layers": 1, "rope_scaling": yarn})
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(root / "two", max_shard_size=total // 3, quantize="fp8")
    model.save_pretrained(root / "decoy")
    (root / "decoy" / "model.safetensors").rename(root / "outside.safetensors")
    return root / "one", root / "two"

def victim(kind, one, two, rng):
    """The folder and the file that a case of a kind spoils."""
    folder = two if kind == "index" else rng.choice([one, two])
    if kind == "index":
        return folder, folder / INDEX
    if kind == "config":
        return folder, folder / "config.json"
    return folder, rng.choice(sorted(folder.glob("*.safetensors")))

def main(root, cases):
    root = Path(root).resolve()
    one, two = checkpoints(root)
    import deepseek_v3

    watch, real = Watch(""), deepseek_v3.safe_open
    deepseek_v3.safe_open = lambda path, **options: (watch.path(path), real(path, **options))[1]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("a case takes too long")))
    warnings.simplefilter("ignore")
    deepseek_v3.PreTrainedModel.init_weights = lambda *_: None  # half the time, and not what is tested
    result = {}
    deepseek_v3.DeepseekV3ForCausalLM.from_pretrained(two)  # what torch imports late, it has imported now
    for kind, count in cases.items():
        rng, counts, wrong = random.Random(kind), collections.Counter(), []
        for _ in range(count):
            folder, file = victim(kind, one, two, rng)
            watch.folder, good = f"{folder}/", file.read_bytes()
            bad = mutate(kind, good, rng).replace(b"{root}", str(root).encode())
            file.write_bytes(bad)
            cls = rng.choice([deepseek_v3.DeepseekV3ForCausalLM, deepseek_v3.DeepseekV3Model])
            name, complaint = outcome(lambda cls=cls, folder=folder: cls.from_pretrained(folder), watch)
            file.write_bytes(good)
            counts[name] += 1
            if complaint and len(wrong) < 20:
                wrong.append(f"{file.name}: {bad[:300]!r}\n{complaint}"[-1500:])
        result[kind] = counts, wrong
    print(json.dumps(result))

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    main(sys.argv[1], json.loads(sys.argv[2]))
