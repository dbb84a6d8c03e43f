"""What torch tensors hold at this moment: for tests of memory that no allocator's noise disturbs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def only_new_tensors() -> Iterator[None]:
    """Within the block, `live_numbers` does not see what was there before, garbage included."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def live_numbers() -> int:
    """Float32 numbers in all tensors that Python knows of, shared storage once."""
    found = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    plain = [tensor for tensor in found if tensor.layout == torch.strided and not tensor.is_meta]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in plain}
    return sum(storages.values()) // 4
