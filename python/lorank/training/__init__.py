"""Ranks during fine-tuning: live PEFT models change theirs, and training goes on."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorank.training.callback import GardCallback
    from lorank.training.dynamic_ranks import DynamicRanks, RankUpdate
    from lorank.training.learning_rates import param_groups
    from lorank.training.resizing import RankChange, resize_lora
    from lorank.training.restoring import restore_ranks

# Imported when they are asked for: all of them need torch.
_LAZY = {
    "DynamicRanks": "dynamic_ranks",
    "GardCallback": "callback",
    "RankChange": "resizing",
    "RankUpdate": "dynamic_ranks",
    "param_groups": "learning_rates",
    "resize_lora": "resizing",
    "restore_ranks": "restoring",
}

__all__ = [
    "DynamicRanks",
    "GardCallback",
    "RankChange",
    "RankUpdate",
    "param_groups",
    "resize_lora",
    "restore_ranks",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'lorank.training' has no attribute {name!r}")
    value: object = getattr(import_module(f"lorank.training.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
