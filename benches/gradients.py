"""Cost of gradient spectra and accuracy of sketches: ``python -m benches.gradients``.

MiniLM reads film reviews, 32 reviews of 48 tokens a batch. A plain training step of its LoRA adapter
alternates with a step under `DynamicRanks`. Effective ranks of 16 batches from sketches of several sizes
are compared with exact ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import lorank
from lorank.training import DynamicRanks
from tests.support import reviews


class Training:
    """A LoRA adapter trained on one repeated batch."""

    def __init__(self) -> None:
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS")
        self.model = get_peft_model(reviews.base_model(), config).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.batch = reviews.batches(0, 32)[0]

    def step(self, dynamic: DynamicRanks | None = None) -> float:
        """Return the seconds of a step, with DynamicRanks if given."""
        start = time.perf_counter()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if dynamic is not None:
            dynamic.step()
        return time.perf_counter() - start


def overhead(size: int, pairs: int, threads: int) -> dict[str, Any]:
    """Return median seconds of a plain step and of one with DynamicRanks, and the median ratio of pairs."""
    torch.set_num_threads(threads)
    plain, watched = Training(), Training()
    # One window stays open: ranks would change only after the last step.
    steps = {"interval": pairs + 2, "window": pairs + 2}
    with DynamicRanks(watched.model, watched.optimizer, sketch=size, **steps) as dynamic:
        plain.step(), watched.step(dynamic)
        runs = [(plain.step(), watched.step(dynamic)) for _ in range(pairs)]
    seconds = [statistics.median(column) for column in zip(*runs, strict=True)]
    ratio = statistics.median(b / a for a, b in runs)
    return {"sketch": size, "plain": seconds[0], "watched": seconds[1], "ratio": ratio}


def agreement(sizes: list[int], count: int) -> list[dict[str, Any]]:
    """Return the share of modules whose effective rank differs from the exact one by at most one."""
    model = reviews.base_model()
    batches = reviews.batches(0, 32 * count)
    found = lorank.profile_gradients(model, batches, sketch=None, progress=False)
    exact = {row.name: row.effective_rank for row in found}
    rows = []
    for size in sizes:
        start = time.perf_counter()
        report = lorank.profile_gradients(model, batches, sketch=size, progress=False)
        seconds = time.perf_counter() - start
        away = [abs(row.effective_rank - exact[row.name]) for row in report]
        within = sum(distance <= 1 for distance in away) / len(away)
        rows.append({"sketch": size, "within_one": within, "worst": max(away), "seconds": seconds})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--json", type=Path, help="file for the numbers as JSON")
    arguments = parser.parse_args()
    steps = [overhead(size, arguments.pairs, arguments.threads) for size in (64, 128)]
    print(f"a training step, {arguments.threads} threads, medians of {arguments.pairs} pairs")
    for row in steps:
        print(
            "sketch {sketch:4}   plain {plain:.3f} s   watched {watched:.3f} s   {ratio:.2f}x".format(**row)
        )
    ranks = agreement([32, 64, 96, 128], arguments.batches)
    print(f"\neffective ranks of {arguments.batches} batches against exact ones")
    for row in ranks:
        print(
            "sketch {sketch:4}   within one {within_one:6.1%}   worst {worst:.0f}   {seconds:.1f} s".format(
                **row
            )
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"steps": steps, "ranks": ranks}, indent=1))


if __name__ == "__main__":
    main()
