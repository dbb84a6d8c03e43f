"""Task spectra of a live model's modules: from inputs to minus output gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lorank.modules import naming
from lorank.profiling.passes import (
    Loss,
    backward_passes,
    check_batches,
    checked_model,
    frozen,
)
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
    given its inputs `X`: a row per token. Rows to which no gradient comes back (zeros, but for what rounding
    makes of them) are left out: padded and masked tokens are no samples, so that padding changes no estimate.
    Only sums over rows are kept. Modules that read the same rows share their part.

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
    TypeError
        If `model` is no module, or `batches` a single batch.
    ValueError
        If there is no batch, no loss, or a value that is not finite; if `memory` does not hold the sums
        of one module; if several passes are needed and `batches` is an iterator.

    Notes
    -----
    Give more tokens than the widest module has inputs: with fewer, the estimates say little, and they
    take longer, as the sums cannot be factored by Cholesky.

    Of a loss that holds gradients itself, the rows are those of the outer backward pass; modules through
    which an inner one passes are flagged.

    Source: Why Does LoRA Work? The Spectral Theory of Low-Rank Adaptation; K* per module is the
    paper's open problem.
    """
    InputMoments(folds=folds)  # Refused before any work.
    model = checked_model(model)
    check_batches(batches)
    found = find_targets(model, targets)
    first, batches = _with_first(batches)
    rows: dict[int, ModuleTask] = {}
    num_samples = 0
    with frozen(model):
        groups = _shared_inputs(model, found.chosen, first, loss)
        while groups:
            passes = _passes(groups, found.chosen, folds, memory)
            groups = []
            for members in passes:
                _check_again(batches, len(passes), bool(rows))
                observer = _TaskSums(members, found.chosen, folds, memory)
                with probing([found.chosen[index] for index in observer.order], observer) as probe:
                    for _ in backward_passes(
                        model, batches, probe, loss=loss, max_batches=max_batches, progress=progress
                    ):
                        observer.end_batch()
                tasks = observer.tasks
                rows |= {
                    i: _row(found.chosen[i], tasks[i], space, i in observer.with_inner)
                    for i in observer.settled
                }
                num_samples = max(num_samples, *(task.num_samples for task in tasks.values()))
                # Modules that came to read other rows than their group are looked at one by one.
                groups += [(index,) for index in observer.order if index not in observer.settled]
    ordered = [rows[index] for index in range(len(found.chosen))]
    source = found.source
    return TaskReport(
        ordered, found.skipped, source.label, source.num_parameters, num_samples, source.unknown_parameters
    )


def _check_again(batches: Iterable[Any], num_passes: int, is_another: bool) -> None:
    """Refuse a second pass through an iterator, before the first if it is foreseen."""
    if iter(batches) is not batches or (num_passes == 1 and not is_another):
        return
    why = (
        "modules that shared their inputs at first read others later, which needs another pass or more memory"
        if is_another
        else f"the memory allowed needs {num_passes} passes"
    )
    raise ValueError(f"{why}, and batches is an iterator: pass a list")


_ROUNDING = 8 * float(np.finfo(np.float32).eps)
"""Up to this share of the largest gradient, one is nothing but rounding."""


class _Read(NamedTuple):
    """What one call of a module read, and the rows to which a gradient came back.

    Rows without one say nothing of the task: padded and masked tokens, or labels that do not count.
    As samples with the target zero they would only pull down the noise.
    """

    x: torch.Tensor
    is_live: torch.Tensor

    @property
    def key(self) -> object:
        """Equal for reads of the same rows of the same memory, as long as both are alive."""
        x = self.x
        return x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, self.is_live.cpu().numpy().tobytes()

    @property
    def rows(self) -> npt.NDArray[np.float32]:
        """Those that count."""
        return _array(self.x[self.is_live])


def _read(x: torch.Tensor, delta: torch.Tensor) -> _Read:
    sizes = delta.abs().amax(1) if delta.numel() else delta.new_zeros(len(delta))
    # Where a gradient is zero because terms cancel (queries of the first token), some kernels leave a rest.
    floor = _ROUNDING * sizes.max() if len(sizes) else 0.0
    # What is not a number counts, and is found.
    return _Read(x, ~(sizes <= floor))


