"""Wrappers of modules: their names in an adapter's keys, and the keys without these names.

`torch.compile`, FSDP, activation checkpointing, DeepSpeed and data parallelism each put a module around
the model or around its blocks. The keys of a state dict that is saved from the wrapped model contain the
wrapper's attribute; a model without the wrapper has no such keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lorank._core import FormatError, Matrix
from lorank.adapters.stored import Stored
from lorank.adapters.tensors import Tensors
from lorank.peft_format.names import PREFIX

ANYWHERE = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
)
"""Attributes of `torch.compile`, FSDP, checkpointing and DeepSpeed; models have no modules of these names."""

AT_THE_FRONT = "module"
"""The attribute of data parallelism. Models have modules of this name too, so only the front is removed."""


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """The keys of a file without the names of wrappers.

    Attributes
    ----------
    tensors
        The file's tensors under the names without wrappers.
    wrappers
        Names of the removed wrappers, in the order of `ANYWHERE`.
    stored_as
        Key without wrappers -> the file's key, for keys that held a wrapper's name.
    """

    tensors: Tensors
    wrappers: tuple[str, ...]
    stored_as: Mapping[str, str]

    @classmethod
    def of(cls, tensors: Tensors, targets: Any = None) -> Unwrapped:
        """Remove the names of wrappers from a file's keys.

        Parameters
        ----------
        tensors
            The file's tensors.
        targets
            The settings' `target_modules`, which show whether the model itself has a module `module`.

        Raises
        ------
        FormatError
            If two keys are the same without wrappers.
        """
        keys = list(tensors.shapes())
        front = _front(keys, targets)
        clean: dict[str, str] = {}
        for key in keys:
            name = _without(key, front)
            if name in clean:
                raise FormatError(
                    f"{tensors.label}: tensors {clean[name]!r} and {key!r} define the same parameter"
                )
            clean[name] = key
        stored_as = {name: key for name, key in clean.items() if name != key}
        if not stored_as:
            return cls(tensors, (), {})
        found = {part for key in stored_as.values() for part in key.split(".")}
        wrappers = tuple(name for name in ANYWHERE if name in found) + ((AT_THE_FRONT,) if front else ())
        return cls(Renamed(tensors, clean), wrappers, stored_as)

    def note(self) -> str:
        """Return a note with the removed names and the number of changed keys."""
        names = ", ".join(self.wrappers)
        return (
            f"{len(self.stored_as)} keys held the names of wrappers ({names}), which were removed: "
            "runtimes do not find such keys in the model"
        )


def _front(keys: Iterable[str], targets: Any) -> bool:
    """Return True if every key has the wrapper of data parallelism at the front of the model's name."""
    front = f"{AT_THE_FRONT}."
    if isinstance(targets, (list, tuple)) and any(str(target).startswith(front) for target in targets):
        return False
    names = [_without(key) for key in keys]
    return all(name.startswith(front) or name.removeprefix(PREFIX).startswith(front) for name in names)


def _without(key: str, front: bool = False) -> str:
    """Remove the names of wrappers from a key; with `front`, also the name of data parallelism."""
    name = ".".join(part for part in key.split(".") if part not in ANYWHERE)
    if not front:
        return name
    name = _without_front(name)
    bare = name.removeprefix(PREFIX)
    return name if bare == name else PREFIX + _without_front(bare)


def _without_front(name: str) -> str:
    while name.startswith(f"{AT_THE_FRONT}."):
        name = name.removeprefix(f"{AT_THE_FRONT}.")
    return name


class Renamed:
    """Tensors under other names."""

    def __init__(self, tensors: Tensors, keys: Mapping[str, str]) -> None:
        self.label = tensors.label
        self.metadata = tensors.metadata
        self._tensors = tensors
        self._keys = keys
        shapes = tensors.shapes()
        self._shapes = {name: shapes[key] for name, key in keys.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name, in order."""
        return self._shapes

    def dtype(self, name: str) -> str:
        """Return a tensor's element type by NumPy's name."""
        return self._tensors.dtype(self._keys[name])

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        """Return a tensor as a row-major matrix."""
        return self._tensors.matrix(self._keys[name], rows, cols)

    def number(self, name: str) -> float:
        """Return the only element of a tensor of any numeric type."""
        return self._tensors.number(self._keys[name])

    def stored(self, name: str) -> Stored:
        """Return a tensor for a writer that does not read its values."""
        return self._tensors.stored(self._keys[name])

    def digest(self, seed: bytes, threads: int) -> str:
        """Return a digest of the tensors, under the names of the file, and of `seed`."""
        return self._tensors.digest(seed, threads)
