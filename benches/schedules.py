"""Training with different ranks by layer: ``python -m benches.schedules``.

The setting is one for which NaN was reported: 200 film reviews, MiniLM, learning rate 3e-4 and `lora_alpha`
32. Every schedule is trained with the alphas of the allocation (one scale for all modules) and with one
`lora_alpha` for all ranks, as from a `rank_pattern` alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer

import lorank
from tests.support import reviews

SCHEDULES = ("uniform", "linear-decay", "attention-heavy", "empirical")
SETTINGS = {"lora_alpha": 32, "lr": 3e-4, "examples": 200, "r_base": 16, "r_min": 4, "r_max": 32}


def run(method: str, rule: str, epochs: int, seed: int) -> dict[str, Any]:
    """Return losses and gradient norms of one run without clipping."""
    model = reviews.base_model()
    allocation = lorank.allocate(
        model,
        method,
        r_min=SETTINGS["r_min"],
        r_max=SETTINGS["r_max"],
        r_base=SETTINGS["r_base"],
        progress=False,
    )
    config = allocation.to_lora_config(model, lora_alpha=SETTINGS["lora_alpha"], task_type="SEQ_CLS")
    if rule == "one alpha":
        config.alpha_pattern = {}
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, config).train()
    layers = [module for module in peft_model.modules() if isinstance(module, LoraLayer)]
    scales = [scale for layer in layers for scale in layer.scaling.values()]
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=SETTINGS["lr"])
    data = reviews.batches(0, SETTINGS["examples"])
    losses, norms = [], []
    for _ in range(epochs):
        for batch in data:
            loss = peft_model(**batch).loss
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(peft_model.parameters(), math.inf)))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return {
        "method": method,
        "rule": rule,
        "parameters": allocation.num_parameters,
        "scales": [min(scales), max(scales)],
        "finite": all(map(math.isfinite, (*losses, *norms))),
        "first": statistics.mean(losses[: len(data)]),
        "last": statistics.mean(losses[-len(data) :]),
        "worst_norm": max(norms),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--json", type=Path, help="file for the numbers as JSON")
    arguments = parser.parse_args()
    rows = [
        run(method, rule, arguments.epochs, seed=0)
        for method in SCHEDULES
        for rule in ("constant", "one alpha")
    ]
    print(f"{SETTINGS['examples']} reviews, {arguments.epochs} epochs, lr {SETTINGS['lr']:g}, no clipping")
    print(
        "schedule          scale rule   parameters   scales        loss: first, last epoch   largest gradient"
    )
    for row in rows:
        low, high = row["scales"]
        print(
            f"{row['method']:17} {row['rule']:10}   {row['parameters']:>10,}   {low:5.2f}-{high:<5.2f}   "
            f"{row['first']:8.4f}, {row['last']:7.4f}        {row['worst_norm']:8.2f}"
            + ("" if row["finite"] else "   NOT FINITE")
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    # Failures were reported for one alpha for all ranks; the default rule must not fail.
    if failed := [row["method"] for row in rows if row["rule"] == "constant" and not row["finite"]]:
        raise SystemExit(f"not finite under the default scale rule: {', '.join(failed)}")


if __name__ == "__main__":
    main()
