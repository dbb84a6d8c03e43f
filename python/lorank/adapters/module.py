"""One adapted module: its factors, wherever they lie, and what they multiply to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lorank import _core
from lorank._core import Matrix
from lorank._internal import core_calls
from lorank.modules.weight import Kind
from lorank.sources import arrays

Array = npt.NDArray[Any]
Factors = Callable[[], Sequence[tuple[Matrix, Matrix]]]


@dataclass(frozen=True, slots=True)
class LoraModule:
    """An update ``scaling * B @ A`` of one weight.

    Attributes
    ----------
    name
        The module's dotted name in the base model, or a stacked parameter's.
    kind
        What the module does with its weight.
    shape
        ``(out, in)``; kernels of convolutions are flattened to ``in * kh * kw``.
    rank
        0 if the module is not adapted any more.
    scaling
        ``lora_alpha / r``, or what its format says instead.
    dtype
        The stored element type.
    copies
        Updates that share the rank: the experts of a stack, else 1.
    a_tail, b_tail
        The stored shapes after the rank: ``(in, kh, kw)`` and ``(1, 1)`` of a convolution.
    factors
        Returns ``(B, A)`` of every copy, as matrices for the core.
    carried
        Further numbers of the module that stay as they are, by the end of their names.
    """

    name: str
    kind: Kind
    shape: tuple[int, int]
    rank: int
    scaling: float
    dtype: str
    factors: Factors
    copies: int = 1
    a_tail: tuple[int, ...] = ()
    b_tail: tuple[int, ...] = ()
    carried: dict[str, Any] = field(default_factory=dict)

    @property
    def cost(self) -> int:
        """Parameters of one rank: ``copies * (out + in)``."""
        return self.copies * sum(self.shape)

    @property
    def num_parameters(self) -> int:
        """Parameters of both factors."""
        return self.rank * self.cost

    @property
    def A(self) -> Array:  # noqa: N802
        """``(r, in)``, or ``(copies, r, in)`` of a stack; float32, or float64 if stored so."""
        return self._stack([a.to_array() for _, a in self.factors()])

    @property
    def B(self) -> Array:  # noqa: N802
        """``(out, r)``, or ``(copies, out, r)`` of a stack; float32, or float64 if stored so."""
        return self._stack([b.to_array() for b, _ in self.factors()])

    def _stack(self, parts: Sequence[Array]) -> Array:
        return parts[0] if self.copies == 1 else np.stack(parts)

    @property
    def singular_values(self) -> npt.NDArray[np.float64]:
        """Singular values of the scaled update, descending; for a stack, see `combined_values`."""
        updates = [[(b, a, self.scaling)] for b, a in self.factors()]
        decomposed = core_calls.collect(
            lambda receive: _core.decompose(updates, 1, receive), lambda _: self.name
        )
        return combined_values([one.singular_values for one in decomposed])


def combined_values(copies: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """Return the singular values of a module: for several copies, the root of the sum of their squares."""
    if len(copies) == 1:
        return copies[0]
    root: npt.NDArray[np.float64] = np.sqrt(sum(np.square(values) for values in copies))
    return root


def in_memory(b: Array, a: Array) -> tuple[Matrix, Matrix]:
    """Factors ``B (out, r)`` and ``A (r, in)`` for the core, without a copy."""
    return arrays.matrix(b), arrays.matrix(a)
