"""`lorank compress` and `lorank merge` against their peers, in one run: ``python benches/compress.py``.

An adapter of LLaMA-7B's shapes (224 modules), folder to folder with the disk cached, against the loop
that people write by hand: load with safetensors, QR of both factors, SVD of the core, global threshold,
rebuild, save. And the merge of two adapters of one 4096x4096 module against PEFT's
`add_weighted_adapter(combination_type="svd")`. Every contender runs in a process of its own; the clock
starts after imports.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

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
    small.save(target)
    return small.certificate.relative_error
"""

LORANK_IN_MEMORY = """
import json, pathlib, safetensors.numpy, time
from lorank import compress
from lorank.adapters import peft_format
from lorank.adapters.tensors import ArrayTensors
def run(source, target, threads):
    tensors = safetensors.numpy.load_file(pathlib.Path(source) / "adapter_model.safetensors")
    config = json.loads((pathlib.Path(source) / "adapter_config.json").read_text())
    start = time.perf_counter()
    adapter = peft_format.read(ArrayTensors(tensors, "memory"), config)
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
def run(source, target, threads):
    adapters = [LoraAdapter.load(f"{source}/{k}") for k in (0, 1)]
    merged = merge(adapters, [0.7, 0.3], avg_rank=16, threads=threads, progress=False)
    return merged.certificate.retained_energy
"""

PEFT_MERGE = """
import peft, torch
def run(source, target, threads):
    torch.set_num_threads(threads)
    base = torch.nn.ModuleDict({"proj": torch.nn.Linear(4096, 4096, bias=False)})
    model = peft.PeftModel.from_pretrained(base, f"{source}/0", adapter_name="a")
    model.load_adapter(f"{source}/1", "b")
    import time
    start = time.perf_counter()
    model.base_model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "m", combination_type="svd", svd_rank=16)
    return {"merge_seconds": time.perf_counter() - start}
"""

HARNESS = """
import json, re, sys, time
def peak(): return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
start = time.perf_counter()
result = run(sys.argv[1], sys.argv[2], int(sys.argv[3]))
seconds = time.perf_counter() - start
print("RESULT " + json.dumps({"seconds": seconds, "peak": peak() - before, "result": result}))
"""


def write_adapter(folder: Path, modules: dict[str, tuple[int, int]], rank: int, seed: int = 0) -> int:
    """An adapter with decaying singular values; returns its bytes."""
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


def measure(code: str, source: Path, target: str, threads: int) -> dict[str, object]:
    """One run in a fresh process."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, str(threads)) | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code + HARNESS, str(source), target, str(threads)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    result: dict[str, object] = json.loads(line.removeprefix("RESULT "))
    return result


def compare(rank: int, layers: int, threads: int, repeats: int, scratch: Path) -> list[dict[str, object]]:
    """Folder to folder, and the same work on tensors in memory."""
    modules = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in SHAPES.items()}
    source = scratch / f"adapter-{rank}"
    size = write_adapter(source, modules, rank)
    whole: list[list[dict[str, object]]] = [[], []]
    inner: list[list[dict[str, object]]] = [[], []]
    for repeat in range(repeats):
        for k, (on_disk, in_memory) in enumerate(((LORANK, LORANK_IN_MEMORY), (TORCH, TORCH))):
            whole[k].append(measure(on_disk, source, str(scratch / f"{k}-{rank}-{repeat}"), threads))
            inner[k].append(measure(in_memory, source, "", threads)["result"])
    difference = abs(whole[0][0]["result"] - whole[1][0]["result"])
    assert difference < 1e-5, f"the contenders disagree by {difference}"
    name = f"compress, {len(modules)} modules, r={rank}"
    peaks = [max(run["peak"] for run in runs) / size for runs in whole]
    return [
        {**row(f"{name}, in memory", *inner), "peaks": None},
        {**row(f"{name}, folder to folder", *whole), "peaks": peaks},
    ]


def row(work: str, mine: list[dict[str, object]], theirs: list[dict[str, object]]) -> dict[str, object]:
    """Medians; the ratio pair by pair, so that a drift of the machine's speed cancels."""
    ratios = [t["seconds"] / m["seconds"] for m, t in zip(mine, theirs, strict=True)]
    medians = [statistics.median(run["seconds"] for run in runs) for runs in (mine, theirs)]
    return {"work": work, "lorank": medians[0], "peer": medians[1], "ratio": statistics.median(ratios)}


def compare_merges(threads: int, scratch: Path) -> dict[str, object]:
    for k in (0, 1):
        write_adapter(scratch / "pair" / str(k), {"proj": (4096, 4096)}, 16, seed=k)
    runs = [measure(LORANK_MERGE, scratch / "pair", "", threads) for _ in range(5)]
    mine = statistics.median(run["seconds"] for run in runs)
    theirs = measure(PEFT_MERGE, scratch / "pair", "", threads)["result"]["merge_seconds"]
    return {
        "work": "merge of two, one 4096x4096 module, r=16",
        "lorank": mine,
        "peer": theirs,
        "ratio": theirs / mine,
        "peaks": None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--without-peft", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        rows = []
        for rank in (16, 64):
            rows += compare(rank, arguments.layers, arguments.threads, arguments.repeats, scratch)
        if not arguments.without_peft:
            rows.append(compare_merges(arguments.threads, scratch))
    print(f"{arguments.threads} threads, medians of {arguments.repeats}; peak memory in sizes of the adapter")
    for entry in rows:
        line = "{work:50} lorank {lorank:7.3f} s   peer {peer:7.3f} s {ratio:7.1f}x".format(**entry)
        if entry["peaks"]:
            line += "   peak {:.2f} against {:.2f}".format(*entry["peaks"])
        print(line)
    if arguments.json:
        arguments.json.write_text(json.dumps({"threads": arguments.threads, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
