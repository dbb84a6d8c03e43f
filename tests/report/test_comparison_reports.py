"""Comparison reports: files, pickles, data frames, and the command line."""

from __future__ import annotations

import copy
import csv
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import lorank
from lorank.report.comparison import COMPARED
from lorank.report.loading import load_report
from tests.support.command_line import ok, run
from tests.support.saved_results import comparison


@pytest.mark.parametrize("ending", ["json", "parquet", "csv"])
def test_reports_survive_saving(ending: str, tmp_path: Path) -> None:
    report = comparison()
    path = tmp_path / f"c.{ending}"
    report.save(path)
    for again in (lorank.ComparisonReport.load(path), load_report(path)):
        assert list(again.modules) == list(report.modules)
        assert isinstance(again, lorank.ComparisonReport)
        assert (again == report) == (ending != "csv")
    with pytest.raises(lorank.FormatError):
        lorank.SpectralReport.load(path)


def test_spectral_reports_are_not_comparisons(tmp_path: Path) -> None:
    report = lorank.analyze({"a.weight": np.eye(3)})
    for ending in ("json", "parquet", "csv"):
        report.save(tmp_path / f"r.{ending}")
        assert isinstance(load_report(tmp_path / f"r.{ending}"), lorank.SpectralReport)
        with pytest.raises(lorank.FormatError):
            lorank.ComparisonReport.load(tmp_path / f"r.{ending}")
    for method in (report.save, lorank.ComparisonReport.load, comparison().save):
        with pytest.raises(ValueError, match=r"x\.txt: the name of a report must end with"):
            method(tmp_path / "x.txt")


def test_reports_survive_copies() -> None:
    report = comparison()
    assert pickle.loads(pickle.dumps(report)) == copy.deepcopy(report) == report
    assert report != lorank.ComparisonReport(report.modules)


def test_data_frames_have_all_columns() -> None:
    frame = comparison().to_pandas()
    assert list(frame.columns) == ["name", "kind", "out", "in", *COMPARED, "flags"]
    assert frame["relative_change"].isna().sum() == 1


def test_methods_that_need_spectra_refuse_comparisons() -> None:
    with pytest.raises(ValueError, match=r"needs spectra: pass the result of lorank\.analyze"):
        lorank.allocate(comparison(), "htsr", r_min=1, r_max=4, avg_rank=2)


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    weights = {f"layers.{i}.w.weight": rng.standard_normal((20, 12)) for i in range(3)}
    save_file(weights | {"norm.weight": np.ones(4)}, paths[0])
    save_file({name: x + 0.1 * i for i, (name, x) in enumerate(weights.items())}, paths[1])
    return paths


def test_command_prints_saves_and_shows(models: tuple[Path, Path], tmp_path: Path) -> None:
    table = ok("compare", *models, "--rank", 2, "--skipped", "-o", tmp_path / "c.csv")
    assert "layers.2.w" in table
    assert "subspaces of rank 2" in " ".join(table.split())
    assert "only in" in table
    with (tmp_path / "c.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["relative_change"]) > 0 for row in rows] == [False, True, True]
    shown = ok("report", tmp_path / "c.csv", "--sort", "left_angle_max", "-d", "--top", 1, "--columns", "all")
    assert "layers.1.w" not in shown or "layers.2.w" not in shown
    content = json.loads(ok("compare", *models, "--json", "-i", "re:.*1.w", "-q"))
    assert [row["name"] for row in content["modules"]] == ["layers.1.w"]
    assert content["modules"][0]["left_angle_max"] > 0


def test_command_refuses_wrong_input(models: tuple[Path, Path], tmp_path: Path) -> None:
    comparison().save(tmp_path / "c.json")
    for arguments, status, message in (
        ((*models, "-o", tmp_path / "c.txt"), 2, "must end with"),
        ((*models, "-o", tmp_path / "c.json"), 2, "exists"),
        ((*models, "--columns", "alpha_hill"), 2, "--columns must be one of"),
        ((*models, "--rank", 0), 2, "--rank"),
        ((tmp_path / "c.json", models[1]), 2, "looks like a saved report"),
        ((models[0], tmp_path / "none.safetensors"), 1, "none.safetensors"),
        ((*models, "-x", "w"), 1, "no selected matrix in common"),
    ):
        result = run("compare", *arguments)
        assert result.returncode == status
        assert message in " ".join(result.stderr.split())
    assert run("report", tmp_path / "c.json", "--html", tmp_path / "x.html").returncode == 2


def test_command_fails_for_values_that_are_not_finite(models: tuple[Path, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    save_file({f"layers.{i}.w.weight": np.full((20, 12), 1.0 if i else np.nan) for i in range(3)}, bad)
    result = run("compare", models[0], bad)
    assert result.returncode == 1
    assert "1 of 3 pairs have no numbers; the first is layers.0.w: B: " in result.stderr
    assert "layers.2.w" in result.stdout
