"""Give a live model the ranks of a checkpoint, so that the checkpoint can be loaded into it."""

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

    ``Trainer.train(resume_from_checkpoint=...)`` loads the adapter's weights before it calls any callback.
    If ranks changed during the resumed training, loading raises RuntimeError ("size mismatch"). Call this
    function first, so that weights and the optimizer's state have the saved shapes. The function reads names,
    shapes and settings, but no weights.

    Parameters
    ----------
    model
        The PEFT model as built before the first training.
    checkpoint
        Folder of a Trainer's checkpoint or of a saved adapter.
    optimizer
        The optimizer that trains the model; None before the optimizer exists.
    adapter_name
        Name of the adapter. PEFT saves an adapter with another name than "default" in a subfolder of that
        name.

    Returns
    -------
    dict
        `RankChange` of each module of the checkpoint, by name in the model.

    Raises
    ------
    FileNotFoundError, OSError
        If the folder cannot be read.
    FormatError
        If the folder has no adapter, or the adapter is damaged.
    ValueError
        If the checkpoint and the model adapt different modules.
    NotImplementedError
        In the cases of `resize_lora`.

    Examples
    --------
    >>> import tempfile
    >>> import torch
    >>> from peft import LoraConfig, get_peft_model
    >>> from lorank.training import resize_lora, restore_ranks
    >>> def built():
    ...     base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    ...     return get_peft_model(base, LoraConfig(r=4, target_modules=["0", "1"]))
    >>> model = built()
    >>> changes = resize_lora(model, {"0": 2, "1": 6})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save_pretrained(folder)
    ...     changes = restore_ranks(built(), folder)
    >>> {name: change.new_rank for name, change in changes.items()}
    {'0': 2, '1': 6}
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
    """Return the folder of the adapter in a checkpoint.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    FormatError
        If the folder has no adapter.
    """
    checkpoint = checkpoint.expanduser()
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint}: no such folder")
    below = checkpoint / adapter_name
    folder = below if adapter_name != "default" and (below / CONFIG_FILE).exists() else checkpoint
    if not (folder / CONFIG_FILE).exists():
        raise FormatError(f"{folder}: holds no {CONFIG_FILE}: pass the checkpoint of a PEFT model")
    return folder


def _paired(names: list[str], layers: Mapping[str, AdaptedLayer], folder: Path) -> dict[str, str]:
    """Map names of modules in the checkpoint to names in the model.

    Raises
    ------
    ValueError
        If a module of the checkpoint or of the model has no counterpart, or several.
    """
    paired: dict[str, str] = {}
    for name in names:
        found = [name] if name in layers else [live for live in layers if naming.is_suffix(name, live)]
        if len(found) != 1:
            what = (
                f"matches several modules of the model ({', '.join(found[:3])})"
                if found
                else "is not adapted in the model"
            )
            raise ValueError(f"{folder}: module {name!r} of the checkpoint {what}")
        paired[name] = found[0]
    found_in_model = set(paired.values())
    if left := [live for live in layers if live not in found_in_model]:
        raise ValueError(f"{folder}: holds no factors of {len(left)} adapted modules, such as {left[0]!r}")
    return paired
