"""Writes a model with the updates of adapters: all files, or none of them."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorank import _core
from lorank._core import Checkpoint, FormatError, Matrix, UpdatedMatrix
from lorank._internal.json_files import read_json
from lorank._internal.progress import progress_bar
from lorank._internal.staging import is_occupied, staged_folder
from lorank.adapters.stored import SAFETENSORS_NAMES, RawTensor, Stored, raw_bytes
from lorank.baking.checkpoint import INDEX_SUFFIX, Shard, StoredModel, StoredTensor
from lorank.baking.plan import Change, Plan, shape_of
from lorank.modules import model_config
from lorank.sources import arrays

Content = Matrix | tuple[Checkpoint, int] | bytes | list[UpdatedMatrix]
OutTensor = tuple[str, list[int], Content, str]

# Files that accompany weights. Weights of other formats would hold the base model.
_COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".vocab", ".bpe", ".spm", ""}
_LARGEST_COPY = 1 << 28
_WEIGHTS = ("*.safetensors", f"*{INDEX_SUFFIX}", "pytorch_model*.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True, slots=True)
class Written:
    """The files of a written model.

    Attributes
    ----------
    files
        The names of the files, relative to the folder.
    total_size
        The size of all tensors in bytes.
    """

    files: tuple[str, ...]
    total_size: int


def check_target(model: StoredModel, folder: Path, *, overwrite: bool) -> None:
    """Check that a model can be written to a folder.

    Raises
    ------
    FileExistsError
        If the folder is the base model's, or holds files and `overwrite` is false.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(errno.EEXIST, "is a file: name a folder", str(folder))
    if os.path.realpath(folder) == os.path.realpath(model.folder):
        raise FileExistsError(errno.EEXIST, "holds the base model: name another folder", str(folder))
    if folder.is_dir() and is_occupied(folder) and not overwrite:
        raise FileExistsError(errno.EEXIST, "is not empty (overwrite replaces the model in it)", str(folder))


def write(
    model: StoredModel,
    plan: Plan,
    folder: Path,
    dtype: str | None,
    threads: int,
    *,
    overwrite: bool,
    progress: bool,
) -> Written:
    """Write a model with the changes of a plan, in the shards of the base model."""
    check_target(model, folder, overwrite=overwrite)
    stale = [path.name for pattern in _WEIGHTS for path in (folder.glob(pattern) if folder.is_dir() else ())]
    heads = (model_config.FILE_NAME, *([model.index.name] if model.index else []))
    total = sum(shard.path.stat().st_size for shard in model.shards)
    changes = {**plan.changes, **dict(_plain(model, plan))}
    with staged_folder(folder, stale, heads, replaces=overwrite) as staging:
        with progress_bar("baking", total, enabled=progress) as advance:
            for number, shard in enumerate(model.shards):
                added = plan_additions(model, plan) if number + 1 == len(model.shards) else {}
                tensors = [*_tensors_of(model, shard, changes, dtype), *_added(added)]
                metadata = shard.checkpoint.metadata()
                _core.write_safetensors(staging / shard.path.name, tensors, metadata, threads)
                advance(shard.path.stat().st_size, shard.path.name)
        size = _write_index(model, plan, staging)
        _copy_files(model, staging)
        _write_settings(plan, staging)
        files = tuple(sorted(str(p.relative_to(staging)) for p in staging.rglob("*") if p.is_file()))
    return Written(files, size)


def plan_additions(model: StoredModel, plan: Plan) -> dict[str, Change]:
    """Return the tensors that the base model lacks."""
    return {name: change for name, change in plan.changes.items() if name not in model.tensors}


def _plain(model: StoredModel, plan: Plan) -> Iterator[tuple[str, Change]]:
    """Yield the packed weights that become plain ones without an update."""
    for name in plan.unpacking.others:
        tensor = model.tensors[name]
        rows, cols = tensor.shape[-2:] if len(tensor.shape) == 3 else tensor.matrix_shape
        yield name, Change(tensor, shape=(rows, cols))


def _tensors_of(
    model: StoredModel, shard: Shard, changes: Mapping[str, Change], dtype: str | None
) -> Iterator[OutTensor]:
    """Yield the tensors of a file; parts of packed weights that become plain ones are left out."""
    dropped = model.parts(changes.keys() & model.codes.keys())
    weights = {codes: weight for weight, codes in model.codes.items() if weight in changes}
    for position, (stored, _, _) in enumerate(shard.checkpoint.tensors()):
        name = weights.get(stored, stored)
        if (change := changes.get(name)) is not None:
            yield _changed(name, change, model.tensors[name], dtype)
        elif stored not in dropped:
            yield stored, [], (shard.checkpoint, position), ""


def _changed(name: str, change: Change, tensor: StoredTensor, dtype: str | None) -> OutTensor:
    own = written_dtype(tensor, dtype)
    if not change.is_copy:
        return name, list(change.full_shape), list(change.matrices()), own
    assert change.saved is not None
    return saved_tensor(name, change.saved, own)


