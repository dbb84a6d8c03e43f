"""Inputs and output gradients of modules, while somebody else runs the model.

The gradient of a frozen weight is never computed by autograd, but it is ``G = sum delta x^T`` over the
tokens: all that is needed passes through the module. A forward hook sees `x` and puts a hook on the
module's output, which sees `delta` when the backward pass comes by. So every backward pass counts once,
also under gradient checkpointing, where forward passes run twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.nn.functional import pad, unfold

from lorank.profiling.targets import Target


class Observer(Protocol):
    """Who wants to know."""

    def see_input(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What to keep of the inputs ``(tokens, in)`` of the `index`-th module until the backward pass."""

    def see_gradient(self, index: int, kept: torch.Tensor, delta: torch.Tensor) -> None:
        """Take the output gradients ``(tokens, out)``, with what was kept."""


@contextmanager
def probing(targets: Sequence[Target], observer: Observer) -> Iterator[None]:
    """Let an observer see all passes through the targets' modules within the block."""
    handles = [
        target.module.register_forward_hook(_forward_hook(index, target, observer), with_kwargs=True)
        for index, target in enumerate(targets)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forward_hook(index: int, target: Target, observer: Observer) -> Callable[..., Any]:
    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        x = args[0] if args else kwargs["input"]
        seen = output
        if not output.requires_grad:
            # Nothing before it is trained. The copy may be changed in place, which a leaf may not.
            seen = output.detach().requires_grad_().clone()
        kept = _apart(output, lambda: observer.see_input(index, rows_in(target, x.detach())))

        def see(gradient: torch.Tensor) -> None:
            _apart(gradient, lambda: observer.see_gradient(index, kept, rows_out(target, gradient)))

        seen.register_hook(see)
        return None if seen is output else seen

    return hook


def _apart(tensor: torch.Tensor, work: Callable[[], Any]) -> Any:
    """Do work that autograd does not record and autocast does not narrow."""
    with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
        return work()


def rows_in(target: Target, x: torch.Tensor) -> torch.Tensor:
    """Inputs as ``(tokens, in)``: for a convolution, a row per position of the kernel."""
    if not target.kernel:
        return x.reshape(-1, x.shape[-1])
    layer = target.module
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    # By the layer's own list: what is one-sided, as under "same", is so here.
    padded = pad(_batched(x).float(), layer._reversed_padding_repeated_twice, mode)
    patches = unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def rows_out(target: Target, gradient: torch.Tensor) -> torch.Tensor:
    """Output gradients as ``(tokens, out)``."""
    if not target.kernel:
        return gradient.reshape(-1, gradient.shape[-1])
    pixels = _batched(gradient).flatten(2)
    return pixels.transpose(1, 2).reshape(-1, pixels.shape[1])


def _batched(image: torch.Tensor) -> torch.Tensor:
    return image if image.ndim == 4 else image[None]
