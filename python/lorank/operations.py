"""The public operations on adapters: compress, elastic, family, merge, extract, convert."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorank.adapter import LoraAdapter
from lorank.adapters import conversion
from lorank.adapters.content import AdapterContent
from lorank.adapters.conversion import Layout
from lorank.adapters.families import member_name
from lorank.allocation.budget import Budget
from lorank.compression import extraction, merging, truncation
from lorank.compression.base_norms import base_norms
from lorank.compression.knobs import KnobArguments, Knobs, check_score, checked_knobs
from lorank.compression.merge_methods import Election, MergeMethod, Method
from lorank.modules import naming
from lorank.runtimes.base_model import base_weights
from lorank.sources import AnySource

if TYPE_CHECKING:
    from typing_extensions import Unpack


def compress(
    adapter: LoraAdapter | str | Path,
    *,
    score: Literal["sigma", "relative"] = "sigma",
    base: AnySource | None = None,
    threads: int | None = None,
    progress: bool = True,
    **knobs: Unpack[KnobArguments],
) -> LoraAdapter:
    """Truncate the updates of an adapter to the singular values with most of their energy.

    Parameters
    ----------
    adapter
        An adapter, or its path.
    score
        ``"sigma"``: modules compete by singular values. ``"relative"``: by singular values divided by the
        Frobenius norm of the module's base weight; this needs `base`, and `rank_ratio` or `avg_rank`.
    base
        The base model, in any form that `analyze` takes, for ``"relative"`` only.
    threads
        Largest number of threads (default: all that the process may use). The result does not depend on it.
    progress
        True to draw a progress bar on standard error, if that is a terminal.
    **knobs
        Exactly one of `rank_ratio`, `avg_rank`, `energy`, `budget` and `auto`; optionally `max_rank`,
        `scope`, `keep` and `scores`. See `lorank.compression.knobs.Knobs`.

    Returns
    -------
    LoraAdapter
        The adapter in balanced spectral form, with scaling 1 in every module, and with its `certificate`.

    Raises
    ------
    ValueError
        If not exactly one knob is given, or a knob is out of range.
    TypeError
        If a knob is unknown, or `adapter` is neither an adapter nor a path.
    NumericalError
        If factors hold NaN or infinite values.

    Notes
    -----
    Source: [PARA], equations 2 to 14. The singular values of the scaled updates of all modules compete. The
    certificate is exact: ``||dW - dW_hat||_F`` is the root of the sum of the squares of the dropped values.

    Examples
    --------
    >>> import peft, torch
    >>> import lorank
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
    >>> config = peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False)
    >>> adapter = lorank.LoraAdapter.from_model(peft.get_peft_model(model, config))
    >>> small = lorank.compress(adapter, rank_ratio=0.5, progress=False)
    >>> sum(small.ranks.values())
    4
    >>> 0 < small.certificate.relative_error < 1
    True
    """
    chosen = checked_knobs(knobs)
    check_score(score, chosen, has_base=base is not None)
    source = _loaded(adapter)
    norms = None if base is None else base_norms(base, [m.name for m in source.adapted], progress)
    return truncation.compress(source, chosen, threads, progress, norms)


def family(
    adapter: LoraAdapter | str | Path,
    avg_ranks: Sequence[float] = (),
    *,
    rank_ratios: Sequence[float] = (),
    energies: Sequence[float] = (),
    budgets: Sequence[Budget] = (),
    threads: int | None = None,
    progress: bool = True,
) -> dict[float | str, LoraAdapter]:
    """Truncate an adapter by several knobs, from one decomposition.

    Parameters
    ----------
    adapter
        An adapter, or its path.
    avg_ranks, rank_ratios, energies, budgets
        Values of the knobs of `compress`; each gives a result.
    threads, progress
        As in `compress`.

    Returns
    -------
    dict
        Average rank, or a name such as ``"ratio-0.25"``, ``"energy-0.9"`` or ``"budget-500k"`` -> truncated
        adapter.

    Raises
    ------
    ValueError
        If a value is out of range, or no values are given.

    Examples
    --------
    >>> import peft, torch
    >>> import lorank
    >>> config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), config)
    >>> adapter = lorank.LoraAdapter.from_model(model)
    >>> members = lorank.family(adapter, [1, 3], budgets=["30"], progress=False)
    >>> {key: member.ranks for key, member in members.items()}
    {1: {'0': 1}, 3: {'0': 3}, 'budget-30': {'0': 2}}
    """
    knobs: dict[float | str, Knobs] = {rank: Knobs(avg_rank=rank) for rank in avg_ranks}
    knobs |= {member_name("ratio", value): Knobs(rank_ratio=value) for value in rank_ratios}
    knobs |= {member_name("energy", value): Knobs(energy=value) for value in energies}
    knobs |= {member_name("budget", value): Knobs(budget=value) for value in budgets}
    if not knobs:
        raise ValueError("give at least one average rank, ratio, energy or budget")
    return truncation.family(_loaded(adapter), knobs, threads, progress)


def elastic(
    adapter: LoraAdapter | str | Path, *, threads: int | None = None, progress: bool = True
) -> LoraAdapter:
    """Bring an adapter into spectral form with all its non-zero singular values.

    The result can be truncated by any knobs on loading, without another decomposition.

    Parameters
    ----------
    adapter
        An adapter, or its path.
    threads, progress
        As in `compress`.

    Examples
    --------
    >>> import tempfile
    >>> import peft, torch
    >>> import lorank
    >>> config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), config)
    >>> parent = lorank.elastic(lorank.LoraAdapter.from_model(model), progress=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = parent.save(folder)
    ...     lorank.LoraAdapter.load(folder, avg_rank=1).ranks
    {'0': 1}
    """
    return truncation.elastic(_loaded(adapter), threads, progress)


def merge(
    adapters: Sequence[LoraAdapter | str | Path],
    weights: Sequence[float] | None = None,
    *,
    method: Method = "sum",
    density: float | None = None,
    seed: int = 0,
    election: Election = "total",
    force: bool = False,
    threads: int | None = None,
    progress: bool = True,
    **knobs: Unpack[KnobArguments],
) -> LoraAdapter:
    """Compute the best adapter of given ranks for ``sum_j weight_j * dW_j``, or for another merge.

    Parameters
    ----------
    adapters
        Adapters of one base model, or their paths. Ranks, scalings and adapted modules may differ.
    weights
        A weight for each adapter; negative weights subtract (default: equal weights with sum 1; weights of 1
        for the updates of ``"ties"`` and ``"dare-ties"``, which divide by the number of updates).
    method
        ``"sum"``; or, element by element, as PEFT's `add_weighted_adapter` defines them: ``"magnitude"``
        (sum of the largest elements of each update), ``"ties"`` (the mean of those that have the majority's
        sign), ``"dare"`` (sum of randomly chosen elements, divided by the density), ``"dare-ties"``.
    density
        Share of the elements of each update that methods other than ``"sum"`` keep.
    seed
        Seed of ``"dare"`` and ``"dare-ties"``.
    election
        Majority's sign: of the sum of all updates (``"total"``), or of most updates (``"frequency"``).
    force
        True to merge adapters whose base models have different names, or that share no module.
    threads, progress
        As in `compress`.
    **knobs
        As in `compress`. `rank_ratio` refers to the sum of all ranks; methods other than ``"sum"`` do not
        take it, and their `max_rank` (default 128) also bounds the computed values.

    Returns
    -------
    LoraAdapter
        The adapter with its `certificate`, which compares it with the exact merged update and names the
        method.

    Raises
    ------
    ValueError
        If

        - the number of weights differs from the number of adapters,
        - formats, or the shapes of one module, differ,
        - an adapter has DoRA magnitudes, which cannot be added,
        - module names of one adapter differ from another's by a prefix,
        - adapters differ in a setting that a sum has only once (task type, biases, trained tokens),
        - one adapter has factors for a module that another saves as a whole,
        - without `force`: base models have different names, or an adapter shares no module with the others.
    TypeError
        If a knob is unknown, or `adapters` is not a list of adapters or paths.

    Notes
    -----
    The terms are stacked, ``[w_1 s_1 B_1, w_2 s_2 B_2, ...]`` and ``[A_1; A_2; ...]``, and decomposed by
    QR and a small SVD. The dense update is never formed. Methods other than ``"sum"`` form it for one module
    per thread, in float64; each expert of a stack is pruned separately. Biases and modules that are saved
    whole are always summed.

    Examples
    --------
    >>> import peft, torch
    >>> import lorank
    >>> config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), config, "a")
    >>> model.add_adapter("b", config)
    >>> a, b = (lorank.LoraAdapter.from_model(model, name) for name in "ab")
    >>> lorank.merge([a, b], [0.7, 0.3], avg_rank=5, progress=False).ranks
    {'0': 5}
    >>> merged = lorank.merge([a, b], method="ties", density=0.5, energy=1, progress=False)
    >>> merged.certificate.action.partition(" by ")[2]
    'ties (density 0.5, signs by total), energy=1, global scope, max_rank=128'
    """
    chosen = checked_knobs(knobs)
    if isinstance(adapters, (str, Path, LoraAdapter)):
        raise TypeError("merge takes a list of adapters, not one")
    chosen_method = MergeMethod(method, density, seed, election)
    loaded = [_loaded(adapter) for adapter in adapters]
    return merging.merge(
        loaded, weights, chosen, method=chosen_method, force=force, threads=threads, progress=progress
    )


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
    """Compute the best adapter of given ranks for the difference of two models.

    Parameters
    ----------
    base, tuned
        The model before and after fine-tuning, in any form that `analyze` takes, read matrix by matrix.
    include, exclude
        The modules to extract or to leave out, as in `analyze`. Leave out embeddings and heads if an engine
        cannot adapt them.
    prefix
        A prefix for the names of all modules, such as ``"bert"`` if the checkpoint has ``encoder.layer.0``
        and the model to adapt has ``bert.encoder.layer.0``.
    guess
        True to continue if the model's code is not available, and names and shapes leave doubts about the
        kinds of its modules: see `lorank.modules.facts.ModelFacts`.
    threads, progress
        As in `compress`.
    **knobs
        As in `compress`, without `rank_ratio`. `max_rank` (default 128) also bounds the computed values.
        A `budget` may be a share of the base model's parameters, such as ``"0.5%"``.

    Returns
    -------
    LoraAdapter
        The adapter with its `certificate`, which compares it with the dense differences. Its `notes` name the
        model that its module names come from, and the changes that an adapter cannot hold: tensors that are
        not matrices, modules that PEFT cannot adapt, tensors of one model only. Modules that share a weight
        get the same update.

    Raises
    ------
    ValueError
        If `rank_ratio` is given, the models have no matrix in common, a shape differs (exclude that
        module), nothing has changed, guessed names leave doubts and `guess` is false, or the budget is a
        share of a base model of unknown size.

    Notes
    -----
    ``||W_tuned - W_base||_F^2`` is computed from the dense difference. Differences with a side of at most 512
    are decomposed in full, larger differences by randomised subspace iteration [HMT].

    Examples
    --------
    >>> import copy
    >>> import torch
    >>> import lorank
    >>> base = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
    >>> tuned = copy.deepcopy(base)
    >>> with torch.no_grad():
    ...     _ = tuned[0].weight.add_(torch.outer(torch.ones(6), torch.ones(8)))
    >>> lorank.extract(base, tuned, energy=0.99, progress=False).ranks
    {'0': 1, '1': 0}
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


