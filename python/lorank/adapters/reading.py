"""Reads adapters from paths: chooses the format, and removes padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorank._core import FormatError
from lorank._internal.staging import is_interrupted
from lorank.adapters.certificate import Certificate
from lorank.adapters.content import AdapterContent
from lorank.adapters.formats import padding
from lorank.adapters.formats.base import AsStored
from lorank.adapters.formats.kohya import KOHYA
from lorank.adapters.formats.peft import PEFT
from lorank.adapters.formats.registry import format_of
from lorank.peft_format.names import CONFIG_FILE
from lorank.sources import recognise


def read_adapter(path: str | Path) -> AdapterContent:
    """Read a PEFT folder or an image adapter's file; see `LoraAdapter.load`."""
    return _finished(path, _read(path))


def read_as_stored(path: str | Path) -> AsStored:
    """Read an adapter with the ranks of the file's tensors, including padding.

    Adapters whose initialisation changed the base model are read too, because some runtimes repeat that
    initialisation.
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
    if path.is_dir() and (path / CONFIG_FILE).exists():
        return PEFT.read(path, contradictions=contradictions, changed_base=changed_base)
    if path.is_dir() and is_interrupted(path):
        raise FormatError(
            f"{path}: an interrupted save left some of its files: save the adapter there again with overwrite"
        )
    if path.is_dir():
        recognise.check_adapter_folder(path)
    return KOHYA.read(path, contradictions=contradictions, changed_base=changed_base)


def _finished(path: str | Path, stored: AsStored) -> AdapterContent:
    """Return the adapter without padding, and with its certificate."""
    metadata = stored.tensors.metadata
    adapter = padding.removed(stored.adapter, metadata)
    # Further training ends the spectral form, so the certificate no longer applies.
    if not adapter.is_spectral:
        return adapter
    its_format = format_of(adapter)
    read_certificate = its_format.certificate(Path(path).expanduser(), metadata)
    if read_certificate is None:
        return adapter
    return _certified(adapter, its_format.certificate_place, read_certificate)


def _certified(adapter: AdapterContent, place: str, read: Callable[[], Any]) -> AdapterContent:
    """Return the adapter with the certificate and its notes, if the certificate fits the adapter."""
    try:
        content = read()
        certificate = Certificate.from_json(content)
    except (OSError, ValueError) as error:
        note = f"{place} was ignored, because it is damaged: {error}"
        return replace(adapter, notes=[*adapter.notes, note])
    ranks = {module.name: module.rank_after for module in certificate.modules if module.rank_after}
    if ranks != {module.name: module.rank for module in adapter.adapted}:
        note = f"{place} was ignored: it has other ranks than the adapter"
        return replace(adapter, notes=[*adapter.notes, note])
    earlier = content.get("notes")
    notes = [note for note in earlier if isinstance(note, str)] if isinstance(earlier, list) else []
    return replace(adapter, certificate=certificate, notes=list(dict.fromkeys([*notes, *adapter.notes])))
