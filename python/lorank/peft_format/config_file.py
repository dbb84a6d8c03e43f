"""`adapter_config.json` without PEFT installed: what `LoraConfig.from_pretrained` loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorank._internal.atomic import write_text

FILE_NAME = "adapter_config.json"


def content(settings: Mapping[str, Any], base_model: str | None) -> dict[str, Any]:
    """The file's content for the arguments of a `LoraConfig`.

    Parameters
    ----------
    settings
        As from `RankAllocation.lora_settings`; what is missing takes PEFT's defaults on loading.
    base_model
        The path or hub id of the base model.
    """
    defaults = {"task_type": None, "bias": "none", "inference_mode": False, "init_lora_weights": True}
    return {"peft_type": "LORA", "base_model_name_or_path": base_model, **defaults, **settings}


def write(folder: Path, settings: Mapping[str, Any], base_model: str | None) -> Path:
    """Write the file into a folder and return its path."""
    path = folder / FILE_NAME
    write_text(path, json.dumps(content(settings, base_model), indent=2) + "\n")
    return path
