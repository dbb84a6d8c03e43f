"""What is wrapped around a live model, and which of it cannot live with ranks that change.

Nothing leads from a module to its wrappers: they are found among all living objects. One that is missed
would silently train on, with hooks that it does not call and gradients that it does not exchange.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DataParallel, DistributedDataParallel


def check_not_compiled(model: Any) -> None:
    """Refuse a model of which a part, or which as a part of another, is compiled.

    Compiled code remembers shapes, and passes hooks by that came after it was made.

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
        gc.collect()  # One that nobody uses any more does no harm.
        if _shares_modules(model, _compiled_modules()):
            raise _compiled("the model, or a part of it, is wrapped in OptimizedModule (torch.compile)")


def check_one_device_a_process(model: Any) -> None:
    """Refuse a model that is copied to several devices for every batch: the copies would share its hooks.

    Raises
    ------
    NotImplementedError
        If it is wrapped in DataParallel over more than one device.
    """
    if any(len(wrapper.device_ids) > 1 for wrapper in _around(model, DataParallel)):
        raise NotImplementedError(
            "the model is wrapped in DataParallel over several devices, and its copies there cannot be "
            "watched: train with one process per device (torchrun), or on one (CUDA_VISIBLE_DEVICES=0)"
        )


def data_parallel_wrappers(model: Any) -> list[Any]:
    """The wrappers by which processes share the model's gradients.

    Raises
    ------
    NotImplementedError
        If one of them remembers shapes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    wrappers = _around(model, DistributedDataParallel)
    for wrapper in wrappers:
        if wrapper._comm_hooks or wrapper.static_graph:
            raise NotImplementedError(
                "the model is wrapped in DistributedDataParallel with a communication hook or a static "
                "graph, which remember shapes: ranks cannot be changed under it"
            )
    return wrappers


def _around(model: Any, kind: type[Any]) -> list[Any]:
    ours = {id(parameter) for parameter in model.parameters()}
    found = [one for one in gc.get_objects() if issubclass(type(one), kind)]
    return [wrapper for wrapper in found if any(id(p) in ours for p in wrapper.parameters())]


def _compiled_modules() -> list[Any]:
    """What `torch.compile` made of modules and still lives."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is None:
        return []
    return [one._orig_mod for one in gc.get_objects() if type(one) is compiler.OptimizedModule]


def _shares_modules(model: Any, others: Iterable[Any]) -> bool:
    ours = {id(module) for module in model.modules()}
    return any(id(module) in ours for other in others for module in other.modules())


def _compiled(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{what}, which remembers shapes: ranks cannot be changed under it. Train without it, or use "
        "profile_gradients and static ranks"
    )
