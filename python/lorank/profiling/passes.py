"""Forward and backward passes that leave a model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase

from lorank.progress import progress_bar

Loss = Callable[[Any, Any], Any]


def checked_model(model: Any) -> Any:
    """The model to run: without a compiler's wrapper, which does not see hooks that come later.

    Raises
    ------
    TypeError
        If it is no torch module.
    ValueError
        As `check_weights`.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}: load it first")
    check_weights(model)
    return getattr(model, "_orig_mod", model)


def check_weights(model: Any) -> None:
    """Raise ValueError for weights without values, or that autograd does not follow."""
    for path, module in model.named_modules():
        # What Accelerate has offloaded has values while it is called.
        is_offloaded = hasattr(module, "_hf_hook")
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.is_meta and not is_offloaded:
                raise ValueError(f"{name} is on the meta device: load the model's weights first")
            if parameter.is_inference():
                raise ValueError(
                    f"{name} was made under torch.inference_mode(), where autograd follows nothing: build or "
                    "load the model outside of it"
                )


def check_batches(batches: Any) -> None:
    """Raise TypeError for what cannot be one batch after the other, a single batch for one."""
    if not isinstance(batches, Iterable) or isinstance(batches, (Mapping, torch.Tensor, str)):
        what = type(batches).__name__
        raise TypeError(f"batches must be an iterable of batches, not {what}: put a single batch in a list")


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No parameter takes a gradient within the block; afterwards all is as it was, running means too."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    buffers = [(buffer, buffer.clone()) for module in norms for buffer in module.buffers(recurse=False)]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
        for buffer, value in buffers:
            buffer.copy_(value)


@contextmanager
def trainable_inputs(model: Any) -> Iterator[None]:
    """Embeddings whose outputs ask for gradients, where checkpointed blocks would otherwise get none."""
    embeddings = _embeddings(model) if _checkpoints(model) else None
    if embeddings is None:
        yield
        return
    handle = embeddings.register_forward_hook(lambda _module, _args, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()


def _embeddings(model: Any) -> Any:
    """What the model's inputs pass first, None if it does not say: other inputs may ask themselves."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _checkpoints(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def backward_passes(
    model: Any, batches: Iterable[Any], *, loss: Loss | None, max_batches: int | None, progress: bool
) -> Iterator[int]:
    """Run forward and backward, and yield the number of batches so far after each.

    Raises
    ------
    ValueError
        If there is no batch, a loss is missing, no scalar, or not finite.
    """
    total = len(batches) if isinstance(batches, Sized) else max_batches
    total = total if max_batches is None or total is None else min(total, max_batches)
    count = 0
    with progress_bar("profiling", total or 0, enabled=progress and total is not None) as report:
        for count, batch in enumerate(islice(batches, max_batches), 1):
            # Whatever the caller has switched off.
            with torch.inference_mode(False), torch.enable_grad():
                value = loss_of(model, _moved(batch, model), loss)
                if not isinstance(value, torch.Tensor) or value.ndim or not value.requires_grad:
                    raise ValueError(
                        f"batch {count - 1}: the loss must be a number that depends on the model"
                    )
                if not torch.isfinite(value):
                    raise ValueError(f"batch {count - 1}: the loss is {value.item()}")
                value.backward()
            report(1, f"loss {value.item():.4g}")
            yield count
    if not count:
        raise ValueError("no batches: profiling needs at least one")


def loss_of(model: Any, batch: Any, loss: Loss | None) -> torch.Tensor:
    """The loss of a batch: the model's own, or what the caller's function says.

    Raises
    ------
    ValueError
        If the model returns none.
    """
    if loss is not None:
        value = loss(model, batch)
    elif isinstance(batch, Mapping):
        value = getattr(model(**batch), "loss", None)
    else:
        raise ValueError(f"a batch is a {type(batch).__name__}, no mapping: give loss=f(model, batch)")
    if value is None:
        raise ValueError(
            "the model returned no loss: put labels into the batches, or give loss=f(model, batch)"
        )
    found: torch.Tensor = value
    return found


def _moved(batch: Any, model: Any) -> Any:
    """The batch on the model's device, in tensors that autograd may keep."""
    device = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), None)
    if isinstance(batch, torch.Tensor):
        return batch.clone() if batch.is_inference() else batch
    if device is None or not isinstance(batch, Mapping):
        return batch
    moved = {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
    return {
        key: value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value
        for key, value in moved.items()
    }
