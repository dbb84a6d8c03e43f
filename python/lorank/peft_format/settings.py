"""The ranks and scalings that an `adapter_config.json` gives to modules."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from lorank._core import FormatError
from lorank._internal.short_text import shown
from lorank.peft_format.fields import DEFAULT_ALPHA, DEFAULT_INITIAL_RANK, DEFAULT_RANK
from lorank.peft_format.pattern_table import PatternTable
from lorank.peft_format.rank_groups import rank_owner
from lorank.peft_format.scaling import divisor
from lorank.peft_format.validation import kind_of

Value = TypeVar("Value")


class Settings:
    """Ranks and scalings of modules, looked up as PEFT does.

    Attributes
    ----------
    rank, alpha
        Rank and alpha of modules that no pattern matches.
    initial_rank
        The rank from which AdaLoRA started.
    rank_stabilized
        True if alpha is divided by the square root of the rank.
    """

    def __init__(self, label: str, config: Mapping[str, Any]) -> None:
        self.rank = _rank(label, "r", config.get("r", DEFAULT_RANK))
        self.alpha = _alpha(label, "lora_alpha", config.get("lora_alpha", DEFAULT_ALPHA))
        self.initial_rank = _rank(label, "init_r", config.get("init_r", DEFAULT_INITIAL_RANK))
        self.rank_stabilized = bool(config.get("use_rslora"))
        # AdaLoRA's `rank_pattern` holds masks, not ranks.
        has_ranks = kind_of(config) != "ADALORA"
        self._ranks = _table(label, config if has_ranks else {}, "rank_pattern", _rank)
        self._alphas = _table(label, config, "alpha_pattern", _alpha)

    def rank_and_scaling(self, name: str) -> tuple[int, float]:
        """Return the rank and the scaling of a module."""
        owner = rank_owner(name)
        rank = self._ranks.get(owner, self.rank)
        alpha = self._alphas.get(owner, self.alpha)
        return rank, alpha / divisor(rank, self.rank_stabilized)

    def adalora_scaling(self, rank: int) -> float:
        """Return the scaling of an AdaLoRA module of a rank.

        PEFT divides alpha by the initial rank plus 1e-5, even if the masks have lowered the rank.
        """
        return (self.alpha if self.alpha > 0 else float(rank)) / (self.initial_rank + 1e-5)


def _rank(label: str, key: str, value: Any) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not 1 <= value < 2**31:
        raise FormatError(f"{label}: the settings' {key} is {shown(value)}: ranks are positive integers")
    return int(value)


def _alpha(label: str, key: str, value: Any) -> float:
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise FormatError(f"{label}: the settings' {key} is {shown(value)}: alphas are finite numbers")
    return float(value)


def _table(
    label: str, config: Mapping[str, Any], key: str, checked: Callable[[str, str, Any], Value]
) -> PatternTable[Value]:
    pattern = config.get(key) or {}
    if not isinstance(pattern, Mapping):
        raise FormatError(
            f"{label}: the settings' {key} has type {type(pattern).__name__}, not a table of modules"
        )
    values = {name: checked(label, f"{key}[{shown(name)}]", value) for name, value in pattern.items()}
    try:
        return PatternTable(values, f"{label}: the settings' {key}")
    except ValueError as error:
        raise FormatError(f"{label}: the settings' {key} has an invalid key: {error}") from None
