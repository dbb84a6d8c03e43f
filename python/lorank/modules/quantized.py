"""Reads shapes and values of live models' weights that are tensors of a quantization library.

Supports 4- and 8-bit weights of bitsandbytes, tensor subclasses of torch, torchao and quanto, and modules of
HQQ. The library that quantized a weight dequantizes it, one matrix at a time. `lorank.sources.dequantized`
dequantizes codes in plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


def is_quantized(module: Any, parameter: Any) -> bool:
    """Return True if a parameter holds codes instead of values."""
    return (
        _bits(parameter) is not None
        or getattr(parameter, "is_quantized", False)
        or _is_foreign_tensor(parameter)
        or is_hqq(module, parameter)
    )


def is_hqq(module: Any, parameter: Any) -> bool:
    """Return True for the codes of an HQQ layer."""
    return (
        parameter is not None and getattr(module, "W_q", None) is parameter and hasattr(module, "dequantize")
    )


def shape(parameter: Any, module: Any = None) -> tuple[int, ...]:
    """Return the shape of the dequantized weight."""
    if is_hqq(module, parameter):
        return tuple(module.meta["shape"])
    state = getattr(parameter, "quant_state", None)
    if state is not None and getattr(state, "shape", None) is not None:
        return tuple(state.shape)
    return tuple(parameter.shape)


def module_shape(module: Any) -> tuple[int, ...] | None:
    """Return the dequantized shape of a module's weight or of a parameter; None if there is no weight."""
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if all(type(size) is int for size in sizes):
        return sizes  # type: ignore[return-value]  # checked the line before
    weight = getattr(module, "weight", module)
    return shape(weight) if hasattr(weight, "shape") else None


def loader(module: Any, parameter: Any) -> Callable[[], Any] | None:
    """Return a function that dequantizes the weight to float32; None if the library has no such function."""
    bits = _bits(parameter)
    if bits == 4 and getattr(parameter, "quant_state", None) is not None:
        return partial(_bitsandbytes_4bit, parameter)
    if bits == 8:
        return partial(_bitsandbytes_8bit, module, parameter)
    if getattr(parameter, "is_quantized", False) or _is_foreign_tensor(parameter):
        return partial(_own_dequantize, parameter)
    if is_hqq(module, parameter):
        return partial(_own_dequantize, module)
    return None


def _bits(parameter: Any) -> int | None:
    """Return 4 or 8 for a parameter of bitsandbytes; None for other parameters."""
    names = {base.__name__ for base in type(parameter).__mro__}
    if "Params4bit" in names:
        return 4
    return 8 if "Int8Params" in names else None


def _is_foreign_tensor(parameter: Any) -> bool:
    """Return True for a tensor subclass of a quantization library that can be dequantized."""
    library = type(parameter).__module__.partition(".")[0]
    return library != "torch" and hasattr(parameter, "dequantize")


def _own_dequantize(quantized: Any) -> Any:
    """Dequantize with the method of a tensor or module itself."""
    return quantized.dequantize().detach().float()


def _bitsandbytes_4bit(parameter: Any) -> Any:
    import bitsandbytes

    return bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state).float()


def _bitsandbytes_8bit(module: Any, parameter: Any) -> Any:
    import bitsandbytes

    codes, scales = parameter.data, getattr(parameter, "SCB", None)
    if scales is None:
        scales = getattr(getattr(module, "state", None), "SCB", None)
    if scales is None:
        return codes.float()  # bitsandbytes quantizes the weight when it moves to the device
    return bitsandbytes.functional.int8_vectorwise_dequant(codes, scales).float()
