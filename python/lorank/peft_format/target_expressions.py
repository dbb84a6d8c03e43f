"""Regular expressions for PEFT's `target_modules` and `exclude_modules`.

PEFT reads a list of targets as suffixes of names. The expressions here exclude modules that a suffix selects
by accident.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from lorank.peft_format.name_matching import proper_suffixes


def accidental_matches(targets: Sequence[str], others: Iterable[str]) -> str | None:
    """Return an expression for modules that end with a target's name and are not targets; None if none do.

    Parameters
    ----------
    targets
        Full names of the targets.
    others
        Names of other modules of the model.
    """
    chosen = set(targets)
    suffixes = {suffix for target in targets for suffix in proper_suffixes(target)}
    hit = sorted(
        {other for other in others if other not in chosen and not chosen.isdisjoint(proper_suffixes(other))}
    )
    # Names in the live model may have a prefix, but the expression must not match a target.
    patterns = [re.escape(name) if name in suffixes else rf"(?:.*\.)?{re.escape(name)}" for name in hit]
    return "|".join(patterns) or None


def guard(targets: Sequence[str]) -> str | None:
    """Return an expression for modules in numbered blocks that end with the name of a target outside blocks.

    The target ``proj_out`` also selects every ``blocks.0.proj_out``, even if these names are not known. A
    prefix that only the live model's names have, such as ``bert.``, contains no number.
    """
    short = [name for name in targets if not any(part.isdigit() for part in name.split("."))]
    if not short:
        return None
    hit = rf"(?:.*\.)?\d+\.(?:.*\.)?(?:{'|'.join(map(re.escape, short))})"
    kept = [name for name in targets if not set(short).isdisjoint(proper_suffixes(name))]
    return rf"(?!(?:.*\.)?(?:{'|'.join(map(re.escape, kept))})$){hit}" if kept else hit


def only(targets: Sequence[str]) -> str | None:
    """Return an expression for all modules that end with a target and are not targets themselves."""
    if not targets:
        return None
    kept = sorted(_extended(targets))
    unless = rf"(?!(?:{'|'.join(map(re.escape, kept))})$)" if kept else ""
    return rf"{unless}.+\.(?:{_alternatives(targets)})"


def either(*expressions: str | None) -> str | None:
    """Return an expression that matches if one of the given ones does; None if all are None."""
    given = [expression for expression in expressions if expression]
    return given[0] if len(given) == 1 else "|".join(f"(?:{one})" for one in given) or None


def as_expression(names: Any) -> str | None:
    """Return one expression for names that PEFT reads as a list of suffixes or as an expression."""
    if not names or isinstance(names, str):
        return names or None
    return rf"(?:.*\.)?(?:{'|'.join(map(re.escape, names))})"


def _extended(targets: Sequence[str]) -> set[str]:
    """Return the targets that end with another target."""
    known = set(targets)
    return {name for name in targets if not known.isdisjoint(proper_suffixes(name))}


def _alternatives(names: Sequence[str]) -> str:
    """Return names as alternatives of an expression; names that differ only in the block share one."""
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        numbered = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        before, number, after = numbered.groups() if numbered else (name, "", "")
        kinds[before, after].append(number)
    return "|".join(
        re.escape(before) + (f"(?:{'|'.join(numbers)})" if after else "") + re.escape(after)
        for (before, after), numbers in kinds.items()
    )
