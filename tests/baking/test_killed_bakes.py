"""Bakes that are killed at every step or at random moments leave the old model or the new one."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig

import lorank
from tests.baking.merged_models import saved_pair
from tests.support import tiny_models
from tests.support.kills import contents, forked_runs, kill_at_every_step, leftovers

BAKE = """
lorank.bake({base!r}, {adapter!r}, {scratch!r}, overwrite=True, threads=1, progress=False)
def work(folder):
    lorank.bake({base!r}, {adapter!r}, folder / "target", overwrite=True, threads=1, progress=False)
"""
RANDOM_KILLS = 20


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Return a program that bakes, the folder that it should write, and that of another model."""
    folder = tmp_path_factory.mktemp("killed")
    config = LoraConfig(r=4, target_modules=["q_proj"])
    base, adapter, _ = saved_pair(tiny_models.llama(), config, folder, max_shard_size="60KB")
    lorank.bake(base, adapter, folder / "new", progress=False)
    lorank.bake(base, adapter, folder / "old", [-2.0], progress=False)
    text = BAKE.format(base=str(base), adapter=str(adapter), scratch=str(folder / "scratch"))
    return text, folder / "new", folder / "old"


def test_bake_killed_at_every_step_is_whole(program: tuple[str, Path, Path], tmp_path: Path) -> None:
    text, new, old = program
    target = tmp_path / "target"
    outcomes = [contents(new), contents(old)]

    def prepare() -> None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(old, target)

    def check() -> None:
        assert contents(target) in outcomes

    kills = kill_at_every_step(text, tmp_path, prepare, check)
    assert kills > 20
    assert contents(target) == outcomes[0]
    assert not leftovers(tmp_path)


def test_new_bake_killed_at_every_step_is_whole(program: tuple[str, Path, Path], tmp_path: Path) -> None:
    text, new, _ = program
    target = tmp_path / "target"

    def check() -> None:
        assert not target.exists() or contents(target) == contents(new)

    kills = kill_at_every_step(
        text, tmp_path, lambda: shutil.rmtree(target, ignore_errors=True), check, every=5
    )
    assert kills > 10
    assert not leftovers(tmp_path)


@pytest.mark.slow  # Kills at every step run with all tests.
def test_bake_killed_at_random_moments_is_whole(program: tuple[str, Path, Path], tmp_path: Path) -> None:
    text, new, old = program
    target = tmp_path / "target"
    outcomes = [contents(new), contents(old)]
    draw = random.Random(0)  # No secret.
    with forked_runs(text) as run:
        killed = 0
        for _ in range(RANDOM_KILLS):
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(old, target)
            killed += run(tmp_path, 1 << 30, draw.uniform(0.002, 0.1)) == -9
            assert contents(target) in outcomes
            assert run(tmp_path, 1 << 30) == 0
            assert contents(target) == outcomes[0]
            assert not leftovers(tmp_path)
        assert killed


def test_ctrl_c_ends_a_bake_with_one_line(program: tuple[str, Path, Path], tmp_path: Path) -> None:
    """The signal comes within the first write of the core."""
    base, adapter = program[2].parent / "base", program[2].parent / "adapter"
    target = tmp_path / "target"
    code = f"""
import os, signal, sys
from lorank import _core
write = _core.write_safetensors
def interrupted(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    return write(*arguments)
_core.write_safetensors = interrupted
sys.argv = ["lorank", "bake", {str(base)!r}, {str(adapter)!r}, "-o", {str(target)!r}]
from lorank.cli import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode in (130, -signal.SIGINT), done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1
    assert not target.exists()
    assert not leftovers(tmp_path)
