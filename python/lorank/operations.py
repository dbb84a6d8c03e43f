"""The public operations on adapters: compress, elastic, family, merge, extract."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorank.adapter import LoraAdapter
from lorank.adapters.content import AdapterContent
from lorank.compression import extraction, merging, truncation
from lorank.compression.knobs import KnobArguments, Knobs, checked_knobs
from lorank.modules import naming
from lorank.sources import AnySource

if TYPE_CHECKING:
    from typing_extensions import Unpack


def compress(
    adapter: LoraAdapter | str | Path,
    *,
    threads: int | None = None,
    progress: bool = True,
    **knobs: Unpack[KnobArguments],
) -> LoraAdapter:
    """Truncate the updates of an adapter to where most of their energy is.

    Parameters
    ----------
    adapter
        An adapter, or its path.
    threads
        The largest number of threads (default: all that the process may use). The result does not depend on
        it.
    progress
        True to draw a progress bar on standard error, if that is a terminal.
    **knobs
        Exactly one of `rank_ratio`, `avg_rank`, `energy`, `budget` and `auto`; and `max_rank`,
        `scope`, `keep`, `scores`. See `lorank.compression.knobs.Knobs`.

    Returns
    -------
    LoraAdapter
        In balanced spectral form, every scaling 1, with its `certificate`.

    Raises
    ------
    ValueError
        If not exactly one knob is given, or one is out of range.
    TypeError
        If there is no such knob, or `adapter` is none.
    NumericalError
        If factors hold NaN or infinite values.

    Notes
    -----
    Source: PARA, equations 2 to 14. The pool of singular values is that of the scaled updates of all
    modules. The error certificate is exact: ``||dW - dW_hat||_F`` is the root of the sum of the
    squares of what was dropped.
    """
    chosen = checked_knobs(knobs)
    return truncation.compress(_loaded(adapter), chosen, threads, progress)


def family(
    adapter: LoraAdapter | str | Path,
    avg_ranks: Sequence[float],
    *,
    threads: int | None = None,
    progress: bool = True,
) -> dict[float, LoraAdapter]:
    """Children of an adapter at several average ranks, from one decomposition.

    Raises
    ------
    ValueError
        If an average rank is negative, or none is given.
    """
    if not avg_ranks:
        raise ValueError("give at least one average rank")
    knobs = {rank: Knobs(avg_rank=rank) for rank in avg_ranks}
    return truncation.family(_loaded(adapter), knobs, threads, progress)


def elastic(
    adapter: LoraAdapter | str | Path, *, threads: int | None = None, progress: bool = True
) -> LoraAdapter:
    """The adapter in spectral form with all its non-zero values: any budget is cut from it at load time."""
    return truncation.elastic(_loaded(adapter), threads, progress)


def merge(
    adapters: Sequence[LoraAdapter | str | Path],
    weights: Sequence[float] | None = None,
    *,
    force: bool = False,
    threads: int | None = None,
    progress: bool = True,
    **knobs: Unpack[KnobArguments],
) -> LoraAdapter:
    """The best adapter of given ranks for ``sum_j weight_j * dW_j``.

    Parameters
    ----------
    adapters
        Adapters or their paths. Of one base model; ranks, scalings and adapted modules may differ.
    weights
        One each, negative ones subtract (default: equal, summing to 1).
    force
        True to merge adapters whose base models have different names, or that share no module.
    threads, progress
        As in `compress`.
    **knobs
        As in `compress`; `rank_ratio` is of the sum of all ranks.

    Returns
    -------
    LoraAdapter
        With its `certificate`, whose error is against the exact weighted sum.

    Raises
    ------
    ValueError
        If weights do not fit, formats or shapes of one module differ, an adapter has DoRA magnitudes, which
        do not add up, module names of one differ from another's by a prefix, settings of which a sum has one
        (task type, biases, trained tokens) differ, or one adapter has factors for a module that another saves
        as a whole; without `force`, if base models have different names, or an adapter shares no module with
        the others.
    TypeError
        If there is no such knob, or what is given are no adapters.

    Notes
    -----
    The terms are stacked, ``[w_1 s_1 B_1, w_2 s_2 B_2, ...]`` and ``[A_1; A_2; ...]``, and decomposed by
    QR and a small SVD: the dense update never exists.
    """
    chosen = checked_knobs(knobs)
    if isinstance(adapters, (str, Path, LoraAdapter)):
        raise TypeError("merge takes a list of adapters, not one")
    loaded = [_loaded(adapter) for adapter in adapters]
    return merging.merge(loaded, weights, chosen, force=force, threads=threads, progress=progress)


def extract(
    base: AnySource,
    tuned: AnySource,
    *,
    include: naming.Targets = None,
    exclude: naming.Targets = None,
    prefix: str = "",
    guess: bool = False,
    threads: int | None = None,
    progress: bool = True,
    **knobs: Unpack[KnobArguments],
) -> LoraAdapter:
    """The best adapter of given ranks for the difference of two models.

    Parameters
    ----------
    base, tuned
        The model before and after: anything that `analyze` takes. Read matrix by matrix.
    include, exclude
        Which modules, as in `analyze`: leave out embeddings and heads that an engine cannot adapt.
    prefix
        Put before every module's name, such as ``"bert"`` where the checkpoint says ``encoder.layer.0``
        and the model to adapt ``bert.encoder.layer.0``.
    guess
        True to go on where the model's code is not at hand and names and shapes leave doubts about the kinds
        of its modules: see `lorank.modules.facts.ModelFacts`.
    threads, progress
        As in `compress`.
    **knobs
        As in `compress`, without `rank_ratio`. `max_rank` (default 128) also bounds what is computed;
        a `budget` may be a share of the base model's parameters, such as ``"0.5%"``.

    Returns
    -------
    LoraAdapter
        With its `certificate`, against the dense differences. Its `notes` name what an adapter cannot hold:
        changed tensors that are not matrices, modules that PEFT cannot adapt, tensors of one model only; and
        the model whose names its modules have. Modules that share a weight get the same update.

    Raises
    ------
    ValueError
        If `rank_ratio` is given, the models have no matrix in common, a shape differs (exclude that
        module), nothing has changed, guessed names leave doubts and `guess` is false, or the budget is a
        share of a base model of unknown size.

    Notes
    -----
    ``||W_tuned - W_base||_F^2`` is that of the dense difference. Differences with a side of at most 512
    are decomposed in full, larger ones by randomised subspace iteration.
    """
    content = extraction.extract(
        base,
        tuned,
        knobs,
        include=include,
        exclude=exclude,
        prefix=prefix,
        guess=guess,
        threads=threads,
        progress=progress,
    )
    return LoraAdapter.from_content(content)


def _loaded(adapter: AdapterContent | str | Path) -> LoraAdapter:
    """Return an adapter, read if a path is given."""
    if isinstance(adapter, LoraAdapter):
        return adapter
    if isinstance(adapter, AdapterContent):
        return LoraAdapter.from_content(adapter)
    if isinstance(adapter, (str, Path)):
        return LoraAdapter.load(adapter)
    raise TypeError(f"an adapter is a LoraAdapter or a path, not a {type(adapter).__name__}")
