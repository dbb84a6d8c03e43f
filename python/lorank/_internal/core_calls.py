"""Outcomes that the core hands to callbacks: a result, or an exception that does not name its module yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def result(outcome: Any, name: str) -> Any:
    """Return the result of a module, or raise its exception with the module's name in the message.

    Parameters
    ----------
    outcome
        What the core found, or an exception of the core.
    name
        The module's.
    """
    if isinstance(outcome, Exception):
        raise named(outcome, name)
    return outcome


def named(error: Exception, name: str) -> Exception:
    """Return an exception of the core with a module's name before its message."""
    return reworded(error, lambda message: f"module {name!r}: {message}")


def reworded(error: Exception, change: Callable[[str], str]) -> Exception:
    """Return an exception of the same class with another message.

    Parameters
    ----------
    error
        An exception of the core, or one that this function made.
    change
        Makes the new message from the old one.
    """
    if isinstance(error, OSError) and error.strerror is not None:
        # Python chooses the class by the number, and adds the name of the file to the message.
        return OSError(error.errno, change(error.strerror), error.filename)
    return type(error)(change(str(error)))
