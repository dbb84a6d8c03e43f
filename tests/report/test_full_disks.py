"""A disk without space: the error names the file, the old file stays, and nothing else is left behind."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

import lorank
from lorank.peft_format import config_file
from lorank.training.dynamic_ranks import RankUpdate
from lorank.training.rank_table import RankTable
from lorank.training.state import write_state
from tests.support.command_line import outcome
from tests.support.saved_results import WEIGHTS, gard_state, gradients, spectral, tasks


@contextmanager
def file_size(limit: int) -> Iterator[None]:
    """Limit the size of files that the process writes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def allocation() -> lorank.RankAllocation:
    return lorank.allocate(spectral(), avg_rank=2, r_min=1, progress=False)


def save(result: Any, path: Path) -> None:
    result.save(path)


# Names of files, with what is written and how.
WRITERS: dict[str, tuple[Callable[[], Any], Callable[[Any, Path], object]]] = {
    "report.json": (spectral, save),
    "report.csv": (spectral, save),
    "report.parquet": (spectral, save),
    "report.html": (spectral, lorank.SpectralReport.to_html),
    "gradients.json": (gradients, save),
    "tasks.json": (tasks, save),
    "ranks.json": (allocation, save),
    "adapter_config.json": (dict, lambda settings, path: config_file.write(path.parent, settings, "x" * 100)),
    "lorank_gard.safetensors": (gard_state, write_state),
}


@pytest.mark.parametrize("limit", [0, 100])
@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_names_the_file(name: str, limit: int, tmp_path: Path) -> None:
    path = tmp_path / name
    make, write = WRITERS[name]
    result = make()
    path.write_text("old")
    with pytest.raises(OSError, match="File too large") as error, file_size(limit):
        write(result, path)
    assert error.value.errno == errno.EFBIG
    assert error.value.filename == str(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


def test_full_disk_names_the_table_of_ranks(tmp_path: Path) -> None:
    update = RankUpdate(4, {"layers.0.q_proj": 2, "layers.1.q_proj": 3}, gradients(), {}, 100)
    RankTable(tmp_path).append(update)
    with pytest.raises(OSError, match="File too large") as error, file_size(100):
        RankTable(tmp_path).append(update)
    assert error.value.filename == str(tmp_path / "lora_ranks.csv")
    RankTable(tmp_path).drop_rows_after(4)


@pytest.mark.parametrize(
    "arguments", [["-o", "saved.json"], ["-o", "saved.parquet"], ["--resume", "saved.jsonl"]]
)
def test_full_disk_is_one_line(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    with file_size(50):
        status, _, errors = outcome("analyze", "model.safetensors", "-q", *arguments)
    assert status == 1
    assert errors == f"lorank: {arguments[1]}: file too large\n"
