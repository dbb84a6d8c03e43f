"""Models of the Hugging Face hub: their ids, the local cache, and downloads."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from lorank._internal import extras
from lorank._internal.json_files import read_json
from lorank.modules import model_config

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")


def local_path(source: str | Path, download: Callable[[str], Path]) -> Path:
    """Return the local path of a source; download it if only the hub has it.

    Parameters
    ----------
    source
        A path, or a hub id ``name`` or ``name@revision``.
    download
        A function that returns the local folder of a hub id: `download_model` or `download_config`.

    Raises
    ------
    FileNotFoundError
        If no file or folder has that name, and no hub model with that id can be downloaded.
    """
    if source == "":
        raise FileNotFoundError("an empty path names no model or adapter")
    path = Path(source).expanduser()
    if path.exists():
        return path
    if isinstance(source, Path) or path.is_absolute() or not _HUB_ID.fullmatch(source):
        raise FileNotFoundError(f"{source}: no such file or folder")
    return download(source)


def download_model(hub_id: str) -> Path:
    """Return the local folder of a hub model; download what the cache lacks.

    The folder holds the configuration and one format of weights: safetensors if the model has them.
    """
    settings = [model_config.FILE_NAME, *model_config.QUANTIZATION_FILES]
    safetensors = [*settings, "*.safetensors", "*.safetensors.index.json"]
    pickles = [*settings, "*.bin", "*.bin.index.json"]
    return _snapshot(hub_id, [safetensors, pickles], _has_all_weights)


def download_checkpoint(hub_id: str) -> Path:
    """Return the local folder of a hub model with its safetensors files, settings and tokenizer."""
    beside = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*"]
    return _snapshot(hub_id, [["*.safetensors", *beside]], _has_all_weights)


def download_config(hub_id: str) -> Path:
    """Return a local folder with the `config.json` of a hub model, with or without its weights."""
    name = model_config.FILE_NAME
    return _snapshot(hub_id, [[name]], lambda folder: (folder / name).exists())


def download_adapter(hub_id: str) -> Path:
    """Return the local folder of a hub adapter; download what the cache lacks.

    The folder holds the settings, and one format of factors: safetensors if the adapter has them.
    """
    safetensors = ["*.json", "*.safetensors"]
    others = ["*.json", "*.bin", "*.gguf"]
    return _snapshot(hub_id, [safetensors, others], _has_factors)


def _has_factors(folder: Path) -> bool:
    return any(any(folder.glob(f"*{end}")) for end in (".safetensors", ".bin", ".gguf"))


def _snapshot(hub_id: str, choices: Sequence[list[str]], is_complete: Callable[[Path], bool]) -> Path:
    """Return the folder of a hub model: from the cache, or with the first choice of files that completes it.

    Parameters
    ----------
    hub_id
        ``name`` or ``name@revision``.
    choices
        Lists of patterns of file names, in the order in which they are tried.
    is_complete
        A function that returns True for a folder with all necessary files.

    Raises
    ------
    FileNotFoundError
        If the model is not in the cache and cannot be downloaded.
    """
    hub = extras.require(
        "huggingface_hub",
        "hub",
        f"to look up {hub_id!r} on the hub, because no such file or folder exists",
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
            f"{hub_id}: no such file or folder; as a hub id, it is not in the local cache and could not be "
            f"downloaded ({reason})"
        ) from error
    return folder


def _has_all_weights(folder: Path) -> bool:
    """Return True if a folder holds weights, and every shard that an index names."""
    indices = [*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")]
    for index in indices:
        try:
            shards = set(read_json(index)["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return True  # the reader of the checkpoint reports the damaged index
        if not all((folder / str(shard)).exists() for shard in shards):
            return False
    return bool(indices) or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
