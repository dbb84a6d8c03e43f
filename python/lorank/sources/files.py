"""Sources on disk and on the hub."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lorank import extras, naming
from lorank._core import Checkpoint, FormatError
from lorank.json_files import read_json
from lorank.sources import recognise
from lorank.sources.base import Skipped, Source, SourceMatrix
from lorank.sources.layout import FLOAT_TYPES, Layout

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
    base = recognise.base_tensors(label, [name for name, _, _ in tensors])
    shapes = {base[name]: tuple(shape) for name, _, shape in tensors if name in base}
    layout = Layout(shapes, read_config(path))
    matrices: list[SourceMatrix] = []
    skipped: list[Skipped] = []
    for position, (name, dtype, shape) in enumerate(tensors):
        found = layout.matrices(base[name], dtype) if name in base else recognise.left_out(name)
        if isinstance(found, str):
            size = math.prod(shape)
            readable = size > 0 and dtype in FLOAT_TYPES
            load = partial(checkpoint.matrix, position, 1, size) if readable else None
            skipped.append(Skipped(name, tuple(shape), found, load))
            continue
        matrices += [
            SourceMatrix(
                m.info,
                partial(checkpoint.matrix, position, m.rows, m.cols, m.index),
                transposed=m.transposed,
                kernel=m.kernel,
            )
            for m in found
        ]
    # Writers sort by type and by name as text: block 10 before block 2.
    matrices.sort(key=lambda matrix: naming.natural_key(matrix.info.name))
    num_parameters = sum(
        math.prod(shape) for name, dtype, shape in tensors if dtype in FLOAT_TYPES and name in base
    )
    return Source(
        label, tuple(matrices), tuple(skipped), num_parameters, _fingerprint(checkpoint.files(), tensors)
    )


def _open_pickles(path: Path, label: str) -> Source:
    from lorank.sources import state_dict

    return state_dict.from_pickles(path, label, read_config(path))


def read_config(path: Path) -> Mapping[str, Any]:
    """The model's `config.json` beside its weights; empty if there is none that can be read."""
    folder = path if path.is_dir() else path.parent
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


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
    """The local folder of a hub model, `name[@revision]`: from the cache if it is there in whole.

    Only the configuration and one format of weights are fetched, safetensors if there are any.
    """
    hub = extras.require(
        "huggingface_hub", "hub", f"as there is no file or folder {hub_id!r}, to look for a hub id"
    )
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo, _, revision = hub_id.partition("@")
    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    fallback = ["config.json", "*.bin", "*.bin.index.json"]

    def cached() -> Path | None:
        try:
            folder = Path(
                hub.snapshot_download(
                    repo, revision=revision or None, allow_patterns=wanted, local_files_only=True
                )
            )
        except LocalEntryNotFoundError:
            return None
        return folder if _is_complete(folder) else None

    def fetched(patterns: list[str]) -> Path:
        return Path(hub.snapshot_download(repo, revision=revision or None, allow_patterns=patterns))

    try:
        folder = cached() or fetched(wanted)
        return folder if _is_complete(folder) else fetched(fallback)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(
            f"{hub_id}: no such file or folder, and as a hub id it is neither in the local cache "
            f"nor could it be downloaded ({reason})"
        ) from error


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
