"""Sources of weights: files, hub models, state dicts and live models, with one reader each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from lorank.sources.base import MatrixInfo, Skipped, Source, SourceMatrix

AnySource: TypeAlias = "str | Path | Mapping[str, object] | object"
"""A path, a hub id, a mapping from names to arrays, a live `torch.nn.Module`, or an opened `Source`."""

OPENING = "reading names and identifying the model"
"""The message that is shown while a source is opened, which may import transformers."""

__all__ = ["OPENING", "AnySource", "MatrixInfo", "Skipped", "Source", "SourceMatrix", "open_source"]


def open_source(source: AnySource) -> Source:
    """Open a source; its weights are read later.

    Parameters
    ----------
    source
        A safetensors file, shard index or folder; a `.bin`, `.pt` or `.pth` state dict; a hub id (the local
        cache is tried first); a mapping from names to arrays; a `torch.nn.Module`.

    Returns
    -------
    Source
        The matrices that can be analysed, and the skipped tensors with the reasons.

    Raises
    ------
    FileNotFoundError
        If a string is neither a path nor a hub id that can be downloaded.
    FormatError
        If a file is damaged or hostile.
    TypeError
        If the source is of another type.

    Examples
    --------
    >>> import numpy
    >>> source = open_source({"q_proj.weight": numpy.eye(4), "q_proj.bias": numpy.zeros(4)})
    >>> [(matrix.info.name, matrix.info.shape) for matrix in source.matrices]
    [('q_proj', (4, 4))]
    >>> [(skipped.name, skipped.reason) for skipped in source.skipped]
    [('q_proj.bias', '1-D tensor')]
    """
    # Each reader is imported when it is needed: modules that use only the types of this package start faster.
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
        f"cannot read weights from an object of type {type(source).__name__}: pass a path, a hub id, "
        "a mapping of arrays or a torch.nn.Module"
    )
