"""The methods of `lorank.allocate`, one file each. The import below registers them."""

from __future__ import annotations

from lorank.allocation.signals import gradient, htsr, registry, schedule, task
from lorank.allocation.signals.registry import Registered

__all__ = ["find", "gradient", "htsr", "names", "registry", "schedule", "task"]


def names() -> list[str]:
    """Return the names of all methods, sorted."""
    return sorted(registry.METHODS)


def find(name: str) -> Registered:
    """Return the method of a name.

    Raises
    ------
    ValueError
        If no method has the name; the message lists the names.
    """
    if name not in registry.METHODS:
        raise ValueError(f"no method {name!r}: choose one of {', '.join(names())}")
    return registry.METHODS[name]
