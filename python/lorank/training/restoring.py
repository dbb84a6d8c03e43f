"""Ranks of a checkpoint for a live model, so that the checkpoint can be loaded into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorank._core import FormatError
from lorank.adapters.live.config import write_config
from lorank.adapters.live.layers import AdaptedLayer
from lorank.adapters.reading import read_adapter
from lorank.modules import naming
from lorank.peft_format.names import CONFIG_FILE
from lorank.peft_format.scaling import alpha_of, divisor
from lorank.training.layers import lora_layers
from lorank.training.resizing import RankChange, resize_lora


def restore_ranks(
    model: Any, checkpoint: str | Path, *, optimizer: Any = None, adapter_name: str = "default"
) -> dict[str, RankChange]:
    """Give a live PEFT model the ranks and scalings of a checkpoint.

    ``Trainer.train(resume_from_checkpoint=...)`` loads the adapter's weights before any callback runs. If
    ranks were changed during the training that it resumes, it fails there: RuntimeError, "size mismatch".
    Call this first: weights and the optimizer's state then find the shapes that they were saved with.
    Only names, shapes and settings are read, no weights.

    Parameters
    ----------
    model
        The PEFT model as it was built at first.
    checkpoint
        A Trainer's checkpoint folder, or an adapter's.
    optimizer
        The optimizer, if there is one already.
    adapter_name
        Which adapter. One that is not called "default" may lie in a subfolder of its name.

    Returns
    -------
    dict
        Module -> what was done, for every module of the checkpoint.

    Raises
    ------
    FileNotFoundError, OSError
        If the folder cannot be read.
    FormatError
        If it holds no adapter, or a damaged one.
    ValueError
        If the checkpoint and the model adapt different modules.
    NotImplementedError
        As `resize_lora`.

    Examples
    --------
    >>> restore_ranks(model, "output/checkpoint-500")  # doctest: +SKIP
    >>> trainer.train(resume_from_checkpoint="output/checkpoint-500")  # doctest: +SKIP
    """
    folder = _adapter_folder(Path(checkpoint), adapter_name)
    adapter = read_adapter(folder)
    layers = lora_layers(model, adapter_name)
    names = _paired(list(adapter.modules), layers, folder)
    ranks = {names[name]: module.rank for name, module in adapter.modules.items()}
    changes = resize_lora(model, ranks, optimizer=optimizer, adapter_name=adapter_name)
    for name, module in adapter.modules.items():
        layers[names[name]].set_scaling(module.scaling)
    config = model.peft_config[adapter_name]
    config.r = adapter.config["r"]
    scaling = adapter.config["lora_alpha"] / divisor(config.r, bool(adapter.config.get("use_rslora")))
    config.lora_alpha = alpha_of(scaling, config.r, bool(config.use_rslora))
    write_config(config, layers.values())
    return changes


def _adapter_folder(checkpoint: Path, adapter_name: str) -> Path:
    checkpoint = checkpoint.expanduser()
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint}: no such folder")
    below = checkpoint / adapter_name
    folder = below if adapter_name != "default" and (below / CONFIG_FILE).exists() else checkpoint
    if not (folder / CONFIG_FILE).exists():
        raise FormatError(f"{folder}: holds no {CONFIG_FILE}: it is no checkpoint of a PEFT model")
    return folder


def _paired(names: list[str], layers: Mapping[str, AdaptedLayer], folder: Path) -> dict[str, str]:
    """The live name of every module of the checkpoint; each has one, and there are no others."""
    paired: dict[str, str] = {}
    for name in names:
        found = [name] if name in layers else [live for live in layers if naming.is_suffix(name, live)]
        if len(found) != 1:
            what = (
                f"fits several of the model ({', '.join(found[:3])})"
                if found
                else "is not adapted in the model"
            )
            raise ValueError(f"{folder}: its module {name!r} {what}")
        paired[name] = found[0]
    if left := [live for live in layers if live not in set(paired.values())]:
        raise ValueError(f"{folder}: holds nothing for {len(left)} adapted modules, such as {left[0]!r}")
    return paired