class _TaskSums:
    """An observer that keeps the sums of every module; those in one group share inputs.

    Attributes
    ----------
    order
        The modules, by their place among all targets.
    tasks
        The sums of each.
    settled
        The modules whose sums are complete: not those that came to read other rows than the rest of
        their group when no memory was left for inputs of their own.
    with_inner
        The modules through which a gradient within the loss passes.
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
        self._reads: dict[int, list[_Read]] = {index: [] for index in self.order}
        self._batch = 0
        self._spare = memory
        for group in groups:
            self._spare -= _input_bytes(targets[group[0]], folds)
            self._spare -= sum(_output_bytes(targets[index], folds) for index in group)
            shared = InputMoments(folds=folds)
            self._inputs.append((group, shared))
            self.tasks |= {index: TaskSpectrum(inputs=shared) for index in group}

    def see_input(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The inputs themselves."""
        del index
        return x

    def see_gradient(self, index: int, kept: torch.Tensor, delta: torch.Tensor) -> None:
        """Add rows to the products with targets; what was read is added when all have read."""
        target = self.order[index]
        if target not in self.settled:
            return
        read = _read(kept, delta)
        try:
            self.tasks[target].update(read.rows, -_array(delta[read.is_live]))
        except ValueError as error:
            name = self._targets[target].info.name
            raise ValueError(
                f"batch {self._batch}: {name}, X its inputs and Y its output gradients: {error}"
            ) from error
        self._reads[target].append(read)

    def see_inner(self, index: int, x: torch.Tensor, delta: torch.Tensor) -> None:
        """Remember the module: this part of its gradient has no rows of inputs and outputs."""
        if bool(delta.any()) and bool(x.any()):
            self.with_inner.add(self.order[index])

    def end_batch(self) -> None:
        """Add what was read, once for all that read the same."""
        self._batch += 1
        groups, self._inputs = self._inputs, []
        for members, moments in groups:
            by_rows: dict[object, list[int]] = {}
            for index in members:
                by_rows.setdefault(tuple(read.key for read in self._reads[index]), []).append(index)
            first, *parted = by_rows.values()
            # Before the first ones' rows come in.
            self._inputs += [(part, self._apart(part, moments)) for part in parted if self._has_room(part)]
            self._inputs.append((first, moments))
        for members, moments in self._inputs:
            for read in self._reads[members[0]]:
                moments.update(read.rows)
        self._reads = {index: [] for index in self.order}

    def _has_room(self, members: Sequence[int]) -> bool:
        """Take the memory for inputs of their own; where there is none, give the modules up."""
        needed = _input_bytes(self._targets[members[0]], self._folds)
        if needed > self._spare:
            self.settled -= set(members)
            return False
        self._spare -= needed
        return True

    def _apart(self, members: Sequence[int], shared: InputMoments) -> InputMoments:
        """Inputs for modules that part from their group: until now they have read what it has."""
        own = InputMoments(folds=self._folds)
        own.merge(shared)
        for index in members:
            task = TaskSpectrum(inputs=own)
            task.merge(self.tasks[index])
            self.tasks[index] = task
        return own


class _Reads:
    """An observer that learns which modules read the same rows."""

    def __init__(self, count: int) -> None:
        # Kept alive, or another tensor could come to lie in the place of one.
        self.reads: list[list[_Read]] = [[] for _ in range(count)]

    def see_input(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The inputs themselves."""
        del index
        return x

    def see_gradient(self, index: int, kept: torch.Tensor, delta: torch.Tensor) -> None:
        """Remember who read it."""
        self.reads[index].append(_read(kept, delta))

    def see_inner(self, index: int, x: torch.Tensor, delta: torch.Tensor) -> None:
        """Ignore the rows, which are not inputs."""


def _shared_inputs(
    model: Any, targets: Sequence[Target], batch: Any, loss: Loss | None
) -> list[tuple[int, ...]]:
    """Groups of modules that read the same rows of one input, every module in one group."""
    observer = _Reads(len(targets))
    with probing(targets, observer) as probe:
        for _ in backward_passes(model, [batch], probe, loss=loss, max_batches=1, progress=False):
            pass
    groups: dict[object, list[int]] = {}
    for index, reads in enumerate(observer.reads):
        # Modules that are called several times are shared if they are so every time.
        groups.setdefault(tuple(read.key for read in reads) or index, []).append(index)
    return [tuple(group) for group in groups.values()]


def _passes(
    groups: Sequence[tuple[int, ...]], targets: Sequence[Target], folds: int, memory: int
) -> list[list[tuple[int, ...]]]:
    """Groups, cut up where they are too large, in passes that fit into memory."""
    passes: list[list[tuple[int, ...]]] = []
    left = 0
    for group in groups:
        inputs = _input_bytes(targets[group[0]], folds)
        open_group = False
        for index in group:
            own = _output_bytes(targets[index], folds)
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


def _input_bytes(target: Target, folds: int) -> int:
    """What the sums over a module's inputs take, factored ones included."""
    return 16 * folds * target.info.shape[1] ** 2


def _output_bytes(target: Target, folds: int) -> int:
    """What the products of its inputs and targets take."""
    out, fan_in = target.info.shape
    return 8 * folds * fan_in * out


_INNER = "the loss holds a gradient that passes through it: that part of its task is left out"


def _row(target: Target, task: TaskSpectrum, space: Space, has_inner: bool) -> ModuleTask:
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
            flags=(_INNER,) if has_inner else ("no gradient reached it",),
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
        flags=(*found.flags, _INNER) if has_inner else found.flags,
    )


def _with_first(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and batches that still begin with it."""
    iterator: Iterator[Any] = iter(batches)
    for first in iterator:
        return first, chain([first], iterator) if iterator is batches else batches
    raise ValueError("no batches: profiling needs at least one")


def _array(rows: torch.Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = rows.float().cpu().numpy()
    return array
