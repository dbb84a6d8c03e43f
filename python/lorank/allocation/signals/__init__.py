"""The methods of `lorank.allocate`: importing a file of this package registers its methods.

Each file holds one signal, or signals of one kind. A new method needs one such file and one line below.
"""

from __future__ import annotations

from lorank.allocation.signals import gradient as gradient
from lorank.allocation.signals import htsr as htsr
from lorank.allocation.signals import schedule as schedule
from lorank.allocation.signals import stable_rank as stable_rank
from lorank.allocation.signals import task as task
from lorank.allocation.signals.registry import METHODS, Registered

__all__ = ["find", "names"]


def names() -> list[str]:
    """Return the names of all methods, sorted.

    Examples
    --------
    >>> "htsr" in names()
    True
    """
    return sorted(METHODS)


def find(name: str) -> Registered:
    """Find a method by name.

    Raises
    ------
    ValueError
        If no method has the name; the message lists the names.

    Examples
    --------
    >>> find("uniform").options
    ['r_base']
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(names())}")
    return METHODS[name]
