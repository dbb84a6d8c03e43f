"""Decoding of quantized weights beside the libraries that define their schemes: ``python -m benches.decode``.

1. Analysis of matrices of 8 rows on one thread, which is little more than reading and decoding: the rate is a
   lower bound of decoded float32 per second. The peer dequantizes the same tensors in memory.
2. `lorank.analyze` of checkpoints in fp8 blocks and in packed integers of 4 bits, against bfloat16.
3. Peak memory of `lorank.analyze` for 5 and for 20 layers in fp8 blocks.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from benches import measuring

MAKE = """
import json, sys
from pathlib import Path
import numpy as np, torch
from safetensors.torch import save_file
def packed(kind, rows, cols, seed=0):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=g)
    if kind == "bf16":
        return {"weight": w.bfloat16()}
    if kind == "fp8":
        return {"weight": (w * 100).to(torch.float8_e4m3fn),
                "weight_scale_inv": torch.rand(max(rows // 128, 1), cols // 128, generator=g) / 100}
    codes = torch.randint(0, 256, (rows, cols // 2), generator=g, dtype=torch.uint8)
    if kind == "int4":
        return {"weight_packed": codes.view(torch.int32), "weight_shape": torch.tensor([rows, cols]),
                "weight_scale": torch.rand(rows, cols // 128, generator=g)}
    exponents = torch.randint(118, 124, (rows, cols // 32), generator=g, dtype=torch.uint8)
    return {"weight_packed": codes, "weight_scale": exponents}
"""

WRITE = (
    MAKE
    + """
def run(folder, kind, layers, rows, cols, threads):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for layer in range(int(layers)):
        state = packed(kind, int(rows), int(cols), layer)
        tensors = {f"layers.{layer}.proj.{name}": x for name, x in state.items()}
        save_file(tensors, folder / f"model-{layer}.safetensors")
"""
)

DECODE = """
import time
from pathlib import Path
import lorank
from lorank.sources import open_source
def run(folder, threads):
    source, seconds = open_source(Path(folder)), []
    for _ in range(3):
        start = time.perf_counter()
        lorank.analyze(source, threads=threads, progress=False)
        seconds.append(time.perf_counter() - start)
    size = sum(4 * m.info.shape[0] * m.info.shape[1] for m in source.matrices)
    return {"seconds": min(seconds), "bytes": size}
"""

LIBRARY = (
    MAKE
    + """
import time
def run(folder, kind, threads):
    from safetensors.torch import load_file
    states = [load_file(path) for path in sorted(Path(folder).glob("*.safetensors"))]
    states = [{name.rpartition(".")[2]: x for name, x in state.items()} for state in states]
    if kind == "fp8":
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize
        one = Fp8Dequantize(None)._dequantize_one
        work = lambda state: one(state["weight"], state["weight_scale_inv"], torch.float32)
    else:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        args = ({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128} if kind == "int4" else
                {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32,
                 "scale_dtype": torch.uint8})
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
        form = "pack-quantized" if kind == "int4" else "mxfp4-pack-quantized"
        compressor = BaseCompressor.get_value_from_registry(form)
        work = lambda state: compressor.decompress(dict(state), scheme)["weight"]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for state in states:
            work(state)
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds)}
"""
)

ANALYZE = """
import lorank
from pathlib import Path
def run(folder, threads):
    lorank.analyze(Path(folder), threads=threads, progress=False)
"""

KINDS = {"fp8": "transformers", "int4": "compressed-tensors", "mxfp4": "compressed-tensors"}


def main() -> None:
    options = measuring.parser(__doc__, repeats=3)
    options.add_argument("--rows", type=int, default=8)
    options.add_argument("--cols", type=int, default=1 << 19)
    options.add_argument("--matrices", type=int, default=16)
    options.add_argument("--width", type=int, default=1024, help="side of the matrices that are analysed")
    options.add_argument("--layers", type=int, default=8)
    arguments = options.parse_args()
    threads, rows = arguments.threads, []
    with tempfile.TemporaryDirectory() as root:
        for kind, library in KINDS.items():
            folder = Path(root, f"one-{kind}")
            measuring.fresh(
                WRITE, folder, kind, arguments.matrices, arguments.rows, arguments.cols, threads=1
            )
            pairs = [
                (
                    measuring.fresh(DECODE, folder, threads=1),
                    measuring.fresh(LIBRARY, folder, kind, threads=1),
                )
                for _ in range(arguments.repeats)
            ]
            mine, theirs = zip(*pairs, strict=True)
            rate = mine[0]["bytes"] / measuring.median(mine) / 1e9
            rows.append(
                measuring.compared(f"decode {kind}, {rate:.1f} GB/s", library, mine, theirs, rate=rate)
            )
            measuring.show(rows[-1])
        folders = {kind: Path(root, f"all-{kind}") for kind in ("bf16", "fp8", "int4")}
        for kind, folder in folders.items():
            side = arguments.width
            measuring.fresh(WRITE, folder, kind, arguments.layers, side, side, threads=1)
        for kind in ("fp8", "int4"):
            pairs = [
                (
                    measuring.fresh(ANALYZE, folders[kind], threads=threads),
                    measuring.fresh(ANALYZE, folders["bf16"], threads=threads),
                )
                for _ in range(arguments.repeats)
            ]
            mine, theirs = zip(*pairs, strict=True)
            rows.append(measuring.compared(f"analyze {kind}", "analyze bf16", mine, theirs))
            measuring.show(rows[-1])
        peaks = {}
        for layers in (5, 20):
            folder = Path(root, f"layers-{layers}")
            measuring.fresh(WRITE, folder, "fp8", layers, arguments.width, 2 * arguments.width, threads=1)
            peaks[layers] = measuring.fresh(ANALYZE, folder, threads=threads)["peak"]
        print(json.dumps({"peak memory by layers": peaks, "ratio": peaks[20] / peaks[5]}), flush=True)
        rows.append({"work": "peak memory of 20 layers / 5 layers", "ratio": peaks[20] / peaks[5]})
    measuring.write(arguments.json, threads, rows)


if __name__ == "__main__":
    main()
