"""Writes an adapter again so that runtimes load it right, and checks the written files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorank.adapters.content import Profile
from lorank.adapters.reading import read_for_repair
from lorank.adapters.writing import Written, write_adapter
from lorank.runtimes.verdicts import Verdict, check, right_profile


@dataclass(frozen=True, slots=True)
class Mended:
    """A written adapter, and the verdicts about it.

    Attributes
    ----------
    profile
        The profile that it was written in.
    written
        The record of writing.
    verdicts
        The verdicts about the written adapter.
    """

    profile: Profile
    written: Written
    verdicts: Sequence[Verdict]


def mend(
    adapter: str | Path,
    target: Path,
    runtimes: Sequence[str] | None = None,
    *,
    base: Any | None = None,
    overwrite: bool = False,
) -> Mended:
    """Write an adapter again in the first profile that every runtime loads right.

    The profile that suits the runtimes by their scales comes first. Where the written adapter is not right
    in all of them, as for experts of unequal ranks, it is written in the portable profile, and the better
    of both is kept.

    Raises
    ------
    FormatError, OSError, ValueError
        If the adapter cannot be read or written, or a runtime is unknown.
    """
    source = read_for_repair(adapter)
    first = right_profile(runtimes)

    def tried(profile: Profile, again: bool) -> Mended:
        written = write_adapter(source, target, profile, None, overwrite=overwrite or again)
        return Mended(profile, written, check(written.address, runtimes, base=base))

    best = tried(first, False)
    if first == "portable" or not bad(best.verdicts, runtimes):
        return best
    other = tried("portable", True)
    if len(bad(other.verdicts, runtimes)) < len(bad(best.verdicts, runtimes)):
        return other
    return tried(first, True)


def bad(verdicts: Sequence[Verdict], runtimes: Sequence[str] | None = None) -> list[str]:
    """List the runtimes that do not load an adapter right.

    Where none were asked for by name, those that read no adapters of its format do not count.
    """
    counted = [verdict for verdict in verdicts if runtimes or verdict.reads_format]
    return [verdict.runtime for verdict in counted if verdict.status != "right"]
