"""What an `adapter_config.json` says: checked, and looked up as PEFT looks it up."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lorank._core import FormatError
from lorank.modules import naming
from lorank.peft_format.rank_groups import rank_owner

DEFAULT_RANK = 8
DEFAULT_ALPHA = 8
DEFAULT_INITIAL_RANK = 12
"""PEFT's own, where the settings are silent; the last is AdaLoRA's."""

CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations whose saved factors are relative to a base model that the method has changed."""

# Variants of LoRA whose update is not `B A`, by the setting that turns them on.
_OTHER_UPDATES = {"kasa_config": "KaSA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA"}

# Of a sum of adapters: what the others may lack, and what has to be the same for all.
_OF_ANY = ("task_type", "bias", "lora_bias", "trainable_token_indices")
_OF_ALL = ("alora_invocation_tokens", "layer_replication")

# What later code relies on, in words and as a test; a setting that is null is one that is not there.
_SHAPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("target_modules", "exclude_modules"),
        ("a regular expression or a list of names", lambda x: isinstance(x, str) or _is_names(x)),
    ),
    **dict.fromkeys(("modules_to_save", "target_parameters"), ("a list of names", lambda x: _is_names(x))),
    **dict.fromkeys(
        ("use_rslora", "use_dora", "lora_bias"), ("true or false", lambda x: isinstance(x, bool))
    ),
    **dict.fromkeys(
        ("base_model_name_or_path", "task_type", "bias"), ("a word", lambda x: isinstance(x, str))
    ),
}

# What configured the training and means nothing, or the wrong thing, for the result.
ONLY_FOR_TRAINING = (
    "arrow_config",
    "beta1",
    "beta2",
    "corda_config",
    "deltaT",
    "eva_config",
    "init_r",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_ga_config",
    "monteclora_config",
    "orth_reg_weight",
    "target_r",
    "tfinal",
    "tinit",
    "total_step",
)


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def changes_the_base(config: Mapping[str, Any]) -> str | None:
    """Return the initialisation by which training changed the base model; None if it did not."""
    init = config.get("init_lora_weights", True)
    return init if isinstance(init, str) and init.lower().startswith(CHANGES_THE_BASE) else None


def checked_kind(label: str, config: Mapping[str, Any], *, changed_base: bool = False) -> str:
    """Return ``"LORA"`` or ``"ADALORA"``; `changed_base` accepts initialisations that change the base model.

    Raises
    ------
    FormatError
        If it is another kind of adapter, or a setting is not what it has to be.
    """
    kind = str(config.get("peft_type", "LORA")).upper().rpartition(".")[2]
    if kind not in ("LORA", "ADALORA"):
        raise FormatError(f"{label}: is a {kind} adapter: only LoRA (and AdaLoRA) can be read")
    for key, method in _OTHER_UPDATES.items():
        if config.get(key) not in (None, False):
            raise FormatError(
                f"{label}: is a {method} adapter ({key} is set), whose update is no product of two factors: "
                "only LoRA (and AdaLoRA) can be read"
            )
    if (init := changes_the_base(config)) and not changed_base:
        raise FormatError(
            f"{label}: was initialised by {init!r}, which changes the base model: its factors are no update "
            "of the original weights. Save it again with PEFT's path_initial_model_for_weight_conversion"
        )
    for key, (wanted, fits) in _SHAPES.items():
        if (value := config.get(key)) is not None and not fits(value):
            raise FormatError(f"{label}: the settings' {key} is {_short(value)}: it should be {wanted}")
    return kind


def merged(settings: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The settings of a sum of adapters: the first's, with what only later ones have.

    Parameters
    ----------
    settings
        Every adapter's label and settings.

    Raises
    ------
    ValueError
        If two adapters have different ones of what there can be one of.
    """
    result = dict(settings[0][1])
    for key in (*_OF_ANY, *_OF_ALL):
        found = [(label, _given(config.get(key))) for label, config in settings]
        if key in _OF_ANY:
            found = [(label, value) for label, value in found if value is not None] or found[:1]
        for label, value in found[1:]:
            if json.dumps(value, sort_keys=True) != json.dumps(found[0][1], sort_keys=True):
                raise ValueError(
                    f"{key} is {_short(found[0][1])} in {found[0][0]}, but {_short(value)} in {label}: a sum "
                    "has one of them; make them agree in adapter_config.json"
                )
        if found[0][1] is not None:
            result[key] = found[0][1]
    kept = [name for _, config in settings for name in config.get("modules_to_save") or ()]
    result["modules_to_save"] = list(dict.fromkeys(kept)) or None
    bases = [base for _, config in settings if (base := config.get("base_model_name_or_path"))]
    result["base_model_name_or_path"] = bases[0] if bases else None
    return result


def _given(value: Any) -> Any:
    """A setting; None for PEFT's ways to say that there is none."""
    return None if value in (False, "none", [], {}) else value


class Settings:
    """Rank and scaling by module, as PEFT looks them up: the first key that matches wins."""

    def __init__(self, label: str, config: Mapping[str, Any]) -> None:
        self.rank = _rank(label, "r", config.get("r", DEFAULT_RANK))
        self.alpha = _alpha(label, "lora_alpha", config.get("lora_alpha", DEFAULT_ALPHA))
        self.initial_rank = _rank(label, "init_r", config.get("init_r", DEFAULT_INITIAL_RANK))
        self.rank_stabilized = bool(config.get("use_rslora"))
        is_masks = str(config.get("peft_type", "")).upper().endswith("ADALORA")
        self._ranks = {} if is_masks else _compiled(label, config, "rank_pattern", _rank)
        self._alphas = _compiled(label, config, "alpha_pattern", _alpha)

    def of(self, name: str) -> tuple[int, float]:
        """The rank that the settings name, and the scaling."""
        owner = rank_owner(name)
        rank = _first(self._ranks, owner, self.rank)
        alpha = _first(self._alphas, owner, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def adalora_scaling(self, rank: int) -> float:
        """The scale of an AdaLoRA module with so many ranks left.

        PEFT goes on dividing by the initial rank, plus 1e-5, whatever the masks have left.
        """
        return (self.alpha if self.alpha > 0 else float(rank)) / (self.initial_rank + 1e-5)


def _rank(label: str, key: str, value: Any) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not 1 <= value < 2**31:
        raise FormatError(f"{label}: the settings' {key} is {_short(value)}: ranks are positive integers")
    return int(value)


def _alpha(label: str, key: str, value: Any) -> float:
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise FormatError(f"{label}: the settings' {key} is {_short(value)}: alphas are finite numbers")
    return float(value)


def _compiled(
    label: str, config: Mapping[str, Any], key: str, checked: Callable[[str, str, Any], Any]
) -> dict[re.Pattern[str], Any]:
    pattern = config.get(key) or {}
    if not isinstance(pattern, Mapping):
        raise FormatError(f"{label}: the settings' {key} is a {type(pattern).__name__}, no table of modules")
    try:
        return {
            naming.expression(rf"(.*\.)?({name})$"): checked(label, f"{key}[{name!r}]", value)
            for name, value in pattern.items()
        }
    except ValueError as error:
        raise FormatError(f"{label}: a key of the settings' {key}: {error}") from None


def _first(table: Mapping[re.Pattern[str], Any], name: str, default: Any) -> Any:
    for key, value in table.items():
        if key.match(name):
            return value
    return default


def _short(value: Any) -> str:
    """What a setting holds, for a message of one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
