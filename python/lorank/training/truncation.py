"""LoRA factors at another rank: the best approximation of their product, and new ranks of product zero."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch

from lorank._core import NumericalError
from lorank.adapters.live.layers import AdaptedLayer

# A is the basis if its ratio of the smallest to the largest singular value is at least this, for any B.
_ILL_CONDITIONED = 1e-3


@dataclass(frozen=True, slots=True)
class Truncation:
    """The best approximation ``B' A'`` of ``B A`` at rank `k`.

    Attributes
    ----------
    A, B
        The new factors, ``A' = of_a A (k, in)`` and ``B' = B of_b^T (out, k)``.
    of_a, of_b
        Coefficients ``(k, r)`` that combine the old ranks into the new ranks, with ``of_a of_b^T = I``.
    dropped
        Singular values of ``B A`` after the first `k`, descending.
    """

    A: torch.Tensor
    B: torch.Tensor
    of_a: torch.Tensor
    of_b: torch.Tensor
    dropped: torch.Tensor


def truncated(A: torch.Tensor, B: torch.Tensor, rank: int) -> Truncation:
    """Truncate the product of ``B (out, r)`` and ``A (r, in)``.

    The rows of the new A are orthogonal; the norm of each is the root mean square of the old rows' norms. B
    contains the singular values. Steps of the optimizer therefore keep their size, and an update of zero
    stays trainable: factors of equal norms would both be zero. If A is ill-conditioned (A of an embedding
    starts at zero), A and B exchange their roles.
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
    """Return a new basis ``c directions Q^T (k, n)`` for a factor ``X = (Q R)^T (r, n)``, and coefficients.

    The coefficients ``(k, r)`` are those of this factor, then those of the other factor.
    """
    length = float(R.norm()) / math.sqrt(R.shape[1]) or 1.0
    own = length * directions @ torch.linalg.pinv(R.T)
    return length * directions @ Q.T, own, directions @ R / length


def _conditioning(R: torch.Tensor) -> float:
    """Return the ratio of the smallest singular value to the largest; 0 for a matrix of zeros."""
    values = torch.linalg.svdvals(R)
    return float(values[-1] / values[0]) if values[0] > 0 else 0.0


def new_ranks(
    adapted: AdaptedLayer, n: int, rows: Any, seed: int, gaussian: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return new rows of A ``(n, in)`` and new columns of B ``(out, n)`` whose product is zero.

    Parameters
    ----------
    adapted
        The layer that grows.
    n
        Number of new ranks.
    rows
        An array whose first `n` rows become the new rows of A; None for random rows as PEFT draws them.
    seed
        Seed of random rows.
    gaussian
        True for PEFT's normal distribution, False for its uniform one.

    Raises
    ------
    ValueError
        If `rows` has another shape.
    NumericalError
        If `rows` has NaN or infinite values.
    """
    a, b = adapted.factors
    out, fan_in = b.shape[0], math.prod(a.shape[1:])
    zeros = torch.zeros(out, n)
    if rows is not None:
        return _checked_rows(adapted.name, rows, n, fan_in), zeros
    # Rows are drawn on the CPU, so that they do not depend on the device.
    generator = torch.Generator().manual_seed(_module_seed(seed, adapted.name, adapted.rank))
    if adapted.is_embedding:
        return torch.zeros(n, fan_in), torch.randn(out, n, generator=generator)
    if gaussian:
        return torch.randn(n, fan_in, generator=generator) / (adapted.rank + n), zeros
    # The bound of Kaiming's uniform distribution with a = sqrt(5).
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(n, fan_in).uniform_(-bound, bound, generator=generator), zeros


def _checked_rows(name: str, rows: Any, n: int, fan_in: int) -> torch.Tensor:
    """Return the first `n` rows, checked for shape and finite values."""
    rows = torch.as_tensor(rows).detach()
    if rows.ndim != 2 or len(rows) < n or rows.shape[1] != fan_in:
        raise ValueError(
            f"directions: module {name!r} needs an array of {n} or more rows of {fan_in}, not "
            f"one of shape {tuple(rows.shape)}"
        )
    if not torch.isfinite(rows[:n]).all():
        raise NumericalError(f"directions: module {name!r}: NaN or infinite values")
    return rows[:n]


def _module_seed(seed: int, name: str, rank: int) -> int:
    # The rank is included, so that rows appended by two calls differ: equal rows would get equal gradients.
    digest = hashlib.blake2b(f"{seed}/{rank}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
