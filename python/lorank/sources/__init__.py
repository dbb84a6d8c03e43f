"""Where weights come from: files, hub ids, state dicts, live models. One reader each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from lorank.sources.base import MatrixInfo, Skipped, Source, SourceMatrix

AnySource: TypeAlias = "str | Path | Mapping[str, object] | object"
"""A path, a hub id, a mapping name -> array, a live `torch.nn.Module`, or an opened `Source`."""

OPENING = "reading names and asking for the model"
"""The line to show while a source is opened, which may import transformers."""

__all__ = ["OPENING", "AnySource", "MatrixInfo", "Skipped", "Source", "SourceMatrix", "open_source"]


def open_source(source: AnySource) -> Source:
    """Open whatever a user may call a source, without reading its weights yet.

    Parameters
    ----------
    source
        A safetensors file, a shard index or a folder of them; a `.bin`, `.pt` or `.pth` state dict;
        a hub id (the local cache is asked first); a mapping name -> array; a `torch.nn.Module`.

    Returns
    -------
    Source
        The matrices that can be analysed, and what is skipped and why.

    Raises
    ------
    FileNotFoundError
        If it is neither a path nor a hub id that can be had.
    FormatError
        If a file is damaged or hostile.
    TypeError
        If it is none of the above.
    """
    from lorank.modules.live_modules import is_module
    from lorank.sources import files, live, state_dict

    if isinstance(source, Source):
        return source
    if isinstance(source, (str, Path)):
        return files.open_path_or_hub_id(source)
    if isinstance(source, Mapping):
        return state_dict.from_mapping(source)
    if is_module(source):
        return live.from_module(source)
    raise TypeError(
        f"cannot read weights from a {type(source).__name__}: pass a path, a hub id, "
        "a mapping of arrays or a torch.nn.Module"
    )
