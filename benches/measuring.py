"""Shared parts of the benches: runs in new processes, ratios of pairs, results as JSON."""

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
"""Bytes that are touched before a run: more than lorank uses, and less than the free memory (a gigabyte or
more) that a virtual machine may return to its host."""

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")

Run = dict[str, Any]


def weights_alone(model: Path, folder: Path) -> Path:
    """Return a link to a model's weights without `config.json`, so that lorank does not use transformers."""
    link = folder / "model.safetensors"
    link.symlink_to(model.resolve() / "model.safetensors")
    return link


def fresh(code: str, *arguments: object, threads: int) -> Run:
    """Run ``run(*arguments, threads)`` of some code in a new process.

    The clock starts a tenth of a second after imports. Before that, the threads of OpenBLAS, which start with
    NumPy, occupy a processor for some fifty milliseconds. A result with a key "seconds" replaces the measured
    time.

    Each run starts after memory was touched and freed, so that the virtual machine already owns those pages.
    The first use of 160 MB of other pages took 0.2 to 0.5 s, one to two times as long as the computation.
    """
    _use_memory()
    environment = os.environ | dict.fromkeys(_THREADS, str(threads)) | {"HF_HUB_OFFLINE": "1"}
    # Modules imported late are compiled once instead of in every process.
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
    """Run code that writes a folder, its last argument, with an idle disk; remove the folder.

    Files of earlier runs are flushed to disk before this run starts. Otherwise the kernel writes them during
    the run and occupies a processor, which delays two threads but not one. The folder is removed immediately,
    so that the next run can use the same memory.
    """
    os.sync()
    found = fresh(code, *arguments, threads=threads)
    shutil.rmtree(str(arguments[-1]))
    return found


def _use_memory() -> None:
    """Touch memory and free it."""
    with mmap.mmap(-1, _MEMORY) as memory:
        for page in range(0, _MEMORY, mmap.PAGESIZE):
            memory[page] = 1


def median(runs: Sequence[Run]) -> float:
    """Return the median seconds of runs."""
    return float(statistics.median(run["seconds"] for run in runs))


def compared(work: str, against: str, mine: Sequence[Run], theirs: Sequence[Run], **more: object) -> Run:
    """Return a row with medians and the median ratio of pairs, in which drifts of the machine cancel."""
    seconds = [median(runs) for runs in (mine, theirs)]
    ratios = [other["seconds"] / own["seconds"] for own, other in zip(mine, theirs, strict=True)]
    row = {"work": work, "against": against, "lorank": seconds[0], "peer": seconds[1]}
    return {**row, "ratio": statistics.median(ratios), "ratios": ratios, **more}


def show(row: Run) -> None:
    """Print a row immediately, so that long benches show their progress."""
    line = "{work:46} {lorank:9.4f} s   {against:38} {peer:9.3f} s {ratio:7.2f}x".format(**row)
    print(line, flush=True)


def parser(doc: str | None, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with the options of every bench."""
    found = argparse.ArgumentParser(description=doc)
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--repeats", type=int, default=repeats)
    found.add_argument("--json", type=Path, help="file for the numbers as JSON")
    return found


def write(path: Path | None, threads: int, rows: Sequence[Run]) -> None:
    """Write the rows as JSON if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"threads": threads, "rows": list(rows)}, indent=1) + "\n")
