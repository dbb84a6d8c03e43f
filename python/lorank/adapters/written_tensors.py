"""The tensors of an adapter's file, as the core writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lorank.adapters.content import AdapterContent
from lorank.adapters.formats.base import AdapterFormat, WrittenTensor
from lorank.adapters.module import LoraModule
from lorank.adapters.profiles import WrittenRank
from lorank.adapters.stored import SAFETENSORS_NAMES, RawTensor, Stored, raw_bytes
from lorank.adapters.stored_factors import is_stored_unchanged, stored_factors, stored_shapes
from lorank.sources import arrays

Array = npt.NDArray[Any]


def written_tensors(
    adapter: AdapterContent,
    form: AdapterFormat,
    ranks: Mapping[str, WrittenRank],
    keys: Mapping[str, tuple[str, str]],
    dtype: str | None,
) -> list[WrittenTensor]:
    """Return all tensors of an adapter's file.

    Parameters
    ----------
    adapter, form
        The adapter and its format.
    ranks
        Rank and scale of every written module.
    keys
        Keys of B and A of every written module.
    dtype
        Element type of all factors; None for the stored types.
    """
    tensors: list[WrittenTensor] = []
    for name, written in ranks.items():
        module = adapter.modules[name]
        own = dtype or module.dtype
        tensors += _factors(form, module, written, keys[name], own)
        for vector in module.carried.values():
            scaled = vector * np.float32(written.factor(module))
            tensors.append(_tensor(_bias_key(keys[name][0]), scaled, own))
    tensors += [_alpha(key, alpha) for key, alpha in form.alphas(adapter, ranks).items()]
    return tensors + [_carried(key, x) for key, x in form.carried(adapter, ranks.keys()).items()]


def _bias_key(b_key: str) -> str:
    """Return the key of B's bias."""
    return f"{b_key.removesuffix('.weight')}.bias"


def _factors(
    form: AdapterFormat, module: LoraModule, written: WrittenRank, keys: tuple[str, str], dtype: str
) -> list[WrittenTensor]:
    """Return the module's B and A, without a copy if they are stored unchanged."""
    if is_stored_unchanged(module, written) and not form.rearranges:
        ((b, a),) = module.factors()
        b_shape, a_shape = stored_shapes(module, written.rank)
        return [(keys[0], b_shape, b, _type_name(dtype)), (keys[1], a_shape, a, _type_name(dtype))]
    stored = form.arranged(module, *stored_factors(module, written))
    return [_tensor(key, x, dtype) for key, x in zip(keys, stored, strict=True)]


def _type_name(dtype: str) -> str:
    """Return safetensors' name of a type; bfloat16 for float8, because lorank does not round to float8."""
    return SAFETENSORS_NAMES.get(dtype, "BF16")


def _alpha(key: str, alpha: float) -> WrittenTensor:
    """Return an alpha in float32, or in float64 if only that holds it; 16 bits do not hold every rank."""
    dtype = "float32" if float(np.float32(alpha)) == alpha else "float64"
    return _tensor(key, np.array(alpha, dtype=dtype), dtype)


def _tensor(key: str, values: Array, dtype: str) -> WrittenTensor:
    rows = np.ascontiguousarray(values).reshape(values.shape[0] if values.ndim else 1, -1)
    return key, list(values.shape), arrays.matrix(rows), _type_name(dtype)


def _carried(key: str, stored: Stored) -> WrittenTensor:
    if stored.position is not None:  # The core copies the bytes.
        return key, [], (stored.origin, stored.position), ""
    if isinstance(stored.origin, RawTensor):
        raw = stored.origin
        return key, list(raw.shape), raw.data, SAFETENSORS_NAMES.get(raw.dtype, raw.dtype)
    if stored.dtype not in ("", arrays.dtype_name(stored.origin)):
        return _tensor(key, stored.origin, stored.dtype)
    values, dtype, shape = raw_bytes(stored.origin, f"tensor {key!r}")
    return key, list(shape), values.tobytes(), dtype
