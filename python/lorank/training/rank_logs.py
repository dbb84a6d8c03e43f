"""Ranks in what Trainer logs: a summary for everybody, and a number per module for those who draw curves."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import CallbackHandler

_OF_MODULE = "lora_rank/"
_CONSOLE = {PrinterCallback.__name__, ProgressCallback.__name__, "NotebookProgressCallback"}


def summary(ranks: Mapping[str, int], num_parameters: int) -> dict[str, float]:
    """What fits into a line."""
    return {
        "lora_rank_mean": sum(ranks.values()) / len(ranks),
        "lora_rank_min": min(ranks.values()),
        "lora_rank_max": max(ranks.values()),
        "lora_parameters": num_parameters,
    }


def by_module(ranks: Mapping[str, int]) -> dict[str, int]:
    """The rank of every module, under a common prefix."""
    return {_OF_MODULE + name: rank for name, rank in ranks.items()}


class ReadableConsole(TrainerCallback):  # type: ignore[misc]
    """Takes the modules' ranks out of the logs before they are printed: there can be hundreds."""

    def on_log(self, *_args: Any, **kwargs: Any) -> None:
        """Leave what fits into a line."""
        logs = kwargs.get("logs") or {}
        for name in [name for name in logs if name.startswith(_OF_MODULE)]:
            del logs[name]


def go_first(callback: TrainerCallback) -> None:
    """Run before the callbacks that report, so that they see what is added to the logs.

    Those that print come last, and behind a `ReadableConsole`. A callback is not told who calls it.
    """
    for handler in gc.get_objects():
        if type(handler) is CallbackHandler and callback in handler.callbacks:
            # In place: the handler is on its way through the list.
            callbacks = handler.callbacks
            callbacks.remove(callback)
            callbacks.insert(0, callback)
            if not any(isinstance(other, ReadableConsole) for other in callbacks):
                printing = [i for i, other in enumerate(callbacks) if type(other).__name__ in _CONSOLE]
                callbacks.insert(min(printing, default=len(callbacks)), ReadableConsole())
