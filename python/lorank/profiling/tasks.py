"""Task spectra of a live model's modules [KSTAR], from inputs and output gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from lorank.modules import naming
from lorank.profiling.module_reads import shared_inputs
from lorank.profiling.passes import Loss, backward_passes, check_batches, checked_model, frozen
from lorank.profiling.probe import probing
from lorank.profiling.targets import Target, find_targets
from lorank.profiling.task_memory import passes_within
from lorank.profiling.task_sums import TaskSums
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
    """Estimate the rank of each module's task: the map from its inputs to its negative output gradients.

    The inputs `X` of a module have a row for each token. A gradient step changes the outputs in proportion to
    the negative output gradients `Y`, the targets of the task. Rows without a gradient, such as padded and
    masked tokens, are not samples: a row is left out if its gradient is zero up to rounding errors. Only sums
    over rows are kept, and modules that read the same rows share the sums over inputs.

    Parameters
    ----------
    model, batches, targets, max_batches, loss, progress
        As in `profile_gradients`.
    space
        As in `task_spectrum`. The default is ``"prediction"`` here, because activations are far from white,
        and the noise edge in prediction space does not depend on the covariance of inputs.
    folds
        Number of folds of the cross-validation for `predicted_rank`, at least 2.
    memory
        Bytes for the sums, about ``8 folds d_in (2 d_in + d_out)`` for each module. If all modules need more,
        they are divided over several passes through the batches.

    Returns
    -------
    TaskReport
        Input of ``allocate(report, method="task")``. The model is left unchanged.

    Raises
    ------
    ImportError
        If torch is not installed (extra ``peft``).
    TypeError
        If `model` is not a module, or `batches` is a single batch.
    ValueError
        If there is no batch, no loss, or a value that is not finite; if the sums of one module exceed
        `memory`; if several passes are needed and `batches` is an iterator.

    Notes
    -----
    Source: [KSTAR], which leaves K* of single modules as an open problem.

    Use more tokens than the widest module has inputs. With fewer tokens, the estimates have large errors and
    take longer, because the sums cannot be factored by Cholesky.

    If the loss itself contains gradients (forces, gradient penalties), the rows are those of the outer
    backward pass, and modules through which an inner backward pass goes are flagged.

    Examples
    --------
    >>> import torch
    >>> import lorank
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> batches = [torch.randn(64, 8) for _ in range(4)]
    >>> report = lorank.profile_tasks(model, batches, loss=lambda model, x: model(x).square().mean())
    >>> [row.name for row in report]
    ['0', '2']
    >>> report.num_samples
    256
    >>> all(1 <= row.predicted_rank <= min(row.shape) for row in report)
    True
    """
    InputMoments(folds=folds)  # Checks `folds` before any pass.
    model = checked_model(model)
    check_batches(batches)
    found = find_targets(model, targets)
    first, batches = _with_first(batches)
    rows: dict[int, ModuleTask] = {}
    num_samples = 0
    with frozen(model):
        groups = shared_inputs(model, found.chosen, first, loss)
        while groups:
            passes = passes_within(memory, groups, found.chosen, folds)
            groups = []
            for members in passes:
                _check_repeatable(batches, len(passes), bool(rows))
                observer = TaskSums(members, found.chosen, folds, memory)
                with probing([found.chosen[index] for index in observer.order], observer) as probe:
                    for _ in backward_passes(
                        model, batches, probe, loss=loss, max_batches=max_batches, progress=progress
                    ):
                        observer.end_batch()
                rows |= _settled_rows(observer, found.chosen, space)
                num_samples = max(num_samples, *(task.num_samples for task in observer.tasks.values()))
                # Modules whose sums are incomplete get groups of their own in another pass.
                groups += [(index,) for index in observer.order if index not in observer.settled]
    ordered = [rows[index] for index in range(len(found.chosen))]
    source = found.source
    return TaskReport(
        ordered, found.skipped, source.label, source.num_parameters, num_samples, source.unknown_parameters
    )


def _with_first(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """Return the first batch, and an iterable of all batches including the first."""
    iterator: Iterator[Any] = iter(batches)
    for first in iterator:
        return first, chain([first], iterator) if iterator is batches else batches
    raise ValueError("no batches: profiling needs at least one")


def _check_repeatable(batches: Iterable[Any], num_passes: int, has_rows: bool) -> None:
    """Raise ValueError if several passes would read an iterator; before the first pass if possible."""
    if iter(batches) is not batches or (num_passes == 1 and not has_rows):
        return
    why = (
        "modules with the same inputs in the first batch have different ones later, which needs another pass "
        "or more memory"
        if has_rows
        else f"the allowed memory needs {num_passes} passes"
    )
    raise ValueError(f"{why}, and batches is an iterator: pass a list")


_INNER = "the loss contains a gradient through this module: that part of the task is left out"


def _settled_rows(sums: TaskSums, targets: Sequence[Target], space: Space) -> dict[int, ModuleTask]:
    """Return the rows of the modules whose sums are complete."""
    return {
        index: _row(targets[index], sums.tasks[index], space, index in sums.with_inner)
        for index in sums.settled
    }


def _row(target: Target, task: TaskSpectrum, space: Space, has_inner: bool) -> ModuleTask:
    """Return the row of a module from its sums."""
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
