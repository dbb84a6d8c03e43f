"""Gradient and task reports: equality, files, data frames and rows by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import lorank
from lorank.report.gradients import ModuleGradients
from tests.support import tiny_models
from tests.support.profiled_models import COUNT, QUERY, Readers, called, text_batches, vectors
from tests.support.report_rows import gradient_row, task_row


def test_reports_are_equal_by_value() -> None:
    for one, other in (
        (gradient_row("a", (4, 4), 2), gradient_row("a", (4, 4), 3)),
        (task_row("a", 1, 1, rho=np.nan), task_row("a", 1, 1, rho=2.0)),
        (task_row("a", 1, 1), task_row("a", 1, 1, singular_values=np.array([2.0, 1.5]))),
        (task_row("a", 1, 1), task_row("a", 1, 1, singular_values=np.array([2.0]))),
    ):
        kind = lorank.GradientReport if isinstance(one, ModuleGradients) else lorank.TaskReport
        assert kind([copy.deepcopy(one)]) == kind((one,))
        assert kind([one]) != kind([other])
        assert kind([one]) != kind([one, one])
        assert kind([one]) != kind([one], source="elsewhere")
    assert lorank.GradientReport([]) != lorank.TaskReport([])


def test_profiles_are_saved_as_json_only(tmp_path: Path) -> None:
    for report in (lorank.GradientReport([gradient_row("a", (4, 4), 2)]), lorank.TaskReport([])):
        with pytest.raises(ValueError, match=r"x\.parquet: a \w+Report is saved as JSON"):
            report.save(tmp_path / "x.parquet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sketch", [None, 8])
def test_gradient_reports_survive_saving(sketch: int | None, tmp_path: Path) -> None:
    report = lorank.profile_gradients(tiny_models.mixtral(), text_batches(3), sketch=sketch, energy=0.8)
    report.save(tmp_path / "g.json")
    again = lorank.GradientReport.load(tmp_path / "g.json")
    assert again == report
    assert (again.sketch, again.energy, again.num_batches) == (sketch, 0.8, 3)
    assert again.skipped
    ranks = [lorank.allocate(r, "gard", r_min=1, r_max=9, avg_rank=4).ranks for r in (report, again)]
    assert ranks[0] == ranks[1]


def test_task_reports_survive_saving(tmp_path: Path) -> None:
    model = nn.ModuleDict({"used": nn.Linear(8, 3), "unused": nn.Linear(8, 3)})
    report = lorank.profile_tasks(model, vectors(), loss=lambda m, x: m["used"](x).square().sum(), folds=2)
    report.save(tmp_path / "t.json")
    again = lorank.TaskReport.load(tmp_path / "t.json")
    assert again == report
    assert np.isnan(again["unused"].rho)
    odd = lorank.TaskReport([task_row("a", 1, 1, rho=np.inf, tau=np.nan, noise=-np.inf)])
    odd.save(tmp_path / "o.json")
    assert lorank.TaskReport.load(tmp_path / "o.json") == odd


def test_files_of_another_kind_raise(tmp_path: Path) -> None:
    gradients = lorank.GradientReport([gradient_row("a", (4, 4), 2)])
    tasks = lorank.TaskReport([task_row("a", 1, 1)])
    spectra = lorank.analyze({"a.weight": np.eye(4, dtype=np.float32)}, progress=False)
    contents: dict[str, Any] = {"g": gradients, "t": tasks, "s": spectra}
    for name, report in contents.items():
        report.save(tmp_path / f"{name}.json")
    texts = {
        "empty": "",
        "list": "[]",
        "null": "null",
        "deep": "[" * 100_000,
        "other": '{"format": "other", "version": 1}',
        "future": (tmp_path / "g.json").read_text().replace('"version": 1', '"version": 99'),
        "cut": (tmp_path / "g.json").read_text()[:-20],
        "shape": (tmp_path / "g.json").read_text().replace('"shape"', '"form"'),
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.json").write_text(text)
    for name in [*texts, "t", "s"]:
        with pytest.raises(lorank.FormatError, match=rf"{name}\.json: is not a GradientReport"):
            lorank.GradientReport.load(tmp_path / f"{name}.json")
    for name in [*texts, "g", "s"]:
        with pytest.raises(lorank.FormatError, match=rf"{name}\.json: is not a TaskReport"):
            lorank.TaskReport.load(tmp_path / f"{name}.json")


def test_numpy_integers_are_saved(tmp_path: Path) -> None:
    report = lorank.profile_gradients(Readers(), vectors(), loss=called, sketch=np.int64(4))
    report.save(tmp_path / "report.json")
    assert lorank.GradientReport.load(tmp_path / "report.json").sketch == 4


def test_data_frames_have_a_row_per_module() -> None:
    report = lorank.profile_gradients(tiny_models.llama(), text_batches(3))
    frame = report.to_pandas()
    assert list(frame.columns) == ["name", "kind", "out", "in", "effective_rank", "mean_square", "flags"]
    assert list(frame["name"]) == [row.name for row in report]
    assert list(frame["mean_square"]) == [row.eigenvalues.sum() for row in report]
    assert list(zip(frame["out"], frame["in"], strict=True)) == [row.shape for row in report]
    tasks = lorank.TaskReport([task_row("a", 3, 2, flags=("one", "two")), task_row("b", 1, 1)])
    frame = tasks.to_pandas()
    assert list(frame["k_star"]) == [3, 1]
    assert list(frame["flags"]) == ["one; two", ""]


def test_rows_are_found_by_name_or_ending() -> None:
    report = lorank.profile_gradients(tiny_models.llama(), text_batches(2))
    assert report[QUERY] is report["layers.0.self_attn.q_proj"] is report.modules[0]
    for name, message in (("q_proj", "2 modules end with 'q_proj'"), ("proj", "no module is named 'proj'")):
        with pytest.raises(KeyError, match=message):
            report[name]


def test_with_energy_equals_a_profile_with_that_energy() -> None:
    model = tiny_models.llama()
    report = lorank.profile_gradients(model, text_batches())
    for energy in (0.3, 0.6, 1.0):
        expected = lorank.profile_gradients(model, text_batches(), energy=energy)
        assert report.with_energy(energy) == expected
    assert [row.effective_rank for row in report.with_energy(1.0)] == [COUNT] * len(report)
    assert [row.effective_rank for row in report.with_energy(1e-6)] == [1] * len(report)
    assert report.energy == 0.9
    with pytest.raises(ValueError, match="energy must be above 0"):
        report.with_energy(0)
