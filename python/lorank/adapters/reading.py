"""From a path to an adapter: which format is it, and is it LoRA at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lorank._core import FormatError
from lorank.adapters import kohya, peft_format
from lorank.adapters.adapter import LoraAdapter
from lorank.adapters.tensors import ArrayTensors, FileTensors, Tensors
from lorank.json_files import read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def read_adapter(path: Path) -> LoraAdapter:
    """Read a PEFT folder or an image adapter's file; see `LoraAdapter.load`."""
    path = path.expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir() and (path / CONFIG).exists():
        return replace(peft_format.read(_weights(path), read_config(path / CONFIG)), label=str(path))
    file = path if path.is_file() else _only_safetensors(path)
    if file.suffix != ".safetensors":
        raise FormatError(f"{file}: is neither a PEFT folder nor a .safetensors file")
    return kohya.read(FileTensors(file))


def read_config(path: Path) -> dict[str, Any]:
    """The content of an `adapter_config.json`.

    Raises
    ------
    FormatError
        If it is no JSON object.
    """
    try:
        config = read_json(path)
    except ValueError as error:
        raise FormatError(f"{path}: is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise FormatError(f"{path}: holds a {type(config).__name__}, not an adapter's settings")
    return config


def _weights(folder: Path) -> Tensors:
    if (folder / WEIGHTS).exists():
        return FileTensors(folder / WEIGHTS)
    pickled = folder / "adapter_model.bin"
    if pickled.exists():
        from lorank.sources.state_dict import read_pickle

        return ArrayTensors(read_pickle(pickled), str(pickled))
    raise FormatError(f"{folder}: holds {CONFIG}, but neither {WEIGHTS} nor adapter_model.bin")


def _only_safetensors(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        what = (
            "several .safetensors files: name one" if files else f"neither {CONFIG} nor a .safetensors file"
        )
        raise FormatError(f"{folder}: holds {what}")
    return files[0]
