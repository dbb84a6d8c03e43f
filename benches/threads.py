"""Speed of two threads against one, beside the ratio of a product: ``python -m benches.threads``.

The works are all eigenvalues of a large matrix, the spectra of a model, and the compression of an adapter,
each in turns with one thread and with several. The product is one of square float64 matrices in torch.
Every run is a new process.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benches import compress, measuring, spectra

PRODUCT = """
import time, torch
def run(order, threads):
    torch.set_num_threads(threads)
    a = torch.randn(int(order), int(order), dtype=torch.float64)
    a @ a
    start = time.perf_counter()
    for _ in range(3):
        a @ a
    return {"seconds": time.perf_counter() - start}
"""

MODEL = """
import lorank
def run(path, threads):
    lorank.analyze(path, threads=threads, progress=False)
"""


def main() -> None:
    options = measuring.parser(__doc__, repeats=7)
    options.add_argument("--layers", type=int, default=32, help="number of layers of the adapter")
    arguments = options.parse_args()
    from tests.support.material import smollm2

    threads, rows = arguments.threads, []
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        compress.write_adapter(adapter, compress.modules_of(arguments.layers), 64)
        works = {
            "product of 3000x3000": (measuring.fresh, PRODUCT, [3000]),
            "spectrum 4096x4096, exact": (measuring.fresh, spectra.LORANK, ["4096x4096", "exact"]),
            "spectrum 4096x4096, fast": (measuring.fresh, spectra.LORANK, ["4096x4096", "fast"]),
            "SmolLM2, exact": (measuring.fresh, MODEL, [measuring.weights_alone(smollm2(), Path(folder))]),
            "compress r=64, folder to folder": (
                measuring.fresh_to_folder,
                compress.LORANK,
                [adapter, Path(folder) / "out"],
            ),
        }
        for work, (measured, code, given) in works.items():
            runs: list[list[measuring.Run]] = [[], []]
            for _ in range(arguments.repeats):
                for found, count in zip(runs, (threads, 1), strict=True):
                    found.append(measured(code, *given, threads=count))
            rows.append(measuring.compared(work, "one thread", *runs))
            measuring.show(rows[-1])
    own = rows[0]["ratio"]
    for row in rows[1:]:
        row["share_of_product"] = row["ratio"] / own
        print(f"{row['work']}: {row['share_of_product']:.2f} of the product's ratio")
    measuring.write(arguments.json, threads, rows)


if __name__ == "__main__":
    main()
