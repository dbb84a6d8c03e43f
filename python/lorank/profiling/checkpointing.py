"""Gradient checkpointing in a model without trained parameters.

Reentrant checkpoints record a block only if one of its input tensors requires a gradient, which the inputs of
a frozen model do not. Inputs or embeddings cannot be marked from outside for every model: some models mark
them themselves, and some take embeddings as inputs. So every checkpointed block gets an extra input that
requires a gradient, and does not use it.
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
    """Make reentrant checkpoints record their blocks for any inputs, within the context."""
    _enter(1)
    try:
        yield
    finally:
        _enter(-1)


def _enter(step: int) -> None:
    """Replace torch's function while any thread is within `trainable_checkpoints`."""
    global _depth
    with _lock:
        _depth += step
        if _depth:
            CheckpointFunction.apply = _recorded
        else:
            del CheckpointFunction.apply


def _recorded(function: Callable[..., Any], preserve_random_state: bool, *inputs: Any) -> Any:
    """Call `CheckpointFunction.apply` with an extra input, and with tensor keywords as inputs.

    transformers binds keywords to the function, out of torch's sight. Gradients of such tensors would pass
    through the graph before the blocks again for each block that uses them.
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
