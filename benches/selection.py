"""Selection among ten million values against NumPy: ``python -m benches.selection``.

The selection by energy (the fewest values that hold a share of the sum of squares) is compared with sort
and cumulative sum, the selection by count with `numpy.partition`. Runs alternate in one process; both are
serial.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from benches import measuring
from lorank import _core


def by_sort(values: np.ndarray, share: float) -> int:
    ordered = np.sort(values)[::-1]
    sums = np.cumsum(ordered**2)
    return int(np.searchsorted(sums, share * sums[-1])) + 1


def by_partition(values: np.ndarray, count: int) -> int:
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    return int(np.count_nonzero(values >= threshold))


def timed(work: Callable[[], int]) -> tuple[measuring.Run, int]:
    start = time.perf_counter()
    found = work()
    return {"seconds": time.perf_counter() - start}, found


def main() -> None:
    options = measuring.parser(__doc__, repeats=5)
    options.add_argument("--values", type=int, default=10_000_000)
    arguments = options.parse_args()
    values = np.abs(np.random.default_rng(0).standard_normal(arguments.values)) ** 3
    quarter = arguments.values // 4
    contenders = {
        "energy 0.9": (
            "NumPy sort + cumsum",
            lambda: int(np.count_nonzero(_core.select_energy(values, 0.9))),
            lambda: by_sort(values, 0.9),
        ),
        "the largest quarter": (
            "NumPy partition",
            lambda: int(np.count_nonzero(_core.select_largest(values, quarter))),
            lambda: by_partition(values, quarter),
        ),
    }
    rows = []
    for name, (peer, mine, theirs) in contenders.items():
        pairs = []
        for _ in range(arguments.repeats + 1):
            (own, count), (other, expected) = timed(mine), timed(theirs)
            assert count == expected, f"{name}: {count} kept, and {expected} by {peer}"
            pairs.append((own, other))
        rows.append(
            measuring.compared(f"select {name} of {len(values):,}", peer, *zip(*pairs[1:], strict=True))
        )
        measuring.show(rows[-1])
    measuring.write(arguments.json, 1, rows)


if __name__ == "__main__":
    main()
