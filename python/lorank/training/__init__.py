"""Change the ranks of live PEFT models during fine-tuning."""

from typing import TYPE_CHECKING

from lorank._internal.lazy import lazy_names

if TYPE_CHECKING:
    from lorank.training.callback import GardCallback
    from lorank.training.dynamic_ranks import DynamicRanks, RankUpdate
    from lorank.training.learning_rates import param_groups
    from lorank.training.resizing import RankChange, resize_lora
    from lorank.training.restoring import restore_ranks

# The modules are imported on first use, because all need torch.
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

__getattr__, __dir__ = lazy_names(__name__, _LAZY, needs_torch_for="to change ranks of a live model")
