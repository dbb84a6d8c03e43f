"""Full disks, many threads and forks: ``python -m tests.soak.resources NAME TIMES``."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

import lorank
from tests.soak.calls import adapter_folder, weights
from tests.support.kills import contents, leftovers


def full_disk(times: int) -> dict[str, int]:
    """Limit the size of files while an adapter is replaced: the old one stays, or the new one is whole."""
    counts = {"refused": 0, "written": 0}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = adapter_folder(folder, rank=8)
        small = lorank.compress(source, avg_rank=2, progress=False)
        large = lorank.compress(source, avg_rank=6, progress=False)
        large.save(folder / "out")
        states = [contents(folder / "out")]
        small.save(folder / "out", overwrite=True)
        states.append(contents(folder / "out"))
        largest = max(map(len, states[0].values()))
        for step in range(times):
            present, other = (large, small) if step % 2 else (small, large)
            present.save(folder / "out", overwrite=True)
            before = contents(folder / "out")
            save = partial(_limited_save, other, folder / "out", 1 + step * largest // times)
            status = _child(save)
            assert status in (0, 3), status
            found = contents(folder / "out")
            assert found in states
            assert status == 0 or found == before
            assert not leftovers(folder)
            counts["written" if status == 0 else "refused"] += 1
    return counts


def _limited_save(adapter: lorank.LoraAdapter, target: Path, limit: int) -> int:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        adapter.save(target, overwrite=True)
    except OSError as error:
        return 3 if str(target) in str(error) else 4
    return 0


def threads(times: int) -> dict[str, int]:
    """Compute the same spectra in sixteen threads at once, with equal bits."""
    matrix = np.random.default_rng(0).standard_normal((48, 64))
    expected = lorank.spectrum(matrix).tobytes()

    def is_equal(_index: int) -> bool:
        return lorank.spectrum(matrix, threads=2).tobytes() == expected

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(is_equal, range(times)))
    return {"calls": times}


def forks(times: int) -> dict[str, int]:
    """Fork while another thread computes; each child analyses a model with two threads."""
    matrices, stop = weights(), threading.Event()
    expected = [row.alpha_hill for row in lorank.analyze(matrices, progress=False).modules]

    def busy() -> None:
        large = np.random.default_rng(0).standard_normal((200, 300))
        while not stop.is_set():
            lorank.spectrum(large, threads=2)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(times):
            assert _child(lambda: _analysed(matrices, expected)) == 0
    finally:
        stop.set()
        thread.join()
    return {"forks": times}


def _analysed(matrices: dict[str, np.ndarray], expected: list[float]) -> int:
    report = lorank.analyze(matrices, threads=2, progress=False)
    return int([row.alpha_hill for row in report.modules] != expected)


def _child(work: Callable[[], int]) -> int:
    """Return the exit status of a forked child, which has a minute."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        status = 1
        try:
            status = work()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


RUNS: dict[str, Callable[[int], dict[str, int]]] = {
    "full disk": full_disk,
    "16 threads": threads,
    "forks": forks,
}

if __name__ == "__main__":
    print(json.dumps(RUNS[sys.argv[1]](int(sys.argv[2]))))
