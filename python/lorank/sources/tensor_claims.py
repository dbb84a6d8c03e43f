"""Compares the sizes that tensors of a file claim with the bytes that the file stores."""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from lorank.sources import arrays

# Largest total size of the different views of one storage, in multiples of the storage. Tied tensors count
# once. A fused weight, its parts and their transposes have three times the size of their storage.
_MOST_VIEWS = 16


def repeated(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Describe the tensors that claim more numbers than their storage holds, by name.

    Such tensors repeat numbers by strides of 0 or by overlapping rows, so that a small file may claim any
    size.
    """
    found = {}
    for name, tensor in _plain(tensors):
        claimed, stored = tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size()
        if claimed > stored:
            numbers = "one number" if stored == 1 else f"{stored:,} numbers"
            found[name] = f"repeats {numbers} to fill its shape {list(tensor.shape)}"
    return found


def excess(tensors: Mapping[str, Any], file_size: int) -> str | None:
    """Return the reason for refusing storages: they exceed the file or have too many views; None for neither.

    Tensors that `repeated` returns do not count.
    """
    storages: dict[tuple[int, int], int] = {}
    views: dict[tuple[int, int], dict[object, int]] = defaultdict(dict)
    for _, tensor in _plain(tensors):
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), storage.nbytes()
        storages[key] = storage.nbytes()
        claimed = tensor.numel() * tensor.element_size()
        if claimed <= storage.nbytes():
            views[key][arrays.identity(tensor)] = claimed
    if (stored := sum(storages.values())) > file_size:
        return f"its tensors claim {stored:,} bytes, and the file has {file_size:,}"
    for key, sizes in views.items():
        if (claimed := sum(sizes.values())) > _MOST_VIEWS * storages[key]:
            return f"{len(sizes):,} tensors claim {claimed:,} bytes of a storage of {storages[key]:,}"
    return None


def beyond_records(tensors: Mapping[str, Any], records: Mapping[int, int]) -> str | None:
    """Return the reason for refusing storages in a mapped archive that exceed their records; None without.

    Parameters
    ----------
    tensors
        The tensors of the archive, mapped into memory.
    records
        Size of each record by its offset in the file.
    """
    sizes = {storage.data_ptr(): storage.nbytes() for storage in _storages(tensors) if storage.nbytes()}
    if not sizes:
        return None
    first = min(sizes)
    starts = [first - offset for offset in records if (first - offset) % mmap.PAGESIZE == 0]
    for start in starts:
        if all(size <= records.get(place - start, -1) for place, size in sizes.items()):
            return None
    return "its tensors claim more bytes than its records hold"


def _storages(tensors: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the storage of every tensor of torch that has one."""
    for _, tensor in _plain(tensors):
        yield tensor.untyped_storage()


def _plain(tensors: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of torch that have a storage."""
    for name, value in tensors.items():
        if arrays.is_tensor(value) and arrays.is_dense(value) and value.device.type != "meta":
            yield name, value
