"""Tasks, saved profiles and schedules on the command line: output, files, exit status."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

import lorank
from lorank import cli
from lorank.allocation import signals
from lorank.report.gradients import GradientReport, ModuleGradients, effective_rank
from lorank.report.loading import load_report
from lorank.report.tasks import ModuleTask, TaskReport
from lorank.sources.base import Skipped
from tests.support.command_line import EXECUTABLE
from tests.support.command_line import ok as started_ok

Array = npt.NDArray[np.float64]

NAMES = [
    f"layers.{i}.{m}"
    for i in range(4)
    for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use one thread, as threads on small matrices mostly wait for each other."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object) -> Result:
    """Run the entry point of the command in this process, which saves the start of Python."""
    out, err = io.StringIO(), io.StringIO()
    status: object = 0
    command = ["lorank", *map(str, arguments)]
    with mock.patch.object(sys, "argv", command), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code
    assert isinstance(status, int)
    return Result(status, out.getvalue(), err.getvalue())


def ok(*arguments: object) -> str:
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def samples(rows: int = 600, noise: float = 0.1) -> tuple[Array, Array]:
    """Return inputs of unit variance and targets with six singular values 4, 2, 1, ..."""
    rng = np.random.default_rng(0)
    left = np.linalg.qr(rng.standard_normal((24, 6)))[0]
    right = np.linalg.qr(rng.standard_normal((40, 6)))[0]
    X = rng.standard_normal((rows, 24))
    return X, X @ (left * 4 * 0.5 ** np.arange(6)) @ right.T + noise * rng.standard_normal((rows, 40))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    X, Y = samples()
    np.savez(tmp_path / "task.npz", X=X, Y=Y)
    return tmp_path / "task.npz"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    shapes = {"mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48)}
    weights = {
        f"{name}.weight": rng.standard_normal(shapes.get(name.split(".", 2)[2], (32, 32))).astype(np.float32)
        for name in NAMES
    }
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def gradients(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    rows = []
    for i, name in enumerate(NAMES):
        values = np.sort(rng.random(8) ** (1 + i % 4))[::-1] * (i != 3)
        rows.append(
            ModuleGradients(
                name=name,
                module=name,
                kind="linear",
                shape=(32, 32),
                effective_rank=effective_rank(values, 0.9),
                eigenvalues=values,
                flags=("no gradient reached it",) if i == 3 else (),
            )
        )
    report = GradientReport(rows, [Skipped("norm", (32,), "1-D tensor")], "tiny", 20_000, num_batches=8)
    report.save(tmp_path / "gradients.json")
    return tmp_path / "gradients.json"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [
        ModuleTask(
            name=name,
            module=name,
            kind="linear",
            shape=(32, 32),
            k_star=i + 1,
            predicted_rank=16 - i,
            rho=1.5 if i else np.nan,
            tau=0.25,
            noise=0.125,
            num_above=i,
            singular_values=np.linspace(1, 0, 32),
            predicted_r2=np.linspace(0, 1, 33),
        )
        for i, name in enumerate(NAMES)
    ]
    TaskReport(rows, source="tiny", num_parameters=20_000, num_samples=1234).save(tmp_path / "tasks.json")
    return tmp_path / "tasks.json"


def test_task_prints_the_numbers_of_the_library(archive: Path) -> None:
    found = lorank.task_spectrum(*samples())
    content = json.loads(ok("task", archive, "--json"))
    for name in ("k_star", "predicted_rank", "rho", "tau", "noise", "num_samples", "space"):
        assert content[name] == getattr(found, name), name
    assert content["piecewise"]["k_star"] == found.piecewise.k_star
    assert content["singular_values"] == found.singular_values.tolist()
    assert content["predicted_r2"] == found.predicted_r2.tolist()
    lines = [line.split() for line in ok("task", archive).splitlines()]
    assert ["rho", f"{found.rho:.4g}", "decay"] in [line[:3] for line in lines]
    assert ["K*", str(found.k_star), "rank"] in [line[:3] for line in lines]
    assert ["noise", f"{found.noise:.4g}", "standard"] in [line[:3] for line in lines]
    assert ["samples", "600"] in lines


def test_chart_has_a_bar_per_value_and_a_line_at_the_threshold(archive: Path) -> None:
    found = lorank.task_spectrum(*samples())
    text = started_ok("task", archive)
    assert max(map(len, text.splitlines())) <= 80
    (line,) = [line for line in text.splitlines() if line.lstrip().startswith("tau") and "│" in line]
    assert f"tau {found.tau:.3g} " in line
    assert line.count("█") == found.num_above == 6
    picture = [row.split("│")[1] for row in text.splitlines() if "│" in row]
    tops = [
        next(i for i, row in enumerate(picture) if row[2 * bar : 2 * bar + 1].strip()) for bar in range(6)
    ]
    # Each value is half the previous one, which gives equal steps on a logarithmic scale.
    assert tops[0] == 0
    assert np.ptp(np.diff(tops)) <= 1
    assert "\x1b" not in text


def test_curve_is_short_and_names_its_ranks(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    X = rng.standard_normal((400, 100))
    np.savez(tmp_path / "wide.npz", x=X, y=X @ rng.standard_normal((100, 100)))
    text = ok("task", tmp_path / "wide.npz")
    content = json.loads(ok("task", tmp_path / "wide.npz", "--json"))
    curve = text[text.index("predicted R2 by rank") :].splitlines()
    assert len(curve) < 25
    (named,) = [line for line in curve if "full rank" in line]
    assert named.split()[:2] == ["100", f"{content['predicted_r2'][100]:.4f}"]
    (named,) = [line for line in curve if "predicted rank" in line]
    assert int(named.split()[0]) == content["predicted_rank"]
    assert "a bar shows the largest of" in text


def test_task_follows_its_options(archive: Path) -> None:
    X, Y = samples()
    options = ("--noise", 0.5, "--leading", 3, "--space", "prediction", "--folds", 4, "-q")
    content = json.loads(ok("task", archive, *options, "--json"))
    found = lorank.task_spectrum(X, Y, noise=0.5, leading=3.0, space="prediction", folds=4)
    assert (content["tau"], content["leading"], content["space"]) == (found.tau, 3.0, "prediction")
    assert content["predicted_r2"] == found.predicted_r2.tolist()


def test_arrays_are_read_under_other_names_and_from_other_files(archive: Path, tmp_path: Path) -> None:
    X, Y = samples()
    expected = json.loads(ok("task", archive, "--json"))
    np.savez_compressed(tmp_path / "b.npz", x=X, Labels=Y, y=Y[:5])
    np.save(tmp_path / "X.npy", X)
    np.save(tmp_path / "Y.npy", np.asfortranarray(Y))
    for arguments in (
        (tmp_path / "b.npz", "--y", "labels"),
        (tmp_path / "X.npy", tmp_path / "Y.npy"),
    ):
        found = json.loads(ok("task", *arguments, "--json"))
        for name in ("singular_values", "predicted_r2"):
            assert found.pop(name) == pytest.approx(expected[name], rel=1e-12, abs=1e-12)
        same = ("k_star", "predicted_rank", "num_above", "num_samples", "space", "flags")
        assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    np.save(tmp_path / "y.npy", Y[:, 0] > 0)
    assert len(json.loads(ok("task", tmp_path / "X.npy", tmp_path / "y.npy", "--json"))["predicted_r2"]) == 2


def test_spectrum_without_values_above_the_noise_is_shown(tmp_path: Path) -> None:
    X, Y = samples(noise=100.0)
    np.savez(tmp_path / "noise.npz", X=X, Y=Y)
    np.savez(tmp_path / "zero.npz", X=X, Y=0 * Y)
    text = ok("task", tmp_path / "noise.npz")
    assert "fewer than two values above the noise: rho is undefined" in text
    assert json.loads(ok("task", tmp_path / "noise.npz", "--json"))["rho"] is None
    text = ok("task", tmp_path / "zero.npz")
    assert "every singular value is zero" in text
    assert "no output varies" in text
    assert "predicted R2 by rank" not in text


def test_terminal_without_unicode_gets_ascii(archive: Path) -> None:
    result = subprocess.run(
        [str(EXECUTABLE), "task", str(archive)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii()
    assert "#-#-#-#-#-#------" in result.stdout


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of files without a task."""
    folder = tmp_path_factory.mktemp("bad")
    X, Y = samples(50)
    np.savez(folder / "whole.npz", X=X, Y=Y)
    whole = (folder / "whole.npz").read_bytes()
    spoilt = Y.copy()
    spoilt[17, 3] = np.nan
    objects = np.array([None] * 50)
    np.savez(folder / "nan.npz", X=X, Y=spoilt)
    np.savez(folder / "keys.npz", inputs=X, targets=Y)
    np.savez(folder / "objects.npz", X=X, Y=objects)
    np.savez(folder / "rows.npz", X=X, Y=Y[:40])
    np.savez(folder / "empty.npz", X=X[:0], Y=Y[:0])
    np.savez(folder / "flat.npz", X=X[0], Y=Y)
    np.savez(folder / "complex.npz", X=X, Y=Y * 1j)
    np.savez(folder / "huge.npz", X=X * 1e200, Y=Y)
    (folder / "cut.npz").write_bytes(whole[:5000])
    (folder / "damaged.npz").write_bytes(whole[:5000] + bytes(100) + whole[5100:])
    (folder / "other.npz").write_bytes(b"nothing of the kind")
    np.save(folder / "single.dat", X)
    (folder / "single.dat.npy").rename(folder / "single.dat")
    np.save(folder / "X.npy", X)
    np.save(folder / "nan.npy", spoilt)
    np.save(folder / "objects.npy", objects)
    header = (folder / "X.npy").read_bytes()
    (folder / "cut.npy").write_bytes(header[:1000])
    (folder / "short.npy").write_bytes(header[:40])
    (folder / "code.npy").write_bytes(header[:10] + b"{((((" + header[15:])
    (folder / "endless.npy").write_bytes(
        header.replace(b"(50, 24), }" + b" " * 20, b"(50, 2" + b"0" * 22 + b"), }")
    )
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("missing.npz", "missing.npz: no such file"),
        ("nan.npz", "row 17 of Y in nan.npz holds NaN"),
        ("X.npy nan.npy", "row 17 of nan.npy holds NaN"),
        ("keys.npz", "no array is named 'X'; the file holds inputs, targets: choose one with --x"),
        ("keys.npz --x inputs", "no array is named 'Y'"),
        ("objects.npz", "Y in objects.npz: cannot be read: Object arrays"),
        ("X.npy objects.npy", "objects.npy: cannot be read"),
        ("rows.npz", "X in rows.npz has 50 rows and Y in rows.npz has 40"),
        ("empty.npz", "X in empty.npz: is empty"),
        ("flat.npz", "X in flat.npz: must have the shape (samples, features), not (24,)"),
        ("complex.npz", "Y in complex.npz: must hold real numbers, not complex128"),
        ("huge.npz", "row 0 of X in huge.npz holds values beyond"),
        ("cut.npz", "cut.npz: cannot be read"),
        ("damaged.npz", "X in damaged.npz: cannot be read: Bad CRC-32"),
        ("other.npz", "other.npz: is not an .npz file"),
        ("single.dat", "single.dat: holds one array"),
        ("X.npy other.npz.npy", "no such file"),
        ("X.npy cut.npy", "cut.npy: cannot be read"),
        ("X.npy short.npy", "short.npy: cannot be read"),
        ("X.npy code.npy", "code.npy: cannot be read"),
        ("X.npy endless.npy", "endless.npy: cannot be read"),
        (".", ".: is a folder: give one .npz file"),
    ],
)
def test_files_without_a_task_fail(
    bad_files: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    monkeypatch.chdir(bad_files)
    result = run("task", *arguments.split())
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "Missing argument"),
        ("X.npy", "two .npy files"),
        ("a.npz b.npz", "two .npy files"),
        ("a.npy b.npy c.npy", "two .npy files"),
        ("X.npy Y.npy --x inputs", "--x and --y name arrays"),
        ("a.npz --noise 0", "--noise must be positive"),
        ("a.npz --leading nan", "--leading must be positive"),
        ("a.npz --space outer", "--space must be one of weights, prediction"),
        ("a.npz --folds 1", "--folds"),
    ],
)
def test_bad_usage_of_task_is_reported_before_files_are_read(arguments: str, message: str) -> None:
    result = run("task", *arguments.split())
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_load_report_returns_the_saved_class(
    checkpoint: Path, gradients: Path, tasks: Path, tmp_path: Path
) -> None:
    spectra = lorank.analyze(checkpoint, progress=False)
    for ending in (".json", ".csv", ".parquet"):
        spectra.save(tmp_path / f"spectra{ending}")
        assert isinstance(load_report(tmp_path / f"spectra{ending}"), lorank.SpectralReport)
    assert isinstance(load_report(gradients), GradientReport)
    assert isinstance(load_report(str(tasks)), TaskReport)


