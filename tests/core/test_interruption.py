"""Ctrl-C ends every long call of the core within a second, and leaves no thread at work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads threads from /proc")

# Prints the processor time that other threads take after an exception has ended the call, in seconds, and the
# greatest pause of another Python thread during the call.
CHILD = """
import os, signal, sys, threading, time
import numpy as np
import lorank
from lorank import _core
from lorank.statistics.effective_rank import effective_rank

def taken():
    times = {}
    for task in os.listdir("/proc/self/task"):
        try:
            fields = open(f"/proc/self/task/{task}/stat").read().rsplit(")", 1)[1].split()
        except OSError:
            continue
        times[task] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return times

class Ended(Exception):
    pass

def handler(*_):
    raise Ended

signal.signal(signal.SIGINT, handler)
rng = np.random.default_rng(0)
ascending = (1 - (np.arange(COUNT) + 0.5) / COUNT) ** (-1 / 1.5)
values = rng.permutation(ascending)
square = values[: 3000 * 3000].reshape(3000, 3000)
matrix = _core.Matrix.from_array(square)
pauses, at_work = [0.0], [False]

def tick():
    last = time.perf_counter()
    while True:
        time.sleep(0.001)
        now = time.perf_counter()
        if at_work[0]:
            pauses.append(now - last)
        last = now

threading.Thread(target=tick, daemon=True).start()
print("ready", flush=True)
sys.stdin.readline()
at_work[0] = True
try:
    while True:
        CALL
except Ended:
    at_work[0] = False
print("ended", flush=True)
time.sleep(0.5)
before = taken()
time.sleep(0.5)
after = taken()
print(sum(after[task] - before.get(task, 0) for task in after), max(pauses), flush=True)
"""
CALLS = {
    "alpha_hill": "lorank.alpha_hill(values)",
    "alpha_hill of float32": "lorank.alpha_hill(values.astype(np.float32))",
    "marchenko_pastur": "lorank.marchenko_pastur(values, (COUNT, COUNT))",
    "effective_rank": "effective_rank(values, 0.5)",
    "spectral_metrics": "_core.spectral_metrics(values, (COUNT, COUNT))",
    "spectral_metrics of an exact law": "_core.spectral_metrics(ascending, (COUNT, COUNT))",
    "select_largest": "_core.select_largest(values, COUNT // 2)",
    "select_smallest of ties": "_core.select_smallest(np.ones(COUNT), COUNT // 2)",
    "select_energy": "_core.select_energy(values, 0.5)",
    "select_budget": "_core.select_budget(ascending[::-1], [COUNT], [3], 10**18)",
    "spectrum": "lorank.spectrum(square, threads=2)",
    "fast spectrum": "lorank.spectrum(square, threads=1, accuracy='fast')",
    "sampled spectrum": "_core.sample(matrix)",
    "to_array": "matrix.to_array()",
    "analyze": "lorank.analyze({'a': square, 'b': square}, progress=False)",
}
COUNT = 9_000_000


def interrupted(call: str, prologue: str = "") -> list[float]:
    """Send a signal to a child that repeats a call; return the two numbers that it prints."""
    program = (
        CHILD.replace("CALL", call)
        .replace("COUNT", str(COUNT))
        .replace('print("ready"', prologue + 'print("ready"')
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "ready\n"
        child.stdin.write("go\n")
        child.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.7)  # The child is computing by then.
        child.send_signal(signal.SIGINT)
        output, _ = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 0
    ended, numbers = output.splitlines()
    assert ended == "ended"
    return [float(x) for x in numbers.split()]


@pytest.mark.parametrize("name", CALLS)
def test_signal_ends_a_call_and_its_threads(name: str) -> None:
    left, pause = interrupted(CALLS[name])
    assert left < 0.25
    # Half a second of computation with the GIL would be one pause.
    assert pause < 5


def test_exception_of_a_callback_ends_the_work_of_other_threads() -> None:
    prologue = """
def fail(*_):
    raise Ended
small = _core.Matrix.from_array(np.ones((2, 2)))
signal.signal(signal.SIGINT, signal.SIG_IGN)
"""
    left, _ = interrupted("_core.analyze([small, matrix, matrix], 'exact', 2, False, fail)", prologue)
    assert left < 0.25


SHUTDOWN = """
import threading, time
import numpy as np
import lorank
square = np.random.default_rng(0).standard_normal((1500, 1500))

def work():
    while True:
        lorank.spectrum(square, threads=2)

for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.5)
print("done", flush=True)
"""

STORM = """
import os, signal, threading, time
import numpy as np
import lorank
count = 0

def handler(*_):
    global count
    count += 1
    lorank.alpha_hill(np.arange(1.0, 30000.0))  # A nested call.

signal.signal(signal.SIGUSR1, handler)
square = np.random.default_rng(0).standard_normal((700, 700))
expected = lorank.spectrum(square, threads=1)
running = True

def send():
    while running:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.002)

sender = threading.Thread(target=send)
sender.start()
equal = all((lorank.spectrum(square, threads=2) == expected).all() for _ in range(5))
running = False
sender.join()
assert equal and count > 5, (equal, count)
print("done", flush=True)
"""

FORKS = """
import multiprocessing, os, threading
import numpy as np
import lorank
square = np.random.default_rng(0).standard_normal((400, 400))
expected = lorank.spectrum(square, threads=1).tobytes()
ended = threading.Event()

def work(failures):
    while not ended.is_set():
        if lorank.spectrum(square, threads=2).tobytes() != expected:
            failures.append("bits")

def child(queue):
    queue.put(lorank.spectrum(square, threads=2).tobytes() == expected)

failures = []
threads = [threading.Thread(target=work, args=(failures,)) for _ in range(16)]
for thread in threads:
    thread.start()
context = multiprocessing.get_context("fork")
for _ in range(10):
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert queue.get(timeout=60)
    process.join(60)
    assert process.exitcode == 0
ended.set()
for thread in threads:
    thread.join()
assert not failures
print("done", flush=True)
"""


@pytest.mark.parametrize("program", [SHUTDOWN, STORM, FORKS], ids=["shutdown", "signals", "forks"])
def test_threads_signals_and_forks_neither_hang_nor_crash(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
