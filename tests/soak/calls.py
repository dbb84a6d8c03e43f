"""Ten thousand calls of each public function: ``python -m tests.soak.calls NAME COUNT``.

The first fifth of the calls fills caches. After it, resident memory may grow by 5 % and 2 MiB, and the
numbers of open files and threads stay.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Call = Callable[[], object]
NAMES = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"]
SHAPE = (16, 24)

CALLS: dict[str, Callable[[Path], Call]] = {}
"""Function that prepares the calls of each public function, by the function's name."""


def prepares(name: str) -> Callable[[Callable[[Path], Call]], Callable[[Path], Call]]:
    def register(prepare: Callable[[Path], Call]) -> Callable[[Path], Call]:
        CALLS[name] = prepare
        return prepare

    return register


def weights(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {f"{name}.weight": rng.standard_normal(SHAPE).astype(np.float32) for name in NAMES}


def adapter_folder(folder: Path, seed: int = 0, rank: int = 4) -> Path:
    """Write a PEFT adapter, and return its folder."""
    rng = np.random.default_rng(seed)
    target = folder / f"adapter{seed}"
    target.mkdir()
    tensors = {}
    for name in NAMES:
        for part, shape in (("A", (rank, SHAPE[1])), ("B", (SHAPE[0], rank))):
            key = f"base_model.model.{name}.lora_{part}.weight"
            tensors[key] = rng.standard_normal(shape).astype(np.float32)
    save_file(tensors, target / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (target / "adapter_config.json").write_text(json.dumps(settings))
    return target


@prepares("spectrum")
def _spectrum(_folder: Path) -> Call:
    import lorank

    matrix = np.random.default_rng(0).standard_normal((32, 48))
    return lambda: lorank.spectrum(matrix)


@prepares("alpha_hill")
def _alpha_hill(_folder: Path) -> Call:
    import lorank

    values = np.random.default_rng(0).pareto(2.0, 500)
    return lambda: lorank.alpha_hill(values)


@prepares("marchenko_pastur")
def _marchenko_pastur(_folder: Path) -> Call:
    import lorank

    values = np.random.default_rng(0).pareto(2.0, 50)
    return lambda: lorank.marchenko_pastur(values, (50, 80))


@prepares("fit_ranks")
def _fit_ranks(_folder: Path) -> Call:
    import lorank

    return lambda: lorank.fit_ranks([3.0, 2.0, 1.0], [40, 50, 60], 1, 8, 400)


@prepares("product_svd")
def _product_svd(_folder: Path) -> Call:
    import lorank

    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((30, 4)), rng.standard_normal((4, 20))
    return lambda: lorank.product_svd(b, a)


@prepares("analyze")
def _analyze(folder: Path) -> Call:
    import lorank

    save_file(weights(), folder / "model.safetensors")
    return lambda: lorank.analyze(folder / "model.safetensors", progress=False)


@prepares("SpectralReport.save, load")
def _report_files(folder: Path) -> Call:
    import lorank

    report = lorank.analyze(weights(), progress=False)

    def call() -> object:
        report.save(folder / "report.json")
        return lorank.SpectralReport.load(folder / "report.json")

    return call


@prepares("SpectralReport in parquet")
def _parquet(folder: Path) -> Call:
    import lorank

    report = lorank.analyze(weights(), progress=False)

    def call() -> object:
        report.save(folder / "report.parquet")
        return lorank.SpectralReport.load(folder / "report.parquet")

    return call


@prepares("allocate")
def _allocate(_folder: Path) -> Call:
    import lorank

    report = lorank.analyze(weights(), progress=False)
    return lambda: lorank.allocate(report, method="htsr", budget=1000)


@prepares("RankAllocation.save, load")
def _allocation_files(folder: Path) -> Call:
    import lorank

    report = lorank.analyze(weights(), progress=False)
    allocation = lorank.allocate(report, method="htsr", budget=1000)

    def call() -> object:
        allocation.save(folder / "ranks.json")
        return lorank.RankAllocation.load(folder / "ranks.json")

    return call


@prepares("LoraAdapter.load, save")
def _adapter_files(folder: Path) -> Call:
    import lorank

    source = adapter_folder(folder)
    return lambda: lorank.LoraAdapter.load(source).save(folder / "out", overwrite=True)


@prepares("compress")
def _compress(folder: Path) -> Call:
    import lorank

    source = adapter_folder(folder)
    return lambda: lorank.compress(source, avg_rank=2, progress=False)


@prepares("elastic")
def _elastic(folder: Path) -> Call:
    import lorank

    source = adapter_folder(folder)
    return lambda: lorank.elastic(source, progress=False)


@prepares("family")
def _family(folder: Path) -> Call:
    import lorank

    source = adapter_folder(folder)
    return lambda: lorank.family(source, [1, 2], progress=False)


@prepares("merge")
def _merge(folder: Path) -> Call:
    import lorank

    sources = [adapter_folder(folder, seed) for seed in range(2)]
    return lambda: lorank.merge(sources, [0.5, 0.5], avg_rank=2, progress=False)


@prepares("extract")
def _extract(_folder: Path) -> Call:
    import lorank

    base, tuned = weights(0), weights(1)
    return lambda: lorank.extract(base, tuned, avg_rank=2, progress=False)


@prepares("check")
def _check(folder: Path) -> Call:
    import lorank

    source = adapter_folder(folder)
    return lambda: lorank.check(source)


@prepares("errors of a damaged file")
def _errors(folder: Path) -> Call:
    import lorank

    (folder / "model.safetensors").write_bytes(b"\xff" * 100)

    def call() -> None:
        try:
            lorank.analyze(folder / "model.safetensors", progress=False)
        except lorank.FormatError:
            return
        raise AssertionError("a damaged file was read")

    return call


@prepares("task_spectrum")
def _task_spectrum(_folder: Path) -> Call:
    import lorank

    rng = np.random.default_rng(0)
    inputs, targets = rng.standard_normal((100, 6)), rng.standard_normal((100, 3))
    return lambda: lorank.task_spectrum(inputs, targets)


@prepares("profile_gradients")
def _profile_gradients(_folder: Path) -> Call:
    import torch

    import lorank

    model, batches = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)), [torch.ones(3, 6)]
    return lambda: lorank.profile_gradients(
        model, batches, loss=lambda model, batch: model(batch).square().sum(), progress=False
    )


