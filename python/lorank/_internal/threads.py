"""The number of threads of a call."""

from __future__ import annotations

from lorank import _core

# More threads than any machine has processors, within the integers of the core.
_MOST = 1 << 20


def thread_count(threads: int | None) -> int:
    """Return `threads`; for None, return the number of processors that the process may use.

    Every call of the core starts at most one thread for each piece of work, and at most 256 unless the
    machine has more processors.

    Raises
    ------
    ValueError
        If `threads` is not positive.
    """
    if threads is None:
        return _core.available_threads()
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    return min(threads, _MOST)
