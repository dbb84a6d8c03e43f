"""Sources in files: safetensors and GGUF checkpoints and pickled state dicts, on disk or from the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from lorank._core import Checkpoint, FormatError, Matrix
from lorank._internal.regular_files import TABLE_BYTES, check_size
from lorank.modules.description import describe_model
from lorank.modules.model_config import ModelConfig
from lorank.sources import hub, recognise
from lorank.sources.assembly import assemble
from lorank.sources.base import Skipped, Source
from lorank.sources.decoded import DecodedTensors
from lorank.sources.decodings import Decoding
from lorank.sources.fingerprint import fingerprint
from lorank.sources.gguf_files import is_gguf, open_gguf
from lorank.sources.packing import Packing
from lorank.sources.quantization import Quantization
from lorank.sources.stored_tensors import StoredTensors

PICKLE_SUFFIXES = {".bin", ".pt", ".pth"}


def open_path_or_hub_id(source: str | Path) -> Source:
    """Open a path if it exists, else the hub model with that id."""
    if source == "":
        raise FileNotFoundError("an empty path names no source")
    return open_path(hub.local_path(source, hub.download_model), str(source))


def open_path(path: Path, label: str) -> Source:
    """Open a safetensors file, index or folder, a GGUF file, or a pickled state dict."""
    path = recognise.model_weights(path, label)
    if is_gguf(path):
        return open_gguf(path, label)
    if path.is_dir():
        if not any(path.glob("*.safetensors")) and not any(path.glob("*.safetensors.index.json")):
            return _open_pickles(path, label)
    elif path.suffix in PICKLE_SUFFIXES or path.name.endswith(".bin.index.json"):
        return _open_pickles(path, label)
    elif path.suffix not in {".safetensors", ".json"}:
        raise FormatError(f"{path}: expected .safetensors, .index.json, .gguf, .bin, .pt or .pth")
    return _open_safetensors(path, label)


def _open_safetensors(path: Path, label: str) -> Source:
    """Open a safetensors file, index or folder."""
    for index in [path] if path.suffix == ".json" else path.glob("*.safetensors.index.json"):
        check_size(index, TABLE_BYTES)
    checkpoint = Checkpoint(path)
    tensors = checkpoint.tensors()
    stored = StoredFiles(checkpoint, label)
    source = _assembled(path, label, stored)
    return replace(
        source,
        skipped=(*source.skipped, *stored.skipped),
        fingerprint=fingerprint(checkpoint.files(), tensors),
    )


class StoredFiles:
    """The tensors of a safetensors checkpoint, by their names in the base model; values stay on disk.

    Raises
    ------
    FormatError
        If the tensors are those of an adapter.
    """

    is_unordered = True

    def __init__(self, checkpoint: Checkpoint, label: str) -> None:
        self._checkpoint = checkpoint
        self._label = label
        self.skipped: list[Skipped] = []
        self._positions: dict[str, int] = {}
        self._entries: dict[str, tuple[str, tuple[int, ...]]] = {}
        tensors = checkpoint.tensors()
        base = recognise.base_tensors(label, [name for name, _, _ in tensors])
        for position, (name, dtype, shape) in enumerate(tensors):
            if name in base:
                self._positions[base[name]] = position
                self._entries[base[name]] = (dtype, tuple(shape))
            else:
                self.skipped.append(Skipped(name, tuple(shape), recognise.exclusion_reason(name)))

    def entries(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Return the element type and shape of every tensor, in the order of the files."""
        return self._entries

    def is_lazy(self, name: str) -> bool:
        """Return False: a view of a file copies no values."""
        del name
        return False

    def matrix(self, name: str, rows: int, cols: int, index: int = 0) -> Matrix:
        """Return the `index`-th matrix of a tensor."""
        return self._checkpoint.matrix(self._positions[name], rows, cols, index)

    def shared_with(self, name: str) -> str | None:
        """Return None: files hold each tensor once."""
        del name
        return None

    def are_equal(self, a: str, b: str) -> bool:
        """Return True if two tensors hold the same bytes."""
        return self.content(a) == self.content(b)

    def content(self, name: str) -> bytes:
        """Return the bytes of a tensor."""
        return self._checkpoint.stored_bytes(self._positions[name])

    def decoded(self, packing: Packing, quantization: Quantization) -> StoredTensors:
        """Return the tensors with packed weights as plain ones, as far as the core can decode them."""
        return DecodedTensors(self, packing, quantization, self._label)

    def dequantized(self, decoding: Decoding, index: int, view: tuple[int, int] | None = None) -> Matrix:
        """Return the `index`-th matrix of a packed weight, or all from there on as a matrix of a shape."""
        parts = {role: self._positions[name] for role, name in decoding.parts.items()}
        return self._checkpoint.dequantized(
            decoding.scheme, parts, decoding.settings, decoding.unit, index, view
        )

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of the files."""
        return self._checkpoint.metadata()


def _assembled(path: Path, label: str, tensors: StoredTensors) -> Source:
    """Assemble a source from tensors and the model that the `config.json` beside them describes."""
    config = ModelConfig.read(path)
    return assemble(label, tensors, config, partial(describe_model, config))


def _open_pickles(path: Path, label: str) -> Source:
    """Open pickled state dicts."""
    from lorank.sources import state_dict, torch_files

    found = torch_files.read_model(path)
    tensors = state_dict.StoredArrays(found.tensors, label, found.check_unchanged)
    source = _assembled(path, label, tensors)
    unread = (Skipped(name, shape, reason) for name, (shape, reason) in found.unread.items())
    return replace(source, skipped=(*tensors.skipped, *source.skipped, *unread))
