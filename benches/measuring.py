"""What the benches share: runs in fresh processes, ratios pair by pair, results as JSON."""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HARNESS = """
import json, re, sys, time
def peak(): return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
time.sleep(0.1)
start = time.perf_counter()
result = run(*sys.argv[2:], int(sys.argv[1]))
seconds = time.perf_counter() - start
found = {"seconds": seconds, "peak": peak(), "grown": peak() - before, "result": result}
print("RESULT " + json.dumps(found))
"""

_MEMORY = 768 << 20
"""Bytes that were in use just before a run: more than lorank takes, and less than what makes a virtual
machine give free memory back to its host, which may happen to a gigabyte and more."""

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")

Run = dict[str, Any]


def weights_alone(model: Path, folder: Path) -> Path:
    """Return a link to a model's weights without the `config.json`, about which lorank asks transformers."""
    link = folder / "model.safetensors"
    link.symlink_to(model.resolve() / "model.safetensors")
    return link


def fresh(code: str, *arguments: object, threads: int) -> Run:
    """``run(*arguments, threads)`` of some code in a process of its own; the clock starts after imports.

    It starts a tenth of a second after them: the threads that importing NumPy starts (OpenBLAS's) spin on a
    processor of their own for some fifty milliseconds. A result with a key "seconds" is its own clock.

    The run begins with memory that was used just before. In a virtual machine, other pages are the host's to
    find: 160 MB of them took 0.2 s to half a second, as long as it takes to compute what they hold, or twice.
    """
    _use_memory()
    environment = os.environ | dict.fromkeys(_THREADS, str(threads)) | {"HF_HUB_OFFLINE": "1"}
    # Modules that are imported late are compiled once, as anywhere, not in every process.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", code + _HARNESS, str(threads), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    found: Run = json.loads(line.removeprefix("RESULT "))
    if isinstance(found["result"], dict) and "seconds" in found["result"]:
        found |= found["result"]
    return found


def fresh_to_folder(code: str, *arguments: object, threads: int) -> Run:
    """`fresh` for what writes a folder, its last argument, from a disk at rest.

    What earlier runs wrote is on disk before this one starts: the kernel writes it on a processor of its own,
    which takes it from two threads, but not from one. And the folder goes at once: were it to stay, the next
    would lie in other memory.
    """
    os.sync()
    found = fresh(code, *arguments, threads=threads)
    shutil.rmtree(str(arguments[-1]))
    return found


def _use_memory() -> None:
    """Use memory and give it back."""
    with mmap.mmap(-1, _MEMORY) as memory:
        for page in range(0, _MEMORY, mmap.PAGESIZE):
            memory[page] = 1


def median(runs: Sequence[Run]) -> float:
    """The median of their seconds."""
    return float(statistics.median(run["seconds"] for run in runs))


def compared(work: str, against: str, mine: Sequence[Run], theirs: Sequence[Run], **more: object) -> Run:
    """A row: medians, and the median of ratios pair by pair, so that a drift of the machine cancels."""
    seconds = [median(runs) for runs in (mine, theirs)]
    ratios = [other["seconds"] / own["seconds"] for own, other in zip(mine, theirs, strict=True)]
    row = {"work": work, "against": against, "lorank": seconds[0], "peer": seconds[1]}
    return {**row, "ratio": statistics.median(ratios), "ratios": ratios, **more}


def show(row: Run) -> None:
    """A row as a line, at once: what is long shows how far it is."""
    line = "{work:46} {lorank:9.4f} s   {against:38} {peer:9.3f} s {ratio:7.2f}x".format(**row)
    print(line, flush=True)


def parser(doc: str | None, repeats: int) -> argparse.ArgumentParser:
    """The options of every bench."""
    found = argparse.ArgumentParser(description=doc)
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--repeats", type=int, default=repeats)
    found.add_argument("--json", type=Path, help="also write the numbers here")
    return found


def write(path: Path | None, threads: int, rows: Sequence[Run]) -> None:
    """The rows as JSON, if somebody wants them."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"threads": threads, "rows": list(rows)}, indent=1) + "\n")
