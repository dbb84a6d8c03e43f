"""Which singular values stay: one choice over all modules, by one of five knobs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal, TypedDict, cast

import numpy as np
import numpy.typing as npt

from lorank import _core
from lorank.allocation.budget import Budget, parse_budget
from lorank.compression.spectral_form import SpectralForm
from lorank.peft_format.rank_groups import group_indices

Mask = npt.NDArray[np.bool_]
Scores = Mapping[str, npt.ArrayLike]

# Gavish and Donoho's optimal hard threshold for a square matrix of unknown noise.
_GAVISH_DONOHO = 2.858

_SMALLEST_SCORE = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """How much to keep: exactly one of the first five.

    Attributes
    ----------
    rank_ratio
        Keep this share of all singular values (PARA's gamma).
    avg_rank
        Keep so many values per module on average.
    energy
        Keep the fewest values whose squares reach this share of the energy (PARA's epsilon): of all of
        it, also where `max_rank` forbids some values. It is an error if the others do not hold so much.
    budget
        Keep what fits into so many parameters, the most energy per parameter first.
    auto
        Keep what stands out of each module's own noise: a heuristic without a knob.
    max_rank
        No module keeps more.
    scope
        ``"global"``: modules compete. ``"module"``: one rank everywhere, or energy module by module.
    keep
        ``"largest"``, or ``"smallest"`` for the study of reverse pruning.
    scores
        By module name, one per singular value, in place of the values: larger is kept first.
    """

    rank_ratio: float | None = None
    avg_rank: float | None = None
    energy: float | None = None
    budget: Budget | None = None
    auto: bool = False
    max_rank: int | None = None
    scope: Literal["global", "module"] = "global"
    keep: Literal["largest", "smallest"] = "largest"
    scores: Scores | None = None

    def __post_init__(self) -> None:
        given = [
            name for name in ("rank_ratio", "avg_rank", "energy", "budget") if getattr(self, name) is not None
        ]
        given += ["auto"] if self.auto else []
        if len(given) != 1:
            raise ValueError(
                "give exactly one of rank_ratio, avg_rank, energy, budget and auto"
                + (f", not {' and '.join(given)}" if given else "")
            )
        _check_range("rank_ratio", self.rank_ratio, 1.0)
        _check_range("energy", self.energy, 1.0)
        _check_range("avg_rank", self.avg_rank, math.inf)
        if self.budget is not None:
            _parameters(self.budget)
        if self.max_rank is not None and self.max_rank < 0:
            raise ValueError(f"max_rank={self.max_rank} cannot be negative")
        if self.scope not in ("global", "module"):
            raise ValueError(f"scope must be 'global' or 'module', not {self.scope!r}")
        if self.keep not in ("largest", "smallest"):
            raise ValueError(f"keep must be 'largest' or 'smallest', not {self.keep!r}")
        if self.budget is not None and self.scope == "module":
            raise ValueError("a parameter budget is shared by all modules: scope='module' contradicts it")
        counted = self.rank_ratio is not None or self.avg_rank is not None
        if (self.keep == "smallest" or self.scores is not None) and not counted:
            raise ValueError("keep='smallest' and scores go with rank_ratio or avg_rank only")

    @property
    def keep_nothing(self) -> bool:
        """Whether no value can stay, whatever there is."""
        parameters = None if self.budget is None else _parameters(self.budget)
        return 0 in (self.rank_ratio, self.avg_rank, self.energy, parameters, self.max_rank)

    def __str__(self) -> str:
        names = ("rank_ratio", "avg_rank", "energy", "budget")
        name = next((name for name in names if getattr(self, name) is not None), "auto")
        words = [f"{name}={getattr(self, name)}", f"{self.scope} scope"]
        words += [f"max_rank={self.max_rank}"] if self.max_rank is not None else []
        words += ["smallest kept"] if self.keep == "smallest" else []
        words += ["custom scores"] if self.scores is not None else []
        return ", ".join(words)


class KnobArguments(TypedDict, total=False):
    """The fields of `Knobs` as keyword arguments, for functions that pass them on."""

    rank_ratio: float | None
    avg_rank: float | None
    energy: float | None
    budget: Budget | None
    auto: bool
    max_rank: int | None
    scope: Literal["global", "module"]
    keep: Literal["largest", "smallest"]
    scores: Scores | None


def _check_range(name: str, value: float | None, most: float) -> None:
    if value is not None and (not 0 <= value <= most or value == math.inf):
        limits = f"between 0 and {most:g}" if most < math.inf else "0 or a finite number above it"
        raise ValueError(f"{name}={value} is not {limits}")


def with_counted_budget(
    knobs: Mapping[str, object], num_parameters: int | None, unknown: str = ""
) -> dict[str, Any]:
    """Return knobs whose budget is a number of parameters, computed from a share of the base model.

    Raises
    ------
    ValueError
        If the budget ends with a per cent sign and is not a share, or the size is unknown, for the reason
        `unknown`.
    """
    budget = knobs.get("budget")
    if isinstance(budget, str) and budget.strip().endswith("%"):
        return {**knobs, "budget": parse_budget(budget, num_parameters, unknown)}
    return dict(knobs)


def checked_knobs(knobs: Mapping[str, object]) -> Knobs:
    """Knobs from keyword arguments.

    Raises
    ------
    TypeError
        If there is no knob of a name.
    ValueError
        If not exactly one of the first five is given, or one is out of range.
    """
    known = [field.name for field in fields(Knobs)]
    if unknown := [name for name in knobs if name not in known]:
        raise TypeError(f"no knob {unknown[0]!r}: choose among {', '.join(known)}")
    return Knobs(**cast("dict[str, Any]", dict(knobs)))


@dataclass(frozen=True, slots=True)
class _Pool:
    """Modules that keep one rank, and their values pooled as those of the copies of a stack are."""

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
    def unseen_energy(self) -> float:
        return math.fsum(form.unseen_energy for form in self.forms)


def select(forms: Sequence[SpectralForm], knobs: Knobs, groups: Iterable[Sequence[str]] = ()) -> list[Mask]:
    """Choose the values that stay, a mask per module.

    Parameters
    ----------
    forms
        The decomposed modules.
    knobs
        How much to keep.
    groups
        Names of modules that keep one rank, as from `rank_groups`. A group counts as one module: its
        values are the roots of the sums of squares over its members, its cost the sum of theirs.

    Raises
    ------
    ValueError
        If scores do not fit the modules, or are no scores, or an energy is out of reach.
    """
    indices = group_indices([form.module.name for form in forms], groups)
    pools = [_Pool.of([forms[i] for i in group]) for group in indices]
    found: dict[int, Mask] = {}
    for group, mask in zip(indices, _selected(pools, knobs), strict=True):
        found |= {i: mask[: len(forms[i].values)] for i in group}
    return [found[i] for i in range(len(forms))]


def _selected(pools: Sequence[_Pool], knobs: Knobs) -> list[Mask]:
    """Return the values that stay, a mask per pool."""
    lengths = [len(pool.values) for pool in pools]
    scores = _concatenated([_scores(pool, knobs.scores) for pool in pools])
    if knobs.max_rank is not None:
        scores = _capped(scores, lengths, knobs)
    if knobs.auto:
        masks = [_above_noise(pool) for pool in pools]
        return [mask & (part > 0) for mask, part in zip(masks, _split(scores, lengths), strict=True)]
    if knobs.budget is not None:
        costs = [pool.cost for pool in pools]
        kept = _core.select_budget(scores, lengths, costs, _parameters(knobs.budget))
    elif knobs.scope == "module":
        parts = _split(scores, lengths)
        if knobs.energy is not None:
            return [
                _core.select_energy(part, _share(knobs.energy, [pool], part))
                for part, pool in zip(parts, pools, strict=True)
            ]
        count = math.floor(_count(pools, knobs) / len(pools) + 0.5) if pools else 0
        return [_choice(knobs)(part, count) for part in parts]
    elif knobs.energy is not None:
        kept = _core.select_energy(scores, _share(knobs.energy, pools, scores))
    else:
        kept = _choice(knobs)(scores, _count(pools, knobs))
    return _split(kept, lengths)


def notes(forms: Sequence[SpectralForm], knobs: Knobs) -> list[str]:
    """What to say about a selection beside its result."""
    counts = [np.count_nonzero(form.values) for form in forms if not form.is_dense]
    few = sum(0 < count <= 2 for count in counts) if knobs.auto else 0
    return [f"{few} modules of one or two ranks were left as they are: no noise to judge by"] if few else []


def _count(pools: Sequence[_Pool], knobs: Knobs) -> int:
    """Return how many values a ratio or an average rank keeps, rounded half up."""
    if knobs.rank_ratio is not None:
        return math.floor(knobs.rank_ratio * sum(pool.rank for pool in pools) + 0.5)
    assert knobs.avg_rank is not None
    return math.floor(knobs.avg_rank * len(pools) + 0.5)


def _parameters(budget: Budget) -> int:
    if isinstance(budget, str) and budget.strip().endswith("%"):
        raise ValueError(
            f"budget={budget}: an adapter does not know its base model's size: give a number of parameters"
        )
    try:
        return parse_budget(budget, None)
    except ValueError:
        raise ValueError(f"budget={budget} is no number of parameters such as 500000, 500k or 1.5M") from None


def _choice(knobs: Knobs) -> Callable[[npt.NDArray[np.float64], int], Mask]:
    return _core.select_smallest if knobs.keep == "smallest" else _core.select_largest


def _share(energy: float, pools: Sequence[_Pool], allowed: npt.NDArray[np.float64]) -> float:
    """The share of the allowed values' energy that is `energy` of the whole.

    The whole has what was not computed and what `max_rank` forbids, too.

    Raises
    ------
    ValueError
        If the allowed values do not hold so much.
    """
    forbidden = _concatenated([pool.values for pool in pools])[allowed == 0]
    missing = math.fsum(pool.unseen_energy for pool in pools) + float(np.square(forbidden).sum())
    if energy == 0 or missing == 0:
        return energy
    held = float(np.square(allowed).sum())
    share = energy * (held + missing) / held if held > 0 else math.inf
    if share > 1 + 1e-12:
        which = f"module {pools[0].forms[0].module.name!r}: " if len(pools) == 1 else ""
        raise ValueError(
            f"{which}energy={energy} is out of reach: the singular values that may be kept hold "
            f"{held / (held + missing):.4f} of the whole; a larger max_rank allows more"
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
    # A value of zero is not worth keeping, whatever its score; a score of zero still is a score.
    return np.where(form.values > 0, np.maximum(given, _SMALLEST_SCORE), 0.0)


def _root_of_squares(parts: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """Pool values by position; shorter parts end with zeros."""
    if len(parts) == 1:
        return parts[0]
    pooled = np.zeros(max(map(len, parts)))
    for part in parts:
        pooled[: len(part)] = np.hypot(pooled[: len(part)], part)
    return pooled


def _capped(scores: npt.NDArray[np.float64], lengths: Sequence[int], knobs: Knobs) -> npt.NDArray[np.float64]:
    """Scores with all but the best `max_rank` of every module set to zero, which is never kept."""
    assert knobs.max_rank is not None
    masks = [_choice(knobs)(part, knobs.max_rank) for part in _split(scores, lengths)]
    return np.where(_concatenated(masks), scores, 0.0)


def _above_noise(pool: _Pool) -> Mask:
    """Return the values above a noise floor.

    Where the whole spectrum's energy is known to exceed that of the computed values (a difference of dense
    weights), the floor is the Marchenko-Pastur edge of the rest, taken anew until no more values exceed it;
    the largest rank of several modules holds for all. For an adapter, whose other values are zero, the floor
    is 2.858 times the median of its values; one or two values are all kept, as none of them could exceed it.
    """
    values = pool.values
    positive = values[values > 0]
    if pool.forms[0].is_dense:
        rank = max(int((form.values > _noise_floor(form)).sum()) for form in pool.forms)
        return np.arange(len(values)) < rank
    mask: Mask = values > (_GAVISH_DONOHO * np.median(positive) if len(positive) > 2 else 0.0)
    return mask


def _noise_floor(form: SpectralForm) -> float:
    """``sigma (sqrt(out) + sqrt(in))``, `sigma` from the energy below the edge."""
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


def _split(whole: npt.NDArray[Any], lengths: Sequence[int]) -> list[npt.NDArray[Any]]:
    ends = np.cumsum(lengths).tolist()
    return [whole[start:end] for start, end in pairwise([0, *ends])]
