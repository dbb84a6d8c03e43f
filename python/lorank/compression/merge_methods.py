"""Methods that merge dense updates element by element.

Sources: [TIES], [DARE]; the definitions are those of PEFT's `merge_utils`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Method = Literal["sum", "ties", "dare", "dare-ties", "magnitude"]
Election = Literal["total", "frequency"]

_ELECTING = ("ties", "dare-ties")
_RANDOM = ("dare", "dare-ties")


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """A rule that combines the updates of one module.

    Attributes
    ----------
    name
        ``"sum"`` (weighted sum), ``"magnitude"`` (sum of pruned updates), ``"ties"`` (the same, without
        elements of the minority's sign), ``"dare"`` and ``"dare-ties"`` (random pruning with rescaling).
    density
        Share of the elements of each update to keep, above 0 and at most 1; None for ``"sum"``.
    seed
        Seed of random pruning.
    election
        Sign of an element for ties: that of the sum of updates (``"total"``) or of most updates
        (``"frequency"``).
    """

    name: Method = "sum"
    density: float | None = None
    seed: int = 0
    election: Election = "total"

    def __post_init__(self) -> None:
        if self.name not in get_args(Method):
            raise ValueError(f"method must be one of {', '.join(get_args(Method))}, not {self.name!r}")
        if self.election not in get_args(Election):
            raise ValueError(f"election must be 'total' or 'frequency', not {self.election!r}")
        if self.is_sum:
            if self.density is not None:
                raise ValueError("density has no meaning for method='sum': choose another method")
        elif self.density is None:
            raise ValueError(f"method={self.name!r} needs a density: the share of elements to keep")
        elif not 0 < self.density <= 1:
            raise ValueError(f"density={self.density} is not above 0 and at most 1")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed={self.seed!r} is not a whole number, 0 or above")

    @property
    def is_sum(self) -> bool:
        """True for the weighted sum, which needs no dense updates."""
        return self.name == "sum"

    @property
    def divides(self) -> bool:
        """True if the method divides by the number of updates that it adds: weights of 1 give a mean."""
        return self.name in _ELECTING

    def __str__(self) -> str:
        if self.is_sum:
            return "sum"
        parts = [f"density {self.density:g}"]
        parts += [f"seed {self.seed}"] if self.name in _RANDOM else []
        parts += [f"signs by {self.election}"] if self.name in _ELECTING else []
        return f"{self.name} ({', '.join(parts)})"

    def merged(self, updates: Sequence[Callable[[], Array]], weights: Sequence[float], label: str) -> Array:
        """Return the merged update.

        Parameters
        ----------
        updates
            Functions that return the dense updates; each is called once, or twice for ties, so that only
            one update is in memory.
        weights
            A weight for each update.
        label
            Name of the module, which selects its random numbers together with the update's position.
        """
        signs = self._majority(self._pruned(updates, label)) if self.divides else None
        total = counts = None
        for update, weight in zip(self._pruned(updates, label), weights, strict=True):
            agrees = None if signs is None else np.sign(update) == signs
            update *= weight
            if agrees is not None:
                update *= agrees
                counts = agrees.astype(np.int32) if counts is None else counts + agrees
            total = update if total is None else np.add(total, update, out=total)
        assert total is not None
        return total if counts is None else np.divide(total, np.maximum(counts, 1), out=total)

    def _majority(self, updates: Iterator[Array]) -> npt.NDArray[np.int8]:
        total: Any = 0.0
        for update in updates:
            total = total + (update if self.election == "total" else np.sign(update))
        return np.where(total >= 0, 1, -1).astype(np.int8)

    def _pruned(self, updates: Sequence[Callable[[], Array]], label: str) -> Iterator[Array]:
        assert self.density is not None
        for position, update in enumerate(updates):
            if self.density == 1:
                yield update()
            elif self.name in _RANDOM:
                dense = update()
                dense *= random_mask(dense.shape, self.density, self.seed, label, position)
                yield np.divide(dense, self.density, out=dense)
            else:
                yield trimmed(update(), self.density)


def trimmed(update: Array, density: float) -> Array:
    """Return an update with only its ``int(density * size)`` elements of largest magnitude, in place.

    Of equal elements, the first are kept.
    """
    count = math.floor(density * update.size)
    if count == 0:
        update[...] = 0
        return update
    sizes = np.abs(update)
    threshold = np.partition(sizes, update.size - count, axis=None)[update.size - count]
    keep = sizes > threshold
    equal = np.flatnonzero(sizes == threshold)
    keep.reshape(-1)[equal[: count - int(np.count_nonzero(keep))]] = True
    update *= keep
    return update


def random_mask(
    shape: tuple[int, ...], density: float, seed: int, label: str, position: int
) -> npt.NDArray[np.bool_]:
    """Return a mask that keeps each element with probability `density`.

    The random numbers depend on the seed, the module's name and the update's position, not on threads or on
    other modules.
    """
    digest = hashlib.sha256(f"{seed}\n{position}\n{label}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    mask: npt.NDArray[np.bool_] = generator.random(shape) < density
    return mask
