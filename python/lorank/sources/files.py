"""Sources on disk and on the hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lorank._core import Checkpoint, FormatError, Matrix
from lorank._internal import extras
from lorank._internal.json_files import read_json
from lorank.modules.description import describe
from lorank.sources import quantization, recognise
from lorank.sources.assembly import StoredTensors, assemble
from lorank.sources.base import Skipped, Source
from lorank.sources.quantization import with_quantization

PICKLE_SUFFIXES = {".bin", ".pt", ".pth"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")


def open_path_or_hub_id(source: str | Path) -> Source:
    """Open a path if it exists, else download (or find in the cache) what may be a hub id."""
    path = Path(source).expanduser()
    if source == "":
        raise FileNotFoundError("an empty path names no source")
    if path.exists():
        return open_path(path, str(source))
    if isinstance(source, Path) or path.is_absolute() or not _HUB_ID.fullmatch(source):
        raise FileNotFoundError(f"{source}: no such file or folder")
    return open_path(download(source), source)


def open_path(path: Path, label: str) -> Source:
    """Open a safetensors file, index or folder, or a pickled state dict."""
    path = recognise.model_weights(path, label)
    if path.is_dir():
        if not any(path.glob("*.safetensors")) and not any(path.glob("*.safetensors.index.json")):
            return _open_pickles(path, label)
    elif path.suffix in PICKLE_SUFFIXES or path.name.endswith(".bin.index.json"):
        return _open_pickles(path, label)
    elif path.suffix not in {".safetensors", ".json"}:
        raise FormatError(f"{path}: expected .safetensors, .index.json, .bin, .pt or .pth")
    return _open_safetensors(path, label)


def _open_safetensors(path: Path, label: str) -> Source:
    checkpoint = Checkpoint(path)
    tensors = checkpoint.tensors()
    stored = StoredFiles(checkpoint, label)
    source = _assembled(path, label, stored)
    fingerprint = _fingerprint(checkpoint.files(), tensors)
    return replace(source, skipped=(*source.skipped, *stored.skipped), fingerprint=fingerprint)


class StoredFiles:
    """The tensors of a safetensors checkpoint, which stay on disk, by the names that they have without PEFT.

    Raises
    ------
    FormatError
        If the tensors are those of an adapter.
    """

    is_unordered = True

    def __init__(self, checkpoint: Checkpoint, label: str) -> None:
        self._checkpoint = checkpoint
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
                self.skipped.append(Skipped(name, tuple(shape), recognise.left_out(name)))

    def entries(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Return every tensor's element type and shape, in the files' order."""
        return self._entries

    def is_lazy(self, name: str) -> bool:
        """Return False: a view of a file costs no memory."""
        del name
        return False

    def matrix(self, name: str, rows: int, cols: int, index: int = 0) -> Matrix:
        """Return the `index`-th matrix of a tensor."""
        return self._checkpoint.matrix(self._positions[name], rows, cols, index)

    def shared_with(self, name: str) -> str | None:
        """Return None: files hold every tensor once."""
        del name
        return None

    def are_equal(self, a: str, b: str) -> bool:
        """Return True if two tensors hold the same bytes."""
        return self.content(a) == self.content(b)

    def content(self, name: str) -> bytes:
        """Return a tensor's bytes."""
        return self._checkpoint.stored_bytes(self._positions[name])

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of the files."""
        return self._checkpoint.metadata()


def _assembled(path: Path, label: str, tensors: StoredTensors) -> Source:
    """Join a checkpoint's tensors and the model that the `config.json` beside them describes."""
    config = read_config(path)
    folder = path if path.is_dir() else path.parent
    return assemble(label, tensors, config, partial(describe, folder, config))


def _open_pickles(path: Path, label: str) -> Source:
    from lorank.sources import state_dict

    tensors = state_dict.StoredArrays(state_dict.read_pickles(path), label)
    source = _assembled(path, label, tensors)
    return replace(source, skipped=(*tensors.skipped, *source.skipped))


def read_config(path: Path) -> Mapping[str, Any]:
    """Return the model's `config.json` beside its weights, with the settings of its quantization.

    The mapping is empty if no file can be read.
    """
    folder = path if path.is_dir() else path.parent
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        config = {}
    return with_quantization(config if isinstance(config, dict) else {}, folder)


def _fingerprint(files: Sequence[Path], tensors: Sequence[tuple[str, str, list[int]]]) -> str:
    """A digest of what a checkpoint holds: headers, and size and time of change of every file."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    for name, dtype, shape in tensors:
        digest.update(f"{name} {dtype} {shape}\n".encode())
    return digest.hexdigest()


def download(hub_id: str) -> Path:
    """Return the local folder of a hub model, `name[@revision]`: from the cache if it is there in whole.

    Only the configuration and one format of weights are fetched, safetensors if there are any.
    """
    settings = ["config.json", *quantization.FILES]
    wanted = [*settings, "*.safetensors", "*.safetensors.index.json"]
    fallback = [*settings, "*.bin", "*.bin.index.json"]
    return _snapshot(hub_id, [wanted, fallback], _is_complete)


def _snapshot(hub_id: str, choices: Sequence[list[str]], is_complete: Callable[[Path], bool]) -> Path:
    """Return the cached or downloaded folder with the files of the first choice that makes it complete.

    Raises
    ------
    FileNotFoundError
        If it is neither in the cache nor can be downloaded.
    """
    hub = extras.require(
        "huggingface_hub", "hub", f"as there is no file or folder {hub_id!r}, to look for a hub id"
    )
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo, _, revision = hub_id.partition("@")

    def folder_with(patterns: list[str], *, is_cached: bool) -> Path:
        found = hub.snapshot_download(
            repo, revision=revision or None, allow_patterns=patterns, local_files_only=is_cached
        )
        return Path(found)

    try:
        with suppress(LocalEntryNotFoundError):
            if is_complete(folder := folder_with(choices[0], is_cached=True)):
                return folder
        for patterns in choices:
            folder = folder_with(patterns, is_cached=False)
            if is_complete(folder):
                break
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(
            f"{hub_id}: no such file or folder, and as a hub id it is neither in the local cache "
            f"nor could it be downloaded ({reason})"
        ) from error
    return folder


def config_folder(base: str | Path) -> Path:
    """Return the path of a model that is needed for its config; of a hub id only the config is fetched.

    Raises
    ------
    FileNotFoundError
        If it is neither a path nor a hub id that can be fetched.
    """
    path = Path(base).expanduser()
    if path.exists():
        return path
    if isinstance(base, Path) or path.is_absolute() or not _HUB_ID.fullmatch(base):
        raise FileNotFoundError(f"{base}: no such file or folder")
    return _snapshot(base, [["config.json"]], lambda folder: (folder / "config.json").exists())


def _is_complete(folder: Path) -> bool:
    """Whether a snapshot holds weights, and every shard that its index names."""
    indices = [*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")]
    for index in indices:
        try:
            shards = set(read_json(index)["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return True  # complete or not, the reader will say what is wrong with it
        if not all((folder / str(shard)).exists() for shard in shards):
            return False
    return bool(indices) or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
