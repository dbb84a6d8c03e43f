"""`lorank compress` and `lorank merge` against their peers in one run: ``python -m benches.compress``.

The adapter has the shapes of LLaMA-7B (224 modules) and is compressed folder to folder with cached files.
The peer is a hand-written loop: load with safetensors, QR of both factors, SVD of the core, global
threshold, rebuild, save. Merges of two adapters of one 4096x4096 module and of four complete adapters are
compared with PEFT's `add_weighted_adapter(combination_type="svd")`. The time of PEFT for complete adapters
would be an hour and is extrapolated from four modules. Every contender runs in a new process; the clock
starts after imports.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from benches import measuring

SHAPES = {
    **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}

LORANK = """
from lorank import LoraAdapter, compress
def run(source, target, threads):
    adapter = LoraAdapter.load(source)
    small = compress(adapter, rank_ratio=0.25, threads=threads, progress=False)
    small.save(target, threads=threads)
    return small.certificate.relative_error
"""

LORANK_IN_MEMORY = """
import json, pathlib, safetensors.numpy, time
from lorank import compress
from lorank.adapters.formats import peft_reading
from lorank.adapters.tensors import ArrayTensors
def run(source, target, threads):
    tensors = safetensors.numpy.load_file(pathlib.Path(source) / "adapter_model.safetensors")
    config = json.loads((pathlib.Path(source) / "adapter_config.json").read_text())
    start = time.perf_counter()
    adapter = peft_reading.read(ArrayTensors(tensors, "memory"), config)
    small = compress(adapter, rank_ratio=0.25, threads=threads, progress=False)
    return {"seconds": time.perf_counter() - start, "error": small.certificate.relative_error}
