"""All eigenvalues of one matrix, exact, fast and sampled, against torch: ``python -m benches.spectra``.

The matrices are Gaussian, float32, in memory. The peer of "exact" is `torch.linalg.eigvalsh` of the Gram
matrix in float64. The peer of "fast" is `torch.linalg.svdvals` in float32. Contenders take turns. Every run
has a new process, which first computes a small matrix without measuring.
"""

from __future__ import annotations

from benches import measuring

MATRIX = """
import numpy as np
def matrix(shape):
    out, fan_in = map(int, shape.split("x"))
    return np.random.default_rng(0).standard_normal((out, fan_in), dtype=np.float32)
def timed(work, small):
    work(small)
    import time
    start = time.perf_counter()
    work(None)
    return {"seconds": time.perf_counter() - start}
"""

LORANK = (
    MATRIX
    + """
import lorank
def run(shape, accuracy, threads):
    w, small = matrix(shape), matrix("600x600")
    def work(m):
        m = w if m is None else m
        if accuracy == "sampled":
            return lorank.analyze({"w": m}, accuracy=accuracy, threads=threads, progress=False)
        return lorank.spectrum(m, accuracy=accuracy, threads=threads)
    return timed(work, small)
"""
)

GRAM = (
    MATRIX
    + """
import torch
def run(shape, threads):
    torch.set_num_threads(threads)
    w, small = torch.from_numpy(matrix(shape)), torch.from_numpy(matrix("600x600"))
    def work(m):
        d = (w if m is None else m).double()
        return torch.linalg.eigvalsh(d.T @ d if d.shape[0] >= d.shape[1] else d @ d.T)
    return timed(work, small)
"""
)

SVDVALS = (
    MATRIX
    + """
import torch
def run(shape, threads):
    torch.set_num_threads(threads)
    w, small = torch.from_numpy(matrix(shape)), torch.from_numpy(matrix("600x600"))
    return timed(lambda m: torch.linalg.svdvals(w if m is None else m), small)
"""
)

PEERS = {
    "exact": ("torch Gram float64 + eigvalsh", GRAM),
    "fast": ("torch svdvals float32", SVDVALS),
}


def main() -> None:
    options = measuring.parser(__doc__, repeats=3)
    options.add_argument("--shapes", default="1024x1024,2048x2048,4096x4096,11008x4096")
    options.add_argument(
        "--sampled", default="8192x8192", help="shape of the sampled matrix; empty to skip it"
    )
    arguments = options.parse_args()
    threads, rows = arguments.threads, []
    for shape in arguments.shapes.split(","):
        runs: dict[str, list[measuring.Run]] = {name: [] for name in (*PEERS, *(f"torch {n}" for n in PEERS))}
        for _ in range(arguments.repeats):
            for accuracy, (_, code) in PEERS.items():
                runs[accuracy].append(measuring.fresh(LORANK, shape, accuracy, threads=threads))
                runs[f"torch {accuracy}"].append(measuring.fresh(code, shape, threads=threads))
        for accuracy, (peer, _) in PEERS.items():
            work = f"spectrum {shape}, {accuracy}"
            rows.append(measuring.compared(work, peer, runs[accuracy], runs[f"torch {accuracy}"]))
            measuring.show(rows[-1])
    if arguments.sampled:
        pairs = [
            [
                measuring.fresh(LORANK, arguments.sampled, accuracy, threads=threads)
                for accuracy in ("sampled", "exact")
            ]
            for _ in range(min(arguments.repeats, 2))
        ]
        mine, theirs = zip(*pairs, strict=True)
        rows.append(
            measuring.compared(f"spectrum {arguments.sampled}, sampled", "lorank exact", mine, theirs)
        )
        measuring.show(rows[-1])
    measuring.write(arguments.json, threads, rows)


if __name__ == "__main__":
    main()
