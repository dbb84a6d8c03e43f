"""Writes that are killed at every step: all old files or all new ones, and nothing left by the next run."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import lorank
from tests.support.kills import NEVER, contents, forked_runs, kill_at_every_step, leftovers

SAVE = """
adapter = lorank.compress({source!r}, avg_rank=1, threads=1, progress=False)
def work(folder):
    adapter.save(folder / "target", overwrite=True, threads=1)
"""
FAMILY = """
from lorank.adapters.writing import write_family
members = lorank.family({source!r}, [1, 3], threads=1, progress=False)
members = {{f"rank-{{rank}}": member for rank, member in members.items()}}
def work(folder):
    write_family(members, folder / "target", "compact", None, overwrite=True, threads=1)
"""
ALLOCATE = """
import lorank.cli.allocate
allocation = lorank.allocate({model!r}, "uniform", r_max=6, progress=False, threads=1)
def work(folder):
    lorank.cli.allocate.write_allocation(folder / "target", allocation, allocation.lora_settings())
"""
TEXT = """
from lorank._internal.atomic import write_text
def work(folder):
    write_text(folder / "target" / "report.json", "new" * 1000)
"""
WITHOUT_EXCHANGE = """
import errno
def refuse(a, b):
    raise OSError(errno.EINVAL, "Invalid argument", str(a))
_core.exchange = refuse
"""


def tensors(rank: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    stem = "base_model.model.model.layers.0.self_attn.{}_proj.lora_{}.weight"
    sides = {"A": (rank, 16), "B": (16, rank)}
    return {
        stem.format(name, side): rng.standard_normal(shape).astype(np.float32)
        for name in "qv"
        for side, shape in sides.items()
    }


def adapter(folder: Path, rank: int = 4, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors(rank, seed), folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 7 * rank, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def occupied(folder: Path) -> Path:
    """Write an adapter among files and folders of other programs."""
    adapter(folder, rank=6, seed=1)
    for name in ("README.md", "tokenizer.json", "adapter_model.bin", "checkpoint-1/state/optimizer.pt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")
    (folder / "latest").symlink_to("checkpoint-1")
    (folder / "link.json").symlink_to("tokenizer.json")
    return folder


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """Make a folder in memory, if there is one: hundreds of runs wait for the disk otherwise."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return adapter(tmp_path / "source")


def shape(folder: Path) -> dict[str, str]:
    """Return the target of each link, and the kind of each other entry."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else f"{path.is_dir()}"
        for path in folder.rglob("*")
    }


class Trial:
    """A folder `target` in a folder of its own, its old content, and the content after a complete run."""

    def __init__(self, root: Path, work: str, old: Path | None) -> None:
        self.root, self.work, self.old = root, work, old
        self.target = root / "target"
        self.prepare()
        self.before = contents(self.target)
        with forked_runs(work) as run:
            assert run(root, NEVER) == 0
        self.after, self.shape = contents(self.target), shape(self.target)
        assert self.after != self.before
        self.runs = 0

    def prepare(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        if self.old:
            shutil.copytree(self.old, self.target, symlinks=True)
        self.inode = self.target.stat().st_ino if self.old else None
        self.runs = 0

    def check(self) -> None:
        """Check the state after a killed run, or after the second run."""
        self.runs += 1
        found = contents(self.target)
        if self.runs == 1:
            assert found in (self.before, self.after)
            return
        assert found == self.after
        assert not leftovers(self.root)
        assert shape(self.target) == self.shape
        assert self.inode in (None, self.target.stat().st_ino), "the folder itself stays"

    def kill(self, every: int = 1) -> int:
        return kill_at_every_step(self.work, self.root, self.prepare, self.check, every)


def test_saves_over_another_adapter_are_whole(source: Path, tmp_path: Path) -> None:
    old = occupied(tmp_path / "old")
    trial = Trial(tmp_path / "root", SAVE.format(source=str(source)), old)
    assert "adapter_model.bin" not in trial.after
    for name in ("README.md", "tokenizer.json", "latest/state/optimizer.pt"):
        assert trial.after[name] == trial.before[name]
    assert trial.kill(every=2) > 50


@pytest.mark.parametrize("is_empty", [True, False])
def test_first_saves_are_whole(is_empty: bool, source: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    trial = Trial(tmp_path / "root", SAVE.format(source=str(source)), tmp_path / "old" if is_empty else None)
    assert trial.kill() > 10


def test_families_are_whole(source: Path, tmp_path: Path) -> None:
    work = FAMILY.format(source=str(source))
    lorank_family = tmp_path / "family"
    with forked_runs(work.replace("[1, 3]", "[1, 2]")) as run:
        lorank_family.mkdir()
        assert run(lorank_family, NEVER) == 0
    old = lorank_family / "target"
    (old / "rank-1" / "tokenizer.json").write_text("mine")
    (old / "rank-1" / "README.md").write_text("mine")
    (old / "logs" / "a").mkdir(parents=True)
    (old / "logs" / "a" / "b").write_text("mine")
    trial = Trial(tmp_path / "root", work, old)
    assert {name.split("/")[0] for name in trial.after} == {"rank-1", "rank-3", "logs"}
    assert trial.after["rank-1/README.md"] == b"mine"
    assert not (trial.target / "rank-2").exists()
    assert trial.kill(every=4) > 60


def test_allocations_are_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = tmp_path / "model.safetensors"
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    save_file({name: rng.standard_normal((16, 16)).astype(np.float32) for name in names}, model)
    old = tmp_path / "old"
    old.mkdir()
    (old / "adapter_config.json").write_text("{}")
    (old / "allocation.json").write_text("{}")
    trial = Trial(tmp_path / "root", ALLOCATE.format(model=str(model)), old)
    assert trial.kill(every=3) > 25


def test_single_files_are_whole(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "report.json").write_text("old")
    assert Trial(tmp_path / "root", TEXT, old).kill() >= 5


class UncoveredTrial(Trial):
    """Saves where folders cannot be exchanged: readers refuse states between the old and the new one."""

    def check(self) -> None:
        self.runs += 1
        found = contents(self.target)
        if self.runs == 2:
            assert found == self.after
            assert not leftovers(self.root)
        elif "adapter_config.json" in found:
            pair = {"adapter_config.json", "adapter_model.safetensors"}
            assert {name: found[name] for name in pair} in (
                {name: self.before[name] for name in pair},
                {name: self.after[name] for name in pair},
            )
        else:
            with pytest.raises(lorank.FormatError, match="an interrupted save left some of its files"):
                lorank.LoraAdapter.load(self.target)
        for name in ("README.md", "tokenizer.json", "latest/state/optimizer.pt"):
            assert found[name] == self.before[name]


def test_saves_without_exchange_are_never_mixed(source: Path, tmp_path: Path) -> None:
    old = occupied(tmp_path / "old")
    work = WITHOUT_EXCHANGE + SAVE.format(source=str(source))
    assert UncoveredTrial(tmp_path / "root", work, old).kill(every=2) > 25
