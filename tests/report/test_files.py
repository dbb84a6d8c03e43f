"""Reports and journals on disk: nothing is lost, and other files raise."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import lorank
from lorank.report.spectral import METRICS
from lorank.sources import open_source


@pytest.fixture(scope="module")
def report() -> lorank.SpectralReport:
    rng = np.random.default_rng(0)
    weights = {
        "layers.0.w.weight": rng.standard_normal((20, 30)).astype(np.float32),
        "layers.1.w.weight": np.zeros((4, 5)),
        "layers.2.w.weight": np.eye(6),
        "layers.3.w.weight": np.full((3, 3), np.nan),
        "layers.4.mlp.experts.gate_up_proj": rng.standard_normal((2, 6, 8)),
        "norm.weight": np.ones(4),
    }
    return lorank.analyze(weights, keep_eigenvalues=True)


def assert_rows_equal(a: lorank.SpectralReport, b: lorank.SpectralReport, *, eigenvalues: bool) -> None:
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        for name in ("name", "module", "kind", "shape", "dtype", "expert", "accuracy", "flags"):
            assert getattr(left, name) == getattr(right, name)
        for metric in METRICS:
            np.testing.assert_equal(getattr(left, metric), getattr(right, metric))
        if eigenvalues:
            np.testing.assert_equal(left.eigenvalues, right.eigenvalues)


@pytest.mark.parametrize("ending", [".json", ".parquet"])
def test_reports_survive_saving(report: lorank.SpectralReport, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"report{ending}"
    report.save(path)
    loaded = lorank.SpectralReport.load(path)
    assert_rows_equal(report, loaded, eigenvalues=True)
    assert tuple(loaded.skipped) == tuple(report.skipped)
    for name in ("source", "accuracy", "num_parameters"):
        assert getattr(loaded, name) == getattr(report, name)


def test_two_rows_of_one_name_are_refused(report: lorank.SpectralReport, tmp_path: Path) -> None:
    report.save(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    content["modules"].append(content["modules"][0])
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(lorank.FormatError, match=r"'layers\.0\.w' occurs more than once"):
        lorank.SpectralReport.load(tmp_path / "report.json")


def test_csv_keeps_the_rows(report: lorank.SpectralReport, tmp_path: Path) -> None:
    report.save(tmp_path / "report.csv")
    loaded = lorank.SpectralReport.load(tmp_path / "report.csv")
    assert_rows_equal(report, loaded, eigenvalues=False)
    assert "read from CSV" in loaded.facts.remark
    with pytest.raises(ValueError, match="read from CSV"):
        lorank.allocate(loaded, budget="5%")


def test_data_frame_has_a_row_per_matrix(report: lorank.SpectralReport) -> None:
    frame = report.to_pandas()
    assert list(frame["name"]) == [row.name for row in report]
    assert frame["alpha_hill"].isna().tolist() == [bool(np.isnan(row.alpha_hill)) for row in report]


def test_rows_without_a_spectrum_have_no_counts(report: lorank.SpectralReport, tmp_path: Path) -> None:
    counts = [name for name in METRICS if name.startswith(("num_", "mp_spikes"))]
    assert len(counts) == 5
    report.save(tmp_path / "report.json")
    by_name = {row["name"]: row for row in json.loads((tmp_path / "report.json").read_text())["modules"]}
    assert [by_name["layers.3.w"][name] for name in counts] == [None] * 5
    assert [by_name["layers.1.w"][name] for name in counts] == [0] * 5
    frame = report.to_pandas().set_index("name")
    assert frame.loc["layers.3.w", counts].isna().all()
    assert (frame.loc["layers.1.w", counts] == 0).all()
    report.save(tmp_path / "report.csv")
    with (tmp_path / "report.csv").open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert {rows["layers.3.w"][name] for name in counts} == {""}


def test_page_needs_no_other_file(report: lorank.SpectralReport, tmp_path: Path) -> None:
    report.to_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "layers.0.w" in text
    assert "NaN" in text
    assert "<script src=" not in text, "the page needs nothing from elsewhere"


def test_rows_are_found_by_name_or_ending(report: lorank.SpectralReport) -> None:
    assert report["0.w"] is report["layers.0.w"]
    with pytest.raises(KeyError, match="4 modules end with 'w'"):
        report["w"]
    with pytest.raises(KeyError, match="no module is named 'x'"):
        report["x"]
    assert [row.name for row in report.select(["0.w", "1.w"], ["1.w"])] == ["layers.0.w"]


@pytest.mark.parametrize("ending", [".json", ".csv", ".parquet"])
@pytest.mark.parametrize("content", [b"", b"{}", b"a,b\n1,2\n", b"\xff\x00PAR1"])
def test_other_files_raise(tmp_path: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"report{ending}"
    path.write_bytes(content)
    with pytest.raises(lorank.FormatError, match=rf"report\{ending}: is not a lorank report"):
        lorank.SpectralReport.load(path)


def test_unknown_endings_and_missing_files_raise(report: lorank.SpectralReport, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must end with"):
        report.save(tmp_path / "report.txt")
    with pytest.raises(FileNotFoundError):
        lorank.SpectralReport.load(tmp_path / "none.json")


@pytest.mark.parametrize("ending", [".parquet", ".csv", ""])
@pytest.mark.parametrize("kind", [lorank.GradientReport, lorank.TaskReport])
def test_profiles_with_another_ending_raise(
    kind: type[lorank.GradientReport | lorank.TaskReport], ending: str, tmp_path: Path
) -> None:
    kind([]).save(tmp_path / "report.json")
    path = (tmp_path / "report.json").rename(tmp_path / f"report{ending}")
    for use in (kind([]).save, kind.load):
        with pytest.raises(ValueError, match=rf"report{ending}: a {kind.__name__} is saved as JSON: end"):
            use(path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    weights = {f"layers.{i}.w.weight": rng.standard_normal((8 + i, 12)) for i in range(6)}
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("cut", [0, 7], ids=["between lines", "within a line"])
def test_interrupted_analysis_resumes_from_its_journal(checkpoint: Path, tmp_path: Path, cut: int) -> None:
    journal = tmp_path / "journal"
    whole = lorank.analyze(checkpoint, resume=journal, threads=1)
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 7
    # Rows of the journal are used without recomputation: a changed number must appear in the report.
    marked = lines[1].replace(b'"num_nonzero": ', b'"num_nonzero": 1')
    journal.write_bytes(lines[0] + marked + lines[2] + lines[3][:cut])
    resumed = lorank.analyze(checkpoint, resume=journal, threads=1)
    changed = [a.name for a, b in zip(whole, resumed, strict=True) if a.num_nonzero != b.num_nonzero]
    assert len(changed) == 1
    restored = [replace(b, num_nonzero=a.num_nonzero) for a, b in zip(whole, resumed, strict=True)]
    assert_rows_equal(whole, lorank.SpectralReport(restored), eigenvalues=False)
    assert len(journal.read_bytes().splitlines()) == 7


def test_journal_of_another_run_raises(checkpoint: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    lorank.analyze(checkpoint, resume=journal)
    with pytest.raises(ValueError, match="different keep_eigenvalues"):
        lorank.analyze(checkpoint, resume=journal, keep_eigenvalues=True)
    save_file({"a.weight": np.eye(3)}, checkpoint)
    with pytest.raises(ValueError, match="different fingerprint"):
        lorank.analyze(checkpoint, resume=journal)
    journal.write_text("something else\n")
    with pytest.raises(lorank.FormatError, match="is not a journal"):
        lorank.analyze(checkpoint, resume=journal)
    with pytest.raises(ValueError, match="resume needs safetensors"):
        lorank.analyze({"a": np.eye(3)}, resume=tmp_path / "other")


def test_opened_source_is_accepted(checkpoint: Path) -> None:
    opened = open_source(checkpoint)
    assert len(lorank.analyze(opened)) == len(opened.matrices) == 6
