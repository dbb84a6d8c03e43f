"""Gradient spectra of a live model before training [GARD]."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
from lorank.profiling.sketch import GradientSketches, spectrum
from lorank.profiling.targets import Target, find_targets
from lorank.report.gradients import GradientReport, ModuleGradients
from lorank.statistics.effective_rank import effective_rank


def profile_gradients(
    model: Any,
    batches: Iterable[Any],
    *,
    energy: float = 0.9,
    sketch: int | None = 128,
    targets: naming.Targets = None,
    max_batches: int | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    progress: bool = True,
) -> GradientReport:
    """Compute spectra of the gradients of the base model's weights over mini-batches.

    The weights are not trained and get no `.grad`: the gradient ``G = sum delta x^T`` of a module follows
    from its inputs `x` and output gradients `delta`. A ``k x k`` projection of each batch's gradient is kept.
    Memory besides the model: ``modules * M * k^2`` numbers for `M` batches, ``modules * k (out + in)`` for
    the projections, and the projected inputs of one batch.

    Parameters
    ----------
    model
        A torch model, plain or with PEFT adapters, whose base modules are profiled. Its mode stays the same:
        dropout is active in training mode.
    batches
        Mappings of the model's keyword arguments, including labels; batches of any type if `loss` is given.
        Their number is an upper bound of effective ranks. `allocate` flags modules at this bound, because
        more batches may show larger ranks.
    energy
        Share of the spectrum that the effective rank holds, in (0, 1].
    sketch
        Size `k` of the random projections; None for exact gradients, in small models.
    targets
        Modules to profile, as in `allocate`.
    max_batches
        Largest number of batches `M`; None for all.
    loss
        A function ``loss(model, batch)``; by default the model's own loss.
    seed
        Seed of the random projections.
    progress
        True to draw a progress bar on standard error, if that is a terminal.

    Returns
    -------
    GradientReport
        Input of ``allocate(report, method="gard", budget=...)``. Parameters, their gradients and the model's
        mode are left unchanged.

    Raises
    ------
    ImportError
        If torch is not installed (extra ``peft``).
    TypeError
        If `model` is not a module, or `batches` is a single batch.
    ValueError
        If there is no batch or no loss, a loss or gradient is not finite, or an option is out of range.

    Notes
    -----
    Source: [GARD], static variant. With ``C_ab = <G_a, G_b> / M``, the effective rank is the smallest number
    of eigenvalues of C that hold the share `energy` of their sum.

    A loss may itself contain gradients (forces, gradient penalties). The backward passes that compute them
    are ignored; the terms that they add to the gradient of the loss are included. Modules that Accelerate
    offloads are profiled like others. Layers whose weight cannot be read are in `skipped`, with the reason.

    Examples
    --------
    >>> import torch
    >>> import lorank
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> batches = [torch.randn(16, 8) for _ in range(6)]
    >>> report = lorank.profile_gradients(model, batches, loss=lambda model, x: model(x).square().mean())
    >>> [row.name for row in report], report.num_batches
    (['0', '2'], 6)
    >>> all(1 <= row.effective_rank <= 6 for row in report)
    True
    """
    effective_rank([1.0], energy)  # Checks `energy` before any pass.
    model = checked_model(model)
    check_batches(batches)
    found = find_targets(model, targets)
    observer = GradientSketches(found.chosen, sketch, seed)
    taken: list[list[torch.Tensor | None]] = []
    with frozen(model), probing(found.chosen, observer) as probe:
        for count in backward_passes(
            model, batches, probe, loss=loss, max_batches=max_batches, progress=progress
        ):
            taken.append(observer.take())
            check_finite(found.chosen, taken[-1], f"batch {count - 1}")
    rows = [
        gradient_row(target, [batch[index] for batch in taken], energy)
        for index, target in enumerate(found.chosen)
    ]
    source = found.source
    return GradientReport(
        rows,
        found.skipped,
        source.label,
        source.num_parameters,
        energy,
        observer.size,
        len(taken),
        source.unknown_parameters,
    )


def gradient_row(target: Target, sketches: list[torch.Tensor | None], energy: float) -> ModuleGradients:
    """Return the row of a module, from one sketch for each batch."""
    info = target.info
    values = spectrum(sketches)
    flags = () if values.any() else ("no gradient reached it",)
    return ModuleGradients(
        name=info.name,
        module=info.module,
        kind=info.kind,
        shape=info.shape,
        effective_rank=effective_rank(values, energy),
        eigenvalues=values,
        flags=flags,
    )


def check_finite(targets: Iterable[Target], sketches: list[torch.Tensor | None], when: str) -> None:
    """Raise ValueError if a sketch has NaN or infinite values; `when` names the batch."""
    for target, sketch in zip(targets, sketches, strict=True):
        if sketch is not None and not torch.isfinite(sketch).all():
            raise ValueError(f"{when}: the gradient of {target.info.name} holds NaN or infinite values")
