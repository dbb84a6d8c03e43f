"""An adapter onto disk: factors, settings and a card, all of them whole or none."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt

from lorank import _core
from lorank.adapters import card, kohya, padding, profiles
from lorank.adapters.adapter import Dtype, LoraAdapter, Profile
from lorank.adapters.module import LoraModule
from lorank.adapters.peft_format import PREFIX, SPECTRAL_KEY
from lorank.adapters.reading import CERTIFICATE, CONFIG, PICKLED_WEIGHTS, WEIGHTS
from lorank.adapters.tensors import SAFETENSORS_NAMES, FileTensors, Stored, raw_bytes
from lorank.atomic import made_folder, write_text
from lorank.certificate import Certificate
from lorank.sources import arrays
from lorank.threads import thread_count

Array = npt.NDArray[Any]
Tensor = tuple[str, list[int], Any, str]
"""Name, shape, values (an array, or a checkpoint and a position), and element type by safetensors' name."""


@dataclass(frozen=True, slots=True)
class Written:
    """What writing an adapter did.

    Attributes
    ----------
    path
        Where the factors are.
    certificate
        The adapter's, with what rounding the factors added.
    notes
        What was left as it was.
    """

    path: Path
    certificate: Certificate | None
    notes: Sequence[str] = ()


def write_adapter(
    adapter: LoraAdapter, target: Path, profile: Profile, dtype: Any, *, overwrite: bool
) -> Written:
    """Write an adapter; see `LoraAdapter.save`."""
    stored = _checked_dtype(dtype)
    target = target.expanduser()
    layouts = profiles.layouts(adapter, profile)
    metadata = {"format": "pt"} | padding.metadata(adapter, layouts)
    metadata |= {SPECTRAL_KEY: "1"} if adapter.is_spectral else {}
    if adapter.format == "kohya":
        path = _write_image_adapter(adapter, target, layouts, stored, metadata, overwrite)
        return Written(path, adapter.certificate)
    _refuse_to_overwrite(target, overwrite)
    tensors = _tensors(adapter, layouts, stored)
    weights = target / WEIGHTS
    with made_folder(target):
        _core.write_safetensors(weights, tensors, metadata, thread_count(None))
    certificate = _with_rounding(adapter, layouts, target, stored)
    write_text(
        target / CONFIG, json.dumps(profiles.settings(adapter, profile), indent=2, sort_keys=True) + "\n"
    )
    # What tells of an earlier adapter must not contradict this one.
    (target / PICKLED_WEIGHTS).unlink(missing_ok=True)
    if certificate is None:
        (target / CERTIFICATE).unlink(missing_ok=True)
    else:
        write_text(target / CERTIFICATE, certificate.to_text(adapter.notes))
    return Written(weights, certificate, _write_card(target, card.text(adapter, profile, certificate)))


def _checked_dtype(dtype: Any) -> Dtype | None:
    """An element type by its name, or as torch's own."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in get_args(Dtype):
        raise ValueError(f"dtype must be {', '.join(map(repr, get_args(Dtype)))}, not {dtype!r}")
    return cast("Dtype | None", name)


def _write_card(folder: Path, text: str) -> list[str]:
    """Write the card, unless there is one of somebody else's; what to note."""
    file = folder / "README.md"
    if file.exists() and not card.is_ours(file.read_text("utf-8", errors="replace")):
        return [f"{file} was kept, as lorank did not write it"]
    write_text(file, text)
    return []


def _tensors(
    adapter: LoraAdapter, layouts: Mapping[str, profiles.Layout], dtype: Dtype | None
) -> list[Tensor]:
    """Everything that a PEFT adapter's file holds."""
    tensors: list[Tensor] = []
    for name, keys in profiles.keys(adapter, layouts).items():
        module = adapter.modules[name]
        tensors += _factors(module, layouts[name], keys, dtype or module.dtype)
        for ending, vector in module.carried.items():
            scaled = vector * np.float32(module.scaling * layouts[name].b_factor)
            tensors.append(_tensor(f"{PREFIX}{name}.{ending}", scaled, dtype or module.dtype))
    return tensors + [
        _carried(key, stored)
        for key, stored in adapter.carried.items()
        if _still_has_a_module(adapter, key, layouts)
    ]


def _refuse_to_overwrite(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: is a file, not a folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder}: is not empty (overwrite replaces the adapter in it)")


