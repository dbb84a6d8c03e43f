"""Decoding of GGUF blocks beside the package `gguf`: ``python -m benches.decode_gguf``.

One matrix is decoded to a NumPy array of float32 on one thread: the time includes the read of the file from
the page cache and the copy to the array. The matrix is small, so that the time is not that of new pages of
memory. The package dequantizes the same blocks in memory. The row `F32` reads a plain matrix, whose time is
that of the read and of the copy.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benches import measuring

WRITE = """
import gguf, numpy as np
def run(path, kind, rows, cols, threads):
    kind = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[kind]
    codes = np.random.default_rng(0).integers(0, 256, (int(rows), int(cols) // values * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(path, "llama")
    codes = codes.view(np.float32) if kind.name == "F32" else codes
    writer.add_tensor("blk.0.attn_v.weight", codes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
"""

DECODE = """
import time
from pathlib import Path
from lorank.sources import open_source
def run(path, threads):
    (matrix,) = open_source(Path(path)).matrices
    stored = matrix.load()
    size, seconds = 0, []
    for _ in range(2000):
        start = time.perf_counter()
        size = stored.to_array().nbytes
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "bytes": size}
"""

LIBRARY = """
import time, warnings
import gguf, numpy as np
def run(path, threads):
    warnings.simplefilter("ignore")
    (tensor,) = gguf.GGUFReader(path).tensors
    codes, seconds = np.array(tensor.data), []
    for _ in range(200):
        start = time.perf_counter()
        gguf.quants.dequantize(codes, tensor.tensor_type)
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds)}
"""

KINDS = ("F32", "Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ2_XXS", "IQ3_S", "MXFP4")


def main() -> None:
    options = measuring.parser(__doc__, repeats=3)
    options.add_argument("--rows", type=int, default=64)
    options.add_argument("--cols", type=int, default=1024)
    arguments = options.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for kind in KINDS:
            path = Path(root, f"{kind}.gguf")
            measuring.fresh(WRITE, path, kind, arguments.rows, arguments.cols, threads=1)
            pairs = [
                (measuring.fresh(DECODE, path, threads=1), measuring.fresh(LIBRARY, path, threads=1))
                for _ in range(arguments.repeats)
            ]
            mine, theirs = zip(*pairs, strict=True)
            rate = mine[0]["bytes"] / measuring.median(mine) / 1e9
            rows.append(
                measuring.compared(f"decode {kind}, {rate:.1f} GB/s", "gguf", mine, theirs, rate=rate)
            )
            measuring.show(rows[-1])
    measuring.write(arguments.json, 1, rows)


if __name__ == "__main__":
    main()
