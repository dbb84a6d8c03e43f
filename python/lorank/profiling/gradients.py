"""Gradient spectra of a live model, before any training."""

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
    """Spectra of the gradients of the base model's weights over mini-batches: static GARD.

    The weights are not trained and get no `.grad`: ``G = sum delta x^T`` follows from what passes
    through each module. Of every batch a ``k x k`` projection is kept, not the gradient: extra memory is
    ``modules * M * k^2`` numbers, the projections ``modules * k (out + in)``, and the projected inputs
    of one batch.

    Parameters
    ----------
    model
        A torch model: plain, or with PEFT adapters (their base modules are what is profiled). It stays
        in the mode that it is in: dropout counts if it is training.
    batches
        Mappings that the model takes as keyword arguments, labels included; anything with `loss`. No
        effective rank exceeds their number: `allocate` remarks on modules that reach it, of which more
        batches would tell more.
    energy
        The share of the spectrum that the effective rank holds.
    sketch
        `k`, the projections' size; None for whole gradients (exact, for small models).
    targets
        Which modules, as in `allocate`.
    max_batches
        Stop after so many: `M` is what memory grows with.
    loss
        ``loss(model, batch)`` (default: the model's own).
    seed
        Of the projections.
    progress
        Whether to show a bar on a terminal.

    Returns
    -------
    GradientReport
        For ``allocate(report, method="gard", budget=...)``. Parameters, their gradients and the
        model's mode are left as they were.

    Raises
    ------
    ImportError
        Without torch (extra ``peft``).
    TypeError
        If `model` is no module, or `batches` a single batch.
    ValueError
        If there is no batch, no loss, a loss or gradient that is not finite, or an option is out of
        range.

    Notes
    -----
    Source: GARD, static variant. ``C_ab = <G_a, G_b> / M``; the effective rank is the smallest number
    of eigenvalues of C that hold `energy` of their sum.

    A loss may hold gradients itself (forces, gradient penalties): backward passes that it runs are not
    counted, but the terms that they add to the gradient of the loss are. Modules that Accelerate offloads are
    profiled as others; layers whose weight cannot be read are in `skipped` with the reason.
    """
    effective_rank([1.0], energy)  # Refused before any work.
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
    """The row of a module, from one sketch per batch."""
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
    """Raise ValueError if a sketch holds NaN or infinite values."""
    for target, sketch in zip(targets, sketches, strict=True):
        if sketch is not None and not torch.isfinite(sketch).all():
            raise ValueError(f"{when}: the gradient of {target.info.name} holds NaN or infinite values")
