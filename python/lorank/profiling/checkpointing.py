"""Gradient checkpointing in a model without trained parameters.

A reentrant checkpoint records a block only if one of the block's input tensors requires a gradient. The
inputs of a frozen model require none. Setting `requires_grad` on the inputs or embeddings does not work for
every model: some models set it themselves, and some take embeddings as inputs. Therefore every checkpointed
block gets an extra, unused input that requires a gradient.
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
    """Make reentrant checkpoints record their blocks, even if no input requires a gradient."""
    _enter(1)
    try:
        yield
    finally:
        _enter(-1)


def _enter(step: int) -> None:
    """Add `step` to the number of open contexts; replace `CheckpointFunction.apply` while any is open."""
    global _depth
    with _lock:
        _depth += step
        if _depth:
            CheckpointFunction.apply = _recorded
        else:
            del CheckpointFunction.apply


def _recorded(function: Callable[..., Any], preserve_random_state: bool, *inputs: Any) -> Any:
    """Call `CheckpointFunction.apply` with an extra input, and pass tensors among the keywords as inputs.

    transformers binds keyword arguments to the function, so torch does not detach the tensors among them.
    The backward pass of every block would then run through the graph that computed such a tensor.
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
