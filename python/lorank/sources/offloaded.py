"""Reads weights that Accelerate offloads: a hook holds the values while the weight is on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any


def loaders(model: Any) -> dict[int, Callable[[], Any]]:
    """Map the `id` of each offloaded parameter to a function that reads its values."""
    return {
        id(parameter): partial(_value, hook.weights_map, name)
        for hook, name, parameter in _offloaded(model)
        if hook.weights_map is not None
    }


def ties(model: Any) -> dict[int, int]:
    """Map the `id` of each offloaded table to the `id` of the first table with equal values.

    Offloading stores tied tables separately, and on disk even under two names. Only parameters with the
    shape of an embedding are read and compared.
    """
    tables = {
        tuple(parameter.shape)
        for module in model.modules()
        if any(base.__name__ == "Embedding" for base in type(module).__mro__)
        for parameter in module.parameters(recurse=False)
    }
    firsts: list[tuple[int, Any]] = []
    found: dict[int, int] = {}
    for hook, name, parameter in _offloaded(model):
        if tuple(parameter.shape) not in tables or hook.weights_map is None:
            continue
        value = _value(hook.weights_map, name)
        equal = [first for first, other in firsts if _are_equal(value, other)]
        found[id(parameter)] = equal[0] if equal else id(parameter)
        if not equal:
            firsts.append((id(parameter), value))
    return found


def _offloaded(model: Any) -> Iterator[tuple[Any, str, Any]]:
    """Yield each offloaded parameter with its hook and its name, in the order hook, name, parameter."""
    for module in model.modules():
        for hook in _hooks(module):
            recurse = bool(getattr(hook, "place_submodules", False))
            for name, parameter in module.named_parameters(recurse=recurse, remove_duplicate=False):
                if parameter.device.type == "meta":
                    yield hook, name, parameter


def _hooks(module: Any) -> Iterator[Any]:
    """Yield the hooks that offload a module."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) is True and hasattr(one, "weights_map"):
            yield one


def _value(weights: Mapping[str, Any], name: str) -> Any:
    """Read an offloaded tensor."""
    return weights[name].detach()


def _are_equal(a: Any, b: Any) -> bool:
    """Return True if two tensors share memory or hold equal values."""
    same: bool = a.shape == b.shape and a.dtype == b.dtype and (a.data_ptr() == b.data_ptr() or a.equal(b))
    return same
