"""Two-sided random projections of the gradients of weights, summed over a batch.

``P_out G P_in``, with projections whose entries have the variance ``1/k``, preserves inner products of
gradients in expectation. It follows from projected inputs and projected output gradients: the gradient itself
is never formed.
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
    """An observer that sums the projected gradient of each module over a batch.

    Parameters
    ----------
    targets
        The modules.
    size
        Size `k` of the projections; None for exact gradients. Dimensions of up to `k` are not projected.
    seed
        Seed of the projections, combined with the module's name.
    """

    def __init__(self, targets: Sequence[Target], size: int | None, seed: int = 0) -> None:
        check_sketch(size)
        self._targets = targets
        self.size = None if size is None else int(size)  # JSON cannot write NumPy integers.
        self._seed = seed
        self._projections: dict[tuple[int, str], torch.Tensor | None] = {}
        self._current: list[torch.Tensor | None] = [None] * len(targets)
        self._devices: dict[int, torch.device] = {}

    def see_input(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Return ``x P_in``, shape ``(tokens, k)``."""
        return self._projected(index, "in", x)

    def see_gradient(self, index: int, kept: torch.Tensor, delta: torch.Tensor) -> None:
        """Add ``P_out delta^T x P_in`` to the module's sketch."""
        delta = self._projected(index, "out", delta)
        gradient = delta.T @ kept.to(delta.device)
        self._devices[index] = gradient.device
        current = self._current[index]
        self._current[index] = gradient if current is None else current.add_(gradient)

    def see_inner(self, index: int, x: torch.Tensor, delta: torch.Tensor) -> None:
        """Add ``P_out delta^T x P_in``: the gradient is the sum of all such terms."""
        self.see_gradient(index, self.see_input(index, x), delta)

    def take(self) -> list[torch.Tensor | None]:
        """Return the sketch of each module since the last call, None for modules without a gradient."""
        taken, self._current = self._current, [None] * len(self._targets)
        return taken

    def take_all(self) -> list[torch.Tensor]:
        """Return the result of `take` with zeros in place of None, for sums over processes."""
        return [self._zeros(index) if sketch is None else sketch for index, sketch in enumerate(self.take())]

    def shape(self, index: int) -> tuple[int, int]:
        """Return the shape of a module's sketch."""
        out, fan_in = self._targets[index].info.shape
        return (out, fan_in) if self.size is None else (min(out, self.size), min(fan_in, self.size))

    def device(self, index: int) -> torch.device:
        """Return the device of a module's sketch: that of the last gradient or, without one, the weight."""
        module = self._targets[index].module
        device: torch.device = module.weight.device
        is_offloaded = device.type == "meta" and hasattr(module, "_hf_hook")
        return self._devices.get(index, torch.device("cpu") if is_offloaded else device)

    def drop_projections(self) -> None:
        """Free the projections; the same ones are drawn again on the next use."""
        self._projections.clear()

    def _zeros(self, index: int) -> torch.Tensor:
        """Return the sketch of a gradient of zeros."""
        return torch.zeros(self.shape(index), device=self.device(index))

    def _projected(self, index: int, side: str, rows: torch.Tensor) -> torch.Tensor:
        """Return rows times the projection of a side, in float32."""
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
        """Draw a projection ``(length, k)`` on the CPU, equal for all devices; None for the identity."""
        if self.size is None or self.size >= length:
            return None
        name = f"{self._seed}/{side}/{self._targets[index].info.name}"
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.randn(length, self.size, generator=generator) / self.size**0.5


def spectrum(sketches: Sequence[torch.Tensor | None]) -> npt.NDArray[np.float64]:
    """Return the eigenvalues of ``C_ab = <G_a, G_b> / M`` for a module's sketches, descending, at least 0.

    A sketch is None, and counts as zero, for a batch without a gradient of the module.
    """
    count = len(sketches)
    seen = [sketch.flatten().double() for sketch in sketches if sketch is not None]
    values = np.zeros(count)
    if seen:
        stacked = torch.stack([sketch.to(seen[-1].device) for sketch in seen])
        gram = (stacked @ stacked.T).cpu().numpy() / count
        values[: len(seen)] = np.clip(np.linalg.eigvalsh(gram)[::-1], 0, None)
    return values