def test_load_report_of_other_files_raises(checkpoint: Path, gradients: Path, tmp_path: Path) -> None:
    lorank.allocate(checkpoint, "uniform").save(tmp_path / "allocation.json")
    with pytest.raises(lorank.FormatError, match=r"allocation\.json: .* it is a 'lorank.RankAllocation'"):
        load_report(tmp_path / "allocation.json")
    content = json.loads(gradients.read_text())
    damaged = tmp_path / "damaged.json"
    for text in (
        "",
        "[]",
        "{}",
        "[" * 100_000,
        "\ud800".encode("utf-8", "surrogatepass").decode("latin1"),
        json.dumps({"format": ["lorank.GradientReport"]}),
        json.dumps({**content, "version": 99}),
        json.dumps({**content, "modules": [{}]}),
    ):
        damaged.write_text(text, "latin1")
        with pytest.raises(lorank.FormatError, match=r"damaged\.json"):
            load_report(damaged)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        load_report(tmp_path / "none.json")
    with pytest.raises(ValueError, match="must end with"):
        load_report(checkpoint)


def test_report_shows_gradients_and_tasks(gradients: Path, tasks: Path) -> None:
    text = ok("report", gradients)
    for word in ("tiny: 16 modules, 8 batches", "layers.3.mlp.down_proj", "32x32", "no gradient reached it"):
        assert word in text
    assert "1 tensor skipped: 1-D tensor" in text
    row = GradientReport.load(gradients)["layers.2.self_attn.q_proj"]
    (line,) = [line for line in text.splitlines() if row.name in line]
    assert line.split()[2:] == [str(int(row.effective_rank)), f"{row.mean_square:.4g}"]
    text = ok("report", tasks)
    assert "tiny: 16 modules, 1,234 samples" in text
    (line,) = [line for line in text.splitlines() if "layers.0.self_attn.q_proj" in line]
    assert line.split()[2:] == ["1", "16", "0", "-", "0.25", "0.125"]


