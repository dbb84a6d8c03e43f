"""The window of steps before a change of ranks: hooks on the model, and a sketch for each module and step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from lorank._core import FormatError
from lorank.profiling.probe import Probe, probing
from lorank.profiling.sketch import GradientSketches
from lorank.profiling.targets import Target
from lorank.training.data_parallel import averaged


class GradientWindow:
    """Gradient sketches of the last steps.

    An open window holds ``modules * steps * k^2`` numbers, the projections, and the projected inputs of one
    batch. Between windows the projections stay; `close` drops them.

    Parameters
    ----------
    targets, size, seed
        As in `GradientSketches`.
    scaler
        The `torch.amp.GradScaler` of the training, or None: gradients are divided by its scale.
    """

    def __init__(self, targets: Sequence[Target], size: int | None, seed: int, scaler: Any) -> None:
        self._targets = targets
        self._sketches = GradientSketches(targets, size, seed)
        self._scaler, self._scale = scaler, 1.0
        self._probe: AbstractContextManager[Probe] | None = None
        self._steps: list[list[torch.Tensor]] = []

    @property
    def size(self) -> int | None:
        """Size of the random projections; None for exact gradients."""
        return self._sketches.size

    @property
    def device(self) -> torch.device:
        """Device of the first module's sketches."""
        return self._sketches.device(0)

    def __len__(self) -> int:
        """Number of steps with sketches."""
        return len(self._steps)

    def watch(self, is_watched: bool) -> None:
        """Put hooks on the model for the coming step if it is watched; remove them otherwise."""
        if is_watched and self._probe is None:
            self._probe = probing(self._targets, self._sketches)
            self._probe.__enter__()
        elif not is_watched:
            self._remove_hooks()
        self._sketches.take()  # Drops sketches of backward passes since the last step.
        self._scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())

    def end_step(self) -> None:
        """Keep the sketches of a watched step."""
        if self._probe is not None:
            self._steps.append([sketch / self._scale for sketch in self._sketches.take_all()])

    def take(self) -> list[list[torch.Tensor]]:
        """Remove and return the sketches of each step, averaged over processes.

        Steps with NaN or infinite values are left out.
        """
        steps, self._steps = [averaged(sketches) for sketches in self._steps], []
        # The gradient scaler skips a step whose gradients overflow.
        return [step for step in steps if all(bool(torch.isfinite(sketch).all()) for sketch in step)]

    def close(self) -> None:
        """Remove all hooks and projections; the sketches of past steps stay."""
        self._remove_hooks()
        self._sketches.take()
        self._sketches.drop_projections()

    def state(self) -> list[list[torch.Tensor]]:
        """Return the sketches of each step, on the CPU.

        Under `torch.distributed`, call this method in every process: sketches are averaged.
        """
        self._steps = [averaged(sketches) for sketches in self._steps]
        return [[sketch.cpu() for sketch in sketches] for sketches in self._steps]

    def load(self, steps: Sequence[Sequence[torch.Tensor]]) -> None:
        """Load the result of `state`, and move each sketch to the device of its module.

        Raises
        ------
        FormatError
            If the shapes of the sketches do not match the modules.
        """
        shapes = [self._sketches.shape(index) for index in range(len(self._targets))]
        if any([tuple(sketch.shape) for sketch in sketches] != shapes for sketches in steps):
            raise FormatError("damaged: the sketches do not match the model's modules in number and shape")
        self._steps = [
            [sketch.to(self._sketches.device(index)) for index, sketch in enumerate(sketches)]
            for sketches in steps
        ]

    def _remove_hooks(self) -> None:
        if self._probe is not None:
            self._probe.__exit__(None, None, None)
            self._probe = None
