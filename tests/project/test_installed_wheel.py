"""The wheel, installed with its dependencies only into the oldest and the newest CPython of the machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
OLDEST = (
    3,
    int(re.search(r'^requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]),
)

IDENTITY = """
import platform, sys, sysconfig
usable = platform.python_implementation() == "CPython" and sys.version_info.releaselevel == "final"
# The stable ABI of the wheel needs the lock that free-threaded builds lack.
if usable and not sysconfig.get_config_var("Py_GIL_DISABLED"):
    print(*sys.version_info[:2])
"""

# Only live models need torch and transformers.
IMPORTS = """
import importlib, json, pkgutil, lorank
lacking = {}
for module in pkgutil.walk_packages(lorank.__path__, "lorank."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        lacking[module.name] = error.name
print(json.dumps({"file": lorank.__file__, "lacking": lacking}))
"""


def interpreters() -> dict[tuple[int, int], Path]:
    """Return the CPython interpreters on the path and under pyenv by version, from the oldest supported."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    on_path = [found for minor in range(100) if (found := shutil.which(f"python3.{minor}"))]
    found = {}
    for path in [sys.executable, *on_path, *sorted(pyenv.glob("versions/3.*/bin/python3"))]:
        result = subprocess.run([str(path), "-c", IDENTITY], capture_output=True, text=True, check=False)
        if result.returncode == 0 and result.stdout:
            major, minor = map(int, result.stdout.split())
            found[major, minor] = Path(path)
    return {version: found[version] for version in sorted(found) if version >= OLDEST}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cargo") is None:
        pytest.skip("building the wheel needs cargo")
    folder = tmp_path_factory.mktemp("wheel")
    # The build of the environment is reused, so only packing takes time.
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (path,) = folder.glob("lorank-*.whl")
    return path


@pytest.fixture(scope="module", params=["oldest", "newest"])
def scripts(
    request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Return the folder of executables of a fresh environment with the wheel and its dependencies."""
    available = interpreters()
    if request.param == "oldest" and OLDEST not in available:
        pytest.skip(f"no CPython {OLDEST[0]}.{OLDEST[1]} on the path or under pyenv")
    version = OLDEST if request.param == "oldest" else max(available)
    environment = tmp_path_factory.mktemp(f"python{version[0]}.{version[1]}")
    # Installing pip and compiling bytecode would take most of the time.
    subprocess.run([str(available[version]), "-m", "venv", "--without-pip", str(environment)], check=True)
    folder = environment / ("Scripts" if sys.platform == "win32" else "bin")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "python"), "install", "--quiet"]
    install = [*pip, "--no-compile", "--retries", "1", str(wheel)]
    result = subprocess.run(install, capture_output=True, text=True, check=False)
    if result.returncode and "connection broken" in result.stderr:
        pytest.skip("pip reaches no package registry")
    assert result.returncode == 0, result.stderr
    yield folder
    shutil.rmtree(environment)


def ok(command: Path, *arguments: object, folder: Path) -> str:
    # PYTHONPATH would hide the packages of the environment.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    line = [str(command), *map(str, arguments)]
    result = subprocess.run(line, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_module_imports_or_lacks_an_extra(scripts: Path, tmp_path: Path) -> None:
    found = json.loads(ok(scripts / "python", "-c", IMPORTS, folder=tmp_path))
    assert Path(found["file"]).is_relative_to(scripts.parent)
    live = ("lorank.profiling.", "lorank.training.")
    assert {name for name in found["lacking"] if not name.startswith(live)} == set()
    assert set(found["lacking"].values()) <= {"torch", "transformers"}


def test_commands_on_a_model_work(scripts: Path, tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((24, 32)).astype(np.float32)
    names = [f"model.layers.0.self_attn.{role}_proj" for role in "qv"]
    save_file(
        {f"{name}.weight": weight * (1 + i) for i, name in enumerate(names)}, tmp_path / "m.safetensors"
    )
    lorank = scripts / "lorank"
    assert "analyze" in ok(lorank, "--help", folder=tmp_path)
    report = json.loads(ok(lorank, "analyze", "m.safetensors", "--json", "-o", "r.json", folder=tmp_path))
    assert [row["name"] for row in report["modules"]] == names
    largest = np.linalg.svd(weight.astype(np.float64), compute_uv=False)[0]
    assert [row["spectral_norm"] for row in report["modules"]] == pytest.approx([largest, 2 * largest])
    assert names[0] in ok(lorank, "report", "r.json", folder=tmp_path)
    ok(lorank, "allocate", "r.json", "--method", "htsr", "--avg-rank", 4, "-o", "ranks", folder=tmp_path)
    assert (tmp_path / "ranks").exists()


def test_commands_on_an_adapter_work(scripts: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    factors = {"A.weight": (8, 32), "B.weight": (24, 8)}
    tensors = {stem + end: rng.standard_normal(shape).astype(np.float32) for end, shape in factors.items()}
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    lorank = scripts / "lorank"
    ok(lorank, "compress", "adapter", "--avg-rank", 3, "-o", "smaller", folder=tmp_path)
    (module,) = json.loads(ok(lorank, "info", "smaller", "--json", folder=tmp_path))["modules"]
    assert (module["rank"], module["shape"]) == (3, [24, 32])
    ok(lorank, "merge", "adapter", "smaller", "--energy", 0.9, "-o", "merged", folder=tmp_path)
