"""Calls of the core that pass each result to a callback as it becomes ready."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def collect(
    call: Callable[[Callable[[int, Any], object]], object],
    name_of: Callable[[int], str] | None = None,
    on_result: Callable[[int], object] | None = None,
) -> list[Any]:
    """Return the results of a call of the core, in the order of its inputs.

    Parameters
    ----------
    call
        Function that calls the core with a callback of the index of an input, and its result or exception.
    name_of
        Function that returns the name of the module at an index; None if the inputs have no names.
    on_result
        Function that receives the index of each result as soon as the result is ready.

    Raises
    ------
    Exception
        The first exception of the core, with the module's name in its message.
    """
    results: dict[int, Any] = {}

    def receive(index: int, outcome: Any) -> None:
        if isinstance(outcome, Exception):
            raise outcome if name_of is None else named(outcome, name_of(index))
        results[index] = outcome
        if on_result is not None:
            on_result(index)

    call(receive)
    return [results[index] for index in range(len(results))]


def named(error: Exception, name: str) -> Exception:
    """Return an exception of the core with a module's name before its message."""
    return reworded(error, lambda message: f"module {name!r}: {message}")


def reworded(error: Exception, change: Callable[[str], str]) -> Exception:
    """Return an exception of the same class with another message.

    Parameters
    ----------
    error
        An exception of the core, or one that this function returned.
    change
        Function from the old message to the new one.
    """
    if isinstance(error, OSError) and error.strerror is not None:
        # Python chooses the subclass of OSError by the number, and adds the file name to the message.
        return OSError(error.errno, change(error.strerror), error.filename)
    return type(error)(change(str(error)))
