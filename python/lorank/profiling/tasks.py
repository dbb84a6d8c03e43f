"""Task spectra of a live model's modules: from inputs to minus output gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lorank import naming
from lorank.profiling.passes import Loss, backward_passes, frozen, trainable_inputs
from lorank.profiling.probe import probing
from lorank.profiling.targets import Target, find_targets
from lorank.report.tasks import ModuleTask, TaskReport
from lorank.task_spectra import InputMoments, Space, TaskSpectrum


def profile_tasks(
    model: Any,
    batches: Iterable[Any],
    *,
    targets: naming.Targets = None,
    max_batches: int | None = None,
    loss: Loss | None = None,
    space: Space = "prediction",
    folds: int = 5,
    memory: int = 4 * 2**30,
    progress: bool = True,
) -> TaskReport:
    """The rank that each module's own task wants: from its inputs to minus its output gradients.

    A step against the gradient asks each module to change its outputs `Y` by minus their gradients,
    given its inputs `X`: a row per token. Only sums over rows are kept. Modules that read the same
    input share its part.

    Parameters
    ----------
    model, batches, targets, max_batches, loss, progress
        As in `profile_gradients`.
    space
        As in `task_spectrum`. Activations are far from white, so that ``"prediction"``, whose noise
        edge does not mind, is the default here.
    folds
        Of the cross-validation behind `predicted_rank`; at least 2.
    memory
        Bytes that the sums may take, about ``8 folds d_in (2 d_in + d_out)`` per module. If they need
        more, the modules are split over several passes through the batches.

    Returns
    -------
    TaskReport
        For ``allocate(report, method="task")``. The model is left as it was.

    Raises
    ------
    ImportError
        Without torch (extra ``peft``).
    ValueError
        If there is no batch, no loss, or a value that is not finite; if `memory` does not hold the sums
        of one module; if several passes are needed and `batches` is an iterator.

    Notes
    -----
    Source: Why Does LoRA Work? The Spectral Theory of Low-Rank Adaptation; K* per module is the
    paper's open problem.
    """
    InputMoments(folds=folds)  # Refused before any work.
    found = find_targets(model, targets)
    first, batches = _with_first(batches)
    rows: dict[int, ModuleTask] = {}
    num_samples = 0
    with frozen(model), trainable_inputs(model):
        groups = _shared_inputs(model, found.chosen, first, loss)
        while groups:
            passes = _passes(groups, found.chosen, folds, memory)
            groups = []
            for members in passes:
                _check_again(batches, len(passes), bool(rows))
                observer = _TaskSums(members, found.chosen, folds)
                with probing([found.chosen[index] for index in observer.order], observer):
                    for _ in backward_passes(
                        model, batches, loss=loss, max_batches=max_batches, progress=progress
                    ):
                        observer.end_batch()
                tasks = observer.tasks
                rows |= {i: _row(found.chosen[i], tasks[i], space) for i in observer.settled}
                num_samples = max(num_samples, *(task.num_samples for task in tasks.values()))
                # Modules that turned out to read different inputs are looked at one by one.
                groups += [(index,) for index in observer.order if index not in observer.settled]
    ordered = [rows[index] for index in range(len(found.chosen))]
    return TaskReport(ordered, found.skipped, found.source.label, found.source.num_parameters, num_samples)


def _check_again(batches: Iterable[Any], num_passes: int, is_another: bool) -> None:
    """Refuse a second pass through an iterator, before the first if it is foreseen."""
    if iter(batches) is not batches or (num_passes == 1 and not is_another):
        return
    why = (
        "modules that read one input at first read different ones later, which needs another pass"
        if is_another
        else f"the memory allowed needs {num_passes} passes"
    )
    raise ValueError(f"{why}, and batches is an iterator: pass a list")


class _TaskSums:
    """An observer that keeps the sums of every module; those in one group share inputs.

    Attributes
    ----------
    order
        The modules, by their place among all targets.
    tasks
        The sums of each.
    settled
        The modules whose group has read one input in every batch so far.
    """

    def __init__(self, groups: Sequence[tuple[int, ...]], targets: Sequence[Target], folds: int) -> None:
        self.order = [index for group in groups for index in group]
        self.settled = set(self.order)
        self.tasks: dict[int, TaskSpectrum] = {}
        self._groups = groups
        self._targets = targets
        self._owned: dict[int, InputMoments] = {}
        self._read: dict[int, list[object]] = {index: [] for index in self.order}
        self._batch = 0
        for group in groups:
            shared = InputMoments(folds=folds)
            self._owned[group[0]] = shared
            self.tasks |= {index: TaskSpectrum(inputs=shared) for index in group}

    def see_input(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The inputs themselves."""
        del index
        return x

    def see_gradient(self, index: int, kept: torch.Tensor, delta: torch.Tensor) -> None:
        """Add rows. Inputs are added here too: the backward pass deals all rows in one order."""
        target = self.order[index]
        self._read[target].append(_identity(kept))
        x = _array(kept)
        try:
            if target in self._owned:
                self._owned[target].update(x)
            self.tasks[target].update(x, -_array(delta))
        except ValueError as error:
            name = self._targets[target].info.name
            raise ValueError(
                f"batch {self._batch}: {name}, X its inputs and Y its output gradients: {error}"
            ) from error

    def end_batch(self) -> None:
        """Look whether the members of every group read the same."""
        self._batch += 1
        for group in self._groups:
            if any(self._read[index] != self._read[group[0]] for index in group):
                self.settled -= set(group)
        self._read = {index: [] for index in self.order}


