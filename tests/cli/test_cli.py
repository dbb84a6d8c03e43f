"""The commands analyze, allocate and report: output, files, exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import lorank
from tests.support.command_line import EXECUTABLE, ok, run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    names = [f"model.layers.{i}.self_attn.{m}_proj" for i in range(3) for m in "qkvo"] + ["lm_head"]
    weights = {f"{name}.weight": rng.standard_normal((24, 32)).astype(np.float32) for name in names}
    weights["model.norm.weight"] = np.ones(32, dtype=np.float32)
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_analyze_prints_every_module_and_skipped_tensors(checkpoint: Path) -> None:
    text = ok("analyze", checkpoint)
    for name in ("model.layers.0.self_attn.q_proj", "lm_head", "24x32", "1 tensor skipped: 1-D tensor"):
        assert name in text
    assert "model.norm.weight" in ok("analyze", checkpoint, "--skipped")


def test_analyze_sorts_filters_and_limits(checkpoint: Path) -> None:
    content = json.loads(
        ok(
            "analyze",
            checkpoint,
            "-i",
            "q_proj,v_proj",
            "--exclude",
            "re:.*layers.2.*",
            "--sort",
            "alpha_hill",
            "-d",
            "--json",
        )
    )
    alphas = [row["alpha_hill"] for row in content["modules"]]
    assert len(alphas) == 4
    assert alphas == sorted(alphas, reverse=True)
    assert all(row["module"].endswith(("q_proj", "v_proj")) for row in content["modules"])
    top = json.loads(ok("analyze", checkpoint, "--top", 2, "--json"))
    assert len(top["modules"]) == 2


def test_json_equals_the_numbers_of_the_library(checkpoint: Path) -> None:
    content = json.loads(ok("analyze", checkpoint, "--json"))
    report = lorank.analyze(checkpoint)
    assert [row["alpha_hill"] for row in content["modules"]] == [row.alpha_hill for row in report]


def test_analyze_accepts_an_accuracy(checkpoint: Path) -> None:
    save_file({"w.weight": np.random.default_rng(0).standard_normal((150, 200))}, checkpoint)
    for accuracy in ("fast", "exact"):
        content = json.loads(ok("analyze", checkpoint, "--accuracy", accuracy, "--json"))
        assert content["accuracy"] == accuracy
        assert [row["accuracy"] for row in content["modules"]] == [accuracy]


@pytest.mark.parametrize("ending", ["json", "csv", "parquet"])
def test_saved_report_is_shown_and_used_for_allocation(checkpoint: Path, tmp_path: Path, ending: str) -> None:
    saved = tmp_path / f"report.{ending}"
    ok("analyze", checkpoint, "-o", saved)
    direct = json.loads(ok("analyze", checkpoint, "--json"))["modules"]
    assert json.loads(ok("report", saved, "--json"))["modules"] == direct
    options = ("--budget", "5k", "--json")
    from_report = json.loads(ok("allocate", saved, *options))["modules"]
    from_weights = json.loads(ok("allocate", checkpoint, *options))["modules"]
    assert from_report == from_weights


def test_existing_output_is_kept_without_overwrite(checkpoint: Path, tmp_path: Path) -> None:
    saved = tmp_path / "report.json"
    saved.write_text("precious")
    refused = run("analyze", checkpoint, "-o", saved)
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr
    assert saved.read_text() == "precious"
    ok("analyze", checkpoint, "-o", saved, "--overwrite")
    assert len(lorank.SpectralReport.load(saved)) == 13
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "notes.txt").write_text("precious")
    assert run("allocate", checkpoint, "--budget", "5k", "-o", folder).returncode == 2
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


def test_allocate_writes_a_config_for_peft(checkpoint: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = tmp_path / "adapter"
    text = ok(
        "allocate",
        checkpoint,
        "--method",
        "htsr",
        "--r-min",
        2,
        "--r-max",
        16,
        "--budget",
        "3k",
        "-o",
        folder,
    )
    allocation = lorank.RankAllocation.load(folder / "allocation.json")
    assert allocation.num_parameters <= 3000
    assert f"{allocation.num_parameters:,} parameters" in text
    config = peft.LoraConfig.from_pretrained(folder)
    assert set(config.target_modules) == set(allocation.ranks)
    assert config.base_model_name_or_path == str(checkpoint)
    from peft.utils.other import get_pattern_key

    for name, rank in allocation.ranks.items():
        assert config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r) == rank


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--budget", "30%"), {"modules": 12}),
        (("--avg-rank", "6"), {"average": 6.0}),
        (("--method", "uniform", "--avg-rank", "8"), {"ranks": {8}}),
        (("--targets", "q_proj", "--avg-rank", "5"), {"modules": 3}),
        (("--option", "granularity=block", "--r-max", "8"), {"modules": 12}),
    ],
)
def test_allocate_follows_its_options(
    checkpoint: Path, options: tuple[str, ...], expected: dict[str, object]
) -> None:
    content = json.loads(ok("allocate", checkpoint, *options, "--json"))
    ranks = [module["rank"] for module in content["modules"]]
    found = {"modules": len(ranks), "average": content["average_rank"], "ranks": set(ranks)}
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("analyze", "{missing}"), "no such file"),
        (("analyze", "{damaged}"), "damaged.safetensors"),
        (("analyze", "{checkpoint}", "-i", "nothing"), "no module is named 'nothing'"),
        (("analyze", "{checkpoint}", "-i", "re:nothing"), "none of its 13 matrices"),
        (("allocate", "{checkpoint}", "-t", "q_proj,typo"), "no module is named 'typo'"),
        (("allocate", "{checkpoint}", "--budget", "1"), "ranks from 4 to 32 of 12 modules cost"),
        (
            ("allocate", "{checkpoint}", "--avg-rank", "2"),
            "--avg-rank 2.0 is not feasible: ranks go from 4 to 32",
        ),
        (("allocate", "{checkpoint}", "--lora-alpha", "-3"), "lora_alpha must be a positive number"),
        (("report", "{checkpoint}"), "must end with"),
        (("report", "nope.parquet"), "nope.parquet: no such file"),
    ],
)
def test_errors_are_one_line_and_status_one(
    checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(checkpoint.read_bytes()[:500])
    places = {"checkpoint": checkpoint, "missing": tmp_path / "missing.safetensors", "damaged": damaged}
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("analyze",),
        ("analyze", "x.safetensors", "--threads", "0"),
        ("analyze", "x.safetensors", "-o", "report.txt"),
        ("analyze", "x.safetensors", "--accuracy", "sloppy"),
        ("allocate", "x.safetensors", "--budget", "1", "--avg-rank", "1"),
        ("allocate", "x.safetensors", "--option", "nonsense"),
        ("allocate", "x.safetensors", "--option", "mood=good"),
        ("allocate", "x.safetensors", "--option", "weight_alpha=x"),
        ("allocate", "x.safetensors", "--option", 'convention=["median"]'),
        ("allocate", "x.safetensors", "-m", "task", "--option", "estimate=best"),
        ("allocate", "x.safetensors", "-m", "uniform", "--option", "r_base=2.5"),
        ("allocate", "x.safetensors", "-m", "empirical", "--option", "blocks=("),
        ("allocate", "x.safetensors", "--placement", "attention", "--option", 'roles={"a": "head"}'),
        ("allocate", "x.safetensors", "--method", "magic"),
        ("allocate", "x.safetensors", "--budget", "a lot"),
        ("allocate", "x.safetensors", "--scale-rule", "wild"),
        ("allocate", "x.safetensors", "--r-min", "9", "--r-max", "8"),
        ("analyze", "x.safetensors", "--sort", "beauty"),
        ("analyze", "x.safetensors", "--columns", "beauty"),
        ("fly",),
    ],
)
def test_bad_usage_is_status_two(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_unknown_columns_are_answered_with_each_known_one_once() -> None:
    listed = run("report", "x.csv", "--sort", "beauty").stderr.partition("one of ")[2].partition(", not")[0]
    columns = " ".join(listed.split()).split(", ")
    assert {"name", "alpha_hill", "effective_rank", "k_star"} <= set(columns)
    assert len(set(columns)) == len(columns)


def test_unwritable_output_is_reported_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("analyze", tmp_path / "missing", "-o", tmp_path / "file" / "report.json")
    assert result.returncode == 1
    assert result.stderr == f"lorank: {tmp_path / 'file'}: is a file, not a folder\n"
    assert "Traceback" not in result.stderr


def test_every_column_is_readable_on_a_narrow_terminal(checkpoint: Path, tmp_path: Path) -> None:
    ok("analyze", checkpoint, "-o", tmp_path / "report.json")
    text = ok("report", tmp_path / "report.json", "--columns", "all")
    assert "model.layers.0.self_attn.q_proj" in text
    assert "…" not in text


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
@pytest.mark.parametrize(("width", "has_note"), [(80, True), (130, False)])
def test_narrow_terminal_names_hidden_columns(
    checkpoint: Path, tmp_path: Path, width: int, has_note: bool
) -> None:
    ok("analyze", checkpoint, "-o", tmp_path / "report.json")
    terminal, inside = os.openpty()
    # The output fits into the buffer of the terminal.
    subprocess.run(
        [str(EXECUTABLE), "report", str(tmp_path / "report.json"), "--top", "1"],
        stdout=inside,
        env=os.environ | {"COLUMNS": str(width), "NO_COLOR": "1"},
        check=True,
    )
    os.close(inside)
    text = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert "alpha" in text
    note = "not shown: powerlaw_distance, stable_rank, effective_rank, spectral_norm; use a wider terminal"
    assert (note in text) == has_note
    assert ("not shown" in text) == has_note


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in run("--debug", "analyze", tmp_path / "missing.safetensors").stderr


def test_matrix_without_a_spectrum_fails_the_run_and_keeps_other_rows(tmp_path: Path) -> None:
    bad = np.ones((4, 4), dtype=np.float32)
    bad[1, 2] = np.nan
    good = np.eye(4, dtype=np.float32) * np.arange(1, 5, dtype=np.float32)
    save_file({"a.weight": good, "b.weight": bad}, tmp_path / "model.safetensors")
    saved = tmp_path / "report.json"
    result = run("analyze", tmp_path, "-o", saved)
    assert result.returncode == 1
    assert "1 of 2 matrices have no spectrum; the first is b" in result.stderr
    row = next(line for line in result.stdout.splitlines() if line.split()[:1] == ["b"])
    assert row.split()[2:9] == ["-"] * 7  # Counts are missing, too, instead of zero.
    report = lorank.SpectralReport.load(saved)
    assert report["a"].spectral_norm == pytest.approx(4.0)
    assert "NaN" in report["b"].flags[0]


def test_resume_continues_from_the_journal(checkpoint: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    first = ok("analyze", checkpoint, "--resume", journal, "--json")
    assert ok("analyze", checkpoint, "--resume", journal, "--json") == first
    assert len(journal.read_text().splitlines()) == 14  # a header and 13 matrices


def test_report_becomes_a_self_contained_page(checkpoint: Path, tmp_path: Path) -> None:
    saved, page = tmp_path / "report.parquet", tmp_path / "report.html"
    ok("analyze", checkpoint, "--keep-eigenvalues", "-o", saved)
    ok("report", saved, "--html", page)
    text = page.read_text()
    assert "model.layers.2.self_attn.v_proj" in text
    assert "Marchenko-Pastur edge" in text
    assert "<script src=" not in text
    assert run("report", saved, "--html", page).returncode == 2


def test_version_is_printed() -> None:
    assert ok("--version").strip() == f"lorank {lorank.__version__}"
