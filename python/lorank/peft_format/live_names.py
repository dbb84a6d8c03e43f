"""Names of an allocation's modules in the live model that will be adapted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lorank.modules import quantized
from lorank.modules.targets import AdaptedModule
from lorank.peft_format.name_matching import KnownNames


def resolve(modules: Sequence[AdaptedModule], model: Any) -> dict[str, str]:
    """Map every module's name to its name in a live model, as `KnownNames.fitting` finds it.

    Raises
    ------
    ValueError
        If a name fits no module or several, two names fit the same module, or shapes differ.
    """
    live: dict[str, Any] = dict(model.named_modules())
    live |= {name: p for name, p in model.named_parameters() if p.ndim == 3}
    known = KnownNames(live)
    resolved: dict[str, str] = {}
    for module in modules:
        found = known.fitting(module.name)
        if len(found) != 1:
            problem = (
                f"fits several of the model's modules ({', '.join(found[:3])})"
                if found
                else "fits none of the model's modules"
            )
            raise ValueError(
                f"{module.name!r} {problem}: the module names of {type(model).__name__} differ from the "
                "source's; pass the live model itself to analyze or allocate"
            )
        _check_shape(module, found[0], live[found[0]])
        resolved[module.name] = found[0]
    if len(set(resolved.values())) < len(resolved):
        raise ValueError("two names of the allocation fit the same module of the model")
    return resolved


def _check_shape(module: AdaptedModule, live_name: str, target: Any) -> None:
    shape = quantized.module_shape(target)
    if shape is None:
        raise ValueError(f"{live_name!r} is a {type(target).__name__}, which has no weight to adapt")
    experts, matrix = (shape[0], shape[1:]) if module.kind == "expert" else (1, shape)
    flattened = (matrix[0], math.prod(matrix[1:]))
    if sorted(flattened) != sorted(module.shape) or experts != module.copies:
        raise ValueError(
            f"{module.name!r} has shape {module.shape} in the source, but {live_name!r} of the model "
            f"has {tuple(shape)}"
        )
