"""Writes an adapter again so that runtimes load it correctly, and checks the written files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorank.adapters.content import Profile
from lorank.adapters.reading import read_for_repair
from lorank.adapters.writing import Written, drafted
from lorank.runtimes.verdicts import Verdict, check, right_profile


@dataclass(frozen=True, slots=True)
class Mended:
    """A mended adapter and the verdicts about it.

    Attributes
    ----------
    profile
        The profile of the written adapter.
    written
        The result of writing.
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
    """Write an adapter again in a profile that the runtimes load correctly.

    The first attempt is the profile that suits the scales of the runtimes. If a runtime does not load the
    result correctly, as with experts of unequal ranks, the second attempt is the portable profile. The
    profile that more runtimes load correctly is kept.

    Parameters
    ----------
    adapter
        The adapter to mend: a PEFT folder, or an image adapter's file.
    target
        The folder or file to write.
    runtimes
        Names of runtimes (default: all).
    base
        The base model, as in `check`.
    overwrite
        True to replace files at the target.

    Raises
    ------
    FormatError, OSError, ValueError
        If the adapter cannot be read or written, or a runtime is unknown.
    """
    source = read_for_repair(adapter)
    first = right_profile(runtimes)

    with drafted(source, target, overwrite=overwrite) as (write, draft):

        def tried(profile: Profile) -> Mended:
            return Mended(profile, write(profile), check(draft, runtimes, base=base))

        best = tried(first)
        if first == "portable" or not bad(best.verdicts, runtimes):
            return best
        other = tried("portable")
        if len(bad(other.verdicts, runtimes)) < len(bad(best.verdicts, runtimes)):
            return other
        return tried(first)


def bad(verdicts: Sequence[Verdict], runtimes: Sequence[str] | None = None) -> list[str]:
    """Return the names of the runtimes that do not load an adapter correctly.

    Parameters
    ----------
    verdicts
        The verdicts about the adapter.
    runtimes
        The runtimes that the user named. If there are none, runtimes that do not read the format of the
        adapter are left out.
    """
    counted = [verdict for verdict in verdicts if runtimes or verdict.reads_format]
    return [verdict.runtime for verdict in counted if verdict.status != "right"]
