"""Keeps the processes of `torch.distributed` equal when ranks change, and rebuilds the gradient reducer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from lorank.training.optimizer_state import FactorChange


def averaged(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the mean of each tensor over all processes, on the tensor's device."""
    if not _is_distributed():
        return list(tensors)
    device = tensors[0].device
    flat = torch.cat([tensor.flatten().to(device) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor).to(tensor.device) for part, tensor in zip(parts, tensors, strict=True)]


def first_process_values(values: Sequence[float], device: Any) -> list[float]:
    """Return the first process's values in every process; each process's own may differ in the last bits."""
    if not _is_distributed():
        return list(values)
    shared = torch.tensor(values, dtype=torch.float64, device=device)
    dist.broadcast(shared, 0)
    return [float(value) for value in shared.tolist()]


def _is_distributed() -> bool:
    """Return True if several processes train together."""
    return bool(dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def broadcast_factor(factor: FactorChange, wrappers: Sequence[Any]) -> None:
    """Broadcast a factor's new tensors from the first process of each wrapper.

    Decompositions in different processes may differ in the last bits or in signs.
    """
    for wrapper in wrappers:
        first = dist.get_global_rank(wrapper.process_group, 0)
        for tensor in (factor.values, factor.value_coefficients, factor.gradient_coefficients):
            if tensor is not None:
                dist.broadcast(tensor, first, wrapper.process_group)


def rebuild_reducer(wrapper: Any) -> None:
    """Rebuild the gradient reducer of a DistributedDataParallel wrapper for the new shapes.

    The steps are those of `DistributedDataParallel.__setstate__`.
    """
    parameters, is_sparse = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._ddp_init_helper(parameters, is_sparse, names, wrapper.static_graph)
