"""Iterates over the modules of a live model, by their names without wrappers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Attributes that hold the wrapped module, by library and by base class of the wrapper. `_AROUND` lists
# wrappers around a model or a part of a model, `_LAYERS` layers of PEFT.
_AROUND = {
    "peft.": {"PeftModel": "base_model", "PeftMixedModel": "base_model", "BaseTuner": "model"},
    "torch.": {
        "OptimizedModule": "_orig_mod",
        "DataParallel": "module",
        "DistributedDataParallel": "module",
        "CheckpointWrapper": "_checkpoint_wrapped_module",
    },
}
_LAYERS = {"peft.": {"BaseTunerLayer": "base_layer", "AuxiliaryTrainingWrapper": "original_module"}}


def is_module(value: object) -> bool:
    """Return True for a `torch.nn.Module`, without importing torch."""
    return any(
        base.__module__.startswith("torch.nn") and base.__name__ == "Module" for base in type(value).__mro__
    )


def named_modules(module: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the prefix of the parameters' names and the module, for every module without wrappers."""
    module = unwrapped(module)
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from named_modules(child, f"{prefix}{name}.")


def unwrapped(module: Any) -> Any:
    """Return the module inside wrappers of PEFT and torch and inside layers of PEFT."""
    inner = module
    while inner is not None:
        module, inner = inner, _wrapped(inner, _AROUND) or _wrapped(inner, _LAYERS)
    return module


def around(module: Any) -> list[Any]:
    """Return the wrappers around a module, outermost first, and the module itself as the last entry.

    Layers of PEFT do not count as wrappers here.
    """
    chain = [module]
    while (inner := _wrapped(chain[-1], _AROUND)) is not None:
        chain.append(inner)
    return chain


def _wrapped(module: Any, wrappers: Mapping[str, Mapping[str, str]]) -> Any:
    """Return the module inside a wrapper; None for any other module."""
    for library, attributes in wrappers.items():
        classes = {base.__name__ for base in type(module).__mro__ if base.__module__.startswith(library)}
        for wrapper, attribute in attributes.items():
            if wrapper in classes and is_module(inner := getattr(module, attribute, None)):
                return inner
    return None
