"""Effective ranks of the gradients of a window, smoothed over windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lorank.profiling.gradients import gradient_row
from lorank.profiling.targets import Target
from lorank.report.gradients import ModuleGradients
from lorank.training.data_parallel import first_process_values


class GradientScores:
    """Effective ranks of modules as exponential averages over windows.

    Parameters
    ----------
    targets
        The modules.
    energy, beta
        The options `energy` and `smoothing` of `GardOptions`.

    Attributes
    ----------
    smoothed
        Effective rank of each module, averaged over the windows so far.
    """

    def __init__(self, targets: Sequence[Target], energy: float, beta: float) -> None:
        self._targets = targets
        self._energy = energy
        self._beta = beta
        self.smoothed: dict[str, float] = {}

    def measured(
        self, steps: Sequence[Sequence[torch.Tensor]], device: torch.device
    ) -> list[ModuleGradients]:
        """Return the row of each module from the sketches of the steps, equal in all processes.

        Parameters
        ----------
        steps
            A sketch of each module, for each step.
        device
            The device over which processes communicate.
        """
        rows = [
            gradient_row(target, [sketches[index] for sketches in steps], self._energy)
            for index, target in enumerate(self._targets)
        ]
        shared = first_process_values([row.effective_rank for row in rows], device)
        return [replace(row, effective_rank=value) for row, value in zip(rows, shared, strict=True)]

    def smooth(self, rows: Sequence[ModuleGradients]) -> list[ModuleGradients]:
        """Update the averages with a window, and return its rows with the averages as effective ranks."""
        for row in rows:
            old = self.smoothed.get(row.name, row.effective_rank)
            self.smoothed[row.name] = self._beta * old + (1 - self._beta) * row.effective_rank
        return [replace(row, effective_rank=self.smoothed[row.name]) for row in rows]
