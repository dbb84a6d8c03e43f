"""Gradients of weights, kept small: two-sided random projections, one sum per batch.

``P_out G P_in`` with entries of variance ``1/k`` keeps inner products of gradients in expectation, and
follows from projected inputs and projected output gradients: the gradient itself is never formed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from lorank.allocation.budget import is_integer
from lorank.profiling.targets import Target


def check_sketch(size: int | None) -> None:
    """Raise ValueError for a size of projections that is neither a positive integer nor None."""
    if size is not None and (not is_integer(size) or size < 1):
        raise ValueError(f"sketch must be a positive integer, or None for no sketch, not {size!r}")


class GradientSketches:
    """An observer that sums up, for every target, the gradient of one batch after the other.

    Parameters
    ----------
    targets
        The modules.
    size
        `k`, the projections' size. Sides that are no longer stay as they are, and without it all do.
    seed
        Of the projections, with the module's name.
    """

    def __init__(self, targets: Sequence[Target], size: int | None, seed: int = 0) -> None:
        check_sketch(size)
        self._targets = targets
        self.size = None if size is None else int(size)  # NumPy's integers are none that JSON knows.
        self._seed = seed
        self._projections: dict[tuple[int, str], torch.Tensor | None] = {}
        self._current: list[torch.Tensor | None] = [None] * len(targets)
        self._devices: dict[int, torch.device] = {}

    def see_input(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """``x P_in``, ``(tokens, k)``."""
        return self._projected(index, "in", x)

    def see_gradient(self, index: int, kept: torch.Tensor, delta: torch.Tensor) -> None:
        """Add ``P_out delta^T x P_in`` to the batch's sketch."""
        delta = self._projected(index, "out", delta)
        gradient = delta.T @ kept.to(delta.device)
        self._devices[index] = gradient.device
        current = self._current[index]
        self._current[index] = gradient if current is None else current.add_(gradient)

    def see_inner(self, index: int, x: torch.Tensor, delta: torch.Tensor) -> None:
        """Add ``P_out delta^T x P_in``: the gradient is the sum of all such terms."""
        self.see_gradient(index, self.see_input(index, x), delta)

    def take(self) -> list[torch.Tensor | None]:
        """The sketches of all that was seen since the last call, None where no gradient came by."""
        taken, self._current = self._current, [None] * len(self._targets)
        return taken

    def take_all(self) -> list[torch.Tensor]:
        """The same with zeros where no gradient came by: for sums over processes."""
        return [
            self._nothing(index) if sketch is None else sketch for index, sketch in enumerate(self.take())
        ]

    def shape(self, index: int) -> tuple[int, int]:
        """The shape of a module's sketch."""
        out, fan_in = self._targets[index].info.shape
        return (out, fan_in) if self.size is None else (min(out, self.size), min(fan_in, self.size))

    def device(self, index: int) -> torch.device:
        """Return the device of a module's sketch: that of its gradients, or of the module before any."""
        module = self._targets[index].module
        device: torch.device = module.weight.device
        is_offloaded = device.type == "meta" and hasattr(module, "_hf_hook")
        return self._devices.get(index, torch.device("cpu") if is_offloaded else device)

    def drop_projections(self) -> None:
        """Free them; they are drawn again, the same, when they are needed."""
        self._projections.clear()

    def _nothing(self, index: int) -> torch.Tensor:
        return torch.zeros(self.shape(index), device=self.device(index))

    def _projected(self, index: int, side: str, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.float()
        if (index, side) not in self._projections:
            self._projections[index, side] = self._projection(index, side, rows.shape[1])
        matrix = self._projections[index, side]
        if matrix is None:
            return rows
        if matrix.device != rows.device:
            matrix = self._projections[index, side] = matrix.to(rows.device)
        return rows @ matrix

    def _projection(self, index: int, side: str, length: int) -> torch.Tensor | None:
        """``(length, k)``, or None for the identity. Drawn on the CPU: the same on every device."""
        if self.size is None or self.size >= length:
            return None
        name = f"{self._seed}/{side}/{self._targets[index].info.name}"
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.randn(length, self.size, generator=generator) / self.size**0.5


def spectrum(sketches: Sequence[torch.Tensor | None]) -> npt.NDArray[np.float64]:
    """Eigenvalues of ``C_ab = <G_a, G_b> / M`` of one module's sketches, descending, not negative.

    Batches that did not reach the module count as zeros.
    """
    count = len(sketches)
    seen = [sketch.flatten().double() for sketch in sketches if sketch is not None]
    values = np.zeros(count)
    if seen:
        stacked = torch.stack([sketch.to(seen[-1].device) for sketch in seen])
        gram = (stacked @ stacked.T).cpu().numpy() / count
        values[: len(seen)] = np.clip(np.linalg.eigvalsh(gram)[::-1], 0, None)
    return values
