"""Factors at another rank: the best approximation of their product, and new ranks that add nothing."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch

from lorank._core import NumericalError
from lorank.adapters.live.layers import AdaptedLayer

# A factor whose singular values differ by more than this is no good basis.
_ILL_CONDITIONED = 1e-3


@dataclass(frozen=True, slots=True)
class Truncation:
    """The best approximation of ``B @ A`` at rank k.

    ``A' = of_a A`` and ``B' = B of_b^T`` with coefficients ``(k, r)`` and ``of_a of_b^T = I``.
    """

    A: torch.Tensor
    B: torch.Tensor
    of_a: torch.Tensor
    of_b: torch.Tensor
    dropped: torch.Tensor


def truncated(A: torch.Tensor, B: torch.Tensor, rank: int) -> Truncation:
    """The truncated product of ``B (out, r)`` and ``A (r, in)``, with its change of basis.

    The rows of the new A are orthogonal and as long as the old ones on average, and B holds the
    singular values. So steps keep their size, and an update that is still zero stays trainable, which
    it would not in balanced form. Where A is no good basis (of an embedding it begins as zeros), the
    parts of A and B are exchanged.
    """
    q_a, r_a = torch.linalg.qr(A.T)
    q_b, r_b = torch.linalg.qr(B)
    U, s, Vh = torch.linalg.svd(r_b @ r_a.T)
    if _conditioning(r_a) >= min(_conditioning(r_b), _ILL_CONDITIONED):
        rows, of_a, of_b = _orthogonal(q_a, r_a, Vh[:rank])
        return Truncation(rows, B @ of_b.T, of_a, of_b, s[rank:])
    columns, of_b, of_a = _orthogonal(q_b, r_b, U.T[:rank])
    return Truncation(of_a @ A, columns.T, of_a, of_b, s[rank:])


def _orthogonal(
    Q: torch.Tensor, R: torch.Tensor, directions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A factor ``X = (Q R)^T (r, n)`` in another basis: ``c directions Q^T``.

    Returns it with the coefficients ``(k, r)`` of itself and of the other factor.
    """
    length = float(R.norm()) / math.sqrt(R.shape[1]) or 1.0
    own = length * directions @ torch.linalg.pinv(R.T)
    return length * directions @ Q.T, own, directions @ R / length


def _conditioning(R: torch.Tensor) -> float:
    """The smallest singular value over the largest; 0 for zeros."""
    values = torch.linalg.svdvals(R)
    return float(values[-1] / values[0]) if values[0] > 0 else 0.0


def new_ranks(
    adapted: AdaptedLayer, n: int, rows: Any, seed: int, gaussian: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """New rows of A ``(n, in)`` and columns of B ``(out, n)`` whose product is zero."""
    a, b = adapted.factors
    out, fan_in = b.shape[0], math.prod(a.shape[1:])
    zeros = torch.zeros(out, n)
    if rows is not None:
        return _checked_rows(adapted.name, rows, n, fan_in), zeros
    # Drawn on the CPU: the same rows on every device.
    generator = torch.Generator().manual_seed(_module_seed(seed, adapted.name, adapted.rank))
    if adapted.is_embedding:
        return torch.zeros(n, fan_in), torch.randn(out, n, generator=generator)
    if gaussian:
        return torch.randn(n, fan_in, generator=generator) / (adapted.rank + n), zeros
    # Kaiming's uniform distribution with a = sqrt(5) has this bound.
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(n, fan_in).uniform_(-bound, bound, generator=generator), zeros


def _checked_rows(name: str, rows: Any, n: int, fan_in: int) -> torch.Tensor:
    rows = torch.as_tensor(rows).detach()
    if rows.ndim != 2 or len(rows) < n or rows.shape[1] != fan_in:
        raise ValueError(
            f"directions: module {name!r} needs an array of {n} or more rows of {fan_in}, not "
            f"{tuple(rows.shape)}"
        )
    if not torch.isfinite(rows[:n]).all():
        raise NumericalError(f"directions: module {name!r}: NaN or infinite values")
    return rows[:n]


def _module_seed(seed: int, name: str, rank: int) -> int:
    # The rank is part of it: ranks that are appended in two calls must differ, or they would train alike.
    digest = hashlib.blake2b(f"{seed}/{rank}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
