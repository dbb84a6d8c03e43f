"""The steps before a change of ranks: hooks on the model, and a sketch per module and step."""

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
    """What the gradients of the last steps looked like.

    While it is open it holds ``modules * steps * k^2`` numbers, the projections, and the projected inputs
    of one batch. Between windows the projections stay; `close` drops them.

    Parameters
    ----------
    targets, size, seed
        As in `GradientSketches`.
    scaler
        The `torch.amp.GradScaler` in use, if any: gradients are divided by its scale.
    """

    def __init__(self, targets: Sequence[Target], size: int | None, seed: int, scaler: Any) -> None:
        self._targets = targets
        self._sketches = GradientSketches(targets, size, seed)
        self._scaler, self._scale = scaler, 1.0
        self._probe: AbstractContextManager[Probe] | None = None
        self._steps: list[list[torch.Tensor]] = []

    @property
    def size(self) -> int | None:
        """The sketches' size."""
        return self._sketches.size

    @property
    def device(self) -> torch.device:
        """The device of the first module's sketches."""
        return self._sketches.device(0)

    def __len__(self) -> int:
        """Steps that were kept."""
        return len(self._steps)

    def watch(self, counts: bool) -> None:
        """Put hooks on for the coming step if its gradients count, and take them off if not."""
        if counts and self._probe is None:
            self._probe = probing(self._targets, self._sketches)
            self._probe.__enter__()
        elif not counts:
            self._take_hooks_off()
        self._sketches.take()  # What a skipped window may have left.
        self._scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())

    def end_step(self) -> None:
        """Keep the sketches of the step that is over, if it was watched."""
        if self._probe is not None:
            self._steps.append([sketch / self._scale for sketch in self._sketches.take_all()])

    def take(self) -> list[list[torch.Tensor]]:
        """The sketches of every step, averaged over processes; steps that overflowed are left out."""
        steps, self._steps = [averaged(sketches) for sketches in self._steps], []
        # A step that overflowed under the gradient scaler was no step.
        return [step for step in steps if all(bool(torch.isfinite(sketch).all()) for sketch in step)]

    def close(self) -> None:
        """Take all hooks off, and drop what can be made again; what was kept stays."""
        self._take_hooks_off()
        self._sketches.take()
        self._sketches.drop_projections()

    def state(self) -> list[list[torch.Tensor]]:
        """What was kept, on the CPU; under `torch.distributed` call it in every process."""
        self._steps = [averaged(sketches) for sketches in self._steps]
        return [[sketch.cpu() for sketch in sketches] for sketches in self._steps]

    def load(self, steps: Sequence[Sequence[torch.Tensor]]) -> None:
        """Go on with what `state` returned, every sketch where its module is.

        Raises
        ------
        FormatError
            If these are no sketches of the modules.
        """
        shapes = [self._sketches.shape(index) for index in range(len(self._targets))]
        if any([tuple(sketch.shape) for sketch in sketches] != shapes for sketches in steps):
            raise FormatError("damaged: its sketches are not those of the model's modules")
        self._steps = [
            [sketch.to(self._sketches.device(index)) for index, sketch in enumerate(sketches)]
            for sketches in steps
        ]

    def _take_hooks_off(self) -> None:
        if self._probe is not None:
            self._probe.__exit__(None, None, None)
            self._probe = None
