"""Every option of every command with absurd values: status 1 or 2 with one line, and never a traceback.

The options are those of the commands themselves, so that new ones are tried, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import click
import numpy as np
import pytest
import typer
from safetensors.numpy import save_file

import lorank
from lorank.cli import app
from tests.support.command_line import assert_one_line

NUMBERS = ["-1", "0", "1e400", "nan", "inf", "-inf", "1.5", "9" * 25, "1e30", "1_000", "٣", "0x10", "1e-320"]
TEXTS = [
    "",
    " ",
    "x",
    ",",
    ",,a",
    "re:",
    "re:(",
    "re:.*",
    "[]",
    "{}",
    "a=b",
    "=",
    "roles={",
    "r_base=[[[[1]]]]",
]
TEXTS += [
    "r_base=" + "[" * 100_000,
    "r_base=1e400",
    "blocks=NaN",
    "50%",
    "nan%",
    "1e308%",
    "-5%",
    "5e99",
    "1.5k",
]
PATHS = ["/dev/null", "/proc/nothing/here", ".", "..", "x" * 5000, "a\nb.json", "missing/x.json", "~", "-"]
ABSURD = [*NUMBERS, *TEXTS, *PATHS]

COMMANDS: dict[str, click.Command] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Return the smallest working arguments of each command."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    for model in ("base", "tuned"):
        weights = {f"{name}.weight": rng.standard_normal((8, 12)).astype(np.float32) for name in names}
        save_file(weights, folder / f"{model}.safetensors")
    (folder / "adapter").mkdir()
    factors = {}
    for name in names:
        factors[f"base_model.model.{name}.lora_A.weight"] = rng.standard_normal((4, 12)).astype(np.float32)
        factors[f"base_model.model.{name}.lora_B.weight"] = rng.standard_normal((8, 4)).astype(np.float32)
    save_file(factors, folder / "adapter/adapter_model.safetensors")
    settings = '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}'
    (folder / "adapter/adapter_config.json").write_text(settings)
    lorank.analyze(folder / "base.safetensors", progress=False).save(folder / "report.json")
    samples = rng.standard_normal((40, 3))
    np.savez(folder / "samples.npz", X=samples, Y=samples @ np.ones((3, 2)))
    base, tuned, adapter = (
        str(folder / name) for name in ("base.safetensors", "tuned.safetensors", "adapter")
    )
    baked = str(lorank.bake(base, adapter, folder / "baked", progress=False).path)
    amount = ["--avg-rank", "1", "-o", "out", "--overwrite", "-q"]
    return {
        "analyze": [base, "-q"],
        "report": [str(folder / "report.json")],
        "allocate": [base, "--avg-rank", "4", "-q"],
        "task": [str(folder / "samples.npz"), "-q"],
        "compress": [adapter, *amount],
        "family": [adapter, "--avg-ranks", "1,2", "-o", "out", "--overwrite", "-q"],
        "merge": [adapter, adapter, *amount],
        "compare": [base, tuned, "-q"],
        "extract": [base, tuned, "--guess", *amount],
        "bake": [base, adapter, "-o", "out", "--overwrite", "-q"],
        "verify": [base, adapter, baked, "-q"],
        "convert": [adapter, "--to", "mlx", "-o", "out", "--overwrite"],
        "check": [adapter],
        "info": [adapter],
    }


def attempts(command: str, working: list[str]) -> Iterator[list[str]]:
    """Yield the arguments of a command with one of them missing, doubled or absurd."""
    for parameter in COMMANDS[command].params:
        if isinstance(parameter, click.Argument) or getattr(parameter, "is_flag", False):
            flags = [] if isinstance(parameter, click.Argument) else [parameter.opts[0]]
            yield [*working, *flags]
            yield [*working, *flags, *flags]
            if not flags:
                yield from ([value, *working[1:]] for value in ABSURD)
            continue
        option = parameter.opts[0]
        yield [*working, option]
        for value in ABSURD:
            yield [*working, f"{option}={value}"]
            yield [*working, f"{option}={value}", f"{option}={value}", "--json"]


def test_each_command_is_tried(files: dict[str, list[str]]) -> None:
    assert set(files) == set(COMMANDS)


@pytest.mark.parametrize("step", [173, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("command", COMMANDS)
def test_absurd_options_end_with_one_line(
    command: str, step: int, files: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert assert_one_line([command, *files[command]]) == 0
    for arguments in islice(attempts(command, files[command]), 0, None, step):
        assert_one_line([command, *arguments])


@pytest.mark.parametrize("option", ["--avg-rank", "--max-rank", "--budget"])
@pytest.mark.parametrize("command", ["compress", "merge", "extract"])
def test_limits_beyond_all_ranks_keep_everything(
    command: str, option: str, files: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    inputs = [argument for argument in files[command] if argument.startswith("/")]
    others = ["--energy", "1"] if option == "--max-rank" else []
    arguments = [
        command,
        *inputs,
        *others,
        "-o",
        "out",
        "--overwrite",
        *(["--guess"] * (command == "extract")),
    ]
    for scope in ["global"] if option == "--budget" else ["global", "module"]:
        made = []
        for value in ("1000", "9" * 25):
            assert assert_one_line([*arguments, option, value, "--scope", scope, "-q"]) == 0
            made.append(lorank.LoraAdapter.load("out").ranks)
        assert made[0] == made[1]


@pytest.mark.parametrize("budget", ["1.5", "0.0001k", "5e99", "1" * 40, "٣", "nan", "1e400", "-1"])
def test_budgets_that_are_not_whole_numbers_are_refused(budget: str, files: dict[str, list[str]]) -> None:
    model = files["allocate"][0]
    assert assert_one_line(["allocate", model, f"--budget={budget}"]) in (1, 2)
    with pytest.raises(ValueError, match="budget"):
        lorank.allocate(model, budget=budget, progress=False)