def test_report_of_tasks_sorts_filters_and_limits(tasks: Path) -> None:
    options = ("-i", "q_proj", "--sort", "k_star", "-d", "--top", 2)
    content = json.loads(ok("report", tasks, *options, "--json"))
    assert content["format"] == "lorank.TaskReport"
    assert [row["k_star"] for row in content["modules"]] == [13, 9]
    undefined_last = json.loads(ok("report", tasks, "--sort", "rho", "-d", "--json"))["modules"]
    assert undefined_last[-1]["rho"] is None
    text = ok("report", tasks, "--columns", "noise,k_star", "-x", "mlp.up_proj")
    assert "layers.0.mlp.down_proj" in text
    assert "up_proj" not in text
    assert "tau" not in text


def test_unknown_columns_of_gradient_reports_are_bad_usage(gradients: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for arguments, message in (
        (("--sort", "alpha_hill"), "--sort must be one of name, effective_rank, mean_square"),
        (("--columns", "k_star"), "--columns must be one of effective_rank, mean_square"),
        (("--html", page), "--html draws spectra"),
    ):
        result = run("report", gradients, *arguments)
        assert result.returncode == 2
        assert message in result.stderr
    assert not page.exists()


def test_allocate_from_saved_profiles(gradients: Path, tasks: Path, tmp_path: Path) -> None:
    budget = ("--r-min", 2, "--r-max", 16, "--budget", "6k")
    content = json.loads(
        started_ok("allocate", gradients, "-m", "gard", *budget, "-o", tmp_path / "out", "--json")
    )
    expected = lorank.allocate(GradientReport.load(gradients), "gard", r_min=2, r_max=16, budget=6000)
    assert {row["name"]: row["rank"] for row in content["modules"]} == expected.ranks
    assert (tmp_path / "out" / "adapter_config.json").exists()
    assert "no gradient reached it" in ok("allocate", gradients, "-m", "gard", *budget)
    for estimate in ("k_star", "predicted_rank"):
        options = ("-m", "task", "--r-min", 1, "--option", f"estimate={estimate}", "--json")
        found = json.loads(ok("allocate", tasks, *options))["modules"]
        assert [row["rank"] for row in found] == [getattr(row, estimate) for row in TaskReport.load(tasks)]


@pytest.mark.parametrize("method", ["gard", "task"])
def test_methods_that_need_profiles_refuse_checkpoints(
    checkpoint: Path, gradients: Path, method: str
) -> None:
    for source in (checkpoint, "organisation/name"):
        result = run("allocate", source, "-m", method, "--avg-rank", 8)
        assert result.returncode == 2
        maker = {"gard": "lorank.profile_gradients", "task": "lorank.profile_tasks"}[method]
        assert f"in Python with {maker}(model, batches).save(" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    missing = run("allocate", gradients.with_name("missing.json"), "-m", method, "--avg-rank", 8)
    assert missing.returncode == 1
    assert "missing.json: no such file" in missing.stderr


def test_report_of_another_kind_fails(gradients: Path, tasks: Path) -> None:
    for source, method, message in (
        (tasks, "gard", "needs a report of gradients, and {} is a report of tasks"),
        (gradients, "htsr", "needs a report of spectra, and {} is a report of gradients"),
    ):
        result = run("allocate", source, "-m", method, "--avg-rank", 8)
        assert result.returncode == 2
        assert message.format(source) in result.stderr
    ok("allocate", tasks, "-m", "linear-decay")


def help_of(command: str) -> str:
    return subprocess.run(
        [str(EXECUTABLE), command, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout


def test_help_of_task_mentions_the_intercept() -> None:
    assert "without an intercept: centre X and Y first" in help_of("task")


def test_help_describes_every_method() -> None:
    shown = help_of("allocate")
    known = {"htsr", "uniform", "linear-decay", "attention-heavy", "empirical", "gard", "task"}
    assert known <= set(signals.names())
    for name in signals.names():
        method = signals.find(name)
        assert f"{name}: {method.summary}" in shown
        assert f"Options: {', '.join(method.options)}." in shown or not method.options
        # The documentation of the method describes every option that the command line lists.
        parameters = str(method.function.__doc__).partition("Parameters\n")[2].partition("Notes\n")[0]
        assert all(re.search(rf"^\s+(\w+, )*{option}\b", parameters, re.M) for option in method.options)
    assert "Give rank r_base - (r_base - r_min) i / (L - 1) in block i of L" in shown


def ranks(*arguments: object) -> dict[str, int]:
    return {row["name"]: row["rank"] for row in json.loads(ok("allocate", *arguments, "--json"))["modules"]}


def test_placement_selects_a_role(checkpoint: Path) -> None:
    attention = ranks(checkpoint, "-m", "uniform", "--placement", "attention")
    feed_forward = ranks(checkpoint, "-m", "uniform", "--placement", "feed-forward")
    assert set(attention) == {name for name in NAMES if "attn" in name}
    assert {*attention, *feed_forward} == set(NAMES)
    refused = run("allocate", "missing", "--placement", "head")
    assert refused.returncode == 2
    assert "--placement must be one of attention, feed-forward, all" in refused.stderr
    nothing = run("allocate", checkpoint, "-t", "q_proj", "--placement", "feed-forward")
    assert nothing.returncode == 1
    assert "placement 'feed-forward' selects none of the 4 modules" in nothing.stderr


def test_options_of_schedules_are_passed_on(tmp_path: Path) -> None:
    names = [f"net.units.{i}.{m}" for i in range(3) for m in ("mixer", "widen")]
    weights = {f"{name}.weight": np.ones((32, 32), dtype=np.float32) for name in names}
    save_file(weights, tmp_path / "model.safetensors")
    model, bounds = tmp_path / "model.safetensors", ("--r-min", 4, "--r-max", 32)
    found = ranks(
        model, "-m", "linear-decay", *bounds, "--option", "r_base=16", "--option", r"blocks=units\.(\d+)"
    )
    assert list(found.values()) == [16, 16, 10, 10, 4, 4]
    roles = 'roles={"mixer": "attention", "widen": "feed-forward"}'
    found = ranks(model, "-m", "attention-heavy", *bounds, "--option", roles, "--option", "r-base=24")
    assert list(found.values()) == [24, 12] * 3
    found = ranks(model, "-m", "uniform", "--placement", "attention", "--option", roles)
    assert list(found) == names[::2]
    for arguments, message in (
        (("-m", "linear-decay", "--option", "r_base=many"), "r_base must be a rank, not 'many'"),
        (("-m", "linear-decay"), "give blocks"),
        (("-m", "linear-decay", "--option", "blocks=("), "is not a regular expression"),
        (("-m", "uniform", "--option", roles), "method 'uniform' has no option 'roles': it has r_base"),
        (("-m", "uniform", "--option", "r_min=3"), "method 'uniform' has no option 'r_min'"),
        (("-m", "uniform", "--option", "placement=all"), "method 'uniform' has no option 'placement'"),
        (("-m", "attention-heavy", "--option", "roles=mixer"), "roles must map regular expressions"),
    ):
        result = run("allocate", model, *arguments)
        assert result.returncode == (2 if "--option" in arguments else 1)
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
