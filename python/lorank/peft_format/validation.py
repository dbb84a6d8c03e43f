"""Checks of an `adapter_config.json`: the kind of adapter, and the types of settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

from lorank._core import FormatError
from lorank._internal.short_text import shown
from lorank.peft_format.initialization import changes_the_base

Kind = Literal["LORA", "ADALORA"]

# Variants of LoRA whose update is not `B A`, by the setting that turns them on.
_OTHER_UPDATES = {"kasa_config": "KaSA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA"}


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


# Settings that other code depends on, with a description and a test of the type. Null means "not set".
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("target_modules", "exclude_modules"),
        ("a regular expression or a list of names", lambda x: isinstance(x, str) or _is_names(x)),
    ),
    **dict.fromkeys(("modules_to_save", "target_parameters"), ("a list of names", _is_names)),
    **dict.fromkeys(
        ("use_rslora", "use_dora", "lora_bias"), ("true or false", lambda x: isinstance(x, bool))
    ),
    **dict.fromkeys(
        ("base_model_name_or_path", "task_type", "bias"), ("a string", lambda x: isinstance(x, str))
    ),
}


def kind_of(config: Mapping[str, Any]) -> str:
    """Return the kind of adapter that the settings name, in capitals, such as ``"LORA"``."""
    return str(config.get("peft_type", "LORA")).upper().rpartition(".")[2]


def checked_kind(label: str, config: Mapping[str, Any], *, changed_base: bool = False) -> Kind:
    """Check an adapter's settings, and return its kind.

    Parameters
    ----------
    label
        Name of the adapter in messages.
    config
        The settings.
    changed_base
        True to accept initialisations that change the base model.

    Raises
    ------
    FormatError
        If the adapter is of another kind, or a setting has a wrong type.
    """
    kind = kind_of(config)
    if kind not in ("LORA", "ADALORA"):
        raise FormatError(f"{label}: is a {kind} adapter: only LoRA (and AdaLoRA) can be read")
    for key, method in _OTHER_UPDATES.items():
        if config.get(key) not in (None, False):
            raise FormatError(
                f"{label}: is a {method} adapter ({key} is set), whose update is not a product of two "
                "factors: only LoRA (and AdaLoRA) can be read"
            )
    if (init := changes_the_base(config)) and not changed_base:
        raise FormatError(
            f"{label}: was initialised by {init!r}, which changes the base model: its factors are not an "
            "update of the original weights. Save it again with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    for key, (wanted, fits) in _TYPES.items():
        if (value := config.get(key)) is not None and not fits(value):
            raise FormatError(f"{label}: the settings' {key} is {shown(value)}: it should be {wanted}")
    return cast("Kind", kind)