def convert(adapter: LoraAdapter | str | Path, to: Layout, *, base: Any | None = None) -> LoraAdapter:
    """Bring an adapter into another layout of files, without loss at full rank.

    Parameters
    ----------
    adapter
        An adapter, or its path.
    to
        The layout: ``"peft"``, ``"peft-0.18"`` (experts before PEFT 0.19), ``"per-expert"`` (experts as
        separate modules, transformers 4), ``"mlx"``, ``"torchtune"``, ``"gguf"`` (llama.cpp), ``"kohya"``,
        ``"diffusers"`` or ``"comfyui"``.
    base
        The base model: a folder with its `config.json`, that file, a hub id, or a live model. It is needed
        where names, architectures or numbers of heads are not in the adapter's files.

    Returns
    -------
    LoraAdapter
        An adapter that `save` writes in the layout; the profile ``"exact"`` keeps factors and scalings. Its
        `notes` name what is not as before, such as scalings that moved into the factors.

    Raises
    ------
    ValueError
        If the layout is unknown or cannot hold the adapter, or the base model is needed.
    FormatError, OSError
        If the adapter cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> import peft, torch
    >>> import lorank
    >>> config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), config)
    >>> converted = lorank.convert(lorank.LoraAdapter.from_model(model), "mlx")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     converted.save(folder, "exact").name
    'adapters.safetensors'
    """
    weights = None if base is None else base_weights(base)
    source = LoraAdapter.load(adapter, base=base) if isinstance(adapter, (str, Path)) else _loaded(adapter)
    return conversion.convert(source, to, weights)


def _loaded(adapter: AdapterContent | str | Path) -> LoraAdapter:
    """Return an adapter, or read it from a path."""
    if isinstance(adapter, LoraAdapter):
        return adapter
    if isinstance(adapter, AdapterContent):
        return LoraAdapter.from_content(adapter)
    if isinstance(adapter, (str, Path)):
        return LoraAdapter.load(adapter)
    raise TypeError(f"an adapter is a LoraAdapter or a path, not an object of type {type(adapter).__name__}")
