"""Computes factors from the stored tensors of a PEFT file, for stacks of experts and for AdaLoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorank.adapters.factors import Pair, TensorFactors, in_memory
from lorank.sources import arrays


@dataclass(frozen=True, slots=True)
class StackFactors:
    """The factors of a stack of experts.

    The stored A is ``(experts * r, in)``; the expert index varies slowest. The stored B is
    ``(out, r * experts)``; the expert index varies fastest.

    Attributes
    ----------
    stored
        A and B of all experts, as stored.
    copies
        Number of experts.
    is_swapped
        True if A holds the outputs and B the inputs, as PEFT before 0.19 wrote them.
    """

    stored: TensorFactors
    copies: int
    is_swapped: bool

    def __call__(self) -> Sequence[Pair]:
        """Return the factors of every expert."""
        b, a = self.stored.b.to_array(), self.stored.a.to_array()
        rank = self.stored.rank // self.copies
        parts = [(b[:, e :: self.copies], a[e * rank : (e + 1) * rank]) for e in range(self.copies)]
        return [in_memory(a.T, b.T) if self.is_swapped else in_memory(b, a) for b, a in parts]


@dataclass(frozen=True, slots=True)
class AdaLoraFactors:
    """The factors ``B (E * A)`` of AdaLoRA, where E holds a value for each rank.

    Attributes
    ----------
    stored
        The stored B and A.
    e_key
        Name of the tensor ``E (r, 1)``.
    """

    stored: TensorFactors
    e_key: str

    def __call__(self) -> Sequence[Pair]:
        """Return B, and A times E."""
        values = self.stored.tensors.matrix(self.e_key, self.stored.rank, 1).to_array()
        return [(self.stored.b, arrays.matrix(self.stored.a.to_array() * values))]
