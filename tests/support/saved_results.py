"""A small good file of every format that lorank reads, how each is read, and the use of what was read."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.numpy import save_file

import lorank
from lorank.allocation import signals
from lorank.analysis.journal import Journal
from lorank.cli.arrays import open_samples
from lorank.cli.tables import ranks, reports
from lorank.report.loading import load_report
from lorank.sources import open_source
from lorank.sources.base import Skipped
from lorank.training.rank_table import RankTable
from lorank.training.state import GardState, read_state, write_state
from tests.support.report_rows import gradient_row, task_row

WEIGHTS = {
    "layers.0.w.weight": np.arange(20.0).reshape(4, 5) ** 2,
    "layers.1.w.weight": np.full((3, 3), np.nan),
    "layers.4.mlp.experts.gate_up_proj": np.random.default_rng(0).standard_normal((2, 4, 6)),
    "norm.weight": np.ones(4),
}
RUN = {"fingerprint": "0", "keep_eigenvalues": True, "accuracy": "exact"}


@dataclass(frozen=True)
class Saved:
    """A format: the name of its file, how to write a good one, to read one, and to use the result."""

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], Any]
    use: Callable[[Any, Path], object]


def spectral() -> lorank.SpectralReport:
    return lorank.analyze(WEIGHTS, keep_eigenvalues=True, progress=False)


def gradients() -> lorank.GradientReport:
    rows = [gradient_row(f"layers.{i}.q_proj", (8, 12), 2.0 + i) for i in range(2)]
    return lorank.GradientReport(rows, [Skipped("embed", (8, 4), "tied to head")], "model", 1000, 0.9, 128, 3)


def comparison() -> lorank.ComparisonReport:
    changed = {name: x + 0.01 * np.eye(*x.shape[-2:]) if x.ndim > 1 else x for name, x in WEIGHTS.items()}
    return lorank.compare(WEIGHTS, changed, rank=2, progress=False)


def tasks() -> lorank.TaskReport:
    return lorank.TaskReport([task_row(f"layers.{i}.q_proj", 2, 1) for i in range(2)], (), "model", None, 64)


def _journal(path: Path) -> Any:
    with Journal(path, RUN, [m.info for m in open_source(WEIGHTS).matrices]) as journal:
        return lorank.SpectralReport(list(journal.finished.values()))


def _write_journal(path: Path) -> None:
    with Journal(path, RUN, [m.info for m in open_source(WEIGHTS).matrices]) as journal:
        for row in spectral():
            journal.add(row)


def gard_state() -> dict[str, Any]:
    sketches = [[torch.ones(2, 2), torch.zeros(2, 2)]]
    return GardState(4, {"a": 2, "b": 3}, 100, 2, {"a": 1.5}, sketches).to_dict()


def _read_state(path: Path) -> GardState:
    try:
        return GardState.from_dict(read_state(path))
    except lorank.FormatError as error:  # `GardCallback` names the file.
        raise lorank.FormatError(f"{path}: {error}") from error


def _read_table(path: Path) -> None:
    RankTable(path.parent).drop_rows_after(3)


def _write_table(path: Path) -> None:
    lines = ["step,module,rank,effective_rank,error", "2,a,3,1.5,0.0", "2,b,4,2.5,0.1", "4,a,3,1.5,0.0", ""]
    path.write_bytes("\r\n".join(lines).encode())


def _write_samples(path: Path) -> None:
    X = np.random.default_rng(0).standard_normal((12, 3))
    np.savez(path, X=X, Y=X @ np.ones((3, 2)))


def use_report(report: Any, folder: Path) -> None:
    """Show, save, load and allocate from a report; requests that its numbers cannot meet raise ValueError."""
    show(reports.report_table(report, report.modules, report.columns))
    show(reports.skipped_table(report))
    assert repr(report)
    report._repr_html_()
    json.dumps(report.to_json(), allow_nan=False)
    report.save(folder / "again.json")
    assert load_report(folder / "again.json") == report
    for method in signals.names():
        with suppress(ValueError):
            use_allocation(
                lorank.allocate(report, method, r_min=1, r_max=4, avg_rank=2, progress=False), folder
            )
    if isinstance(report, (lorank.SpectralReport, lorank.ComparisonReport)):
        for ending in ("csv", "parquet"):
            with suppress(ValueError):
                report.save(folder / f"again.{ending}")


def use_allocation(allocation: lorank.RankAllocation, folder: Path) -> None:
    assert repr(allocation)
    show(ranks.allocation_summary(allocation) if allocation.ranks else "")
    allocation.save(folder / "ranks.json")
    assert lorank.RankAllocation.load(folder / "ranks.json").ranks == allocation.ranks
    with suppress(ValueError):
        json.dumps(allocation.lora_settings())


def use_certificate(adapter: lorank.LoraAdapter, _folder: Path) -> None:
    if adapter.certificate is not None:
        assert repr(adapter.certificate)
        assert adapter.certificate.to_text()


def show(table: Any) -> None:
    Console(file=io.StringIO(), width=200).print(table)


def _nothing(_value: Any, _folder: Path) -> None:
    pass


def write_adapter(folder: Path) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    factors = {}
    for name in names:
        factors[f"base_model.model.{name}.lora_A.weight"] = rng.standard_normal((4, 12)).astype(np.float32)
        factors[f"base_model.model.{name}.lora_B.weight"] = rng.standard_normal((8, 4)).astype(np.float32)
    save_file(factors, folder / "adapter_model.safetensors")
    settings = '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}'
    (folder / "adapter_config.json").write_text(settings)


def _write_compressed(path: Path) -> None:
    """Write an adapter with a certificate; `path` is one of its files."""
    write_adapter(path.parent / "plain")
    compressed = lorank.compress(path.parent / "plain", avg_rank=2, progress=False)
    compressed.save(path.parent, "portable", overwrite=True)


def _read_adapter(path: Path) -> lorank.LoraAdapter:
    return lorank.LoraAdapter.load(path.parent)


FORMATS = [
    Saved("report.json", lambda path: spectral().save(path), load_report, use_report),
    Saved("report.csv", lambda path: spectral().save(path), load_report, use_report),
    Saved("report.parquet", lambda path: spectral().save(path), load_report, use_report),
    Saved("gradients.json", lambda path: gradients().save(path), load_report, use_report),
    Saved("tasks.json", lambda path: tasks().save(path), load_report, use_report),
    *(
        Saved(f"comparison.{ending}", lambda path: comparison().save(path), load_report, use_report)
        for ending in ("json", "csv", "parquet")
    ),
    Saved(
        "allocation.json",
        lambda path: lorank.allocate(spectral(), avg_rank=2, r_min=1, progress=False).save(path),
        lorank.RankAllocation.load,
        use_allocation,
    ),
    Saved("journal.jsonl", _write_journal, _journal, use_report),
    Saved("lorank_gard.safetensors", lambda path: write_state(gard_state(), path), _read_state, _nothing),
    Saved("lora_ranks.csv", _write_table, _read_table, _nothing),
    Saved("samples.npz", _write_samples, lambda path: open_samples([path], None, None), _nothing),
    Saved("lorank.json", _write_compressed, _read_adapter, use_certificate),
    Saved("adapter_config.json", _write_compressed, _read_adapter, use_certificate),
]
"""Formats that are read from files."""
