"""An adapter onto disk: factors, settings and a card, all of them whole or none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt

from lorank import _core
from lorank._internal.atomic import staged_folder
from lorank._internal.threads import thread_count
from lorank.adapters import card, carried, profiles, rounding
from lorank.adapters.certificate import Certificate
from lorank.adapters.content import AdapterContent, Dtype, Profile
from lorank.adapters.formats import image_keys, image_layout, kohya, padding
from lorank.adapters.formats.peft import PREFIX, SPECTRAL_KEY
from lorank.adapters.module import LoraModule
from lorank.adapters.reading import CERTIFICATE, CONFIG, PICKLED_WEIGHTS, WEIGHTS
from lorank.adapters.tensors import SAFETENSORS_NAMES, Stored, raw_bytes
from lorank.sources import arrays

Array = npt.NDArray[Any]
Tensor = tuple[str, list[int], Any, str]
"""Name, shape, values (an array, or a checkpoint and a position), and element type by safetensors' name."""

IMAGE_WEIGHTS = "adapter.safetensors"
"""What an image adapter's file is called where only a folder is named."""


@dataclass(frozen=True, slots=True)
class Written:
    """What writing an adapter did.

    Attributes
    ----------
    path
        Where the factors are.
    certificate
        The adapter's, with what rounding the factors added.
    stored_parameters
        Parameters of the written factors, the zeros of padded ranks included.
    notes
        What was left as it was, what rounding did where no certificate tells, what padding costs.
    """

    path: Path
    certificate: Certificate | None
    stored_parameters: int
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class _Job:
    """What is to be written, how, and where."""

    adapter: AdapterContent
    profile: Profile
    dtype: Dtype | None
    layouts: Mapping[str, profiles.Layout]
    keys: Mapping[str, tuple[str, str]]
    folder: Path
    file: str
    alone: bool
    threads: int

    @classmethod
    def of(
        cls, adapter: AdapterContent, target: Path, profile: Profile, dtype: Any, threads: int | None
    ) -> _Job:
        count = thread_count(threads)
        checked = _checked_dtype(dtype)
        if adapter.format == "peft":
            layouts = profiles.layouts(adapter, profile)
            keys = profiles.keys(adapter, layouts)
            return cls(adapter, profile, checked, layouts, keys, target, WEIGHTS, alone=False, threads=count)
        layouts = image_layout.layouts(adapter, profile)
        keys = {name: image_layout.style_of(adapter).keys[name] for name in layouts}
        alone = target.suffix == ".safetensors"
        folder, file = (target.parent, target.name) if alone else (target, IMAGE_WEIGHTS)
        return cls(adapter, profile, checked, layouts, keys, folder, file, alone, count)

    @property
    def stored_parameters(self) -> int:
        return sum(layout.rank * self.adapter.modules[name].cost for name, layout in self.layouts.items())


def write_adapter(
    adapter: AdapterContent,
    target: Path,
    profile: Profile,
    dtype: Any,
    *,
    overwrite: bool,
    threads: int | None = None,
) -> Written:
    """Write an adapter; see `LoraAdapter.save`."""
    job = _Job.of(adapter, target.expanduser(), profile, dtype, threads)
    _check_target(job, overwrite)
    # What tells of an earlier adapter must not contradict this one.
    with (
        staged_folder(job.folder, () if job.alone else (PICKLED_WEIGHTS, CERTIFICATE)) as staging,
        ThreadPoolExecutor(1) as beside,
    ):
        narrow = rounding.narrow(adapter, job.layouts, job.dtype)
        tensors = _tensors(job)
        # Python writes texts while the core writes factors, but for words that tell of their rounding. It
        # begins when this thread has nothing more to do in Python: the core would wait for the texts.
        begin = Event()
        texts = beside.submit(_write_texts, job, staging, begin, with_words=not narrow)
        begin.set()
        certificate, notes = _write_weights(job, staging, tensors, narrow)
        notes += texts.result()
        if narrow:
            notes += _write_words(job, staging, certificate)
    return Written(job.folder / job.file, certificate, job.stored_parameters, [*notes, *_padding_note(job)])