def written_dtype(tensor: StoredTensor, dtype: str | None) -> str:
    """Return the element type in which a changed tensor is written."""
    if dtype is not None:
        return SAFETENSORS_NAMES[dtype]
    return tensor.dtype if tensor.dtype in ("F64", "F32", "F16", "BF16") else "BF16"


def _added(changes: Mapping[str, Change]) -> Iterator[OutTensor]:
    for name, change in changes.items():
        assert change.saved is not None
        yield saved_tensor(name, change.saved, None)


def saved_tensor(name: str, stored: Stored, dtype: str | None) -> OutTensor:
    """Return a tensor of an adapter in an element type, or in its own type."""
    shape = list(shape_of(stored))
    if stored.position is not None:
        own = SAFETENSORS_NAMES.get(stored.dtype, stored.dtype)
        if dtype in (None, own) or own not in ("F64", "F32", "F16", "BF16"):
            return name, shape, (stored.origin, stored.position), ""
        assert dtype is not None
        return name, shape, stored.origin.matrix(stored.position, 1, math.prod(shape)), dtype
    if isinstance(stored.origin, RawTensor):
        return (
            name,
            shape,
            stored.origin.data,
            SAFETENSORS_NAMES.get(stored.origin.dtype, stored.origin.dtype),
        )
    if dtype is not None:
        return name, shape, arrays.matrix(stored.to_array().reshape(1, -1)), dtype
    values, own, _ = raw_bytes(stored.origin, f"tensor {name!r}")
    return name, shape, values.tobytes(), own


def _write_index(model: StoredModel, plan: Plan, staging: Path) -> int:
    """Write the index of shards; return the size of all tensors."""
    size = 0
    written = {shard.path.name: Checkpoint(staging / shard.path.name) for shard in model.shards}
    weight_map = {}
    for file, checkpoint in written.items():
        for name, dtype, shape in checkpoint.tensors():
            size += _bits(dtype) * math.prod(shape) // 8
            weight_map[name] = file
    if model.index is None:
        return size
    content = read_json(model.index)
    if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
        raise FormatError(f"{model.index}: is no index of shards")
    weights = {codes: weight for weight, codes in model.codes.items()}
    order = [weights.get(name, name) if name not in weight_map else name for name in content["weight_map"]]
    order += plan_additions(model, plan)
    metadata = content.get("metadata")
    new = {"total_size": size}
    if isinstance(metadata, dict) and "total_parameters" in metadata:
        before = sum(math.prod(model.tensors[name].shape) for name in plan.changes if name in model.tensors)
        after = sum(math.prod(change.full_shape) for change in plan.changes.values())
        new["total_parameters"] = metadata["total_parameters"] + after - before
    content["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), **new}
    content["weight_map"] = {name: weight_map[name] for name in dict.fromkeys(order) if name in weight_map}
    text = json.dumps(content, indent=2) + "\n"
    (staging / model.index.name).write_text(text, "utf-8")
    return size


def _bits(dtype: str) -> int:
    if dtype in ("F4", "F6_E2M3", "F6_E3M2"):
        return 4 if dtype == "F4" else 6
    if dtype in ("BOOL", "U8", "I8") or dtype.startswith("F8"):
        return 8
    digits = "".join(character for character in dtype if character.isdigit())
    return int(digits) if digits else 8


def _copy_files(model: StoredModel, staging: Path) -> None:
    """Copy the settings, tokenizer and code beside the weights."""
    if model.path.is_file() and model.index is None and model.config.is_empty:
        return  # A file alone in a folder of other files.
    for path in _files_beside(model.folder):
        target = staging / path.relative_to(model.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _files_beside(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "checkpoint-"))]
        for name in names:
            path = Path(root, name)
            if name.startswith((".", "adapter_")) or name.endswith(".index.json") or not path.is_file():
                continue
            is_settings = path.suffix in _COPIED and (path.suffix or name.startswith(("LICENSE", "NOTICE")))
            if is_settings and path.stat().st_size <= _LARGEST_COPY:
                yield path


def _write_settings(plan: Plan, staging: Path) -> None:
    """Write the settings that the changes need."""
    for name in (model_config.FILE_NAME, *model_config.QUANTIZATION_FILES):
        file = staging / name
        content = read_json(file) if file.exists() and (plan.settings or plan.unpacking.adapted) else None
        if not isinstance(content, dict):
            continue
        new = plan.unpacking.edited(name, content)
        if new is None:
            file.unlink()
            continue
        if name == model_config.FILE_NAME:
            new = _merged(new, plan.settings)
        if new != content:
            file.write_text(json.dumps(new, indent=2) + "\n", "utf-8")


def _merged(settings: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with new values; those of a part of the model are merged into its settings."""
    parts = {key: {**settings[key], **value} for key, value in new.items() if isinstance(value, Mapping)}
    return {**settings, **new, **parts}
