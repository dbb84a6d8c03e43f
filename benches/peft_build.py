"""Time to build a PEFT model of a thousand adapted modules: ``python -m benches.peft_build``.

PEFT finds the rank of every module by regular expressions. The same model is adapted with one rank for all
modules, with the configuration of an allocation (one key per rank), and with one key per module.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

import lorank

BLOCKS, WIDTH = 143, 16


class Block(torch.nn.Module):
    """Seven linear layers, named as Llama's."""

    def __init__(self) -> None:
        super().__init__()
        attention = {f"{name}_proj": torch.nn.Linear(WIDTH, WIDTH) for name in "qkvo"}
        self.self_attn = torch.nn.ModuleDict(attention)
        mlp = {f"{name}_proj": torch.nn.Linear(WIDTH, WIDTH) for name in ("gate", "up", "down")}
        self.mlp = torch.nn.ModuleDict(mlp)


def model() -> torch.nn.Module:
    return torch.nn.ModuleDict({"layers": torch.nn.ModuleList(Block() for _ in range(BLOCKS))})


def seconds_to_build(config: LoraConfig) -> float:
    fresh = model()
    start = time.perf_counter()
    get_peft_model(fresh, config)
    return time.perf_counter() - start


def main() -> None:
    torch.manual_seed(0)
    uniform = lorank.allocate(model(), "uniform")
    rng = np.random.default_rng(0)
    ranks = {name: int(rng.integers(4, 33)) for name in uniform.ranks}
    allocation = lorank.RankAllocation(uniform.modules, ranks, uniform.scores, "random")
    targets = list(ranks)
    configs = {
        "one rank": LoraConfig(r=16, target_modules=targets),
        "lorank, a key a rank": allocation.to_lora_config(model()),
        "a key a module": LoraConfig(r=16, target_modules=targets, rank_pattern=ranks),
    }
    print(f"{len(ranks):,} modules, {len(set(ranks.values()))} different ranks, medians of 3")
    for name, config in configs.items():
        runs = 1 if name == "a key a module" else 3
        print(f"{name:22} {statistics.median(seconds_to_build(config) for _ in range(runs)):7.2f} s")


if __name__ == "__main__":
    main()
