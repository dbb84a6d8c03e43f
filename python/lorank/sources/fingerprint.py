"""Fingerprints of checkpoints, by which an interrupted run is resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path


def fingerprint(files: Sequence[tuple[Path, int, int]], tensors: Sequence[tuple[str, str, list[int]]]) -> str:
    """Return a digest of a checkpoint's headers and of each file's name, size and modification time."""
    digest = hashlib.sha256()
    for file, size, modified in files:
        digest.update(f"{file.name} {size} {modified}\n".encode("utf-8", "surrogateescape"))
    for name, dtype, shape in tensors:
        digest.update(f"{name} {dtype} {shape}\n".encode())
    return digest.hexdigest()