def _checked_dtype(dtype: Any) -> Dtype | None:
    """An element type by its name, or as torch's own."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in get_args(Dtype):
        raise ValueError(f"dtype must be {', '.join(map(repr, get_args(Dtype)))}, not {dtype!r}")
    return cast("Dtype | None", name)


def _check_target(job: _Job, overwrite: bool) -> None:
    file = job.folder / job.file
    if not job.alone and job.folder.suffix == ".safetensors":
        raise ValueError(
            f"{job.folder}: a PEFT adapter is a folder, its settings beside its factors: name a folder"
        )
    if job.folder.exists() and not job.folder.is_dir():
        raise FileExistsError(f"{job.folder}: is a file, not a folder")
    if overwrite or not job.folder.exists():
        return
    if job.alone and file.exists():
        raise FileExistsError(f"{file}: exists (overwrite replaces it)")
    if not job.alone and any(job.folder.iterdir()):
        raise FileExistsError(f"{job.folder}: is not empty (overwrite replaces the adapter in it)")


def _write_weights(
    job: _Job, staging: Path, tensors: list[Tensor], narrow: Mapping[str, str]
) -> tuple[Certificate | None, list[str]]:
    """Write the factors; the certificate with what rounding to narrow types added, or a note of that."""
    file = staging / job.file
    _core.write_safetensors(file, tensors, _metadata(job, job.adapter.certificate), job.threads)
    added = rounding.added(job.adapter, job.layouts, job.keys, file, narrow)
    if added is None:
        return job.adapter.certificate, []
    if job.adapter.certificate is None:
        return None, [rounding.note(job.adapter, added)] if added else []
    certificate = job.adapter.certificate.with_rounding(added)
    if job.adapter.format == "kohya":
        # The file itself holds the certificate, and what the file is measured for belongs to that.
        _core.write_safetensors(file, tensors, _metadata(job, certificate), job.threads)
    return certificate, []


def _metadata(job: _Job, certificate: Certificate | None) -> dict[str, str]:
    adapter = job.adapter
    metadata = {"format": "pt"} | padding.metadata(adapter, job.layouts)
    metadata |= {SPECTRAL_KEY: "1"} if adapter.is_spectral else {}
    if adapter.format == "peft":
        return metadata
    metadata |= kohya.metadata(adapter, {name: layout.rank for name, layout in job.layouts.items()})
    words = {kohya.CERTIFICATE_KEY: certificate.to_text(adapter.notes)} if certificate else {}
    return metadata | words


def _write_texts(job: _Job, staging: Path, begin: Event, *, with_words: bool) -> list[str]:
    """Write what does not depend on how factors are rounded; what to note."""
    begin.wait(timeout=1.0)  # An interrupt may come before it is set.
    if job.adapter.format == "peft":
        settings = profiles.settings(job.adapter, job.profile)
        (staging / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")
    return _write_words(job, staging, job.adapter.certificate) if with_words else []


def _write_words(job: _Job, staging: Path, certificate: Certificate | None) -> list[str]:
    """Write the certificate and the card, unless there is a card of somebody else's; what to note."""
    if job.alone:
        return []
    if certificate is not None:
        (staging / CERTIFICATE).write_text(certificate.to_text(job.adapter.notes), "utf-8")
    file = job.folder / "README.md"
    if file.exists() and not card.is_ours(file.read_text("utf-8", errors="replace")):
        return [f"{file} was kept, as lorank did not write it"]
    text = card.text(job.adapter, job.profile, certificate, job.stored_parameters)
    (staging / "README.md").write_text(text, "utf-8")
    return []


def _padding_note(job: _Job) -> list[str]:
    """How much padded ranks cost, and what to do about it."""
    adapter, stored = job.adapter, job.stored_parameters
    if stored == adapter.num_parameters:
        return []
    largest = max(layout.rank for layout in job.layouts.values())
    note = f"{job.profile}: {stored:,} parameters are stored, as ranks are padded with zeros"
    before = adapter.certificate.parameters_before if adapter.certificate else adapter.num_parameters
    if job.profile == "portable" and stored >= before:
        note += f" to {largest}; nothing is saved: max_rank bounds the largest rank"
    return [note]


def _tensors(job: _Job) -> list[Tensor]:
    """Everything that the file holds."""
    adapter = job.adapter
    tensors: list[Tensor] = []
    for name, layout in job.layouts.items():
        module = adapter.modules[name]
        dtype = job.dtype or module.dtype
        tensors += _factors(module, layout, job.keys[name], dtype)
        for ending, vector in module.carried.items():
            scaled = vector * np.float32(module.scaling * layout.b_factor)
            is_peft = adapter.format == "peft"
            key = f"{PREFIX}{name}.{ending}" if is_peft else image_keys.bias_key(job.keys[name][0])
            tensors.append(_tensor(key, scaled, dtype))
    # float32, as types of 16 bits do not hold every rank exactly.
    tensors += [
        _tensor(kohya.alpha_key(name), np.array(alpha, dtype=np.float32), "float32")
        for name, alpha in _alphas(job).items()
    ]
    return tensors + [_carried(key, x) for key, x in carried.written(adapter, job.layouts.keys()).items()]


def _alphas(job: _Job) -> dict[str, int]:
    """Return the alphas of an image file by module."""
    if job.adapter.format == "peft":
        return {}
    ranks = {name: layout.rank for name, layout in job.layouts.items()}
    return image_layout.written_alphas(image_layout.style_of(job.adapter), ranks)


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
    if stored.dtype not in ("", arrays.dtype_name(stored.origin)):
        return _tensor(key, stored.origin, stored.dtype)
    values, dtype, shape = raw_bytes(stored.origin, key)
    return key, list(shape), values.tobytes(), dtype
