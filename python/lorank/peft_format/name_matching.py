"""Matching of module names whose prefixes, like ``bert.``, differ between files and models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice

from lorank.modules import naming


class KnownNames:
    """Names of modules, indexed by their dotted suffixes."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = dict.fromkeys(names)
        self._longer: dict[str, list[str]] = defaultdict(list)
        for name in self._names:
            for suffix in proper_suffixes(name):
                self._longer[suffix].append(name)

    def fitting(self, name: str) -> list[str]:
        """Return the known names that may belong to the same module as `name`, in their order.

        These are the equal name; else all known names that end with `name`; else the longest known name
        that `name` ends with.
        """
        if name in self._names:
            return [name]
        return self._longer.get(name) or [x for x in proper_suffixes(name) if x in self._names][:1]

    def only(self, name: str) -> str | None:
        """Return the one known name that fits a name; None if none or several fit."""
        found = self.fitting(name)
        return found[0] if len(found) == 1 else None


def proper_suffixes(name: str) -> Iterator[str]:
    """Yield the dotted suffixes of a name without the name itself, longest first."""
    return islice(naming.suffixes(name), 1, None)
