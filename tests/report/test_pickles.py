"""Public results are data: they survive pickling, copying and another process, and print in a few lines."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import lorank
from lorank.report.gradients import ModuleGradients
from lorank.report.tasks import ModuleTask
from lorank.sources.base import Skipped

LONG = "model.language_model." + "layers.0.a_module_with_a_name." * 3


def spectral(folder: Path) -> lorank.SpectralReport:
    """Return the report of a file, with a matrix without a spectrum and two skipped tensors."""
    rng = np.random.default_rng(0)
    weights = {f"layers.{i}.mlp.weight": rng.standard_normal((8, 12)) for i in range(30)}
    weights |= {"layers.30.mlp.weight": np.full((3, 3), np.nan), "norm.weight": np.ones(4)}
    weights |= {"other.norm.weight": np.ones(4)}
    save_file(weights, folder / "model.safetensors")
    return lorank.analyze(folder / "model.safetensors", keep_eigenvalues=True)


def gradients(_folder: Path) -> lorank.GradientReport:
    rows = [
        ModuleGradients(
            name=f"{LONG}{i}",
            module=f"{LONG}{i}",
            kind="linear",
            shape=(8, 12),
            effective_rank=2.0,
            eigenvalues=np.array([3.0, 1.0, np.nan]),
            flags=("no gradient reached it",),
        )
        for i in range(30)
    ]
    skipped = [Skipped("embed", (8, 4), "tied to head")]
    return lorank.GradientReport(rows, skipped, "model", 1000, 0.9, None, 3)


def tasks(_folder: Path) -> lorank.TaskReport:
    rows = [
        ModuleTask(
            name=f"layers.{i}.q_proj",
            module=f"layers.{i}.q_proj",
            kind="linear",
            shape=(8, 12),
            k_star=0,
            predicted_rank=0,
            rho=np.nan,
            tau=np.nan,
            noise=1.0,
            num_above=3,
            singular_values=np.arange(8.0),
            predicted_r2=np.full(9, np.nan),
        )
        for i in range(30)
    ]
    return lorank.TaskReport(rows, (), "model", num_samples=64, unknown_parameters="packed")


def allocation(folder: Path) -> lorank.RankAllocation:
    return lorank.allocate(spectral(folder), budget=2000, r_min=1)


RESULTS = [spectral, gradients, tasks, allocation]


def spawned(value: Any) -> Any:
    """Return a value that a spawned process received and sent back."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(copy.copy, value).result()


COPIES: list[Callable[[Any], Any]] = [
    copy.copy,
    copy.deepcopy,
    *(
        lambda value, protocol=protocol: pickle.loads(pickle.dumps(value, protocol))
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
    ),
]


@pytest.mark.parametrize("make", RESULTS)
def test_copies_and_pickles_are_equal(make: Callable[[Path], Any], tmp_path: Path) -> None:
    result = make(tmp_path)
    for duplicate in COPIES:
        again = duplicate(result)
        assert type(again) is type(result)
        assert again == result
        assert again is not result
        for row in result.modules[:2]:
            assert duplicate(row) == row


@pytest.mark.parametrize("make", RESULTS)
def test_results_cross_a_process_boundary(make: Callable[[Path], Any], tmp_path: Path) -> None:
    result = make(tmp_path)
    assert spawned(result) == result


def test_copied_reports_of_live_models_are_equal() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 4))
    report = lorank.analyze(model)
    assert report.skipped
    for duplicate in COPIES:
        assert duplicate(report) == report


def test_skipped_entries_hold_data_only(tmp_path: Path) -> None:
    for entry in spectral(tmp_path).skipped:
        assert type(entry) is Skipped
        assert entry == Skipped(entry.name, (4,), "1-D tensor")


def test_different_reports_are_not_equal(tmp_path: Path) -> None:
    report = spectral(tmp_path)
    assert report != report.select(["layers.0.mlp"])
    assert report != gradients(tmp_path)


@pytest.mark.parametrize("make", RESULTS)
def test_repr_is_a_few_lines(make: Callable[[Path], Any], tmp_path: Path) -> None:
    result = make(tmp_path)
    lines = repr(result).splitlines()
    assert lines[0].startswith(f"{type(result).__name__} of ")
    assert len(lines) == 5
    assert f"{len(result.modules) - 3} more: see " in lines[-1]
    for row in result.modules:
        assert len(repr(row).splitlines()) == 1
        assert len(repr(row)) < 220 + len(row.name)


def test_repr_of_an_empty_report() -> None:
    assert (
        repr(lorank.SpectralReport([])) == "SpectralReport of an unnamed model: 0 matrices, accuracy='exact'"
    )


def test_repr_shows_leading_numbers_and_flags(tmp_path: Path) -> None:
    report = spectral(tmp_path)
    title = repr(report).splitlines()[0]
    assert "31 matrices, 2 tensors skipped" in title
    assert title.endswith(f"{30 * 96 + 17:,} parameters, accuracy='exact'")
    row = report["layers.0.mlp"]
    assert f"layers.0.mlp (8x12): alpha_hill {row.alpha_hill:.4g}, mp_spikes {row.mp_spikes}" in repr(report)
    assert f"alpha_hill={row.alpha_hill:.4g}, mp_spikes={row.mp_spikes}" in repr(row)
    failed = repr(report["layers.30.mlp"])
    assert "holds NaN or infinite values" in failed
    assert "mp_spikes" not in failed


@pytest.mark.parametrize("make", [spectral, gradients, tasks])
def test_notebooks_show_a_table(make: Callable[[Path], Any], tmp_path: Path) -> None:
    report = make(tmp_path)
    page = report._repr_html_()
    assert page.count("<tr") == 11
    assert f"{len(report) - 10} more" in page
    for column in report.leading:
        assert f"<th>{column}</th>" in page


def test_table_of_a_notebook_escapes_names() -> None:
    row = lorank.ModuleSpectrum(
        name="<script>", module="<script>", kind="linear", shape=(2, 2), dtype="float32"
    )
    page = lorank.SpectralReport([row], source="<b>")._repr_html_()
    assert "<script>" not in page
    assert "<b>" not in page


def test_repr_of_a_task_spectrum() -> None:
    task = lorank.TaskSpectrum(folds=4)
    assert repr(task) == "TaskSpectrum(0 samples, no widths yet, 4 folds)"
    task.update(np.ones((1200, 3)), np.ones(1200))
    assert repr(task) == "TaskSpectrum(1,200 samples, 3 inputs, 1 output, 4 folds)"
