"""Changes of rank under DistributedDataParallel: one result for all processes, and a new reducer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from lorank.training.optimizer_state import FactorChange


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
