"""Autograd functions that observe every use of a frozen weight, including uses in gradients of gradients.

A linear layer or convolution computes ``y = W x``. Its backward pass computes ``W^T delta``. If the loss
contains a gradient, the backward pass of that backward pass computes ``W v``, where `v` is the gradient of
the inner result. Each of these applications of `W` adds a term to the gradient of `W`: ``delta x^T`` for
the first, ``delta v^T`` for the second.

The functions here act as a second weight of zeros that is added to `W`: they change no value, and autograd
passes them exactly the pairs whose products sum to the gradient of `W`, at every order.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.graph import get_gradient_edge

with torch.inference_mode(False), torch.enable_grad():
    _ANCHOR = torch.zeros((), requires_grad=True)
    """A leaf that requires a gradient but gets none, so that outputs require one in a frozen model."""
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
        """Receive the gradient of the outputs, and the kept part of the inputs."""
        ...

    def see_inner(self, x: torch.Tensor, delta: torch.Tensor) -> None:
        """Receive a term ``delta x^T`` that an inner backward pass adds to the weight's gradient."""
        ...


def tapped(x: torch.Tensor, y: torch.Tensor, tap: Tap) -> torch.Tensor:
    """Put a tap on the outputs `y` of a module with inputs `x`; return outputs to use in place of `y`."""
    watched: torch.Tensor = _Outputs.apply(x, y, _ANCHOR, tap)
    return watched


class _Like(NamedTuple):
    """Shape, element type and device of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Like:
        return cls(tensor.shape, tensor.dtype, tensor.device)

    def zeros(self) -> torch.Tensor:
        """Return zeros of this shape in the memory of one element."""
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)


class _Outputs(torch.autograd.Function):  # type: ignore[misc]  # torch leaves it untyped
    """The identity of a module's outputs, with a tap in the backward pass."""

    @staticmethod
    def forward(x: torch.Tensor, y: torch.Tensor, anchor: torch.Tensor, tap: Tap) -> torch.Tensor:
        del x, anchor, tap
        # The result is detached, not a view of y, because later operations may change the result in place.
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
        raise NotImplementedError("forward-mode derivatives of a backward pass are not supported")

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
    """Return the tensor with the batch dimension first, repeated if it has no batch dimension."""
    return tensor.expand(info.batch_size, *tensor.shape) if place is None else tensor.movedim(place, 0)
