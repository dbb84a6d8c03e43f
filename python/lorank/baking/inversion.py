"""Inverts transformers' conversions: finds the stored matrices that hold the blocks of a parameter.

A conversion is run on matrices whose elements are numbered. The places of the numbers in the parameter show
where each stored matrix went.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorank._core import FormatError
from lorank.baking.blocks import Block, block_of
from lorank.modules.building import Unknown, build
from lorank.modules.description import Description, ask_child
from lorank.modules.loading import Conversion, place
from lorank.modules.model_config import ModelConfig

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Portion:
    """A stored matrix that holds a block of a parameter.

    Attributes
    ----------
    tensor
        The name of the stored tensor.
    index
        The matrix within the stored tensor.
    copy
        The matrix within the parameter.
    block
        The block of the parameter's matrix, and its place in the stored matrix.
    """

    tensor: str
    index: int
    copy: int
    block: Block


def portions(
    config: ModelConfig, shapes: Shapes, found: Description, targets: Collection[str]
) -> dict[str, list[Portion]]:
    """Return the stored matrices that hold the blocks of parameters, by the name of the parameter.

    The work needs torch; it is done in a child process unless this process has imported torch.

    Raises
    ------
    FormatError
        If a conversion cannot be inverted.
    """
    names = sorted(targets)
    if config.library in sys.modules or not sys.executable:
        content: Any = _answer(found.placement.conversions, shapes, names)
    else:
        content = ask_child(__name__, config, shapes, targets=names)
    if isinstance(content, Unknown):
        raise FormatError(f"{config.folder}: {content.reason}")
    if isinstance(content, str):
        raise FormatError(f"{config.folder}: {content}")
    return {
        target: [Portion(name, index, copy, Block.from_json(block)) for name, index, copy, block in parts]
        for target, parts in content.items()
    }


def answer(question: Mapping[str, Any]) -> None:
    """Print the portions of parameters as JSON. The child process runs this function."""
    out, sys.stdout = sys.stdout, sys.stderr
    shapes = {name: tuple(shape) for name, shape in question["shapes"].items()}
    model = build(ModelConfig(question["config"], Path(question["folder"])), shapes.keys())
    if isinstance(model, Unknown):
        json.dump(model.reason, out)
    else:
        json.dump(_answer(place(shapes, model).conversions, shapes, question["targets"]), out)
    out.flush()


def _answer(
    conversions: Sequence[Conversion], shapes: Shapes, targets: Collection[str]
) -> dict[str, list[Any]] | str:
    """Return the portions as JSON values, or the reason why a conversion cannot be inverted."""
    found: dict[str, list[Any]] = {target: [] for target in targets}
    known: dict[Any, list[Any]] = {}
    for conversion in conversions:
        wanted = [target for target in conversion.targets if target in found]
        if not wanted:
            continue
        key = (
            tuple((pattern, shapes[names[0]], len(names)) for pattern, names in conversion.sources.items()),
            tuple(re.sub(r"\d+", "", target) for target in conversion.targets),
        )
        try:
            if key not in known:
                known[key] = _pattern(conversion, shapes)
        except (ValueError, RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0][:200]
            return f"the adapted parameter {wanted[0]} is stored in another form: {reason}"
        sources = list(conversion.sources.values())
        for number, source, part, block in known[key]:
            target = conversion.targets[number]
            if target not in found:
                continue
            names = sources[source]
            count = _count(conversion, shapes) if conversion.by_expert else 1
            for copy in range(count) if conversion.by_expert else [part]:
                is_stack = conversion.by_expert and len(names) == 1
                name = names[0] if is_stack or not conversion.by_expert else names[copy]
                found[target].append([name, copy if is_stack else 0, copy, block])
    if missing := [target for target, parts in found.items() if not parts]:
        return f"the adapted parameter {missing[0]} is stored in another form, which cannot be inverted"
    return found


def _count(conversion: Conversion, shapes: Shapes) -> int:
    names = next(iter(conversion.sources.values()))
    return len(names) if len(names) > 1 else shapes[names[0]][0]


def _pattern(conversion: Conversion, shapes: Shapes) -> list[Any]:
    """Return ``[target, source, copy, block]`` for every source, all by their positions in the conversion."""
    import torch

    first: dict[str, int] = {}
    total = 0

    def fetch(name: str, part: int | None) -> Any:
        nonlocal total
        shape = shapes[name] if part is None else (1, *shapes[name][1:])
        count = math.prod(shape)
        first[name] = total
        total += count
        return torch.arange(first[name], total, dtype=torch.int64).reshape(shape)

    if not conversion.by_expert and any(len(names) > 1 for names in conversion.sources.values()):
        raise ValueError("a stack whose matrices are not converted one by one")
    values = conversion.run(fetch, 0 if conversion.by_expert else None)
    result = []
    for number, target in enumerate(conversion.targets):
        numbers = values[target].numpy()
        if numbers.ndim == 3 and numbers.shape[0] == 1:
            numbers = numbers[0]
        if numbers.ndim == 1:
            numbers = numbers[None]
        if numbers.ndim != 2:
            raise ValueError(f"a parameter of {numbers.ndim} dimensions")
        for source, names in enumerate(conversion.sources.values()):
            shape = shapes[names[0]]
            matrix = (shape[-2] if len(shape) > 1 else 1, shape[-1])
            block = block_of(np.asarray(numbers), first[names[0]], matrix)
            if block is not None:
                result.append([number, source, 0, block.to_json()])
    return result
