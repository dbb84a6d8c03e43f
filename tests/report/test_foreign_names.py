"""Reports whose names come from others: pages have no other elements, and files hold the same names."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lorank
from lorank._internal.csv_cells import from_cell, to_cell
from lorank._internal.printable import printable_name
from lorank.report.rows import ModuleSpectrum
from lorank.sources.base import Skipped
from tests.support.foreign_text import TEXTS, foreign_texts, unprintable, wide_texts

# Halves of surrogate pairs are names that come from pickles.
names = st.one_of(foreign_texts, wide_texts)
fast = settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])


def report_of(*texts: str) -> lorank.SpectralReport:
    """Return a report in which every text that files may give is one of the texts."""
    rows = [
        ModuleSpectrum(
            name=text,
            module=f"layers.{i}.{text}",
            kind="linear",
            shape=(3, 4),
            dtype=text,
            frobenius_norm=1.0,
            alpha_hill=2.0 + i,
            mp_edge=1.0,
            flags=(text.replace("; ", " ") or "flag",),
            eigenvalues=np.array([0.5, 1.0, 2.0]),
        )
        for i, text in enumerate(texts)
    ]
    return lorank.SpectralReport(rows, [Skipped(text, (2,), text) for text in texts], texts[0])


class Page(HTMLParser):
    """The elements, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._is_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(f"{key}={value}" for key, value in attrs if key != "id")))
        self._is_script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._is_script = self._is_script and tag != "script"

    def handle_data(self, data: str) -> None:
        (self.scripts if self._is_script else self.texts).append(data)


def written(report: lorank.SpectralReport, folder: Path) -> Page:
    report.to_html(folder / "page.html")
    text = (folder / "page.html").read_text("utf-8")
    # The library of plotly is constant, and slow to parse.
    return Page(re.sub(r"(?s)<script[^>]*>/\*\*.*?</script>", "<script></script>", text, count=1))


@pytest.fixture(scope="module")
def plain_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return written(report_of("first", "second"), tmp_path_factory.mktemp("plain"))


@fast
@given(a=names, b=names)
def test_pages_have_the_elements_of_the_template(a: str, b: str, plain_page: Page, tmp_path: Path) -> None:
    page = written(report_of(a, b), tmp_path)
    assert page.elements == plain_page.elements
    assert printable_name(a) in [text.strip() for text in page.texts] or a.strip() != a or len(a) > 900
    assert not unprintable("".join(page.texts))


@fast
@given(name=names)
def test_labels_of_plots_are_text(name: str, tmp_path: Path) -> None:
    page = written(report_of(name, "second"), tmp_path)
    labels = [text for script in page.scripts for text in strings(script)]
    shown = [label for label in labels if unescape(label) == printable_name(name)]
    assert shown
    assert not [label for label in labels if "<" in label and "W^T" not in label and "%{" not in label]


def strings(script: str) -> list[str]:
    """Return the strings of the JSON that a script passes to plotly."""
    return [json.loads(quoted) for quoted in re.findall(r'"(?:[^"\\]|\\.)*"', script)]


@pytest.mark.parametrize("text", TEXTS)
def test_notebooks_and_representations_show_text(text: str) -> None:
    report = report_of(text, "second")
    page = Page(report._repr_html_())
    assert {tag for tag, _ in page.elements} == {"p", "table", "tr", "th", "td"}
    assert not unprintable("".join(page.texts))
    assert not unprintable(repr(report))
    assert not unprintable(repr(report.modules[0]))
    assert len(repr(report).splitlines()) == 3


@fast
@given(name=names)
def test_files_hold_the_same_names(name: str, tmp_path: Path) -> None:
    report = report_of(name, "second")
    report.save(tmp_path / "r.json")
    assert lorank.SpectralReport.load(tmp_path / "r.json") == report
    without_surrogates = name.encode("utf-8", "backslashreplace").decode()
    for suffix in (".csv", ".parquet"):
        report.save(tmp_path / f"r{suffix}")
        loaded = lorank.SpectralReport.load(tmp_path / f"r{suffix}")
        assert [row.name for row in loaded] == [without_surrogates, "second"]
        assert loaded.modules[1] == replace(report.modules[1], eigenvalues=loaded.modules[1].eigenvalues)


@given(names)
def test_cells_are_read_back(name: str) -> None:
    cell = to_cell(name)
    assert from_cell(cell) == name.encode("utf-8", "backslashreplace").decode()
    assert cell[0] not in "=+-@\t\r"


def test_cells_of_csv_are_no_formulas(tmp_path: Path) -> None:
    formulas = ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "layers.0"]
    report_of(*formulas).save(tmp_path / "r.csv")
    with (tmp_path / "r.csv").open(newline="", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = [*csv.DictReader(file)]
    assert [row["name"] for row in rows] == [*(f"'{text}" for text in formulas[:-1]), "layers.0"]
    assert not [cell for row in rows for cell in row.values() if re.match(r"[=+@\t\r]|-\D", cell)]
