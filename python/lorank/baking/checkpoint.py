"""The tensors of a safetensors checkpoint, shard by shard."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorank._core import Checkpoint, FormatError, Matrix
from lorank._internal.regular_files import TABLE_BYTES, check_size
from lorank.modules.model_config import ModelConfig
from lorank.sources import hub, recognise
from lorank.sources.arrays import FLOAT_TYPES
from lorank.sources.decoded import DecodedTensors
from lorank.sources.files import StoredFiles
from lorank.sources.packing import Packing
from lorank.sources.quantization import Quantization

INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of a checkpoint.

    Attributes
    ----------
    path
        The file.
    checkpoint
        The opened file.
    """

    path: Path
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint.

    Attributes
    ----------
    name
        The name of the tensor.
    shard
        The file that holds the tensor.
    position
        The position of the tensor in the file.
    dtype
        The element type by safetensors' name.
    shape
        The shape.
    """

    name: str
    shard: Shard = field(repr=False)
    position: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        """True if the values are floating-point numbers of a known type."""
        return self.dtype in FLOAT_TYPES

    @property
    def is_decoded(self) -> bool:
        """True for a packed weight, whose matrices are decoded."""
        return False

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape of a matrix of the tensor; further dimensions of a kernel are flattened."""
        if len(self.shape) < 2:
            return 1, math.prod(self.shape)
        return self.shape[0], math.prod(self.shape[1:])

    def matrix(self, rows: int, cols: int, index: int = 0) -> Matrix:
        """Return the `index`-th matrix of the tensor."""
        return self.shard.checkpoint.matrix(self.position, rows, cols, index)

    def rows(self, indices: Collection[int]) -> npt.NDArray[Any]:
        """Return rows of a matrix that is the whole tensor."""
        _, cols = self.matrix_shape
        return np.concatenate([self.matrix(1, cols, i).to_array() for i in indices])

    def content(self) -> bytes:
        """Return the stored bytes."""
        return self.shard.checkpoint.stored_bytes(self.position)


@dataclass(frozen=True, slots=True)
class DecodedTensor(StoredTensor):
    """A packed weight of a checkpoint, with the true shape, and its scheme as the element type.

    File, position and stored bytes are those of the codes.

    Attributes
    ----------
    decoded
        The decoded tensors of the checkpoint.
    """

    decoded: DecodedTensors = field(repr=False)

    @property
    def is_float(self) -> bool:
        """True: the values are decoded to floating-point numbers."""
        return True

    @property
    def is_decoded(self) -> bool:
        """True."""
        return True

    def matrix(self, rows: int, cols: int, index: int = 0) -> Matrix:
        """Return the `index`-th matrix of the weight."""
        return self.decoded.matrix(self.name, rows, cols, index)

    def rows(self, indices: Collection[int]) -> npt.NDArray[Any]:
        """Return rows of a matrix that is the whole tensor."""
        return self.matrix(*self.matrix_shape).to_array()[list(indices)]


@dataclass(frozen=True)
class StoredModel:
    """A safetensors checkpoint.

    Attributes
    ----------
    label
        The name of the checkpoint in messages.
    path
        The file or folder of the weights.
    shards
        The files, sorted by name.
    tensors
        The tensors by name. A packed weight that can be decoded has its own name, in place of its codes.
    index
        The index of the shards; None for a single file.
    config
        The model's configuration.
    packing
        The packed weights that cannot be decoded, and the parts of all packed weights.
    codes
        The name of the tensor of codes, by the name of the decoded weight.
    """

    label: str
    path: Path
    shards: tuple[Shard, ...]
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    index: Path | None
    config: ModelConfig = field(repr=False)
    packing: Packing = field(repr=False)
    codes: Mapping[str, str] = field(repr=False)

    @property
    def folder(self) -> Path:
        """The folder of the weights."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def plain_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that are not packed, by name."""
        return {name: t.shape for name, t in self.tensors.items() if self.packing.reason(name) is None}

    @cached_property
    def packed(self) -> dict[str, str]:
        """The reasons why packed weights cannot be changed, by the name of the weight."""
        return {codes.weight: codes.scheme.name for codes in self.packing.codes.values()}

    def parts(self, weights: Collection[str]) -> set[str]:
        """Return the names of the scales, zero points and the like of packed weights."""
        return {name for name, part in self.packing.parts.items() if part.weight in weights}


def open_model(source: str | Path) -> StoredModel:
    """Open a safetensors file, index or folder, or a model of the hub.

    Raises
    ------
    FileNotFoundError
        If the source is neither a path nor a hub id that can be downloaded.
    FormatError
        If the files are damaged, hold an adapter, or have another format than safetensors.
    """
    if source == "":
        raise FileNotFoundError("an empty path names no model")
    label = str(source)
    path = recognise.model_weights(hub.local_path(source, hub.download_checkpoint), label)
    index = _index(path)
    if index is None and (
        path.suffix != ".safetensors" if path.is_file() else not any(path.glob("*.safetensors"))
    ):
        raise FormatError(f"{label}: holds no safetensors file: save the model with safe_serialization=True")
    for file in [index] if index else []:
        check_size(file, TABLE_BYTES)
    whole = Checkpoint(path)
    files = [file for file, _, _ in whole.files()]
    shards = tuple(Shard(file, Checkpoint(file)) for file in files)
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for position, (name, dtype, shape) in enumerate(shard.checkpoint.tensors()):
            tensors[name] = StoredTensor(name, shard, position, dtype, tuple(shape))
    if any(key != name for key, name in recognise.base_tensors(label, list(tensors)).items()):
        raise FormatError(f"{label}: holds a model with an adapter in it: save the base model alone")
    config = ModelConfig.read(path)
    found, packing, codes = _with_decoded(tensors, whole, label, config)
    return StoredModel(label, path, shards, found, index, config, packing, codes)


def _with_decoded(
    tensors: Mapping[str, StoredTensor], whole: Checkpoint, label: str, config: ModelConfig
) -> tuple[dict[str, StoredTensor], Packing, dict[str, str]]:
    """Replace codes by the weights that they encode, as far as the core can decode them."""
    entries = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    quantization = Quantization(config.quantization)
    packing = Packing(entries, quantization, lambda name: tensors[name].content())
    if not packing.codes:
        return dict(tensors), packing, {}
    weights = {name: codes.weight for name, codes in packing.codes.items()}
    decoded = DecodedTensors(StoredFiles(whole, label), packing, quantization, label)
    new_entries = decoded.entries()
    found: dict[str, StoredTensor] = {}
    codes = {}
    for name, tensor in tensors.items():
        if name not in weights or name in packing.codes:
            found[name] = tensor
            continue
        weight = weights[name]
        scheme, shape = new_entries[weight]
        codes[weight] = name
        found[weight] = DecodedTensor(weight, tensor.shard, tensor.position, scheme, tuple(shape), decoded)
    return found, packing, codes


def _index(path: Path) -> Path | None:
    """Return the index of a checkpoint; None for a single file."""
    if path.is_file():
        return path if path.name.endswith(INDEX_SUFFIX) else None
    return next(iter(sorted(path.glob(f"*{INDEX_SUFFIX}"))), None)
