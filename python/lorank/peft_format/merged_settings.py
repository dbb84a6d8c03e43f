"""The settings of a sum of adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lorank._internal.short_text import shown

# Settings that must be equal in all adapters; settings of the first line may be missing in some.
_OF_ANY = ("task_type", "bias", "lora_bias", "trainable_token_indices")
_OF_ALL = ("alora_invocation_tokens", "layer_replication")


def merged(settings: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the settings of a sum of adapters: the first adapter's, and some that only later adapters have.

    Parameters
    ----------
    settings
        Label and settings of each adapter.

    Raises
    ------
    ValueError
        If two adapters differ in a setting that a sum has only once.
    """
    result = dict(settings[0][1])
    for key in (*_OF_ANY, *_OF_ALL):
        found = [(label, _given(config.get(key))) for label, config in settings]
        if key in _OF_ANY:
            found = [(label, value) for label, value in found if value is not None] or found[:1]
        for label, value in found[1:]:
            if json.dumps(value, sort_keys=True) != json.dumps(found[0][1], sort_keys=True):
                raise ValueError(
                    f"{key} is {shown(found[0][1])} in {found[0][0]}, but {shown(value)} in {label}: a sum "
                    "has only one value; make the values equal in adapter_config.json"
                )
        if found[0][1] is not None:
            result[key] = found[0][1]
    kept = [name for _, config in settings for name in config.get("modules_to_save") or ()]
    result["modules_to_save"] = list(dict.fromkeys(kept)) or None
    bases = [base for _, config in settings if (base := config.get("base_model_name_or_path"))]
    result["base_model_name_or_path"] = bases[0] if bases else None
    return result


def _given(value: Any) -> Any:
    """Return a setting; None for the values by which PEFT turns it off."""
    return None if value in (False, "none", [], {}) else value
