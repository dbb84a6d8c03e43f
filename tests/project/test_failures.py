"""Errors for lack of memory, lack of threads and defects; only numerical problems flag a row instead."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import lorank
from lorank import _core
from lorank._internal import core_calls
from lorank._internal.staging import staged_folder
from lorank.analysis import matrices
from lorank.compression import extraction
from lorank.sources import Source, open_source

LARGE = "model.layers.0.mlp.up_proj"
SMALL = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
NAN = "model.layers.1.mlp.up_proj"
MEBIBYTE = 1 << 20

LIMITED = """
import re, resource, lorank.cli
from lorank import _core

def limit(call):
    def limited(*arguments):
        held = int(re.search(r"VmSize:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) << 10
        resource.setrlimit(resource.RLIMIT_AS, (held + {spare}, resource.RLIM_INFINITY))
        return call(*arguments)
    return limited

for name in ("analyze", "decompose", "subtract"):
    setattr(_core, name, limit(getattr(_core, name)))
lorank.cli.main()
"""
DEFECTIVE = """
import sys
from dataclasses import replace
import lorank.cli
from lorank import _core
from lorank.analysis import matrices
source = matrices.open_source(sys.argv[2])
load = lambda: _core._panicking_matrix(16, 16)
matrices.open_source = lambda _: replace(source, matrices=(replace(source.matrices[0], load=load),))
lorank.cli.main()
"""
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the size of a process from /proc"
)


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in its own process."""
    # glibc reserves 128 MiB of addresses for each arena, which count towards the limit.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "RUST_BACKTRACE": "0"}
    line = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=environment)


def limited(spare: int, *arguments: object) -> str:
    """Return the error line of a command that fails because the memory of the core is limited."""
    result = run(LIMITED.replace("{spare}", str(spare)), *arguments)
    assert result.returncode == 1, result
    (line,) = result.stderr.splitlines()
    return line


def weights(*shape: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(shape)
    tensors = {name: rng.standard_normal((16, 16)).astype(np.float32) for name in SMALL}
    tensors[LARGE] = rng.standard_normal(shape).astype(np.float32)
    tensors[NAN] = np.full((8, 8), np.nan, dtype=np.float32)
    return {f"{name}.weight": tensor for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a file whose largest matrix has 16 MiB."""
    path = tmp_path_factory.mktemp("large") / "model.safetensors"
    save_file(weights(1024, 4096), path)
    return path


@pytest.fixture(scope="module")
def clean(checkpoint: Path) -> lorank.SpectralReport:
    """Return the report of a run without limits."""
    return lorank.analyze(checkpoint)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    save_file(weights(32, 24), tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def rows(journal: Path) -> dict[str, list[str]]:
    """Return the flags of every matrix in a journal."""
    lines = map(json.loads, journal.read_text().splitlines()[1:])
    return {row["name"]: row["flags"] for row in lines}


@needs_proc
@pytest.mark.parametrize(
    ("spare", "purpose"), [(12, "tensor `.*up_proj.weight` of .*model.safetensors"), (24, "a decomposition")]
)
def test_matrix_without_memory_is_tried_again(
    spare: int, purpose: str, checkpoint: Path, clean: lorank.SpectralReport, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    line = limited(spare * MEBIBYTE, "analyze", checkpoint, "--threads", 1, "--resume", journal)
    assert re.match(rf"lorank: module '{LARGE}': no memory for the \d+ bytes of {purpose}; 1 of 5", line)
    assert str(journal) in line
    flags = rows(journal)
    assert set(flags) == {*SMALL, NAN}
    assert flags.pop(NAN)
    assert not any(flags.values())
    assert lorank.analyze(checkpoint, resume=journal, threads=1) == clean
    assert set(rows(journal)) == {*SMALL, NAN, LARGE}


@needs_proc
def test_lack_of_memory_without_a_journal_ends_the_run(checkpoint: Path) -> None:
    line = limited(12 * MEBIBYTE, "analyze", checkpoint, "--threads", 1)
    assert re.fullmatch(rf"lorank: module '{LARGE}': no memory for the \d+ bytes of .*", line)


@needs_proc
def test_lack_of_memory_ends_commands_on_updates(checkpoint: Path, tmp_path: Path) -> None:
    save_file(
        weights(1024, 4096) | {f"{SMALL[0]}.weight": np.eye(16, dtype=np.float32)}, tmp_path / "b.safetensors"
    )
    chosen = ("--avg-rank", 2, "--threads", 1, "-o", tmp_path / "out")
    line = limited(
        12 * MEBIBYTE, "extract", checkpoint, tmp_path / "b.safetensors", "-x", "re:.*1.mlp.*", *chosen
    )
    assert re.match(rf"lorank: module '{LARGE}': no memory for the 33554432 bytes of a difference", line)
    adapter = saved_adapter(tmp_path, width=1 << 19)
    for command in ("compress", "merge"):
        line = limited(12 * MEBIBYTE, command, adapter, *chosen)
        assert re.match(rf"lorank: module '{SMALL[0]}': no memory for the \d+ bytes of ", line)
    assert not (tmp_path / "out").exists()


@needs_proc
def test_lack_of_stacks_is_an_error(small: Path, tmp_path: Path) -> None:
    # Each thread takes 2 MiB of addresses for its stack.
    journal = tmp_path / "journal"
    line = limited(8 * MEBIBYTE, "analyze", small, "--threads", 200, "--resume", journal)
    # One for each of the five matrices.
    assert re.match("lorank: (could not start 5 threads: |no memory for .* of the stacks of threads)", line)
    line = limited(MEBIBYTE, "analyze", small, "--threads", 1, "--resume", journal)
    assert re.match("lorank: (could not start 1 thread: |no memory for .* of the stacks of threads)", line)
    assert rows(journal) == {}
    assert len(lorank.analyze(small, resume=journal)) == 5


def saved_adapter(folder: Path, width: int) -> Path:
    rng = np.random.default_rng(0)
    target = folder / "adapter"
    target.mkdir()
    factors = {"A": rng.standard_normal((8, width)), "B": rng.standard_normal((16, 8))}
    stem = f"base_model.model.{SMALL[0]}.lora_"
    tensors = {f"{stem}{side}.weight": value.astype(np.float32) for side, value in factors.items()}
    save_file(tensors, target / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


def with_defects(path: Path, *names: str) -> Callable[[object], Source]:
    """Return a replacement of `open_source` in which the named matrices cause panics."""
    source = open_source(path)
    found = list(source.matrices)
    for i, matrix in enumerate(found):
        if matrix.info.name in names:
            panicking = _core._panicking_matrix(*matrix.info.shape)
            found[i] = replace(matrix, load=lambda panicking=panicking: panicking)
    return lambda _: replace(source, matrices=tuple(found))


REPORTED = r"internal error: a defect, in two lines at \S+\.rs:\d+:\d+ \(.*please report this line.*\)"


def test_defect_raises_with_a_request_to_report_it(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "open_source", with_defects(small, SMALL[1]))
    with pytest.raises(lorank.LorankError, match=f"^module '{SMALL[1]}': {REPORTED}$") as error:
        lorank.analyze(small)
    assert type(error.value) is lorank.LorankError


def test_defect_is_not_written_to_the_journal(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "journal"
    with monkeypatch.context() as patched:
        patched.setattr(matrices, "open_source", with_defects(small, LARGE, SMALL[1]))
        with pytest.raises(lorank.LorankError, match=f"{REPORTED}; 2 of 5 matrices failed, .*{journal}"):
            lorank.analyze(small, resume=journal, threads=1)
    assert set(rows(journal)) == {SMALL[0], SMALL[2], NAN}
    assert lorank.analyze(small, resume=journal) == lorank.analyze(small)


def test_defect_prints_one_line(small: Path) -> None:
    result = run(DEFECTIVE, "analyze", small)
    assert result.returncode == 1
    assert re.fullmatch(f"lorank: module '{LARGE}': {REPORTED}\n", result.stderr)
    assert not result.stdout


def test_defects_of_updates_name_their_module(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "open_source", with_defects(small, SMALL[2]))
    with pytest.raises(lorank.LorankError, match=f"^module '{SMALL[2]}': {REPORTED}$"):
        lorank.extract(small, small, avg_rank=2, exclude=["layers.1.mlp.up_proj"])
    adapter = lorank.LoraAdapter.load(saved_adapter(tmp_path, width=16))
    module = adapter.modules[SMALL[0]]
    panicking = [(_core._panicking_matrix(16, 8), _core._panicking_matrix(8, 16))]
    broken = replace(adapter, modules={SMALL[0]: replace(module, factors=lambda: panicking)})
    for operation in (
        lambda: lorank.compress(broken, avg_rank=2),
        lambda: lorank.merge([adapter, broken], avg_rank=2),
    ):
        with pytest.raises(lorank.LorankError, match=f"^module '{SMALL[0]}': {REPORTED}$"):
            operation()


def test_name_is_prepended_to_messages_of_any_class() -> None:
    braces = "a.{b}"
    for error in (MemoryError("none"), OSError("none"), lorank.LorankError("none"), ValueError("none")):
        found = core_calls.named(error, braces)
        assert (type(found), str(found)) == (type(error), "module 'a.{b}': none")
    found = core_calls.named(FileNotFoundError(errno.ENOENT, "No such file", "f.safetensors"), "a")
    assert isinstance(found, FileNotFoundError)
    assert (found.errno, found.strerror, found.filename) == (
        errno.ENOENT,
        "module 'a': No such file",
        "f.safetensors",
    )


@pytest.mark.parametrize("kind", [MemoryError, lorank.LorankError, lorank.NumericalError])
def test_write_errors_name_the_final_file(kind: type[Exception], tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    with pytest.raises(kind, match=f"^the 8 bytes of {folder}/a$"), staged_folder(folder) as staging:
        raise kind(f"the 8 bytes of {staging}/a")
    # NumPy's subclass of MemoryError has no constructor that takes a message.
    with pytest.raises(MemoryError, match="Unable to allocate"), staged_folder(folder):
        np.empty(1 << 58)
    assert not list(tmp_path.iterdir())
