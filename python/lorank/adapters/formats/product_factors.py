"""LoHa and LoKr as products of two factors, computed from their own factors.

LoHa's update is ``(W1a W1b) * (W2a W2b)``, element by element. The columns of B are the products of a column
of W1a and one of W2a, and the rows of A those of W1b and W2b: the rank is the product of both ranks. LoKr's
update is a Kronecker product, so that B and A are the Kronecker products of the factors of both sides.
Products are computed in float64, in which those of float32 values are exact.

Sources: `lycoris/modules/loha.py` and `lokr.py` of LyCORIS, and the layers of PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np

from lorank._core import FormatError
from lorank.adapters.factors import Pair, in_memory
from lorank.adapters.formats.derived_factors import Array
from lorank.adapters.formats.stored_arrays import array_of
from lorank.adapters.tensors import Tensors

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


@dataclass(frozen=True, slots=True)
class ProductFactors:
    """The factors of a LoHa or LoKr module.

    Attributes
    ----------
    tensors
        The tensors of the file.
    name
        The module's name, for messages.
    keys
        The keys of the module's tensors by their parts, such as ``"hada_w1_a"``.
    """

    tensors: Tensors = field(repr=False)
    name: str
    keys: Mapping[str, str]

    def __call__(self) -> Sequence[Pair]:
        """Return ``B (out, r)`` and ``A (r, in)`` in float64."""
        first, second = self.sides()
        if self.is_loha:
            b = (first[0][:, :, None] * second[0][:, None, :]).reshape(first[0].shape[0], -1)
            a = (first[1][:, None, :] * second[1][None, :, :]).reshape(-1, first[1].shape[1])
        else:
            b, a = np.kron(first[0], second[0]), np.kron(first[1], second[1])
        return [in_memory(np.ascontiguousarray(b), np.ascontiguousarray(a))]

    @property
    def is_loha(self) -> bool:
        """True for LoHa, False for LoKr."""
        return "hada_w1_a" in self.keys or "hada_w1_b" in self.keys

    def sides(self) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """Return B and A of both sides of the product, in float64."""
        values = {part: array_of(self.tensors, key).astype(np.float64) for part, key in self.keys.items()}
        if self.is_loha:
            return _core_side(values, "hada_w1", "hada_t1"), _core_side(values, "hada_w2", "hada_t2")
        return _side(values, "lokr_w1", ""), _side(values, "lokr_w2", "lokr_t2")


def _side(values: Mapping[str, Array], name: str, core: str) -> tuple[Array, Array]:
    """Return B and A of one side of LoKr, of which either may be the identity."""
    if name not in values:
        return _core_side(values, name, core)
    whole = values[name].reshape(values[name].shape[0], -1)
    rows, cols = whole.shape
    return (whole, np.eye(cols)) if cols <= rows else (np.eye(rows), whole)


def _core_side(values: Mapping[str, Array], name: str, core: str) -> tuple[Array, Array]:
    """Return B and A of a side with two factors and, for kernels of convolutions, a core."""
    a, b = values[f"{name}_a"], values[f"{name}_b"]
    if core not in values:
        return a, b.reshape(b.shape[0], -1)
    # The update is sum_ij t[i, j, k, l] a[i, p] b[j, q].
    kernel = np.einsum("ij...,jq->iq...", values[core], b)
    return a.T, kernel.reshape(kernel.shape[0], -1)


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of a product.

    Attributes
    ----------
    outputs, inputs
        Sides of the update; kernels of convolutions are flattened into the inputs.
    rank
        Rank of the factors of the product.
    divisor
        The number that alpha is divided by: the rank of the stored factors; None if neither side has factors.
    kernel
        Shape ``(kh, kw)`` of the kernel, if the file holds it; else empty.
    parameters
        Number of stored parameters.
    """

    outputs: int
    inputs: int
    rank: int
    divisor: int | None
    kernel: tuple[int, ...]
    parameters: int


def size_of(factors: ProductFactors) -> Size:
    """Return the shape of a product after a check of all its tensors, without their values.

    Raises
    ------
    FormatError
        If a tensor is missing, or shapes do not fit each other.
    """
    known = factors.tensors.shapes()
    shapes = {part: known[key] for part, key in factors.keys.items()}

    def fail(reason: str) -> NoReturn:
        raise FormatError(f"{factors.tensors.label}: module {factors.name!r}: {reason}")

    if any(0 in shape or not shape for shape in shapes.values()):
        fail("has a tensor without values")
    parameters = sum(math.prod(shape) for shape in shapes.values())
    if factors.is_loha:
        one, two = (_pair(shapes, f"hada_w{i}", f"hada_t{i}", fail) for i in (1, 2))
        if one[:2] != two[:2] or one[3] != two[3]:
            fail(f"both sides of its product differ in shape: {list(one[:2])} and {list(two[:2])}")
        return Size(one[0], one[1], one[2] * two[2], shapes["hada_w1_b"][0], one[3], parameters)
    one, two = _whole_or_pair(shapes, "lokr_w1", "", fail), _whole_or_pair(shapes, "lokr_w2", "lokr_t2", fail)
    divisor = next(
        (shapes[part][0] for part in ("lokr_w1_b", "lokr_w2_b", "lokr_t2") if part in shapes), None
    )
    return Size(one[0] * two[0], one[1] * two[1], one[2] * two[2], divisor, two[3], parameters)


_Sides = tuple[int, int, int, tuple[int, ...]]
_Shapes = Mapping[str, tuple[int, ...]]
_Fail = Callable[[str], NoReturn]


def _whole_or_pair(shapes: _Shapes, name: str, core: str, fail: _Fail) -> _Sides:
    if name not in shapes:
        return _pair(shapes, name, core, fail)
    if extra := [part for part in shapes if part.startswith(f"{name}_")]:
        fail(f"has {name} and {extra[0]}, of which one is too many")
    shape = shapes[name]
    if len(shape) < 2:
        fail(f"{name} of shape {list(shape)} is not a matrix")
    inputs = math.prod(shape[1:])
    return shape[0], inputs, min(shape[0], inputs), shape[2:]


def _pair(shapes: _Shapes, name: str, core: str, fail: _Fail) -> _Sides:
    for part in (f"{name}_a", f"{name}_b"):
        if part not in shapes:
            fail(f"has no {part}")
    a, b = shapes[f"{name}_a"], shapes[f"{name}_b"]
    if core in shapes:
        t = shapes[core]
        if len(a) != 2 or len(b) != 2 or len(t) < 3 or t[:2] != (a[0], b[0]):
            fail(f"tensors of shapes {list(a)}, {list(t)} and {list(b)} do not fit each other")
        return a[1], b[1] * math.prod(t[2:]), a[0], t[2:]
    if len(a) != 2 or len(b) < 2 or a[1] != b[0]:
        fail(f"tensors of shapes {list(a)} and {list(b)} do not fit each other")
    return a[0], math.prod(b[1:]), a[1], b[2:]
