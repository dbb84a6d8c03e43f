"""From a path to an adapter: which format is it, and is it LoRA at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorank._core import FormatError
from lorank._internal.json_files import parse_json, read_json
from lorank.adapters.certificate import Certificate
from lorank.adapters.content import AdapterContent
from lorank.adapters.formats import kohya, padding, peft
from lorank.adapters.formats.expert_layout import Parameter
from lorank.adapters.formats.key_wrappers import Unwrapped
from lorank.adapters.tensors import ArrayTensors, FileTensors, Tensors
from lorank.sources import recognise
from lorank.sources.state_dict import read_pickle

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"
CERTIFICATE = "lorank.json"


@dataclass(frozen=True, slots=True)
class AsStored:
    """An adapter with the ranks of the file's tensors, and the differences between it and the file.

    Attributes
    ----------
    adapter
        The adapter with padding, and with the ranks of the tensors, whatever the settings state.
    tensors
        The tensors by their names without wrappers.
    wrappers
        The names of wrappers that keys of the file hold.
    stored_as
        Key without wrappers -> the file's key, for keys with a wrapper's name.
    swapped
        Stacks of experts whose factors lie as PEFT before 0.19 wrote them.
    """

    adapter: AdapterContent
    tensors: Tensors
    wrappers: tuple[str, ...] = ()
    stored_as: Mapping[str, str] = field(default_factory=dict)
    swapped: tuple[Parameter, ...] = ()


def read_adapter(path: str | Path) -> AdapterContent:
    """Read a PEFT folder or an image adapter's file; see `LoraAdapter.load`."""
    return _finished(path, _read(path))


def read_as_stored(path: str | Path) -> AsStored:
    """Read an adapter with the ranks that the file's tensors have, padding included.

    Adapters whose initialisation changed the base model are read too: some runtimes change it again.
    """
    return _read(path, contradictions=True, changed_base=True)


def read_for_repair(path: str | Path) -> AdapterContent:
    """Read an adapter whose settings may contradict its tensors: ranks from tensors, scales from settings."""
    return _finished(path, _read(path, contradictions=True))


def _read(path: str | Path, *, contradictions: bool = False, changed_base: bool = False) -> AsStored:
    if path == "":
        raise FileNotFoundError("an empty path names no adapter")
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir() and (path / CONFIG).exists():
        return _read_peft(path, contradictions, changed_base)
    if path.is_dir():
        recognise.check_adapter_folder(path)
    file = path if path.is_file() else _only_safetensors(path)
    if file.suffix != ".safetensors":
        raise FormatError(f"{file}: is neither a PEFT folder nor a .safetensors file")
    tensors = FileTensors(file)
    recognise.check_adapter_tensors(tensors.label, tensors.shapes())
    return AsStored(kohya.read(tensors), tensors)


def _read_peft(folder: Path, contradictions: bool, changed_base: bool) -> AsStored:
    config = read_config(folder / CONFIG)
    unwrapped = Unwrapped.of(_weights(folder), config.get("target_modules"))
    reading = peft.read_all(
        unwrapped.tensors, config, contradictions=contradictions, changed_base=changed_base
    )
    notes = [*([unwrapped.note()] if unwrapped.wrappers else []), *reading.adapter.notes]
    adapter = replace(reading.adapter, label=str(folder), notes=notes)
    return AsStored(
        adapter, unwrapped.tensors, unwrapped.wrappers, unwrapped.stored_as, tuple(reading.swapped)
    )


def _finished(path: str | Path, stored: AsStored) -> AdapterContent:
    """The adapter without padding, and with its certificate."""
    metadata = stored.tensors.metadata
    adapter = padding.removed(stored.adapter, metadata)
    # Further training ends the spectral form, so the certificate no longer applies.
    if not adapter.is_spectral:
        return adapter
    if adapter.format == "kohya":
        text = metadata.get(kohya.CERTIFICATE_KEY, "")
        return _certified(adapter, kohya.CERTIFICATE_KEY, lambda: parse_json(text)) if text else adapter
    file = Path(path).expanduser() / CERTIFICATE
    return _certified(adapter, CERTIFICATE, lambda: read_json(file)) if file.is_file() else adapter


def _certified(adapter: AdapterContent, name: str, content_of: Callable[[], Any]) -> AdapterContent:
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
