"""Ranks from samples against the best rank on fresh samples: ``python -m benches.task_spectra``.

The tasks are the ten synthetic ones of "Why Does LoRA Work? The Spectral Theory of Low-Rank Adaptation"
(tables 3.2 to 3.4), with the numbers of the paper, and six tasks whose spectra have plateaus or change
their rate of decay. The best rank is that of the paper: the smallest with 95 % of the full rank's R^2 on
fresh samples.

For the task 'small' the fit alone gives a median K* of 9. K* never exceeds the number of values above the
noise threshold, which is 8, so the result is 8.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lorank.task_spectra import task_spectrum

Array = npt.NDArray[np.float64]

D_IN, D_OUT, FRESH = 64, 32, 4000
ESTIMATORS = ("plain", "prediction", "piecewise", "predicted")


@dataclass(frozen=True)
class Task:
    """A spectrum, its sampling, and the results of the paper: estimated rho, K*, r_opt, R^2."""

    name: str
    values: Array
    samples: int = 500
    noise: float = 0.1
    paper: tuple[float, int, int, float] | None = None


def geometric(rho: float) -> Array:
    return rho ** -np.arange(float(D_OUT))


def pieces(*parts: tuple[int, float, float]) -> Array:
    """Return pieces of ``count`` values that decay from ``top`` at the rate ``rho``, then zeros."""
    runs = [top * rho ** -np.arange(float(count)) for count, top, rho in parts]
    values = np.concatenate([*runs, np.zeros(D_OUT)])
    return values[:D_OUT]


PAPER_TASKS = (
    Task("weak", geometric(1.2), paper=(1.19, 12, 12, 0.87)),
    Task("moderate", geometric(1.5), paper=(1.46, 6, 4, 0.72)),
    Task("strong", geometric(2.0), paper=(1.87, 3, 3, 0.67)),
    Task("very strong", geometric(3.0), paper=(2.96, 2, 2, 0.64)),
    Task("domain", geometric(5.0), paper=(5.01, 2, 1, 0.44)),
    Task("narrow", geometric(10.0), paper=(8.84, 1, 1, 0.50)),
    Task("small", geometric(2.0), samples=100, paper=(1.21, 3, 1, 0.38)),
    Task("large", geometric(2.0), samples=2000, paper=(1.93, 3, 3, 0.64)),
    Task("noisy", geometric(2.0), noise=0.5, paper=(1.88, 1, 1, 0.09)),
    Task("clean", geometric(2.0), noise=0.01, paper=(1.97, 7, 4, 0.97)),
)
OTHER_TASKS = (
    Task("plateau", pieces((6, 1.0, 1.0), (26, 0.5, 2.0))),
    Task("two plateaus", pieces((6, 3.0, 1.0), (8, 0.25, 1.0))),
    Task("far plateaus", pieces((4, 20.0, 1.0), (10, 0.25, 1.0))),
    Task("slow, fast", pieces((9, 1.0, 1.05), (23, 0.3, 3.0))),
    Task("fast, slow", pieces((3, 3.0, 3.0), (29, 0.3, 1.05))),
    Task("slow, step, slow", pieces((3, 10.0, 1.2), (12, 0.5, 1.1))),
)


@dataclass
class Row:
    """Measurements of a task, an entry per seed."""

    task: Task
    ranks: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in ESTIMATORS})
    r_opt: list[int] = field(default_factory=list)
    rho: list[float] = field(default_factory=list)
    r2: list[float] = field(default_factory=list)
    above: list[int] = field(default_factory=list)
    above_edge: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def median(self, name: str) -> float:
        """Return the median rank of an estimator."""
        return float(np.median(self.ranks[name]))

    def error(self, name: str) -> float:
        """Return the mean distance to the best rank."""
        return float(np.mean(np.abs(np.subtract(self.ranks[name], self.r_opt))))

    def count_error(self, name: str) -> float:
        """Return the mean distance to the number of true values above the noise."""
        truth = self.above_edge if name == "prediction" else self.above
        return float(np.mean(np.abs(np.subtract(self.ranks[name], truth))))

    def match(self, name: str) -> bool:
        """Return True if the medians satisfy the rule of the paper."""
        return abs(self.median(name) - float(np.median(self.r_opt))) <= 2

    def content(self) -> dict[str, object]:
        """Return the row for JSON, without NaN."""
        rho = [None if np.isnan(value) else value for value in self.rho]
        content = asdict(self) | {"task": self.task.name, "paper": self.task.paper, "rho": rho}
        return content | {"error": {name: self.error(name) for name in ESTIMATORS}}


def samples(task: Task, seed: int) -> tuple[Array, Array, Array, Array]:
    """Return inputs and targets for the estimate, and fresh ones."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((D_IN, D_IN)))[0][:, :D_OUT]
    right = np.linalg.qr(rng.standard_normal((D_OUT, D_OUT)))[0]
    W = left * task.values @ right.T
    drawn: list[Array] = []
    for count in (task.samples, FRESH):
        X = rng.standard_normal((count, D_IN))
        drawn += [X, X @ W + task.noise * rng.standard_normal((count, D_OUT))]
    return drawn[0], drawn[1], drawn[2], drawn[3]


