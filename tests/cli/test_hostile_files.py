"""Commands on folders of strangers: pipes for settings, exponential expressions, absurd names and numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import lorank
from lorank._internal import patterns
from lorank.modules import naming

QUERY = "model.layers.{}.self_attn.q_proj"


def adapter(folder: Path, names: Sequence[str] | None = None, **settings: Any) -> Path:
    """Write an adapter of rank 2."""
    folder.mkdir()
    names = names or [QUERY.format(i) for i in range(3)]
    shapes = {"lora_A": (2, 6), "lora_B": (4, 2)}
    rng = np.random.default_rng(0)
    save_file(
        {
            f"base_model.model.{name}.{factor}.weight": rng.standard_normal(shape, dtype=np.float32)
            for name in names
            for factor, shape in shapes.items()
        },
        folder / "adapter_model.safetensors",
    )
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **settings}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def model(folder: Path) -> Path:
    folder.mkdir()
    weights = np.random.default_rng(0).standard_normal((2, 8, 8), dtype=np.float32)
    save_file({f"{QUERY.format(i)}.weight": x for i, x in enumerate(weights)}, folder / "model.safetensors")
    return folder


def command(*arguments: object, limit: float = 5.0) -> subprocess.CompletedProcess[str]:
    """Run a command that must neither wait nor show a traceback, with a limit in seconds of expressions."""
    code = f"""
import lorank.cli
from lorank._internal import patterns
patterns._SECONDS = {limit}
lorank.cli.main()
"""
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode in (0, 1, 2)
    assert "Traceback" not in result.stderr
    return result


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


KINDS = [pipe, device, huge]


@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_adapters_are_regular_files(kind: Callable[[Path], None], tmp_path: Path) -> None:
    folder = adapter(tmp_path / "A")
    kind(folder / "adapter_config.json")
    with pytest.raises(OSError, match=r"regular file|larger") as caught:
        lorank.LoraAdapter.load(folder)
    assert caught.value.filename == str(folder / "adapter_config.json")
    for name in ("info", "check"):
        result = command(name, folder)
        assert result.returncode == 1
        assert "adapter_config.json" in result.stderr
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["config.json", "quantize_config.json"])
def test_settings_of_models_are_regular_files(
    kind: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    folder = model(tmp_path / "m")
    kind(folder / name)
    assert command("analyze", folder, "-q").returncode == 0


@pytest.mark.parametrize("kind", KINDS)
def test_indices_are_regular_files(kind: Callable[[Path], None], tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    kind(folder / "model.safetensors.index.json")
    with pytest.raises((OSError, lorank.FormatError), match=r"regular file|larger"):
        lorank.analyze(folder, progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_reports_and_allocations_are_regular_files(kind: Callable[[Path], None], tmp_path: Path) -> None:
    kind(tmp_path / "r.json")
    with pytest.raises((OSError, lorank.FormatError), match=r"regular file|larger"):
        lorank.SpectralReport.load(tmp_path / "r.json")
    with pytest.raises((OSError, lorank.FormatError), match=r"regular file|larger"):
        lorank.RankAllocation.load(tmp_path / "r.json")


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
def test_exponential_expressions_end(key: str, tmp_path: Path) -> None:
    value = {"(a|a)*#": 2} if key.endswith("pattern") else "model.layers.0.(a|a)*#"
    folder = adapter(tmp_path / "A", ["model.layers.0." + "a" * 40 + ".q_proj"], **{key: value})
    for arguments in (("info", folder), ("check", folder)):
        result = command(*arguments, limit=0.3)
        if result.returncode and "regular expression" in result.stderr:
            assert str(folder) in result.stderr
            assert key in result.stderr
            assert len(result.stderr.splitlines()) == 1


@pytest.mark.usefixtures("short_limit")
def test_exponential_expressions_of_modules_to_save_end(tmp_path: Path) -> None:
    names = ["model.layers.0." + "a" * 40 + ".q_proj"]
    folders = [adapter(tmp_path / name, names, modules_to_save=["(a|a)*#"]) for name in "AB"]
    with pytest.raises(lorank.FormatError, match="modules_to_save"):
        lorank.merge([lorank.LoraAdapter.load(folder) for folder in folders], avg_rank=1)
    folders = [adapter(tmp_path / name, names, modules_to_save=["("]) for name in "CD"]
    with pytest.raises(ValueError, match=r"modules_to_save.*not a regular expression"):
        lorank.merge([lorank.LoraAdapter.load(folder) for folder in folders], avg_rank=1)


BOMB = "(.|.)*#"


@pytest.fixture
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 0.3)


@pytest.mark.usefixtures("short_limit")
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("uniform", {"targets": BOMB}),
        ("attention-heavy", {"roles": {BOMB: "attention"}}),
        ("linear-decay", {"blocks": BOMB, "r_min": 1, "r_max": 4}),
    ],
    ids=["targets", "roles", "blocks"],
)
def test_exponential_options_of_allocations_end(method: Any, options: Any, tmp_path: Path) -> None:
    report = lorank.analyze(model(tmp_path / "m"), progress=False)
    with pytest.raises(lorank.FormatError, match=rf"{next(iter(options))}.*takes more than"):
        lorank.allocate(report, method=method, avg_rank=2, **options)


@pytest.mark.usefixtures("short_limit")
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_exponential_selections_end(option: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    with pytest.raises(lorank.FormatError, match=f"{option}.*takes more than"):
        lorank.analyze(folder, progress=False, **{option: BOMB})


@pytest.mark.parametrize(
    "name", ["a." * 50_000 + "q_proj", "a" * 100_000, "." * 100_000, "model" + ".layers.0" * 5000]
)
def test_absurd_names_raise_with_their_file(name: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "A", [name])
    with pytest.raises(lorank.FormatError, match=r"adapter_model\.safetensors: tensor .* a name has at most"):
        lorank.LoraAdapter.load(folder)
    save_file({f"{name}.weight": np.eye(4, dtype=np.float32)}, tmp_path / "m.safetensors")
    with pytest.raises(lorank.FormatError, match=r"m\.safetensors: tensor .* a name has at most"):
        lorank.analyze(tmp_path / "m.safetensors", progress=False)
    with pytest.raises(ValueError, match="a name has at most"):
        list(naming.suffixes("a." * 50_000))


@pytest.mark.parametrize("number", ["9" * 17, "9" * 500])
def test_huge_numbers_in_names(number: str, tmp_path: Path) -> None:
    names = [
        f"model.layers.{i}.{part}" for i in ("0", number) for part in ("mlp.experts.0.up_proj", "q_proj")
    ]
    names.append(f"model.layers.0.mlp.experts.{number}.up_proj")
    folder = adapter(tmp_path / "A", names, target_modules=["q_proj", "up_proj"])
    assert command("info", folder).returncode == 0
    assert len(lorank.check(folder)) > 5