@prepares("profile_tasks")
def _profile_tasks(_folder: Path) -> Call:
    import torch

    import lorank

    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    batches = [torch.randn(8, 6) for _ in range(4)]
    return lambda: lorank.profile_tasks(
        model, batches, loss=lambda model, batch: model(batch).square().sum(), progress=False
    )


@prepares("LoraAdapter.from_model, into_model")
def _live(_folder: Path) -> Call:
    import lorank

    model = peft_model()
    return lambda: lorank.LoraAdapter.from_model(model).into_model(model)


@prepares("training.resize_lora")
def _resize(_folder: Path) -> Call:
    from lorank.training import resize_lora

    model, ranks = peft_model(), iter(range(10**9))
    return lambda: resize_lora(model, dict.fromkeys(("0", "1"), 2 + next(ranks) % 2))


@prepares("training.param_groups")
def _param_groups(_folder: Path) -> Call:
    from lorank.training import param_groups

    model = peft_model()
    return lambda: param_groups(model, lr=1e-3)


@prepares("training.DynamicRanks")
def _dynamic(_folder: Path) -> Call:
    import torch

    from lorank.training import DynamicRanks

    model = peft_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    dynamic = DynamicRanks(model, optimizer, budget=60, interval=4, window=2)
    dynamic.__enter__()

    def call() -> object:
        model(torch.ones(3, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return dynamic.step()

    return call


def peft_model() -> Any:
    """Return a PEFT model of two small layers."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    return get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))


def state() -> dict[str, int]:
    """Return resident memory in KiB, and the numbers of open files and threads."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "kib": int(status["VmRSS"].split()[0]),
        "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "threads": int(status["Threads"]),
    }


def repeated(name: str, count: int) -> dict[str, dict[str, int]]:
    """Return the state after a fifth of the calls, and after all."""
    with tempfile.TemporaryDirectory() as folder:
        call = CALLS[name](Path(folder))
        # The collector, and functions that search all objects, then skip the objects of libraries.
        gc.freeze()
        for _ in range(count // 5):
            call()
        first = state()
        for _ in range(count - count // 5):
            call()
        return {"first": first, "last": state()}


def is_flat(first: dict[str, int], last: dict[str, int]) -> bool:
    """Return True if memory grew by at most 5 % and 2 MiB, and no file or thread was left."""
    is_small = last["kib"] <= first["kib"] * 1.05 and last["kib"] - first["kib"] <= 2048
    return is_small and last["files"] <= first["files"] and last["threads"] <= first["threads"]


if __name__ == "__main__":
    print(json.dumps(repeated(sys.argv[1], int(sys.argv[2]))))
