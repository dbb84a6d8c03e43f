"""How many threads a call may use."""

from __future__ import annotations

from lorank import _core


def thread_count(threads: int | None) -> int:
    """`threads`, or all processors of this process for None.

    Raises
    ------
    ValueError
        If it is not positive.
    """
    if threads is None:
        return _core.available_threads()
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    return threads
