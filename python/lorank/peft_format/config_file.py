"""Reads and writes `adapter_config.json`, the file that `LoraConfig.from_pretrained` loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorank._core import FormatError
from lorank._internal.atomic import write_text
from lorank._internal.json_files import read_json
from lorank._internal.regular_files import SETTINGS_BYTES
from lorank.peft_format.names import CONFIG_FILE

FILE_NAME = CONFIG_FILE

_DEFAULTS = {"task_type": None, "bias": "none", "inference_mode": False, "init_lora_weights": True}


def read(path: Path) -> dict[str, Any]:
    """Return the settings in an `adapter_config.json`.

    Raises
    ------
    FormatError
        If the file does not hold a JSON object.
    """
    try:
        config = read_json(path, SETTINGS_BYTES)
    except ValueError as error:
        raise FormatError(f"{path}: is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise FormatError(
            f"{path}: holds an object of type {type(config).__name__}, not an adapter's settings"
        )
    return config


def content(settings: Mapping[str, Any], base_model: str | None) -> dict[str, Any]:
    """Return the file's content for the arguments of a `LoraConfig`.

    Parameters
    ----------
    settings
        Arguments as from `RankAllocation.lora_settings`; PEFT uses its defaults for missing ones.
    base_model
        The path or hub id of the base model.
    """
    return {"peft_type": "LORA", "base_model_name_or_path": base_model, **_DEFAULTS, **settings}


def write(folder: Path, settings: Mapping[str, Any], base_model: str | None) -> Path:
    """Write the file into a folder and return its path."""
    path = folder / FILE_NAME
    write_text(path, json.dumps(content(settings, base_model), indent=2) + "\n")
    return path
