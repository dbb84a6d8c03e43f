"""The rows that modules read during a pass, and the groups of modules that read the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lorank.profiling.passes import Loss, backward_passes
from lorank.profiling.probe import probing
from lorank.profiling.targets import Target

_ROUNDING = 8 * float(np.finfo(np.float32).eps)
"""Share of the largest gradient in a call, up to which a gradient counts as a rounding error."""


class ModuleRead(NamedTuple):
    """The inputs of one call of a module.

    Rows without a gradient (padded tokens, masked tokens, ignored labels) are not samples of the task: with
    the target zero, they would lower the estimated noise.

    Attributes
    ----------
    x
        The inputs, ``(tokens, in)``.
    has_gradient
        True for rows with a gradient, ``(tokens,)``.
    """

    x: torch.Tensor
    has_gradient: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, delta: torch.Tensor) -> ModuleRead:
        """Build a `ModuleRead` from inputs and output gradients, ``(tokens, in)`` and ``(tokens, out)``."""
        sizes = delta.abs().amax(1) if delta.numel() else delta.new_zeros(len(delta))
        # If the terms of a gradient cancel (queries of the first token), some kernels leave a rounding error.
        floor = _ROUNDING * sizes.max() if len(sizes) else 0.0
        # The comparison is negated, so that NaN counts as a gradient; a later check raises for NaN.
        return cls(x, ~(sizes <= floor))

    @property
    def key(self) -> object:
        """Key of the rows in memory: equal keys mean equal rows, as long as both tensors are alive."""
        x = self.x
        has_gradient = self.has_gradient.cpu().numpy().tobytes()
        return x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, has_gradient

    @property
    def rows(self) -> npt.NDArray[np.float32]:
        """Inputs of the rows with a gradient, shape ``(samples, in)``."""
        return as_float32(self.x[self.has_gradient])


def as_float32(rows: torch.Tensor) -> npt.NDArray[np.float32]:
    """Return a tensor as a float32 array."""
    array: npt.NDArray[np.float32] = rows.float().cpu().numpy()
    return array


def shared_inputs(
    model: Any, targets: Sequence[Target], batch: Any, loss: Loss | None
) -> list[tuple[int, ...]]:
    """Return groups of modules that read the same rows in one batch; each module is in one group.

    Modules that are called several times share a group if all their calls read the same rows.
    """
    observer = _ReadRecorder(len(targets))
    with probing(targets, observer) as probe:
        for _ in backward_passes(model, [batch], probe, loss=loss, max_batches=1, progress=False):
            pass
    groups: dict[object, list[int]] = {}
    for index, reads in enumerate(observer.reads):
        # A module without reads is a group of its own.
        groups.setdefault(tuple(read.key for read in reads) or index, []).append(index)
    return [tuple(group) for group in groups.values()]


class _ReadRecorder:
    """An observer that keeps the reads of each module."""

    def __init__(self, count: int) -> None:
        # Tensors stay alive, so that no two of them have the same address.
        self.reads: list[list[ModuleRead]] = [[] for _ in range(count)]

    def see_input(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Return the inputs unchanged."""
        del index
        return x

    def see_gradient(self, index: int, kept: torch.Tensor, delta: torch.Tensor) -> None:
        """Record the inputs of one call and the rows with a gradient."""
        self.reads[index].append(ModuleRead.of(kept, delta))

    def see_inner(self, index: int, x: torch.Tensor, delta: torch.Tensor) -> None:
        """Ignore inner gradients, whose rows are not inputs of the module."""
