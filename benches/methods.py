"""All methods at one budget on one task: ``python -m benches.methods``.

MiniLM learns to classify film reviews as fresh or rotten (all linear layers adapted, the head trained,
too). The budget of every method is the cost of uniform ranks of `--avg-rank`. The order of the data, the
head and the initial adapters depend on the seed. Runs that `--json` already contains are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

import lorank
from lorank.training import DynamicRanks
from tests.support import reviews

BOUNDS = {"r_min": 2, "r_max": 32}
# The empirical schedule multiplies r_base by 1.2 in middle blocks, which must not exceed r_max.
EMPIRICAL_BASE = 26
LORA_ALPHA = 16
LEARNING_RATE = 2e-3


def from_weights(method: str, **options: Any) -> Callable[..., lorank.RankAllocation]:
    """Return a function that allocates ranks from weights."""
    return lambda model, _data, budget: lorank.allocate(
        model, method, budget=budget, progress=False, **BOUNDS, **options
    )


def from_gradients(model: Any, data: list[Any], budget: int) -> lorank.RankAllocation:
    """Return static GARD ranks from 16 batches of the training data."""
    report = lorank.profile_gradients(model, data[:16], progress=False)
    return lorank.allocate(report, "gard", budget=budget, **BOUNDS)


def from_tasks(model: Any, data: list[Any], budget: int) -> lorank.RankAllocation:
    """Return K* of every module from 16 batches of the training data."""
    report = lorank.profile_tasks(model, data[:16], progress=False)
    return lorank.allocate(report, "task", budget=budget, **BOUNDS)


METHODS: dict[str, Callable[..., lorank.RankAllocation]] = {
    "uniform": from_weights("uniform"),
    "linear-decay": from_weights("linear-decay"),
    "attention-heavy": from_weights("attention-heavy"),
    "empirical": from_weights("empirical", r_base=EMPIRICAL_BASE),
    "htsr": from_weights("htsr"),
    "task (K*)": from_tasks,
    "gard static": from_gradients,
    "gard dynamic": from_weights("uniform"),
}


def run(method: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the results of one training run."""
    model = reviews.base_model()
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.classifier.weight, std=0.02)
    data = reviews.batches(0, arguments.reviews)
    held_out = reviews.batches(4000, arguments.held_out)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    data = [data[i] for i in order]
    uniform = lorank.allocate(model, "uniform", avg_rank=arguments.avg_rank, progress=False, **BOUNDS)

    start = time.perf_counter()
    allocation = METHODS[method](model, data, uniform.num_parameters)
    config = allocation.to_lora_config(model, lora_alpha=LORA_ALPHA, task_type="SEQ_CLS")
    chosen = time.perf_counter() - start
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, config).train()
    losses, peak = train(peft_model, data, arguments, uniform.num_parameters if "dynamic" in method else None)
    adapter = lorank.LoraAdapter.from_model(peft_model)
    ranks = [module.rank for module in adapter.modules.values()]
    return {
        "method": method,
        "seed": seed,
        **evaluation(peft_model.eval(), held_out),
        "train_loss": statistics.mean(losses[-len(data) :]),
        "parameters": peak,
        "ranks": [min(ranks), max(ranks)],
        "flags": dict(allocation.flags),
        "choosing": chosen,
        "seconds": time.perf_counter() - start,
    }


def train(
    model: Any, data: list[Any], arguments: argparse.Namespace, budget: int | None
) -> tuple[list[float], int]:
    """Return the loss of every step and the largest number of adapter parameters."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    steps = arguments.epochs * len(data)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    # With a budget, ranks change four times in the first half of the run.
    interval = max(steps // 8, 1)
    options = {"interval": interval, "window": min(16, interval), "freeze_after": steps // 2, **BOUNDS}
    dynamic = None if budget is None else DynamicRanks(model, optimizer, budget=budget, **options)
    losses = []
    counted = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    if dynamic is not None:
        dynamic.__enter__()
    for step in range(steps):
        loss = model(**data[step % len(data)]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if dynamic is not None:
            dynamic.step()
            counted = max(counted, dynamic.num_parameters)
    if dynamic is not None:
        dynamic.close()
    return losses, counted


@torch.no_grad()
def evaluation(model: Any, data: list[Any]) -> dict[str, float]:
    """Return accuracy and mean loss on held-out reviews."""
    right, losses = 0, []
    for batch in data:
        found = model(**batch)
        right += int((found.logits.argmax(-1) == batch["labels"]).sum())
        losses.append(found.loss.item())
    return {"accuracy": right / sum(len(batch["labels"]) for batch in data), "loss": statistics.mean(losses)}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "method             accuracy           held-out loss      parameters   ranks    choosing  whole run"
    ]
    for method in METHODS:
        runs = [row for row in rows if row["method"] == method]
        if not runs:
            continue

        def spread(key: str, scale: float = 1.0, runs: list[dict[str, Any]] = runs) -> tuple[float, float]:
            values = [row[key] * scale for row in runs]
            return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0

        low, high = min(row["ranks"][0] for row in runs), max(row["ranks"][1] for row in runs)
        (accuracy, accuracy_sd), (loss, loss_sd) = spread("accuracy", 100), spread("loss")
        lines.append(
            f"{method:18} {accuracy:5.1f} % +- {accuracy_sd:4.1f}    {loss:6.4f} +- {loss_sd:6.4f}   "
            f"{max(row['parameters'] for row in runs):>10,}   {low:>2}-{high:<2}   "
            f"{spread('choosing')[0]:6.1f} s  {spread('seconds')[0]:7.1f} s"
        )
        flags = "; ".join(flag for row in runs for flag in row["flags"].values()).split("; ")
        flagged = sorted(Counter(filter(None, flags)).items())
        lines += [f"    on {count / len(runs):.3g} modules: {flag}" for flag, count in flagged]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--reviews", type=int, default=768)
    parser.add_argument("--held-out", type=int, default=768)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--avg-rank", type=float, default=8)
    parser.add_argument("--json", type=Path, help="file of finished runs, which are read first and extended")
    arguments = parser.parse_args()
    setting = {key: getattr(arguments, key) for key in ("reviews", "held_out", "epochs", "avg_rank")}
    setting["empirical_base"] = EMPIRICAL_BASE
    rows: list[dict[str, Any]] = []
    if arguments.json and arguments.json.exists():
        saved = json.loads(arguments.json.read_text())
        if saved["setting"] != setting:
            raise SystemExit(f"{arguments.json} holds runs of another setting: {saved['setting']}")
        rows = saved["rows"]
    for seed in range(arguments.seeds):
        for method in METHODS:
            if any(row["method"] == method and row["seed"] == seed for row in rows):
                continue
            rows.append(run(method, seed, arguments))
            print("{method}, seed {seed}: {accuracy:.1%} in {seconds:.0f} s".format(**rows[-1]), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1))
    print(
        f"\n{arguments.reviews} reviews, {arguments.epochs} epochs, {arguments.held_out} held out, average "
        f"rank {arguments.avg_rank:g}; mean and standard deviation of {arguments.seeds} seeds"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
