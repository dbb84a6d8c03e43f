"""The modules of a live model under the names that they have without wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# The attribute in which wrappers of PEFT and of torch keep the module that they wrap, by their base classes.
_WRAPPED = {
    "peft.": {
        "PeftModel": "base_model",
        "BaseTuner": "model",
        "BaseTunerLayer": "base_layer",
        "AuxiliaryTrainingWrapper": "original_module",
    },
    "torch.": {
        "OptimizedModule": "_orig_mod",
        "DataParallel": "module",
        "DistributedDataParallel": "module",
        "CheckpointWrapper": "_checkpoint_wrapped_module",
    },
}


def is_module(value: object) -> bool:
    """Return True for a `torch.nn.Module`, without importing torch."""
    return any(
        base.__module__.startswith("torch.nn") and base.__name__ == "Module" for base in type(value).__mro__
    )


def named_modules(module: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every module of the base model with the prefix of its parameters' names; skip wrappers."""
    module = unwrapped(module)
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from named_modules(child, f"{prefix}{name}.")


def unwrapped(module: Any) -> Any:
    """Return the module inside wrappers of PEFT and of torch."""
    for library, wrappers in _WRAPPED.items():
        classes = {base.__name__ for base in type(module).__mro__ if base.__module__.startswith(library)}
        for wrapper, attribute in wrappers.items():
            if wrapper in classes and is_module(inner := getattr(module, attribute, None)):
                return unwrapped(inner)
    return module
