"""The state of dynamic rank allocation, in a dictionary and in a file within a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from lorank._core import FormatError
from lorank._internal.atomic import atomic_path
from lorank._internal.json_fields import Fields
from lorank._internal.json_files import parse_json

STATE_FILE = "lorank_gard.safetensors"

# Key of the header in the metadata of the file.
_HEADER = "lorank.gard"


@dataclass(frozen=True, slots=True, eq=False)
class GardState:
    """Counters, averages and open window of dynamic rank allocation, for a resumed training.

    Attributes
    ----------
    step
        Number of steps done.
    ranks
        Rank of each module that can change.
    budget
        Largest number of parameters of the adapter.
    sketch
        Size of the random projections; None for exact gradients.
    smoothed
        Effective rank of each module, averaged over windows.
    sketches
        A sketch of each module, for each step of an open window.
    """

    step: int
    ranks: dict[str, int]
    budget: int
    sketch: int | None
    smoothed: dict[str, float]
    sketches: list[list[torch.Tensor]]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> GardState:
        """Make a state from the result of `to_dict`.

        Raises
        ------
        FormatError
            If a field is missing or malformed.
        """
        try:
            fields = Fields(dict(content))
            ranks, smoothed = fields.object("ranks"), fields.object("smoothed")
            return cls(
                step=fields.integer("step"),
                ranks={name: ranks.integer(name) for name in ranks},
                budget=fields.integer("budget"),
                sketch=fields.optional_integer("sketch", 1),
                smoothed={name: smoothed.number(name, 0) for name in smoothed},
                sketches=_sketches(fields.value("sketches")),
            )
        except (ValueError, TypeError) as error:
            raise FormatError(f"damaged: {error}") from error


def _sketches(content: Any) -> list[list[torch.Tensor]]:
    """Return checked sketches.

    Raises
    ------
    TypeError, ValueError
        If the content is not lists of floating-point tensors.
    """
    sketches = [[torch.as_tensor(sketch) for sketch in step] for step in content]
    if not all(sketch.is_floating_point() for step in sketches for sketch in step):
        raise ValueError("the sketches are not floating-point tensors")
    return sketches


def write_state(content: Mapping[str, Any], path: Path) -> None:
    """Write the result of `GardState.to_dict`: sketches as tensors ``STEP.MODULE``, the rest as a header."""
    tensors = {
        f"{step}.{index}": sketch.contiguous()
        for step, sketches in enumerate(content["sketches"])
        for index, sketch in enumerate(sketches)
    }
    header = {**content, "sketches": [len(sketches) for sketches in content["sketches"]]}
    # A safetensors file holds at least one tensor. `save_file` would not name the file of a full disk.
    stored = save(tensors or {"none": torch.zeros(1)}, {_HEADER: json.dumps(header)})
    with atomic_path(path) as temporary:
        temporary.write_bytes(stored)


def read_state(path: Path) -> dict[str, Any]:
    """Read the dictionary that `write_state` wrote to a file.

    Raises
    ------
    FormatError
        If the file is malformed or a tensor is missing.
    OSError
        If the file cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            header = Fields(parse_json((file.metadata() or {}).get(_HEADER, "")))
            sketches = [
                [file.get_tensor(f"{step}.{index}") for index in range(count)]
                for step, count in enumerate(header.integers("sketches"))
            ]
            return {**{key: header.value(key) for key in header}, "sketches": sketches}
    except OSError:
        raise
    except Exception as error:  # safetensors raises an exception type of its own, derived from Exception.
        raise FormatError(str(error)) from error
