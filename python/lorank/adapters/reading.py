"""From a path to an adapter: which format is it, and is it LoRA at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorank._core import FormatError
from lorank.adapters import kohya, padding, peft_format
from lorank.adapters.adapter import LoraAdapter
from lorank.adapters.tensors import ArrayTensors, FileTensors, Tensors
from lorank.certificate import Certificate
from lorank.json_files import parse_json, read_json
from lorank.sources import recognise

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
CERTIFICATE = "lorank.json"


def as_adapter(adapter: LoraAdapter | str | Path) -> LoraAdapter:
    """An adapter, or the one at a path.

    Raises
    ------
    TypeError
        If it is neither.
    """
    if isinstance(adapter, LoraAdapter):
        return adapter
    if isinstance(adapter, (str, Path)):
        return read_adapter(adapter)
    raise TypeError(f"an adapter is a LoraAdapter or a path, not a {type(adapter).__name__}")


def read_adapter(path: str | Path) -> LoraAdapter:
    """Read a PEFT folder or an image adapter's file; see `LoraAdapter.load`."""
    return _finished(path, *_read(path))


def read_as_stored(path: str | Path) -> LoraAdapter:
    """The same with the ranks that the file's tensors have, padding included, whatever its settings say."""
    return _read(path, contradictions=True)[0]


def read_for_repair(path: str | Path) -> LoraAdapter:
    """An adapter whose settings may contradict its tensors: the ranks are the tensors', the scale theirs."""
    return _finished(path, *_read(path, contradictions=True))


def _read(path: str | Path, *, contradictions: bool = False) -> tuple[LoraAdapter, Mapping[str, str]]:
    if path == "":
        raise FileNotFoundError("an empty path names no adapter")
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir() and (path / CONFIG).exists():
        tensors = _weights(path)
        adapter = peft_format.read(tensors, read_config(path / CONFIG), contradictions=contradictions)
        return replace(adapter, label=str(path)), tensors.metadata
    if path.is_dir():
        recognise.check_adapter_folder(path)
    file = path if path.is_file() else _only_safetensors(path)
    if file.suffix != ".safetensors":
        raise FormatError(f"{file}: is neither a PEFT folder nor a .safetensors file")
    tensors = FileTensors(file)
    recognise.check_adapter_tensors(tensors.label, tensors.shapes())
    return kohya.read(tensors), tensors.metadata


def _finished(path: str | Path, adapter: LoraAdapter, metadata: Mapping[str, str]) -> LoraAdapter:
    """The adapter without padding, and with its certificate."""
    adapter = padding.removed(adapter, metadata)
    # Who has trained the adapter since did not write factors in spectral form.
    if not adapter.is_spectral:
        return adapter
    if adapter.format == "kohya":
        text = metadata.get(kohya.CERTIFICATE_KEY, "")
        return _certified(adapter, kohya.CERTIFICATE_KEY, lambda: parse_json(text)) if text else adapter
    file = Path(path).expanduser() / CERTIFICATE
    return _certified(adapter, CERTIFICATE, lambda: read_json(file)) if file.is_file() else adapter


def _certified(adapter: LoraAdapter, name: str, content_of: Callable[[], Any]) -> LoraAdapter:
    """The adapter with the certificate and the notes that were written with it, if they are its own."""
    try:
        content = content_of()
        certificate = Certificate.from_json(content)
    except (OSError, ValueError) as error:
        return replace(adapter, notes=[*adapter.notes, f"{name} was ignored, as it is damaged: {error}"])
    ranks = {module.name: module.rank_after for module in certificate.modules if module.rank_after}
    if ranks != {module.name: module.rank for module in adapter.adapted}:
        return replace(adapter, notes=[*adapter.notes, f"{name} was ignored: it has other ranks"])
    earlier = content.get("notes")
    notes = [note for note in earlier if isinstance(note, str)] if isinstance(earlier, list) else []
    return replace(adapter, certificate=certificate, notes=list(dict.fromkeys([*notes, *adapter.notes])))


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
    pickled = folder / PICKLED_WEIGHTS
    if pickled.exists():
        from lorank.sources.state_dict import read_pickle

        return ArrayTensors(read_pickle(pickled), str(pickled))
    if reason := recognise.other_adapter(folder, read_config(folder / CONFIG)):
        raise FormatError(reason)
    raise FormatError(f"{folder}: holds {CONFIG}, but neither {WEIGHTS} nor {PICKLED_WEIGHTS}")


def _only_safetensors(folder: Path) -> Path:
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if len(files) != 1:
        what = (
            "several .safetensors files: name one" if files else f"neither {CONFIG} nor a .safetensors file"
        )
        raise FormatError(f"{folder}: holds {what}")
    return files[0]
