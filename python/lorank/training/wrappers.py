"""Wrappers around a live model, and checks for wrappers that prevent changes of ranks.

A module has no reference to its wrappers; they are therefore looked up among all objects in memory. Training
with an overlooked wrapper would raise no error, but would not call hooks or exchange gradients.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DataParallel, DistributedDataParallel


def check_not_compiled(model: Any) -> None:
    """Check that neither the model, nor a part of it, nor a model around it is compiled.

    Compiled code is specialised to shapes, and does not call hooks that were added after compilation.

    Raises
    ------
    NotImplementedError
        If `torch.compile` or `Module.compile` was called.
    """
    in_place = [
        path or "the model"
        for path, module in model.named_modules()
        if getattr(module, "_compiled_call_impl", None) is not None
    ]
    if in_place:
        raise _compiled(f"{in_place[0]} is compiled (Module.compile)")
    if _shares_modules(model, _compiled_modules()):
        gc.collect()  # Compiled models without references do not count.
        if _shares_modules(model, _compiled_modules()):
            raise _compiled("the model, or a part of it, is wrapped in OptimizedModule (torch.compile)")


def check_one_device_a_process(model: Any) -> None:
    """Check that the model is not copied to several devices for each batch: copies would share its hooks.

    Raises
    ------
    NotImplementedError
        If the model is wrapped in DataParallel over more than one device.
    """
    if any(len(wrapper.device_ids) > 1 for wrapper in _wrappers_around(model, DataParallel)):
        raise NotImplementedError(
            "the model is wrapped in DataParallel over several devices, and gradients of its copies there "
            "cannot be observed: train with one process per device (torchrun), or on one device "
            "(CUDA_VISIBLE_DEVICES=0)"
        )


def data_parallel_wrappers(model: Any) -> list[Any]:
    """Return the wrappers that exchange the model's gradients between processes.

    Raises
    ------
    NotImplementedError
        If a wrapper depends on the shapes of parameters.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    wrappers = _wrappers_around(model, DistributedDataParallel)
    for wrapper in wrappers:
        if wrapper._comm_hooks or wrapper.static_graph:
            raise NotImplementedError(
                "the model is wrapped in DistributedDataParallel with a communication hook or a static "
                "graph, which depend on the shapes of parameters: ranks cannot be changed under it"
            )
    return wrappers


def _wrappers_around(model: Any, kind: type[Any]) -> list[Any]:
    """Return the wrappers of a kind that share a parameter with the model."""
    own = {id(parameter) for parameter in model.parameters()}
    # Classes come from type(): isinstance() would evaluate `__class__` of proxies.
    found = [candidate for candidate in gc.get_objects() if issubclass(type(candidate), kind)]
    return [wrapper for wrapper in found if any(id(p) in own for p in wrapper.parameters())]


def _compiled_modules() -> list[Any]:
    """Return the modules in memory that `torch.compile` has compiled."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is None:
        return []
    wrappers = [candidate for candidate in gc.get_objects() if type(candidate) is compiler.OptimizedModule]
    return [wrapper._orig_mod for wrapper in wrappers]


def _shares_modules(model: Any, others: Iterable[Any]) -> bool:
    """Return True if a module of the model is a module of another model."""
    own = {id(module) for module in model.modules()}
    return any(id(module) in own for other in others for module in other.modules())


def _compiled(what: str) -> NotImplementedError:
    """Return the error for a compiled model."""
    return NotImplementedError(
        f"{what}: compiled code is specialised to shapes, so that ranks cannot change. Train without "
        "compilation, or use profile_gradients and static ranks"
    )
