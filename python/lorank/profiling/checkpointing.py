"""Gradient checkpointing in a model of which nothing is trained.

The reentrant kind records a block only if one of the tensors given to it requires a gradient, and the
inputs of a frozen model do not. To mark inputs or embeddings would be a guess at what a model does with
them: some mark theirs themselves, some take embeddings for inputs. So every checkpointed block gets one
more tensor, which requires a gradient and which the block does not see.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

_lock = threading.Lock()
_depth = 0
_apply: Callable[..., Any] = CheckpointFunction.apply


@contextmanager
def trainable_checkpoints() -> Iterator[None]:
    """Let reentrant checkpoints record their blocks, whatever their inputs are."""
    _enter(1)
    try:
        yield
    finally:
        _enter(-1)


def _enter(step: int) -> None:
    """Replace torch's own function while any thread is within `trainable_checkpoints`."""
    global _depth
    with _lock:
        _depth += step
        if _depth:
            CheckpointFunction.apply = _recorded
        else:
            del CheckpointFunction.apply


def _recorded(function: Callable[..., Any], preserve_random_state: bool, *inputs: Any) -> Any:
    """Call `CheckpointFunction.apply` with one more input, and with tensors given by keyword as inputs.

    transformers binds keywords to the function, where torch does not see them: for every block that takes
    them, their gradients would pass once more through the graph before the blocks.
    """
    keywords = function.keywords if isinstance(function, partial) else {}
    names = [
        name for name, value in keywords.items() if isinstance(value, torch.Tensor) and value.requires_grad
    ]

    def run(_extra: torch.Tensor, *given: Any) -> Any:
        bound = dict(zip(names, given[: len(names)], strict=True))
        return function(*given[len(names) :], **bound)

    extra = torch.zeros((), requires_grad=True)
    return _apply(run, preserve_random_state, extra, *(keywords[name] for name in names), *inputs)