"""

TORCH = """
import json, pathlib, safetensors.torch, time, torch
def run(source, target, threads):
    torch.set_num_threads(threads)
    tensors = safetensors.torch.load_file(pathlib.Path(source) / "adapter_model.safetensors")
    if not target:
        tensors = {key: value.clone() for key, value in tensors.items()}
    start = time.perf_counter()
    config = json.loads((pathlib.Path(source) / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    parts = {}
    for key in tensors:
        if ".lora_A." in key:
            a, b = tensors[key], tensors[key.replace(".lora_A.", ".lora_B.")] * scaling
            q_b, r_b = torch.linalg.qr(b)
            q_a, r_a = torch.linalg.qr(a.T)
            u, s, vh = torch.linalg.svd(r_b @ r_a.T)
            parts[key] = (q_b @ u, s, vh @ q_a.T)
    values = torch.cat([s for _, s, _ in parts.values()])
    count = int(0.25 * len(values) + 0.5)
    threshold = values.topk(count).values[-1]
    out, dropped = {}, 0.0
    for key, (u, s, vh) in parts.items():
        k = int((s >= threshold).sum())
        dropped += float(s[k:].double().square().sum())
        root = s[:k].sqrt()
        out[key] = (root[:, None] * vh[:k]).contiguous()
        out[key.replace(".lora_A.", ".lora_B.")] = (u[:, :k] * root).contiguous()
    error = (dropped / float(values.double().square().sum())) ** 0.5
    if not target:
        return {"seconds": time.perf_counter() - start, "error": error}
    pathlib.Path(target).mkdir()
    safetensors.torch.save_file(out, pathlib.Path(target) / "adapter_model.safetensors")
    return error
"""

LORANK_MERGE = """
from lorank import LoraAdapter, merge
def run(source, count, threads):
    adapters = [LoraAdapter.load(f"{source}/{k}") for k in range(int(count))]
    weights = [0.4, 0.3, 0.2, 0.1][:len(adapters)]
    merged = merge(adapters, weights, avg_rank=16, threads=threads, progress=False)
    return merged.certificate.retained_energy
"""

PEFT_MERGE = """
import json, peft, safetensors, time, torch
def run(source, count, threads):
    torch.set_num_threads(threads)
    names = [str(k) for k in range(int(count))]
    base = torch.nn.Module()
    with safetensors.safe_open(f"{source}/0/adapter_model.safetensors", "pt") as file:
        for key in file.keys():
            if ".lora_A." in key:
                *path, leaf = key.removeprefix("base_model.model.").split(".lora_A.")[0].split(".")
                where = base
                for part in path:
                    if not hasattr(where, part):
                        where.add_module(part, torch.nn.Module())
                    where = getattr(where, part)
                fan_in = file.get_slice(key).get_shape()[1]
                out = file.get_slice(key.replace(".lora_A.", ".lora_B.")).get_shape()[0]
                where.add_module(leaf, torch.nn.Linear(fan_in, out, bias=False))
    model = peft.PeftModel.from_pretrained(base, f"{source}/0", adapter_name="0")
    for name in names[1:]:
        model.load_adapter(f"{source}/{name}", name)
    weights = [0.4, 0.3, 0.2, 0.1][:len(names)]
    start = time.perf_counter()
    model.base_model.add_weighted_adapter(names, weights, "m", combination_type="svd", svd_rank=16)
    return {"seconds": time.perf_counter() - start}
"""


def write_adapter(folder: Path, modules: dict[str, tuple[int, int]], rank: int, seed: int = 0) -> int:
    """Write an adapter with decaying singular values; return its size in bytes."""
    rng = np.random.default_rng(seed)
    decay = np.geomspace(1, 0.02, rank).astype(np.float32)
    tensors = {}
    for name, (out, fan_in) in modules.items():
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_B.weight"] = rng.standard_normal((out, rank), dtype=np.float32) * decay
        tensors[f"{key}.lora_A.weight"] = rng.standard_normal((rank, fan_in), dtype=np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in modules})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return sum(tensor.nbytes for tensor in tensors.values())


def compare(rank: int, layers: int, threads: int, repeats: int, scratch: Path) -> list[measuring.Run]:
    """Compare compressions folder to folder, and of tensors in memory."""
    modules = modules_of(layers)
    source = scratch / f"adapter-{rank}"
    size = write_adapter(source, modules, rank)
    whole: list[list[measuring.Run]] = [[], []]
    inner: list[list[measuring.Run]] = [[], []]
    for _ in range(repeats):
        for k, (on_disk, in_memory) in enumerate(((LORANK, LORANK_IN_MEMORY), (TORCH, TORCH))):
            whole[k].append(measuring.fresh_to_folder(on_disk, source, scratch / "small", threads=threads))
            inner[k].append(measuring.fresh(in_memory, source, "", threads=threads))
    difference = abs(whole[0][0]["result"] - whole[1][0]["result"])
    assert difference < 1e-5, f"the contenders disagree by {difference}"
    peaks = [max(run["grown"] for run in runs) / size for runs in whole]
    name, peer = f"compress {len(modules)} modules, r={rank}", "torch QR + SVD loop"
    return [
        measuring.compared(f"{name}, in memory", peer, *inner),
        measuring.compared(f"{name}, folder to folder", peer, *whole, peaks_in_adapters=peaks),
    ]


def compare_merges(layers: int, threads: int, repeats: int, scratch: Path) -> list[measuring.Run]:
    """Compare merges of two adapters of one module, and of four of all modules, extrapolating PEFT's time."""
    modules = modules_of(layers)
    for k in range(2):
        write_adapter(scratch / "pair" / str(k), {"proj": (4096, 4096)}, 16, seed=k)
    for k in range(4):
        write_adapter(scratch / "whole" / str(k), modules, 16, seed=k)
        write_adapter(scratch / "four" / str(k), dict(list(modules.items())[3:7]), 16, seed=k)
    rows = []
    for work, count, mine, theirs, scale in (
        ("merge 2 of 1 module 4096x4096", 2, "pair", "pair", 1.0),
        # The four modules have all shapes: the attention output and the three of the feed-forward block.
        (
            f"merge 4 of {len(modules)} modules, r=16",
            4,
            "whole",
            "four",
            _cost(modules) / _cost_of_four(modules),
        ),
    ):
        own = [measuring.fresh(LORANK_MERGE, scratch / mine, count, threads=threads) for _ in range(repeats)]
        peer = measuring.fresh(PEFT_MERGE, scratch / theirs, count, threads=threads)
        peer["seconds"] *= scale
        name = 'PEFT add_weighted_adapter("svd")' + (", extrapolated" if scale > 1 else "")
        rows.append(measuring.compared(work, name, own, [peer] * repeats))
    return rows


def _cost(modules: dict[str, tuple[int, int]]) -> float:
    """Return the cost of an SVD of every module, up to a constant."""
    return sum(min(shape) ** 2 * max(shape) for shape in modules.values())


def _cost_of_four(modules: dict[str, tuple[int, int]]) -> float:
    return _cost(dict(list(modules.items())[3:7]))


def modules_of(layers: int) -> dict[str, tuple[int, int]]:
    """Return the modules and shapes of the first layers of LLaMA-7B."""
    return {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in SHAPES.items()}


def main() -> None:
    options = measuring.parser(__doc__, repeats=5)
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--without-peft", action="store_true")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        rows = []
        for rank in (16, 64):
            rows += compare(rank, arguments.layers, arguments.threads, arguments.repeats, scratch)
        if not arguments.without_peft:
            rows += compare_merges(arguments.layers, arguments.threads, arguments.repeats, scratch)
    for row in rows:
        measuring.show(row)
        if "peaks_in_adapters" in row:
            print(
                "  peak memory in sizes of the adapter: {:.2f} against {:.2f}".format(
                    *row["peaks_in_adapters"]
                )
            )
    measuring.write(arguments.json, arguments.threads, rows)


if __name__ == "__main__":
    main()
