"""The number of threads of a call."""

from __future__ import annotations

from lorank import _core


def thread_count(threads: int | None) -> int:
    """Return `threads`; for None, return the number of processors that the process may use.

    Raises
    ------
    ValueError
        If `threads` is not positive.
    """
    if threads is None:
        return _core.available_threads()
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    return threads
