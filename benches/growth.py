"""Cost against the size of models and adapters: ``python -m benches.growth``.

`lorank.analyze` reads Llama-like checkpoints of random bfloat16 weights with more and more layers of one
shape, then of growing shapes, from 10 million to 2 billion parameters. `lorank.compress` reads adapters of
10 to 1,000 modules. The results are time, peak memory and time per predicted operation; every run is a new
process with cached files.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from benches import compress, measuring

ANALYZE = """
import lorank
def run(path, threads):
    found = lorank.analyze(path, threads=threads, progress=False)
    assert not any(row.flags for row in found)
"""

# Hidden size, feed-forward size, layers: one shape with more and more layers, then growing shapes.
LAYERS = [(768, 2048, layers) for layers in (2, 4, 8, 16, 32)]
SHAPES = [
    (288, 768, 9),
    (512, 1376, 12),
    (768, 2048, 14),
    (1024, 2816, 26),
    (2048, 5504, 20),
    (2048, 5504, 40),
]
MODULES = (10, 30, 100, 300, 1000)


def matrices(hidden: int, inner: int, layers: int) -> dict[str, tuple[int, int]]:
    """Return shapes of layers with few key-value heads (a quarter) and a gated feed-forward block."""
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}


def operations(shape: tuple[int, int]) -> float:
    """Return the operations of half a Gram matrix and its reduction to tridiagonal form."""
    short, long = min(shape), max(shape)
    return short**2 * long + 4 / 3 * short**3


def write_checkpoint(folder: Path, hidden: int, inner: int, layers: int) -> int:
    """Write a shard of normal bfloat16 weights per layer; return the number of parameters."""
    import json

    import ml_dtypes

    folder.mkdir()
    numbers = np.random.default_rng(0)
    places, total = {}, 0
    for i in range(layers):
        tensors = {}
        for name, (out, fan_in) in matrices(hidden, inner, layers).items():
            if not name.startswith(f"model.layers.{i}."):
                continue
            weight = numbers.standard_normal((out, fan_in), dtype=np.float32) / math.sqrt(fan_in)
            tensors[f"{name}.weight"] = weight.astype(ml_dtypes.bfloat16)
            total += weight.size
        file = f"model-{i:05}.safetensors"
        save_file(tensors, folder / file)
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return total


def grow_model(shape: tuple[int, int, int], threads: int, repeats: int) -> measuring.Run:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        parameters = write_checkpoint(folder, *shape)
        runs = [measuring.fresh(ANALYZE, folder, threads=threads) for _ in range(repeats)]
    predicted = sum(operations(shape) for shape in matrices(*shape).values())
    seconds = measuring.median(runs)
    hidden, inner, layers = shape
    row = {
        "work": f"analyze {layers} layers of {hidden}/{inner}",
        "parameters": parameters,
        "seconds": seconds,
        "peak_mb": max(run["peak"] for run in runs) / 1e6,
        "seconds_per_layer": seconds / layers,
        "gflops": predicted / seconds / 1e9,
    }
    print(
        "{work:36} {parameters:14,} parameters {seconds:8.2f} s {seconds_per_layer:7.3f} s a layer "
        "{gflops:6.1f} GF/s peak {peak_mb:5.0f} MB".format(**row),
        flush=True,
    )
    return row


def grow_adapter(count: int, threads: int, repeats: int) -> measuring.Run:
    modules = dict(list(compress.modules_of(math.ceil(count / 7)).items())[:count])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = compress.write_adapter(folder / "adapter", modules, 16)
        runs = [
            measuring.fresh_to_folder(compress.LORANK, folder / "adapter", folder / "out", threads=threads)
            for _ in range(repeats)
        ]
    seconds = measuring.median(runs)
    row = {
        "work": f"compress {count} modules, r=16",
        "modules": count,
        "seconds": seconds,
        "milliseconds_per_module": 1e3 * seconds / count,
        "grown_mb": max(run["grown"] for run in runs) / 1e6,
        "adapter_mb": size / 1e6,
    }
    print(
        "{work:36} {seconds:8.3f} s {milliseconds_per_module:7.3f} ms a module, memory grows by "
        "{grown_mb:5.0f} MB for {adapter_mb:6.0f} MB".format(**row),
        flush=True,
    )
    return row


def main() -> None:
    options = measuring.parser(__doc__, repeats=3)
    options.add_argument("--most", type=float, default=2.1e9, help="parameters of the largest checkpoint")
    arguments = options.parse_args()
    threads, repeats = arguments.threads, arguments.repeats
    layers = [grow_model(shape, threads, repeats) for shape in LAYERS]
    fits = [s for s in SHAPES if sum(math.prod(m) for m in matrices(*s).values()) <= arguments.most]
    shapes = [grow_model(shape, threads, 1 if shape[0] > 1024 else repeats) for shape in fits]
    modules = [grow_adapter(count, threads, repeats) for count in MODULES]
    costs = [row["seconds_per_layer"] for row in layers]
    print(f"a layer of one shape: {min(costs):.3f} to {max(costs):.3f} s ({max(costs) / min(costs):.2f}x)")
    measuring.write(arguments.json, threads, [*layers, *shapes, *modules])


if __name__ == "__main__":
    main()
