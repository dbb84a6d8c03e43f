"""Time of `fit_ranks` against the number of modules: ``python -m benches.fit_ranks``."""

from __future__ import annotations

import statistics
import time

import numpy as np

import lorank


def main() -> None:
    rng = np.random.default_rng(0)
    print("modules   ranks 1..256, random scores and costs, half the budget; median of 5")
    for count in (100, 1_000, 10_000, 100_000):
        scores, costs = rng.random(count), rng.integers(1_000, 30_000, count)
        budget = int(128 * costs.sum())
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            ranks = lorank.fit_ranks(scores, costs, 1, 256, budget)
            seconds.append(time.perf_counter() - start)
        left = budget - int(ranks @ costs)
        print(f"{count:7,}   {statistics.median(seconds) * 1e3:8.1f} ms   {left:,} of {budget:,} left")


if __name__ == "__main__":
    main()
