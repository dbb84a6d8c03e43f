"""Forward and backward passes that leave a model unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lorank._internal.progress import progress_bar
from lorank.profiling.checkpointing import trainable_checkpoints
from lorank.profiling.probe import Probe
from lorank.sources import offloaded

Loss = Callable[[Any, Any], Any]


def checked_model(model: Any) -> Any:
    """Return the model without the wrappers of compilers and data parallelism.

    Compiled code does not call hooks that were added after compilation, and copies of the model on other
    devices would share its hooks.

    Raises
    ------
    TypeError
        If the model is not a torch module.
    ValueError
        In the cases of `check_weights`.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}: load it first")
    check_weights(model)
    return _unwrapped(model)


def _unwrapped(model: Any) -> Any:
    """Return the model within any wrappers."""
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return _unwrapped(model.module)
    return _unwrapped(model._orig_mod) if hasattr(model, "_orig_mod") else model


def check_weights(model: Any) -> None:
    """Raise ValueError for weights on the meta device, or made in inference mode."""
    # Offloaded weights are on the meta device between calls.
    elsewhere = offloaded.loaders(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta and id(parameter) not in elsewhere:
            raise ValueError(f"{name} is on the meta device: load the model's weights first")
        if parameter.is_inference():
            raise ValueError(
                f"{name} was made under torch.inference_mode(), which excludes it from autograd: build or "
                "load the model outside of inference mode"
            )


def check_batches(batches: Any) -> None:
    """Raise TypeError if `batches` is a single batch or not iterable."""
    if not isinstance(batches, Iterable) or isinstance(batches, (Mapping, torch.Tensor, str)):
        what = type(batches).__name__
        raise TypeError(f"batches must be an iterable of batches, not {what}: put a single batch in a list")


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Freeze all parameters within the context; restore `requires_grad` and running means afterwards."""
    before = [
        (module, name, parameter.requires_grad)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    buffers = [(buffer, buffer.clone()) for module in norms for buffer in module.buffers(recurse=False)]
    try:
        for module, name, _ in before:
            module.get_parameter(name).requires_grad_(False)
        yield
    finally:
        # Parameters are looked up by name, because Accelerate replaces those that it offloads.
        for module, name, required in before:
            module.get_parameter(name).requires_grad_(required)
        for buffer, value in buffers:
            buffer.copy_(value)


def backward_passes(
    model: Any,
    batches: Iterable[Any],
    probe: Probe,
    *,
    loss: Loss | None,
    max_batches: int | None,
    progress: bool,
) -> Iterator[int]:
    """Run a forward and a backward pass for each batch, and yield the number of batches so far.

    The probe counts the backward pass of the loss, but not the backward passes within the loss.

    Raises
    ------
    ValueError
        If there is no batch, or a loss is missing, not a scalar, or not finite.
    """
    total = len(batches) if isinstance(batches, Sized) else max_batches
    total = total if max_batches is None or total is None else min(total, max_batches)
    count = 0
    probe.is_counting = False
    with progress_bar("profiling", total or 0, enabled=progress and total is not None) as report:
        for count, batch in enumerate(islice(batches, max_batches), 1):
            # The caller may have switched autograd off.
            with torch.inference_mode(False), torch.enable_grad(), trainable_checkpoints():
                value = _checked_loss(model, batch, loss, count - 1)
                if not isinstance(value, torch.Tensor) or value.ndim or not value.requires_grad:
                    raise ValueError(
                        f"batch {count - 1}: the loss must be a number that depends on the model"
                    )
                if not torch.isfinite(value):
                    raise ValueError(f"batch {count - 1}: the loss is {value.item()}")
                with probe.counting():
                    value.backward()
            report(1, f"loss {value.item():.4g}")
            del value  # Frees the tensors that hooks keep for this batch, before the next one.
            yield count
    if not count:
        raise ValueError("no batches: profiling needs at least one")


def _checked_loss(model: Any, batch: Any, loss: Loss | None, index: int) -> torch.Tensor:
    """Return the loss of a batch; raise ValueError if it differentiates with respect to frozen parameters."""
    try:
        return loss_of(model, batch, loss)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise ValueError(
            f"batch {index}: the loss differentiates with respect to the model's parameters, which are "
            f"frozen while profiling, or to a tensor that requires no gradient ({error})"
        ) from error


def loss_of(model: Any, batch: Any, loss: Loss | None) -> torch.Tensor:
    """Compute the loss of a batch on the model's device, by the caller's function or the model itself.

    Raises
    ------
    ValueError
        If the model returns no loss.
    """
    batch = _moved(batch, model)
    if loss is not None:
        value = loss(model, batch)
    elif isinstance(batch, Mapping):
        value = getattr(model(**batch), "loss", None)
    else:
        raise ValueError(f"a batch has type {type(batch).__name__}, not a mapping: give loss=f(model, batch)")
    if value is None:
        raise ValueError(
            "the model returned no loss: put labels into the batches, or pass loss=f(model, batch)"
        )
    found: torch.Tensor = value
    return found


def _moved(batch: Any, model: Any) -> Any:
    """Move a batch to the model's device, detached from the caller's graphs and `.grad`."""
    device = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), None)
    if isinstance(batch, Mapping):
        return {key: _moved_value(value, device) for key, value in batch.items()}
    return _moved_value(batch, device) if isinstance(batch, torch.Tensor) else batch


def _moved_value(value: Any, device: torch.device | None) -> Any:
    moved = value.to(device) if device is not None and hasattr(value, "to") else value
    if not isinstance(moved, torch.Tensor):
        return moved
    if moved.is_inference():
        return moved.clone()
    # The result is detached: the caller's tensor gets no `.grad`, and backward passes do not free its graph.
    return moved.detach().requires_grad_() if moved.requires_grad else moved
