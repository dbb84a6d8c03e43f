"""Processes that are killed at random moments of their work."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress


def killed(work: Callable[[], object], seconds: float) -> bool:
    """Run work in a forked process, and kill it after a time; return True if it was killed before its end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    time.sleep(seconds)
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work failed before it was killed"
    return os.WIFSIGNALED(status)


def kill_repeatedly(
    work: Callable[[], object],
    after_kill: Callable[[], object],
    after_end: Callable[[], object],
    *,
    kills: int,
    seed: int = 0,
) -> int:
    """Kill work again and again at random moments, and start it again each time; return the number of kills.

    Parameters
    ----------
    work
        The work, which continues what a killed run left behind.
    after_kill
        Checks what a killed run left behind.
    after_end
        Checks the result of a run that was not killed, and prepares work from the beginning.
    kills
        The number of kills.
    seed
        Seed of the random moments.
    """
    chance = random.Random(seed)
    start = time.perf_counter()
    work()
    whole = time.perf_counter() - start
    after_end()
    done = 0
    while done < kills:
        if killed(work, chance.uniform(0, whole)):
            done += 1
            after_kill()
        else:
            after_end()
    work()
    after_end()
    return done
