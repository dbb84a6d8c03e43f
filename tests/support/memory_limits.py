"""Runs of lorank's functions in child processes whose address space is limited.

``python -m tests.support.memory_limits`` searches the least memory of every function, in about 1,200
children.
"""

import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import lorank

MIB = 1 << 20

#: Seconds after which a child counts as hung.
PATIENCE = 120.0

#: Limits in MiB of a short run: before, within and after the memory of most calls.
FEW = (0, 9, 40)

#: Most memory in MiB that a work is given.
LARGEST = 1 << 16

#: Errors that a lack of memory may raise, and what their message says. numpy and Python raise their own.
EXPECTED = (MemoryError, OSError, ImportError)

Work = Callable[[], object]


@dataclass(frozen=True)
class Outcome:
    """The end of a child process."""

    name: str
    extra: int
    end: str

    @property
    def is_right(self) -> bool:
        """True if the work succeeded, or failed with an error after which small work succeeded."""
        return self.end in {"done", "error"}


def run_limited(name: str, work: Work, extra: int) -> Outcome:
    """Run work in a child that may map `extra` bytes more than this process has mapped."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _child(work, extra, writer)
    os.close(writer)
    said = _said(reader, pid)
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if said is None:
        return Outcome(name, extra, "hang")
    return Outcome(name, extra, said if code == 0 and said else f"{code}: {said}")


def _said(reader: int, pid: int) -> str | None:
    said, end = b"", time.monotonic() + PATIENCE
    while True:
        if not select.select([reader], [], [], max(end - time.monotonic(), 0.0))[0]:
            os.kill(pid, signal.SIGKILL)
            return None
        if not (piece := os.read(reader, 4096)):
            return said.decode(errors="replace")
        said += piece


def _child(work: Work, extra: int, writer: int) -> None:
    said, code = b"", 3
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        small = np.eye(8)
        said = _tried(work, mapped + extra)
        # The limit stays: small work must succeed after an error.
        if said != b"done" and extra >= 9 * MIB:
            lorank.spectrum(small, threads=1)
        code = 0
    finally:
        if code:
            said += b", then " + repr(sys.exc_info()[1])[:500].encode()
        os.write(writer, said)
        os._exit(code)  # The child must not return to the caller.


def _tried(work: Work, limit: int) -> bytes:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        work()
    except EXPECTED:
        return b"error"
    return b"done"


def sweep(name: str, work: Work, below: int = 16, coarse: int = 24) -> Iterator[Outcome]:
    """Search the least MiB that suffice; run the work 1 MiB apart below them, and coarsely from 0."""
    low, high = 0, 1
    while (outcome := run_limited(name, work, high * MIB)).end != "done":
        yield outcome
        low, high = high, 2 * high
        if not outcome.is_right or high > LARGEST:
            return
    while high - low > 1:
        middle = (low + high) // 2
        yield (outcome := run_limited(name, work, middle * MIB))
        low, high = (low, middle) if outcome.end == "done" else (middle, high)
    step = high * MIB // coarse
    extras = {*(max(high - i, 0) * MIB for i in range(-2, below)), *(i * step for i in range(coarse))}
    for extra in sorted(extras):
        yield run_limited(name, work, extra)


def works(folder: Path, rows: int = 640, cols: int = 1000) -> dict[str, Work]:
    """Return calls of the public functions that allocate, with inputs in `folder`. Each has run once."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((rows, cols))
    tuned = weight + generator.standard_normal((rows, 4)) @ generator.standard_normal((4, cols))
    single, square = weight.astype(np.float32), weight[:, :rows].astype(np.float32)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)]
    save_file(dict.fromkeys(names, single), folder / "model.safetensors")
    save_file(dict.fromkeys(names, tuned.astype(np.float32)), folder / "tuned.safetensors")
    adapters = [_adapter(folder / f"adapter-{rank}", rows, cols, rank) for rank in (16, 64)]
    X, Y = generator.standard_normal((300, 200)), generator.standard_normal((300, 40))
    loaded = lorank.LoraAdapter.load(adapters[0])
    found: dict[str, Work] = {
        "spectrum float64": lambda: lorank.spectrum(weight, threads=1),
        "spectrum float64, 2 threads": lambda: lorank.spectrum(weight, threads=2),
        "spectrum float32, tall": lambda: lorank.spectrum(single.T, threads=1),
        "spectrum float32, square": lambda: lorank.spectrum(square, accuracy="fast", threads=8),
        "spectrum of few rows": lambda: lorank.spectrum(weight[:100], threads=1),
        "statistics": lambda: lorank.alpha_hill(weight.ravel() ** 2),
        "extract": lambda: lorank.extract(
            {"a.weight": weight}, {"a.weight": tuned}, avg_rank=4, progress=False
        ),
        "extract, float32": lambda: lorank.extract(
            folder / "model.safetensors", folder / "tuned.safetensors", avg_rank=4, progress=False
        ),
        "compress": lambda: lorank.compress(adapters[0], avg_rank=4, progress=False),
        "compress, rank 64": lambda: lorank.compress(adapters[1], avg_rank=4, progress=False),
        "merge": lambda: lorank.merge(adapters, avg_rank=4, progress=False),
        "elastic": lambda: lorank.elastic(adapters[1], progress=False),
        "family": lambda: lorank.family(adapters[1], avg_ranks=[2, 4], progress=False),
        "product_svd": lambda: lorank.product_svd(weight[:, :48], weight[:48]),
        "task_spectrum": lambda: lorank.task_spectrum(X, Y),
        "fit_ranks": lambda: lorank.fit_ranks(weight[0] ** 2, np.ones(cols, int), 0, 8, cols),
        "save": lambda: loaded.save(folder / f"saved-{os.getpid()}", profile="portable", dtype="float16"),
        "analyze, file of 3 matrices": lambda: _analyze(folder, "exact", 1),
    }
    for accuracy, threads in (("fast", 2), ("sampled", 8), ("exact", 8)):
        found[f"analyze, {accuracy}, {threads} threads"] = lambda a=accuracy, n=threads: _analyze(
            folder, a, n
        )
    for work in found.values():
        work()
    return found


def _analyze(folder: Path, accuracy: str, threads: int) -> object:
    return lorank.analyze(folder / "model.safetensors", accuracy=accuracy, threads=threads, progress=False)


def _adapter(folder: Path, rows: int, cols: int, rank: int) -> Path:
    generator = np.random.default_rng(rank)
    folder.mkdir()
    tensors = {}
    for i in range(3):
        name = f"base_model.model.model.layers.{i}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = generator.standard_normal((rank, cols)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = generator.standard_normal((rows, rank)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """Sweep all works, or those whose names contain an argument; report the ends of all children.

    After `--few`, run each work under three limits only.
    """
    few = arguments[:1] == ["--few"]
    parts = arguments[few:]
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for name, work in works(Path(folder)).items():
            if parts and not any(part in name for part in parts):
                continue
            limits = (run_limited(name, work, extra * MIB) for extra in FEW)
            found = list(limits if few else sweep(name, work))
            ends.update(outcome.end for outcome in found)
            least = min((outcome.extra for outcome in found if outcome.end == "done"), default=-MIB) // MIB
            _write(f"{name}: {len(found)} children, succeeds from {least} MiB")
            for outcome in found:
                if not outcome.is_right:
                    _write(f"  wrong at {outcome.extra / MIB:.2f} MiB: {outcome.end}")
    _write(f"{ends.total()} children: {dict(ends)}")
    return 0 if set(ends) <= {"done", "error"} else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
