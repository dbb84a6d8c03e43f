"""Doubts about names, kinds and orientations that were guessed without the model's code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from lorank.modules.building import Unknown
from lorank.modules.facts import ModelFacts

_SINGLE_EXPERT = re.compile(r".*\bexperts\.\d+\..+")
_IN_EXPERTS = re.compile(r"(?:.*\.)?(?:experts|\w*moe\w*)(?:\..*)?")
_EXAMPLES = 3


def doubts(shapes: Mapping[str, tuple[int, ...]], unknown: Unknown) -> tuple[str, ...]:
    """Return the reasons why guessed names, kinds or orientations may be wrong.

    Parameters
    ----------
    shapes
        The tensors' shapes by name.
    unknown
        The reason why the model's skeleton is not known.
    """
    found = [unknown.reason] if unknown.is_foreign else []
    if single := [name for name in shapes if _SINGLE_EXPERT.fullmatch(name)]:
        found.append(f"experts are stored one by one, but newer transformers stack them ({_some(single)})")
    three = [name for name, shape in shapes.items() if len(shape) == 3 and name.endswith(".weight")]
    if three:
        found.append(f"3-D weights may be kernels or stacks of matrices ({_some(three)})")
    square = [
        name
        for name, shape in shapes.items()
        if len(shape) == 3 and shape[1] == shape[2] and _IN_EXPERTS.fullmatch(name)
    ]
    if square:
        found.append(f"square matrices of experts may be transposed ({_some(square)})")
    return tuple(found)


def doubtful(label: str, facts: ModelFacts, action: str) -> str:
    """Return the error message for an action that would rely on doubtful guesses."""
    return (
        f"{label}: {facts.remark}: {action} needs the model's code (a config.json beside the weights and "
        "transformers or diffusers, or the live model); guess=True continues without it"
    )


def _some(names: Iterable[str]) -> str:
    """Return the first names of a list, for messages."""
    names = list(names)
    return ", ".join(names[:_EXAMPLES]) + (", ..." if len(names) > _EXAMPLES else "")
