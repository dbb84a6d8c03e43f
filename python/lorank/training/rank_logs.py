"""Ranks in the logs of Trainer: a summary for the console, and the rank of each module for trackers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_callback import CallbackHandler

_MODULE_PREFIX = "lora_rank/"


def summary(ranks: Mapping[str, int], num_parameters: int) -> dict[str, float]:
    """Return mean, smallest and largest rank, and the number of the adapter's parameters."""
    return {
        "lora_rank_mean": sum(ranks.values()) / len(ranks),
        "lora_rank_min": min(ranks.values()),
        "lora_rank_max": max(ranks.values()),
        "lora_parameters": num_parameters,
    }


def by_module(ranks: Mapping[str, int]) -> dict[str, int]:
    """Return the rank of each module, under ``lora_rank/MODULE``."""
    return {_MODULE_PREFIX + name: rank for name, rank in ranks.items()}


class ReadableConsole(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """A filter that keeps the ranks of single modules, possibly hundreds, off the console."""

    def on_log(self, *_args: Any, **kwargs: Any) -> None:
        """Remove the entries ``lora_rank/MODULE``."""
        logs = kwargs.get("logs") or {}
        for name in [name for name in logs if name.startswith(_MODULE_PREFIX)]:
            del logs[name]


def go_before_trackers(callback: TrainerCallback) -> None:
    """Move a callback to the front, and callbacks that print to the end, after a `ReadableConsole`.

    Trainer passes one dictionary of logs to its callbacks in turn, trackers first. Entries that the callback
    adds reach trackers only if the callback comes before them. Call this from an event of the callback.
    """
    handler = _calling_handler(callback)
    if handler is None:
        return
    others = [
        other for other in handler.callbacks if other is not callback and type(other) is not ReadableConsole
    ]
    trackers = [other for other in others if not _prints(other)]
    printing = [other for other in others if _prints(other)]
    # A new list: the handler is still iterating over the old one.
    handler.callbacks = [callback, *trackers, ReadableConsole(), *printing]


def _calling_handler(callback: TrainerCallback) -> Any:
    """Return the handler that is calling a callback; None if other code is calling it.

    The order of callbacks can only be set in the handler, but a callback gets no reference to Trainer or its
    handler. The handler is therefore taken from the call stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler) and any(other is callback for other in caller.callbacks):
            return caller
        frame = frame.f_back
    return None


def _prints(callback: Any) -> bool:
    """Return True for the callbacks of transformers that write logs to the console or a notebook."""
    # The class is compared by name: the notebook's callback can be imported only where IPython is installed.
    return isinstance(callback, (PrinterCallback, ProgressCallback)) or any(
        kind.__name__ == "NotebookProgressCallback" for kind in type(callback).__mro__
    )