def _write_image_adapter(
    adapter: LoraAdapter,
    target: Path,
    layouts: Mapping[str, profiles.Layout],
    dtype: Dtype | None,
    metadata: dict[str, str],
    overwrite: bool,
) -> Path:
    if target.suffix != ".safetensors":
        target = target / "adapter.safetensors"
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target}: exists (overwrite replaces it)")
    tensors: list[Tensor] = []
    for name, layout in layouts.items():
        module = adapter.modules[name]
        b_key, a_key, alpha_key = kohya.keys(adapter, name)
        stored = dtype or module.dtype
        tensors += _factors(module, profiles.Layout(layout.rank, 1.0), (b_key, a_key), stored)
        tensors.append(_tensor(alpha_key, np.array(layout.rank, dtype=np.float32), stored))
    tensors += [_carried(key, stored) for key, stored in adapter.carried.items()]
    with made_folder(target.parent):
        _core.write_safetensors(target, tensors, {**kohya.metadata(adapter), **metadata}, thread_count(None))
    return target


def _factors(module: LoraModule, layout: profiles.Layout, keys: tuple[str, str], dtype: str) -> list[Tensor]:
    """The module's B and A; as they are, if nothing has to be done to them."""
    if profiles.is_written_as_it_is(module, layout):
        ((b, a),) = module.factors()
        b_shape, a_shape = profiles.shapes(module, layout.rank)
        return [(keys[0], b_shape, b, _stored(dtype)), (keys[1], a_shape, a, _stored(dtype))]
    return [_tensor(key, x, dtype) for key, x in zip(keys, profiles.factors(module, layout), strict=True)]


def _stored(dtype: str) -> str:
    """The header's name; float8, which has no rounding rule here, goes out as bfloat16."""
    return SAFETENSORS_NAMES.get(dtype, "BF16")


def _tensor(key: str, values: Array, dtype: str) -> Tensor:
    rows = values.reshape(values.shape[0] if values.ndim else 1, -1)
    return key, list(values.shape), arrays.matrix(rows), _stored(dtype)


def _carried(key: str, stored: Stored) -> Tensor:
    if stored.position is not None:
        return key, [], (stored.origin, stored.position), ""
    values, dtype, shape = raw_bytes(stored.origin, key)
    return key, list(shape), values.tobytes(), dtype


def _still_has_a_module(adapter: LoraAdapter, key: str, layouts: Mapping[str, profiles.Layout]) -> bool:
    """Whether what belongs to a LoRA layer (its DoRA magnitude) still has that layer."""
    owner, found, _ = key.removeprefix(PREFIX).partition(".lora_")
    return not found or owner not in adapter.modules or owner in layouts


def _with_rounding(
    adapter: LoraAdapter, layouts: Mapping[str, profiles.Layout], folder: Path, dtype: Dtype | None
) -> Certificate | None:
    """The certificate with what rounding to a narrow type added, measured on the written file."""
    certificate = adapter.certificate
    narrow = {
        name for name in layouts if (dtype or adapter.modules[name].dtype) not in ("float32", "float64")
    }
    if certificate is None or not narrow:
        return certificate
    written = FileTensors(folder / WEIGHTS)
    total = 0.0
    for name, (b_key, a_key) in profiles.keys(adapter, layouts).items():
        exact = profiles.factors(adapter.modules[name], layouts[name])
        rounded = _rows(written, b_key), _rows(written, a_key)
        copies = adapter.modules[name].copies
        for (b, a), (b2, a2) in zip(_experts(*exact, copies), _experts(*rounded, copies), strict=True):
            # The file's update is the adapter's times the layout's factor.
            total += _squared_distance(b, a, b2, a2) / layouts[name].b_factor ** 2
    return certificate.with_rounding(math.sqrt(total))


def _rows(tensors: FileTensors, key: str) -> Array:
    first, *rest = tensors.shapes()[key]
    return tensors.matrix(key, first, math.prod(rest)).to_array()


def _experts(b: Array, a: Array, copies: int) -> Iterator[tuple[Array, Array]]:
    """Every copy's factors from the stored ones."""
    b, rank = b.reshape(b.shape[0], -1), a.shape[0] // copies
    a = a.reshape(a.shape[0], -1)
    return ((b[:, e::copies], a[e * rank : (e + 1) * rank]) for e in range(copies))


def _squared_distance(b: Array, a: Array, b2: Array, a2: Array) -> float:
    """``||B A - B2 A2||_F^2`` from small products of the factors."""
    if np.array_equal(b, b2) and np.array_equal(a, a2):
        return 0.0
    left = np.hstack([b, -b2]).astype(np.float64)
    right = np.vstack([a, a2]).astype(np.float64)
    # A change of basis first: traces of the products alone would cancel.
    r_left: Array = np.linalg.qr(left)[1]
    r_right: Array = np.linalg.qr(right.T)[1]
    return float(np.square(r_left @ r_right.T).sum())
