"""Commands on files of others: names, paths and settings are shown, and change nothing on the terminal."""

from __future__ import annotations

import io
import json
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
from hypothesis import HealthCheck, assume, given, settings
from rich.cells import cell_len

import lorank
from lorank import cli
from lorank._internal.printable import printable, printable_name
from lorank.cli import task
from tests.support.foreign_text import (
    TEXTS,
    foreign_names,
    foreign_texts,
    unprintable,
    write_adapter,
    write_model,
)

few = settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Result(NamedTuple):
    status: object
    out: str
    err: str


def run(*arguments: object) -> Result:
    """Run the command in this process, and check its output."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    command = ["lorank", *map(str, arguments)]
    with mock.patch.object(sys, "argv", command), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code or 0
    result = Result(status, out.getvalue(), err.getvalue())
    assert not unprintable(result.out + result.err)
    assert "Traceback" not in result.err
    return result


def in_column(name: str, out: str) -> bool:
    """Return True if a short name is shown in a row."""
    return printable_name(name).strip() in out


@few
@given(name=foreign_names)
def test_models(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("models")
    name = f"{name}.q_proj"
    model = write_model(folder / "m.safetensors", [name, "layers.0.q_proj"])
    other = write_model(folder / "n.safetensors", [name, "layers.0.q_proj"], (6, 9))
    shown = run("analyze", model, "-q", "--skipped", "-o", folder / "r.json")
    assert shown.status == 0
    if len(name) < 35 and "  " not in name:
        assert in_column(name, shown.out)
    assert run("report", folder / "r.json", "--sort", "name").status == 0
    printed = json.loads(run("analyze", model, "-q", "--json").out)
    assert {row["name"] for row in printed["modules"]} == {name, "layers.0.q_proj"}
    run("allocate", model, "-q", "-m", "uniform", "--option", "r_base=2", "--targets", "q_proj")
    run("allocate", model, "-q", "-o", folder / "allocated")
    assert run("extract", model, other, "-q", "-o", folder / "e", "--avg-rank", 1).status == 1


@few
@given(name=foreign_names, base=foreign_texts)
def test_adapters(name: str, base: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("adapters")
    names = [f"{name}.q_proj", "layers.0.q_proj"]
    adapter = write_adapter(folder / "a", names, base_model_name_or_path=base)
    other = write_adapter(folder / "b", names[1:], base_model_name_or_path=f"{base}2")
    assert run("info", adapter).status == 0
    shown = run("info", adapter, "--modules")
    if len(name) < 20 and "  " not in name and len(name.splitlines()) == 1:
        assert in_column(names[0], shown.out)
    if len(base) < 2000:
        assert f"base model: {printable(base).rstrip()}" in shown.out
    run("check", adapter)
    run("check", adapter, "--fix", folder / "fixed", "--for", "vLLM")
    assert run("compress", adapter, "-q", "--avg-rank", 1, "--modules", "-o", folder / "c").status == 0
    run("merge", adapter, other, "-q", "--avg-rank", 1, "-o", folder / "m")
    assert run("merge", adapter, other, "-q", "--force", "--energy", 1, "-o", folder / "m").status == 0
    assert run("family", adapter, "-q", "--avg-ranks", "1,2", "-o", folder / "f").status == 0
    run("analyze", adapter, "-q")


@few
@given(name=foreign_texts)
def test_arguments_and_paths(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    assume("\0" not in name)
    folder = tmp_path_factory.mktemp("paths")
    model = write_model(folder / "m.safetensors", ["layers.0.q_proj"])
    for arguments in (
        ("analyze", folder / "missing" / name),
        ("analyze", model, "--accuracy", name),
        ("analyze", model, "--include", f"re:({name}"),
        ("analyze", model, "--top", name),
        ("analyze", model, f"--{name}"),
        ("analyze", model, "-o", name),
        ("analyze", model, "more", name),
        ("allocate", model, "--budget", name),
        ("allocate", model, "--option", f"{name}={name}"),
        ("compress", name, "-o", folder / "o", "--avg-rank", "1"),
        ("merge", f"{name}:{name}", "-o", folder / "o", "--avg-rank", "1"),
        ("family", name, "-o", folder / "o", "--avg-ranks", name),
        ("task", f"{folder}/{name}.npz"),
        (name,),
    ):
        if not str(arguments[-1]).startswith(("--help", "--version", "--debug")):
            assert run(*arguments).status in (0, 1, 2)  # Some texts are numbers.
    valid = name.replace("/", "")[:40].encode()[:80].decode("utf-8", "ignore")
    if valid.strip("."):
        path = write_model(folder / f"{valid}.safetensors", ["layers.0.q_proj"])
        shown = run("analyze", path, "-q")
        assert shown.status == 0
        assert printable(valid).strip().split(" ")[-1] in shown.out.replace(" \n", "").replace("\n", "")


def test_paths_that_are_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "m.safetensors", ["layers.0.q_proj"])
    write_adapter(tmp_path / "a", ["layers.0.q_proj"])
    try:
        shutil.copy("m.safetensors", "m\udcff.safetensors")
    except OSError:
        pytest.skip("the file system takes names in UTF-8 only")
    shutil.copytree("a", "a\udcff")
    for arguments in (
        ("analyze", "m\udcff.safetensors", "-q", "-o", "r\udcfe.json"),
        ("analyze", "m\udcff.safetensors", "-q", "-o", "r\udcfe.csv"),
        ("analyze", "m\udcff.safetensors", "-q", "-o", "r\udcfe.parquet", "--resume", "j\udcfe"),
        ("report", "r\udcfe.parquet", "--html", "r\udcfe.html"),
        ("allocate", "m\udcff.safetensors", "-q", "-o", "al\udcfe", "--guess"),
        ("info", "a\udcff", "--json"),
        ("check", "a\udcff", "--fix", "f\udcfe", "--for", "vllm"),
        ("merge", "a\udcff", "a", "-q", "-o", "m\udcfe", "--avg-rank", "1"),
        ("info", "m\udcfe", "--modules"),
        ("family", "a\udcff", "-q", "-o", "fa\udcfe", "--avg-ranks", "1"),
    ):
        shown = run(*arguments)
        assert shown.status == 0, shown.err
    assert lorank.SpectralReport.load("r\udcfe.json").source == "m\udcff.safetensors"


@pytest.mark.parametrize("text", TEXTS)
def test_damaged_files(text: str, tmp_path: Path) -> None:
    head = json.dumps({text: {"dtype": "F32", "shape": [2], "data_offsets": [0, 100]}}).encode()
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(len(head).to_bytes(8, "little") + head)
    assert run("analyze", torn).status == 1
    (tmp_path / "r.json").write_text(json.dumps({"format": text, "version": text}))
    assert run("report", tmp_path / "r.json").status == 1
    adapter = write_adapter(tmp_path / "a", ["layers.0.q_proj"], peft_type=text)
    assert run("info", adapter).status == 1


def test_internal_errors_show_a_printable_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("q\x1b[2J")

    monkeypatch.setattr(task, "check_files", broken)
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", ["lorank", "--debug", "task", "x.npz"])
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert not unprintable(err.getvalue())
    assert r"q\x1b[2J" in err.getvalue()


def test_columns_are_aligned(tmp_path: Path) -> None:
    names = ["q", "漢字漢字", "e\u0301e\u0301", "😀", "[b]x", "\x1b\x1b", "ä"]
    model = write_model(tmp_path / "m.safetensors", names)
    lines = run("analyze", model, "-q", "--sort", "name").out.splitlines()
    rows = [line for line in lines if "6x8" in line]
    assert len(rows) == len(names)
    assert len({cell_len(row[: row.index("6x8")]) for row in rows}) == 1


def test_long_names_are_refused_in_a_short_line(tmp_path: Path) -> None:
    names = [f"layers.{i}.{'x' * 100_000}.{i}" for i in range(5)]
    model = write_model(tmp_path / "m.safetensors", names)
    adapter = write_adapter(tmp_path / "a", names)
    for arguments in (
        ("analyze", model, "-q", "--skipped"),
        ("info", adapter, "--modules"),
        ("compress", adapter, "-q", "--avg-rank", 1, "--modules", "-o", tmp_path / "c"),
    ):
        shown = run(*arguments)
        assert shown.status == 1
        assert "a name has at most 1,000 characters" in shown.err
        assert len(shown.err) < 1000
