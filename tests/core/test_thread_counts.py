"""Any number of threads is accepted, and no call starts more threads than it has work for."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorank
from lorank import _core

MANY = [3000, 10**9, 2**63, 10**30]


def threads_of_the_core() -> int:
    """Return the number of threads of the core that have not ended."""
    count = 0
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # A thread may end meanwhile.
            count += (task / "comm").read_text().startswith("lorank")
    return count


def most_threads(call: Any) -> tuple[Any, int]:
    """Return the result of a call, and the largest number of threads of the core during it."""
    counts, alive = [0], True

    def watch() -> None:
        while alive:
            counts.append(threads_of_the_core())
            time.sleep(0.001)

    # Threads of earlier calls end after their calls have returned.
    deadline = time.monotonic() + 10
    while threads_of_the_core() and time.monotonic() < deadline:
        time.sleep(0.001)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return call(), max(counts)
    finally:
        alive = False
        watcher.join()


@pytest.mark.parametrize("threads", MANY)
def test_results_do_not_depend_on_absurd_numbers_of_threads(threads: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    small, medium = rng.standard_normal((64, 64)), rng.standard_normal((400, 400))
    for weights in ({"a": small}, {"a": medium}, {"a": small, "b": medium, "c": small}):
        one = lorank.analyze(weights, threads=1, progress=False)
        many = lorank.analyze(weights, threads=threads, progress=False)
        assert [str(row) for row in many] == [str(row) for row in one]
    assert np.array_equal(lorank.spectrum(medium, threads=threads), lorank.spectrum(medium, threads=1))
    clamped = min(threads, 2**64 - 1)
    for name, count in (("one", 1), ("many", clamped)):
        tensors = [("a", [64, 64], _core.Matrix.from_array(small), "F32")]
        _core.write_safetensors(tmp_path / name, tensors, {}, count)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_threads_do_not_exceed_the_work() -> None:
    matrix = _core.Matrix.from_array(np.random.default_rng(0).standard_normal((64, 64)))
    update = [(matrix, matrix, 1.0)]

    def ignore(*_: Any) -> None:
        pass

    # The thread that waits for the pool counts, too.
    calls = {
        lambda: _core.analyze([matrix] * 3, "exact", 10**9, False, ignore): 4,
        lambda: _core.decompose([update] * 3, 10**9, ignore): 4,
        lambda: _core.subtract([(matrix, matrix)] * 3, 2, 10**9, ignore): 4,
        lambda: _core.spectrum(matrix, "exact", 10**9): 1,
    }
    for call, most in calls.items():
        assert most_threads(call)[1] <= most