class _Identities:
    """An observer that learns which modules read the same tensor."""

    def __init__(self) -> None:
        self.readers: dict[object, list[int]] = {}
        self._alive: list[torch.Tensor] = []

    def see_input(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Remember who read it."""
        self._alive.append(x)  # Or another tensor could come to lie in its place.
        self.readers.setdefault(_identity(x), []).append(index)
        return x

    def see_gradient(self, index: int, kept: torch.Tensor, delta: torch.Tensor) -> None:
        """Not looked at."""


def _shared_inputs(
    model: Any, targets: Sequence[Target], batch: Any, loss: Loss | None
) -> list[tuple[int, ...]]:
    """Groups of modules that read one input, every module in one group."""
    observer = _Identities()
    with probing(targets, observer):
        for _ in backward_passes(model, [batch], loss=loss, max_batches=1, progress=False):
            pass
    # Modules that are called several times are shared if they are so every time.
    inputs: dict[int, list[object]] = {index: [] for index in range(len(targets))}
    for key, readers in observer.readers.items():
        for index in readers:
            inputs[index].append(key)
    groups: dict[object, list[int]] = {}
    for index, keys in inputs.items():
        shape = targets[index].info.shape[1]
        groups.setdefault((tuple(keys), shape) if keys else index, []).append(index)
    return [tuple(group) for group in groups.values()]


def _passes(
    groups: Sequence[tuple[int, ...]], targets: Sequence[Target], folds: int, memory: int
) -> list[list[tuple[int, ...]]]:
    """Groups, cut up where they are too large, in passes that fit into memory."""
    passes: list[list[tuple[int, ...]]] = []
    left = 0
    for group in groups:
        width = targets[group[0]].info.shape[1]
        open_group = False
        for index in group:
            inputs, own = 16 * folds * width**2, 8 * folds * width * targets[index].info.shape[0]
            if inputs + own > memory:
                raise ValueError(
                    f"memory {memory:,}: the sums of {targets[index].info.name} alone need {inputs + own:,} "
                    "bytes: give more, or fewer folds"
                )
            if open_group and own <= left:
                passes[-1][-1] = (*passes[-1][-1], index)
                left -= own
                continue
            if inputs + own > left:
                passes.append([])
                left = memory
            passes[-1].append((index,))
            left -= inputs + own
            open_group = True
    return passes


def _row(target: Target, task: TaskSpectrum, space: Space) -> ModuleTask:
    info = target.info
    identity: dict[str, Any] = {
        "name": info.name,
        "module": info.module,
        "kind": info.kind,
        "shape": info.shape,
    }
    if task.num_samples == 0:
        return ModuleTask(
            **identity,
            k_star=0,
            predicted_rank=0,
            rho=np.nan,
            tau=np.nan,
            noise=np.nan,
            num_above=0,
            singular_values=np.empty(0),
            predicted_r2=np.empty(0),
            flags=("no gradient reached it",),
        )
    found = task.estimate(space=space)
    return ModuleTask(
        **identity,
        k_star=found.k_star,
        predicted_rank=found.predicted_rank,
        rho=found.rho,
        tau=found.tau,
        noise=found.noise,
        num_above=found.num_above,
        singular_values=found.singular_values,
        predicted_r2=found.predicted_r2,
        flags=found.flags,
    )


def _with_first(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and batches that still begin with it."""
    iterator: Iterator[Any] = iter(batches)
    for first in iterator:
        return first, chain([first], iterator) if iterator is batches else batches
    raise ValueError("no batches: profiling needs at least one")


def _identity(x: torch.Tensor) -> object:
    """Equal for tensors that are alive together and are the same memory."""
    return (x.data_ptr(), tuple(x.shape), x.stride(), x.dtype)


def _array(rows: torch.Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = rows.float().cpu().numpy()
    return array
