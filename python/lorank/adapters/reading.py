"""Reads adapters from paths: chooses the format, and removes padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorank._core import FormatError, LorankError
from lorank._internal.staging import is_interrupted
from lorank.adapters import binding
from lorank.adapters.certificate import Certificate
from lorank.adapters.claims import Claims
from lorank.adapters.content import AdapterContent
from lorank.adapters.formats import gguf_files, gguf_tensors, mlx, padding
from lorank.adapters.formats.base import AsStored
from lorank.adapters.formats.base_weights import BaseWeights
from lorank.adapters.formats.kohya import KOHYA
from lorank.adapters.formats.peft import PEFT
from lorank.adapters.formats.registry import format_of
from lorank.peft_format.names import CONFIG_FILE, WEIGHTS_FILE
from lorank.sources import hub, recognise


def read_adapter(path: str | Path, base: BaseWeights | None = None) -> AdapterContent:
    """Read an adapter of any layout; see `LoraAdapter.load`.

    Parameters
    ----------
    path
        The path of a folder or file, or a hub id.
    base
        The base model, for layouts whose factors depend on it.
    """
    path = hub.local_path(path, hub.download_adapter)
    stored = _read(path)
    if base is not None and stored.with_base is not None:
        stored = replace(stored, adapter=stored.with_base(base))
    return _finished(path, stored)


def read_as_stored(path: str | Path) -> AsStored:
    """Read an adapter with the ranks of the file's tensors, including padding.

    Adapters whose initialisation changed the base model are read too, because some runtimes repeat that
    initialisation.
    """
    path = hub.local_path(path, hub.download_adapter)
    return _read(path, contradictions=True, changed_base=True)


def read_for_repair(path: str | Path) -> AdapterContent:
    """Read an adapter whose settings may contradict its tensors: ranks from tensors, scales from settings."""
    path = hub.local_path(path, hub.download_adapter)
    return _finished(path, _read(path, contradictions=True))


def _read(path: str | Path, *, contradictions: bool = False, changed_base: bool = False) -> AsStored:
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_file() and gguf_tensors.is_gguf(path):
        return gguf_files.read(path)
    if mlx.is_folder(path) and not (path / WEIGHTS_FILE).exists():
        return mlx.read(path)
    if path.is_dir() and (path / CONFIG_FILE).exists():
        return PEFT.read(path, contradictions=contradictions, changed_base=changed_base)
    if path.is_dir() and is_interrupted(path):
        raise FormatError(
            f"{path}: an interrupted save left some of its files: save the adapter there again with overwrite"
        )
    if (
        path.is_dir()
        and len(files := sorted(path.glob("*.gguf"))) == 1
        and not any(path.glob("*.safetensors"))
    ):
        return gguf_files.read(files[0])
    if path.is_dir():
        recognise.check_adapter_folder(path)
    return KOHYA.read(path, contradictions=contradictions, changed_base=changed_base)


def _finished(path: str | Path, stored: AsStored) -> AdapterContent:
    """Return the adapter without padding, and with the statements of its files."""
    metadata = stored.tensors.metadata
    adapter = padding.removed(stored.adapter, metadata)
    its_format = format_of(adapter)
    read = its_format.certificate(Path(path).expanduser(), metadata)
    place = its_format.certificate_place
    if not adapter.is_spectral:
        # Further training ends the spectral form, so the certificate no longer applies.
        notes = [f"{place} was ignored: another program wrote the factors since"] if read else []
        return replace(adapter, notes=[*adapter.notes, *notes])
    certificate, content, notes = _stated(adapter, place, read)
    seed = _seed(stored)
    is_in_file = its_format.rewrites_certificate
    every = [*adapter.notes, *notes]
    return adapter.claiming(Claims(stored.tensors, seed, every, certificate, content, place, is_in_file))


def _seed(stored: AsStored) -> bytes:
    modules = stored.adapter.modules.values()
    return binding.seed(stored.tensors.metadata, [(m.name, m.rank, m.scaling) for m in modules])


def is_as_written(path: str | Path) -> bool:
    """Return True if an adapter's tensors, ranks and scalings are exactly those that lorank wrote.

    False for an adapter of another program, for one that was trained or edited since, and for files that
    cannot be read.
    """
    try:
        stored = _read(path)
        return binding.fits(stored.tensors, _seed(stored)) is True
    except (LorankError, OSError, ValueError):
        return False


def _stated(
    adapter: AdapterContent, place: str, read: Callable[[], Any] | None
) -> tuple[Certificate | None, Any, list[str]]:
    """Return the certificate if it fits the adapter's ranks, its JSON values, and notes."""
    if read is None:
        return None, None, []
    try:
        content = read()
        certificate = Certificate.from_json(content)
    except (OSError, ValueError) as error:
        return None, None, [f"{place} was ignored, because it is damaged: {error}"]
    ranks = {module.name: module.rank_after for module in certificate.modules if module.rank_after}
    if ranks != {module.name: module.rank for module in adapter.adapted}:
        return None, None, [f"{place} was ignored: it has other ranks than the adapter"]
    return certificate, content, []
