"""Changes of rank under DistributedDataParallel: one result for all processes, and a new reducer."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lorank.training.optimizer_state import FactorChange


def wrappers_of(model: Any) -> list[Any]:
    """The wrappers by which processes share the model's gradients."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    ours = {id(parameter) for parameter in model.parameters()}
    # Nothing leads from a module to its wrapper. One that is missed would silently stop to exchange the
    # gradients of the factors that change.
    wrappers = [found for found in gc.get_objects() if issubclass(type(found), DistributedDataParallel)]
    wrappers = [found for found in wrappers if any(id(p) in ours for p in found.parameters())]
    for wrapper in wrappers:
        if wrapper._comm_hooks or wrapper.static_graph:
            raise NotImplementedError(
                "the model is wrapped in DistributedDataParallel with a communication hook or a static "
                "graph, which remember shapes: ranks cannot be changed under it"
            )
    return wrappers


def agree(factor: FactorChange, wrappers: Sequence[Any]) -> None:
    """Take the first process's numbers: decompositions may differ in the last bits or in signs."""
    for wrapper in wrappers:
        first = dist.get_global_rank(wrapper.process_group, 0)
        for tensor in (factor.values, factor.of_values, factor.of_gradients):
            if tensor is not None:
                dist.broadcast(tensor, first, wrapper.process_group)


def rebuild_reducer(wrapper: Any) -> None:
    """Let the wrapper see the new shapes, in the way in which it is unpickled."""
    parameters, is_sparse = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._ddp_init_helper(parameters, is_sparse, names, wrapper.static_graph)
