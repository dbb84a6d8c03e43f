"""One adapted module: its factors, and the update that is their product."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lorank import _core
from lorank._internal import core_calls
from lorank.adapters.factors import Factors, PackedFactors
from lorank.modules.weight import Kind

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class LoraModule:
    """An update ``scaling * B @ A`` of one weight.

    Pickling and deep copying copy the values of the factors: the copy depends neither on a file nor on a live
    model.

    Attributes
    ----------
    name
        Dotted name of the module, or of the stacked parameter, in the base model.
    kind
        Kind of the module's operation, such as ``"linear"`` or ``"expert"``.
    shape
        ``(out, in)``; kernels of convolutions are flattened to ``in * kh * kw``.
    rank
        Rank of the factors; 0 if the module is no longer adapted.
    scaling
        ``lora_alpha / r``, or the scale that the adapter's format defines instead.
    dtype
        The stored element type.
    factors
        A function that returns ``(B, A)`` of every copy, as matrices for the core.
    copies
        Number of updates that share the rank: the experts of a stack, else 1.
    a_tail, b_tail
        Stored dimensions of A and B after the rank: ``(in, kh, kw)`` and ``(1, 1)`` for a convolution.
    carried
        Other tensors of the module, which are kept unchanged, by the end of their keys.
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
        """Number of parameters of one rank: ``copies * (out + in)``."""
        return self.copies * sum(self.shape)

    @property
    def num_parameters(self) -> int:
        """Number of parameters of both factors."""
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

    def __repr__(self) -> str:
        stack = f"{self.copies} x " if self.copies > 1 else ""
        return (
            f"LoraModule({self.name!r}, {self.kind}, {stack}{self.shape[0]}x{self.shape[1]}, "
            f"rank {self.rank}, scaling {self.scaling:.4g}, {self.dtype})"
        )

    def __reduce__(self) -> tuple[type[LoraModule], tuple[Any, ...]]:
        packed = replace(self, factors=PackedFactors.of(self.factors))
        return LoraModule, tuple(getattr(packed, entry.name) for entry in fields(packed))

    def __copy__(self) -> LoraModule:
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> LoraModule:
        del memo
        return replace(self, factors=PackedFactors.of(self.factors), carried=copy.deepcopy(self.carried))


def combined_values(copies: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """Return the singular values of a module: the root of the sum of squares over the copies."""
    if len(copies) == 1:
        return copies[0]
    root: npt.NDArray[np.float64] = np.sqrt(sum(np.square(values) for values in copies))
    return root
