"""The choice of singular values to keep, over all modules at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from lorank import _core
from lorank.compression.knobs import ITEM_BYTES, Knobs, Scores, amount_of, size_of
from lorank.compression.spectral_form import SpectralForm
from lorank.peft_format.rank_groups import group_indices

Mask = npt.NDArray[np.bool_]

# The optimal hard threshold for a square matrix of unknown noise, as a multiple of the median [GD].
_GAVISH_DONOHO = 2.858

_SMALLEST_SCORE = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, slots=True)
class _Pool:
    """Modules that keep one rank, with one sequence of values for all, as for the copies of a stack."""

    forms: Sequence[SpectralForm]
    values: npt.NDArray[np.float64]

    @classmethod
    def of(cls, forms: Sequence[SpectralForm]) -> _Pool:
        return cls(forms, _root_of_squares([form.values for form in forms]))

    @property
    def rank(self) -> int:
        return max(form.module.rank for form in self.forms)

    @property
    def cost(self) -> int:
        return sum(form.module.cost for form in self.forms)

    @property
    def num_bytes(self) -> int:
        """Number of bytes of one rank in the stored types."""
        return sum(form.module.cost * ITEM_BYTES[form.module.dtype] for form in self.forms)

    @property
    def unseen_energy(self) -> float:
        return math.fsum(form.unseen_energy for form in self.forms)


def select(forms: Sequence[SpectralForm], knobs: Knobs, groups: Iterable[Sequence[str]] = ()) -> list[Mask]:
    """Return a mask of the values to keep for each module.

    Parameters
    ----------
    forms
        The decomposed modules.
    knobs
        The number of values to keep.
    groups
        Names of modules that keep one rank, as from `rank_groups`. A group counts as one module: its
        values are the roots of the sums of squares over its members, its cost is the sum of their costs.

    Raises
    ------
    ValueError
        If scores do not fit the modules or are negative, or an energy cannot be reached.
    """
    indices = group_indices([form.module.name for form in forms], groups)
    pools = [_Pool.of([forms[i] for i in group]) for group in indices]
    found: dict[int, Mask] = {}
    for group, mask in zip(indices, _selected(pools, knobs), strict=True):
        found |= {i: mask[: len(forms[i].values)] for i in group}
    return [found[i] for i in range(len(forms))]


def _selected(pools: Sequence[_Pool], knobs: Knobs) -> list[Mask]:
    """Return a mask of the values to keep for each pool."""
    lengths = [len(pool.values) for pool in pools]
    scores = _concatenated([_scores(pool, knobs.scores) for pool in pools])
    if knobs.max_rank is not None:
        scores = _capped(scores, lengths, knobs)
    if knobs.auto:
        masks = [_above_noise(pool) for pool in pools]
        return [mask & (part > 0) for mask, part in zip(masks, _split(scores, lengths), strict=True)]
    if knobs.budget is not None:
        costs = [pool.cost if size_of(knobs.budget) is None else pool.num_bytes for pool in pools]
        amount = min(amount_of(knobs.budget), int(np.dot(lengths, costs)))
        kept = _core.select_budget(scores, lengths, costs, amount)
    elif knobs.scope == "module":
        parts = _split(scores, lengths)
        if knobs.energy is not None:
            return [
                _core.select_energy(part, _share(knobs.energy, [pool], part))
                for part, pool in zip(parts, pools, strict=True)
            ]
        count = math.floor(_count(pools, knobs) / len(pools) + 0.5) if pools else 0
        return [_chosen(part, count, knobs) for part in parts]
    elif knobs.energy is not None:
        kept = _core.select_energy(scores, _share(knobs.energy, pools, scores))
    else:
        kept = _chosen(scores, _count(pools, knobs), knobs)
    return _split(kept, lengths)


def notes(forms: Sequence[SpectralForm], knobs: Knobs) -> list[str]:
    """Return remarks on a selection."""
    counts = [np.count_nonzero(form.values) for form in forms if not form.is_dense]
    few = sum(0 < count <= 2 for count in counts) if knobs.auto else 0
    return (
        [f"{few} modules of one or two ranks are unchanged: they have too few values to estimate noise"]
        if few
        else []
    )


def _count(pools: Sequence[_Pool], knobs: Knobs) -> int:
    """Return the number of values that a ratio or an average rank keeps, rounded half up."""
    if knobs.rank_ratio is not None:
        return math.floor(knobs.rank_ratio * sum(pool.rank for pool in pools) + 0.5)
    assert knobs.avg_rank is not None
    most = len(pools) * max((len(pool.values) for pool in pools), default=0)
    return math.floor(min(knobs.avg_rank * len(pools) + 0.5, most))


def _chosen(scores: npt.NDArray[np.float64], count: int, knobs: Knobs) -> Mask:
    """Return a mask of the best scores, or of all if there are fewer than `count`."""
    choose = _core.select_smallest if knobs.keep == "smallest" else _core.select_largest
    return choose(scores, min(count, len(scores)))


def _share(energy: float, pools: Sequence[_Pool], allowed: npt.NDArray[np.float64]) -> float:
    """Convert a share of the total energy to a share of the energy of the allowed values.

    The total includes values that were not computed and those beyond `max_rank`.

    Raises
    ------
    ValueError
        If the allowed values hold less energy.
    """
    forbidden = _concatenated([pool.values for pool in pools])[allowed == 0]
    missing = math.fsum(pool.unseen_energy for pool in pools) + float(np.square(forbidden).sum())
    if energy == 0 or missing == 0:
        return energy
    held = float(np.square(allowed).sum())
    share = energy * (held + missing) / held if held > 0 else math.inf
    if share > 1 + 1e-12:
        where = f"module {pools[0].forms[0].module.name!r}: " if len(pools) == 1 else ""
        raise ValueError(
            f"{where}energy={energy} is out of reach: the singular values that may be kept hold "
            f"{held / (held + missing):.4f} of the total energy; a larger max_rank allows more"
        )
    return min(share, 1.0)


def _scores(pool: _Pool, scores: Scores | None) -> npt.NDArray[np.float64]:
    if scores is None:
        return pool.values
    return _root_of_squares([_scores_of(form, scores) for form in pool.forms])


def _scores_of(form: SpectralForm, scores: Scores) -> npt.NDArray[np.float64]:
    name, length = form.module.name, len(form.values)
    if name not in scores:
        raise ValueError(f"no scores for module {name!r}")
    given = np.asarray(scores[name], dtype=np.float64)
    if given.shape != (length,):
        raise ValueError(f"module {name!r} has {length} singular values, its scores have shape {given.shape}")
    if np.any(bad := ~np.isfinite(given) | (given < 0)):
        i = int(np.argmax(bad))
        raise ValueError(f"module {name!r}: score {i} is {given[i]}: scores are finite numbers, 0 or above")
    # A value of zero is never kept, whatever its score; other values may be kept with a score of zero.
    return np.where(form.values > 0, np.maximum(given, _SMALLEST_SCORE), 0.0)


def _root_of_squares(parts: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """Return the roots of the sums of squares by position; shorter parts end with zeros."""
    if len(parts) == 1:
        return parts[0]
    pooled = np.zeros(max(map(len, parts)))
    for part in parts:
        pooled[: len(part)] = np.hypot(pooled[: len(part)], part)
    return pooled


def _capped(scores: npt.NDArray[np.float64], lengths: Sequence[int], knobs: Knobs) -> npt.NDArray[np.float64]:
    """Set all but the best `max_rank` scores of every module to zero, so that no others are kept."""
    assert knobs.max_rank is not None
    masks = [_chosen(part, knobs.max_rank, knobs) for part in _split(scores, lengths)]
    return np.where(_concatenated(masks), scores, 0.0)


def _above_noise(pool: _Pool) -> Mask:
    """Return the values above a noise floor.

    For a difference of dense weights, the energy of the values that were not computed is known. The floor is
    the Marchenko-Pastur edge of the remaining values [MP], computed again until no more values exceed it; all
    modules of a pool keep the largest of their ranks. For an adapter, whose other values are zero, the floor
    is 2.858 times the median of its values [GD]; one or two values are kept, because none could exceed it.
    """
    values = pool.values
    positive = values[values > 0]
    if pool.forms[0].is_dense:
        rank = max(int((form.values > _noise_floor(form)).sum()) for form in pool.forms)
        return np.arange(len(values)) < rank
    mask: Mask = values > (_GAVISH_DONOHO * np.median(positive) if len(positive) > 2 else 0.0)
    return mask


def _noise_floor(form: SpectralForm) -> float:
    """Return ``sigma (sqrt(out) + sqrt(in))``, with `sigma` from the energy below this edge."""
    out, fan_in = form.module.shape
    short = min(out, fan_in) * form.module.copies
    squares = np.square(form.values)
    kept = 0
    while True:
        left = max(form.energy - float(squares[:kept].sum()), 0.0)
        mean = left / max(short - kept, 1)
        edge = math.sqrt(mean) * (1 + math.sqrt(min(out, fan_in) / max(out, fan_in)))
        above = int((form.values > edge).sum())
        if above <= kept:
            return edge
        kept = above


def _concatenated(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0)


def _split(joined: npt.NDArray[Any], lengths: Sequence[int]) -> list[npt.NDArray[Any]]:
    ends = np.cumsum(lengths).tolist()
    return [joined[start:end] for start, end in pairwise([0, *ends])]
