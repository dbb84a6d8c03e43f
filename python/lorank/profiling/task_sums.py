"""Sums of inputs and output gradients of modules, from which their task spectra follow."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorank.profiling.module_reads import ModuleRead, as_float32
from lorank.profiling.targets import Target
from lorank.profiling.task_memory import input_bytes, output_bytes
from lorank.task_spectra import InputMoments, TaskSpectrum


class TaskSums:
    """An observer that keeps the sums of each module; modules in one group share the sums over inputs.

    Parameters
    ----------
    groups
        Modules that share inputs, by index in `targets`.
    targets
        All modules that are profiled.
    folds
        Number of folds.
    memory
        Bytes for all sums.

    Attributes
    ----------
    order
        The modules of all groups, by index in `targets`.
    tasks
        The sums of each module.
    settled
        Modules whose sums are complete. A module leaves this set if it reads other rows than its group in a
        later batch, and memory is too small for separate sums over inputs.
    with_inner
        Modules through which a gradient within the loss passes.
    """

    def __init__(
        self, groups: Sequence[tuple[int, ...]], targets: Sequence[Target], folds: int, memory: int
    ) -> None:
        self.order = [index for group in groups for index in group]
        self.settled = set(self.order)
        self.with_inner: set[int] = set()
        self.tasks: dict[int, TaskSpectrum] = {}
        self._targets = targets
        self._folds = folds
        self._inputs: list[tuple[Sequence[int], InputMoments]] = []
        self._reads: dict[int, list[ModuleRead]] = {index: [] for index in self.order}
        self._batch = 0
        self._spare = memory
        for group in groups:
            self._spare -= input_bytes(targets[group[0]], folds)
            self._spare -= sum(output_bytes(targets[index], folds) for index in group)
            shared = InputMoments(folds=folds)
            self._inputs.append((group, shared))
            self.tasks |= {index: TaskSpectrum(inputs=shared) for index in group}

    def see_input(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Return the inputs unchanged."""
        del index
        return x

    def see_gradient(self, index: int, kept: torch.Tensor, delta: torch.Tensor) -> None:
        """Add rows to the products of inputs and targets; `end_batch` adds them to the sums over inputs."""
        target = self.order[index]
        if target not in self.settled:
            return
        read = ModuleRead.of(kept, delta)
        try:
            self.tasks[target].update(read.rows, -as_float32(delta[read.has_gradient]))
        except ValueError as error:
            name = self._targets[target].info.name
            raise ValueError(
                f"batch {self._batch}: {name} (X: its inputs, Y: its output gradients): {error}"
            ) from error
        self._reads[target].append(read)

    def see_inner(self, index: int, x: torch.Tensor, delta: torch.Tensor) -> None:
        """Record the module: this part of its gradient has no rows of inputs and outputs."""
        if bool(delta.any()) and bool(x.any()):
            self.with_inner.add(self.order[index])

    def end_batch(self) -> None:
        """Add the rows of the batch to the sums over inputs, once for all modules that read the same rows."""
        self._batch += 1
        groups, self._inputs = self._inputs, []
        for members, moments in groups:
            by_rows: dict[object, list[int]] = {}
            for index in members:
                by_rows.setdefault(tuple(read.key for read in self._reads[index]), []).append(index)
            first, *separated = by_rows.values()
            # The shared sums are copied before the rows of this batch are added.
            self._inputs += [
                (part, self._separated(part, moments)) for part in separated if self._reserve(part)
            ]
            self._inputs.append((first, moments))
        for members, moments in self._inputs:
            for read in self._reads[members[0]]:
                moments.update(read.rows)
        self._reads = {index: [] for index in self.order}

    def _reserve(self, members: Sequence[int]) -> bool:
        """Reserve memory for separate sums; without enough memory, leave the modules to another pass."""
        needed = input_bytes(self._targets[members[0]], self._folds)
        if needed > self._spare:
            self.settled -= set(members)
            return False
        self._spare -= needed
        return True

    def _separated(self, members: Sequence[int], shared: InputMoments) -> InputMoments:
        """Give modules their own copy of the sums over inputs that they shared with their group."""
        own = InputMoments(folds=self._folds)
        own.merge(shared)
        for index in members:
            task = TaskSpectrum(inputs=own)
            task.merge(self.tasks[index])
            self.tasks[index] = task
        return own
