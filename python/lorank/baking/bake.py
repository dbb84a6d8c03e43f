"""Adds the updates of adapters to the weights of their base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from lorank._internal.progress import waiting
from lorank._internal.threads import thread_count
from lorank.adapters.content import AdapterContent, Dtype
from lorank.adapters.reading import read_adapter
from lorank.baking import writing
from lorank.baking.checkpoint import open_model
from lorank.baking.plan import plan
from lorank.sources import OPENING


@dataclass(frozen=True, slots=True)
class Baked:
    """A written model.

    Attributes
    ----------
    path
        The folder of the model.
    modules
        The names of the modules whose weights hold updates.
    updated
        The names of the tensors that were computed.
    replaced
        The names of the tensors that adapters save, and that replace those of the base model or are new.
    copied
        Number of tensors that were copied byte by byte.
    files
        The names of the written files.
    total_size
        The size of all tensors in bytes.
    notes
        Remarks on shared weights, new tensors and changed settings.
    unpacked
        The names of the packed weights that became plain ones.
    """

    path: Path
    modules: tuple[str, ...]
    updated: tuple[str, ...]
    replaced: tuple[str, ...]
    copied: int
    files: tuple[str, ...]
    total_size: int
    notes: tuple[str, ...]
    unpacked: tuple[str, ...] = ()


def bake(
    base: str | Path,
    adapters: Sequence[AdapterContent | str | Path] | AdapterContent | str | Path,
    output: str | Path,
    weights: Sequence[float] | None = None,
    *,
    dtype: Dtype | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: bool = True,
) -> Baked:
    """Write a base model with the updates of adapters added to its weights.

    Parameters
    ----------
    base
        The base model: a safetensors file, a folder of shards with an index, or a hub id.
    adapters
        An adapter or several, or their paths.
    output
        The folder to write.
    weights
        A weight for each adapter; negative weights subtract (default: 1 each).
    dtype
        Element type of the changed tensors (default: the stored type of each; bfloat16 for packed weights).
    overwrite
        True to replace a model in the folder.
    threads
        Largest number of threads (default: all that the process may use). The result does not depend on it.
    progress
        True to draw a progress bar on standard error, if that is a terminal.

    Returns
    -------
    Baked
        The written files, and the modules that hold updates.

    Raises
    ------
    FileExistsError
        If the folder holds files and `overwrite` is false, or is the base model's folder.
    FormatError
        If a module of an adapter is not in the base model, has another shape, or is packed in a form that
        cannot be decoded.
    ValueError
        If an adapter is no change of weights (aLoRA), or DoRA is to be combined with other adapters.
    NumericalError
        If a value is not finite or does not fit the element type. Nothing is written in this case.

    Notes
    -----
    ``W + sum_j weight_j scaling_j B_j A_j`` is computed in float64 and rounded once to the stored type. DoRA
    gives the rows of this sum the norms that the adapter holds. Tensors without an update are copied byte by
    byte; shards, index, settings and tokenizer stay the same. A packed weight with an update becomes a plain
    one, and the settings of the quantization name it as such.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np, peft, safetensors.numpy, torch
    >>> import lorank
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     weights = {name: x.numpy() for name, x in model.state_dict().items()}
    ...     safetensors.numpy.save_file(weights, f"{folder}/model.safetensors")
    ...     config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    ...     adapted = peft.get_peft_model(model, config)
    ...     adapted.save_pretrained(f"{folder}/adapter")
    ...     baked = lorank.bake(folder, f"{folder}/adapter", f"{folder}/baked", progress=False)
    ...     found = safetensors.numpy.load_file(f"{folder}/baked/model.safetensors")
    >>> merged = adapted.merge_and_unload()
    >>> baked.updated, np.allclose(found["0.weight"], merged[0].weight.detach(), atol=1e-6)
    (('0.weight',), True)
    """
    loaded = loaded_adapters(adapters)
    shares = checked_weights(loaded, weights)
    if dtype is not None and dtype not in get_args(Dtype):
        raise ValueError(f"dtype must be {', '.join(map(repr, get_args(Dtype)))}, not {dtype!r}")
    count, folder = thread_count(threads), Path(output).expanduser()
    with waiting(OPENING, enabled=progress):
        model = open_model(base)
        writing.check_target(model, folder, overwrite=overwrite)
        changes = plan(model, loaded, shares)
    written = writing.write(model, changes, folder, dtype, count, overwrite=overwrite, progress=progress)
    replaced = tuple(name for name, change in changes.changes.items() if change.is_copy)
    updated = tuple(name for name, change in changes.changes.items() if not change.is_copy)
    unpacked = changes.unpacking.weights
    lost = model.parts(unpacked) | unpacked
    return Baked(
        folder,
        tuple(dict.fromkeys(changes.modules)),
        updated,
        replaced,
        sum(name not in changes.changes and name not in lost for name in model.tensors),
        written.files,
        written.total_size,
        tuple(changes.notes),
        tuple(name for name in model.codes if name in unpacked),
    )


def loaded_adapters(
    adapters: Sequence[AdapterContent | str | Path] | AdapterContent | str | Path,
) -> list[AdapterContent]:
    """Return adapters, read from their paths."""
    given = [adapters] if isinstance(adapters, (AdapterContent, str, Path)) else list(adapters)
    for adapter in given:
        if not isinstance(adapter, (AdapterContent, str, Path)):
            raise TypeError(
                f"an adapter is a LoraAdapter or a path, not an object of type {type(adapter).__name__}"
            )
    if not given:
        raise ValueError("give at least one adapter")
    return [adapter if isinstance(adapter, AdapterContent) else read_adapter(adapter) for adapter in given]


def checked_weights(adapters: Sequence[AdapterContent], weights: Sequence[float] | None) -> list[float]:
    """Return a finite weight for each adapter; 1 each if none are given."""
    shares = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(adapters) or not np.all(np.isfinite(shares)):
        raise ValueError(f"{len(adapters)} adapters need as many finite weights, not {weights!r}")
    return shares
