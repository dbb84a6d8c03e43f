"""Autograd functions that see every use of a frozen weight, through gradients of gradients too.

A linear layer or convolution computes ``y = W x``. Its backward pass computes ``W^T delta``, and the
backward pass of that one (a loss that holds a gradient) ``W v`` again. Each of these is an application of
`W`, and each adds a term to the gradient of `W`: ``delta x^T`` for the first, ``delta v^T`` for the second,
where `v` is the gradient of what the inner backward pass returned.

The functions here behave as a second weight of zeros beside `W` would: they change no value, and autograd
leads to them exactly the pairs of which the gradient of `W` is the sum, at every order.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.graph import get_gradient_edge

with torch.inference_mode(False), torch.enable_grad():
    _ANCHOR = torch.zeros((), requires_grad=True)
    """Requires a gradient and gets none, so that outputs require one even if nothing else is trained."""
    _END = get_gradient_edge(_ANCHOR).node


def is_whole_pass() -> bool:
    """Return True if the running backward pass reaches every leaf, as that of `loss.backward()` does."""
    return bool(torch._C._will_engine_execute_node(_END))


class Tap(Protocol):
    """Receives the inputs and gradients of one module."""

    def counts(self) -> bool:
        """Return True if the running backward pass belongs to the gradient that is measured."""
        ...

    def keep(self, x: torch.Tensor) -> Any:
        """Return the part of the inputs to keep until the backward pass."""
        ...

    def see(self, kept: Any, delta: torch.Tensor) -> None:
        """Take the gradient of the outputs, with what was kept of the inputs."""
        ...

    def see_inner(self, x: torch.Tensor, delta: torch.Tensor) -> None:
        """Take one term ``delta x^T`` that an inner backward pass adds to the weight's gradient."""
        ...


def tapped(x: torch.Tensor, y: torch.Tensor, tap: Tap) -> torch.Tensor:
    """Return the outputs `y` of a module with inputs `x`, with a tap: they are to be used in place of `y`."""
    watched: torch.Tensor = _Outputs.apply(x, y, _ANCHOR, tap)
    return watched


class _Like(NamedTuple):
    """Shape, type and place of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Like:
        return cls(tensor.shape, tensor.dtype, tensor.device)

    def zeros(self) -> torch.Tensor:
        """Return zeros that take the memory of one."""
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)


class _Outputs(torch.autograd.Function):  # type: ignore[misc]  # torch leaves it untyped
    """The outputs of a module, unchanged."""

    @staticmethod
    def forward(x: torch.Tensor, y: torch.Tensor, anchor: torch.Tensor, tap: Tap) -> torch.Tensor:
        del x, anchor, tap
        # Not a view of y: later operations may change the result in place.
        return y.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        del output
        x, _, _, tap = inputs
        ctx.tap, ctx.kept, ctx.x = tap, tap.keep(x), _Like.of(x)

    @staticmethod
    def backward(ctx: Any, delta: torch.Tensor) -> tuple[Any, ...]:
        if ctx.tap.counts():
            ctx.tap.see(ctx.kept, delta)
        applied = None
        if torch.is_grad_enabled() and ctx.needs_input_grad[0]:
            applied = _Application.apply(delta, _ANCHOR, ctx.tap, ctx.x, True)
        return applied, delta, None, None

    @staticmethod
    def jvp(ctx: Any, x: Any, y: Any, *_: Any) -> Any:
        return y if x is None or y is None else tapped(x, y, ctx.tap)

    @staticmethod
    def vmap(
        info: Any, places: tuple[Any, ...], x: torch.Tensor, y: torch.Tensor, anchor: torch.Tensor, tap: Tap
    ) -> tuple[torch.Tensor, int]:
        x, y = _batched(info, places[0], x), _batched(info, places[1], y)
        return _Outputs.apply(x, y, anchor, tap), 0


class _Application(torch.autograd.Function):  # type: ignore[misc]  # torch leaves it untyped
    """An application of the weight of zeros, ``W x`` or ``W^T delta``, within a backward pass."""

    @staticmethod
    def forward(
        given: torch.Tensor, anchor: torch.Tensor, tap: Tap, result: _Like, is_adjoint: bool
    ) -> torch.Tensor:
        del given, anchor, tap, is_adjoint
        return result.zeros()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        del output
        given, _, ctx.tap, _, ctx.is_adjoint = inputs
        ctx.given = _Like.of(given)
        ctx.save_for_backward(given)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        if ctx.tap.counts():
            (given,) = ctx.saved_tensors
            ctx.tap.see_inner(*((gradient, given) if ctx.is_adjoint else (given, gradient)))
        applied = None
        if torch.is_grad_enabled() and ctx.needs_input_grad[0]:
            applied = _Application.apply(gradient, _ANCHOR, ctx.tap, ctx.given, not ctx.is_adjoint)
        return applied, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, given: Any, *_: Any) -> Any:
        raise NotImplementedError("forward-mode derivatives of a backward pass are not followed")

    @staticmethod
    def vmap(
        info: Any,
        places: tuple[Any, ...],
        given: torch.Tensor,
        anchor: torch.Tensor,
        tap: Tap,
        result: _Like,
        is_adjoint: bool,
    ) -> tuple[torch.Tensor, int]:
        whole = result._replace(shape=torch.Size([info.batch_size, *result.shape]))
        return _Application.apply(_batched(info, places[0], given), anchor, tap, whole, is_adjoint), 0


def _batched(info: Any, place: int | None, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with the batch first, repeated where it has no batch."""
    return tensor.expand(info.batch_size, *tensor.shape) if place is None else tensor.movedim(place, 0)
