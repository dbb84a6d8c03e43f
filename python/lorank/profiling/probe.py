"""Inputs and output gradients of modules, observed while other code runs the model.

Autograd does not compute the gradient of a frozen weight, but the gradient is ``G = sum delta x^T`` over
tokens, with the inputs `x` and the output gradients `delta` of the module. A forward hook receives `x` and
puts a tap on the module's outputs; the tap receives `delta` during the backward pass. Each backward pass
therefore counts once, also under gradient checkpointing, which runs forward passes twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.nn.functional import pad, unfold

from lorank.profiling.taps import is_whole_pass, tapped
from lorank.profiling.targets import Target


class Observer(Protocol):
    """Receives inputs and output gradients of modules."""

    def see_input(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Return the part of a module's inputs ``(tokens, in)`` to keep until the backward pass."""

    def see_gradient(self, index: int, kept: torch.Tensor, delta: torch.Tensor) -> None:
        """Receive a module's output gradients ``(tokens, out)``, and the kept part of its inputs."""

    def see_inner(self, index: int, x: torch.Tensor, delta: torch.Tensor) -> None:
        """Receive the rows of a term ``delta^T x`` that a gradient within the loss adds to the gradient."""


class Probe:
    """The state of the hooks on a model: they count backward passes while `is_counting` is True."""

    def __init__(self) -> None:
        self.is_counting = True

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count backward passes within the block, and none after it."""
        self.is_counting = True
        try:
            yield
        finally:
            self.is_counting = False


@contextmanager
def probing(targets: Sequence[Target], observer: Observer) -> Iterator[Probe]:
    """Report all passes through the targets' modules to an observer, within the context.

    A backward pass counts if it computes the gradient of every leaf, as `loss.backward()` does. A backward
    pass for selected tensors, such as `torch.autograd.grad` for positions or pixels, does not count.
    """
    probe = Probe()
    handles = [
        target.module.register_forward_hook(_ModuleTap(probe, index, target, observer).hook, with_kwargs=True)
        for index, target in enumerate(targets)
    ]
    try:
        yield probe
    finally:
        for handle in handles:
            handle.remove()


class _ModuleTap:
    """A tap that passes the inputs and gradients of one module to the observer, as rows."""

    def __init__(self, probe: Probe, index: int, target: Target, observer: Observer) -> None:
        self._probe, self._index, self._target, self._observer = probe, index, target, observer

    def __deepcopy__(self, _memo: Any) -> _ModuleTap:
        return self

    def hook(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the outputs with a tap; None without autograd, and for copies of the module."""
        # Copies of a module share its hooks.
        if module is not self._target.module or not torch.is_grad_enabled():
            return None
        return tapped(args[0] if args else kwargs["input"], output, self)

    def counts(self) -> bool:
        return self._probe.is_counting and is_whole_pass()

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        kept: torch.Tensor = _without_autograd(
            x, lambda: self._observer.see_input(self._index, rows_in(self._target, x.detach()))
        )
        return kept

    def see(self, kept: torch.Tensor, delta: torch.Tensor) -> None:
        rows = rows_out(self._target, delta.detach())
        _without_autograd(delta, lambda: self._observer.see_gradient(self._index, kept, rows))

    def see_inner(self, x: torch.Tensor, delta: torch.Tensor) -> None:
        rows = rows_out(self._target, delta.detach())
        _without_autograd(
            delta, lambda: self._observer.see_inner(self._index, rows_in(self._target, x.detach()), rows)
        )


def _without_autograd(tensor: torch.Tensor, work: Callable[[], Any]) -> Any:
    """Run `work` without autograd, and without autocast to a lower precision."""
    with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
        return work()


def rows_in(target: Target, x: torch.Tensor) -> torch.Tensor:
    """Return inputs as ``(tokens, in)``; for a convolution, one row for each position of the kernel."""
    if not target.kernel:
        return x.reshape(-1, x.shape[-1])
    layer = target.module
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    # The layer's list of paddings by side, because padding="same" may pad one side more.
    padded = pad(_images(x).float(), layer._reversed_padding_repeated_twice, mode)
    patches = unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def rows_out(target: Target, gradient: torch.Tensor) -> torch.Tensor:
    """Return output gradients as ``(tokens, out)``."""
    if not target.kernel:
        return gradient.reshape(-1, gradient.shape[-1])
    pixels = _images(gradient).flatten(2)
    return pixels.transpose(1, 2).reshape(-1, pixels.shape[1])


def _images(tensor: torch.Tensor) -> torch.Tensor:
    """Return images as ``(count, channels, height, width)``, with leading dimensions joined."""
    return tensor.reshape(-1, *tensor.shape[-3:])