def fresh_r2(X: Array, Y: Array, fresh_X: Array, fresh_Y: Array) -> Array:
    """Return R^2 on fresh samples, averaged over outputs, of least squares truncated to ranks 1, 2, ..."""
    left, values, right = np.linalg.svd(np.linalg.lstsq(X, Y, rcond=None)[0], full_matrices=False)
    spread = np.sum(np.square(fresh_Y - fresh_Y.mean(axis=0)), axis=0)
    curve = []
    for rank in range(1, len(values) + 1):
        fitted = fresh_X @ (left[:, :rank] * values[:rank]) @ right[:rank]
        curve.append(1 - np.mean(np.sum(np.square(fresh_Y - fitted), axis=0) / spread))
    return np.array(curve)


def measure(task: Task, seeds: int) -> Row:
    row = Row(task)
    # The tasks of the paper have C = 1; the others use the leading value.
    leading = 1.0 if task.paper else None
    for seed in range(seeds):
        drawn = samples(task, seed)
        start = time.perf_counter()
        found = task_spectrum(*drawn[:2], leading=leading)
        row.seconds.append(time.perf_counter() - start)
        exact = task_spectrum(*drawn[:2], space="prediction")
        curve = fresh_r2(*drawn)
        # Every rank is better than a full rank without R^2: argmax then finds the first.
        row.r_opt.append(1 + int(np.argmax(curve >= 0.95 * curve[-1])))
        row.rho.append(found.rho)
        row.r2.append(float(curve[found.k_star - 1]))
        row.above.append(int(np.sum(task.values > found.tau)))
        row.above_edge.append(int(np.sum(task.values * task.samples**0.5 > exact.tau)))
        row.ranks["plain"].append(found.k_star)
        row.ranks["prediction"].append(exact.k_star)
        row.ranks["piecewise"].append(found.piecewise.k_star)
        row.ranks["predicted"].append(found.predicted_rank)
    return row


def cells(values: Iterable[float], form: str) -> str:
    return " ".join(format(value, form) for value in values)


def print_paper_tasks(rows: list[Row]) -> None:
    print("Medians; in brackets the paper's. Ranks and mean |rank - r_opt| of: " + ", ".join(ESTIMATORS))
    print("task                 K*           rho         r_opt     R2 at K*         ranks           errors")
    for row in rows:
        assert row.task.paper is not None
        rho, k_star, r_opt, r2 = row.task.paper
        print(
            f"{row.task.name:<15} {row.median('plain'):4g} ({k_star:2})"
            f"  {np.nanmedian(row.rho) if not np.isnan(row.rho).all() else np.nan:5.2f} ({rho:5.2f})"
            f"  {np.median(row.r_opt):4g} ({r_opt:2})  {np.median(row.r2):5.2f} ({r2:.2f})"
            f"   {cells(map(row.median, ESTIMATORS), '4g')}   {cells(map(row.error, ESTIMATORS), '5.2f')}"
        )
    print_totals(rows)


def print_other_tasks(rows: list[Row]) -> None:
    print(
        "\nPlateaus and piecewise decay. 'above': true values above the noise threshold (prediction: its own)"
    )
    print("task              r_opt above         ranks          |rank - r_opt|            |rank - above|")
    for row in rows:
        print(
            f"{row.task.name:<17} {np.median(row.r_opt):5g} {np.median(row.above):5g}"
            f"   {cells(map(row.median, ESTIMATORS), '4g')}   {cells(map(row.error, ESTIMATORS), '5.2f')}"
            f"   {cells(map(row.count_error, ESTIMATORS), '5.2f')}"
        )
    print_totals(rows)


def print_totals(rows: list[Row]) -> None:
    for name in ESTIMATORS:
        error = statistics.mean(row.error(name) for row in rows)
        count_error = statistics.mean(row.count_error(name) for row in rows)
        matches = sum(row.match(name) for row in rows)
        print(
            f"{name:>12}: mean |rank - r_opt| {error:.2f}, {matches} of {len(rows)} rows within 2;"
            f" mean |rank - above| {count_error:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="file for all measurements as JSON")
    arguments = parser.parse_args()
    paper = [measure(task, arguments.seeds) for task in PAPER_TASKS]
    print(f"{arguments.seeds} seeds, {D_IN} inputs, {D_OUT} outputs, {FRESH} fresh samples")
    print_paper_tasks(paper)
    print("the paper's own table: mean |K* - r_opt| 0.8, 9 of 10 rows")
    others = [measure(task, arguments.seeds) for task in OTHER_TASKS]
    print_other_tasks(others)
    slowest = max(statistics.median(row.seconds) for row in [*paper, *others])
    print(f"\nslowest task: {slowest * 1e3:.0f} ms, predicted curve included")
    if arguments.json:
        rows = {"paper_tasks": paper, "other_tasks": others}
        content = {key: [row.content() for row in part] for key, part in rows.items()}
        arguments.json.write_text(json.dumps({"seeds": arguments.seeds, **content}, indent=2) + "\n")


if __name__ == "__main__":
    main()
