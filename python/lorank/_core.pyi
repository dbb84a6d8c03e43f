"""Types of the Rust core. Private: use the functions that `lorank` exports."""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt

__all__ = [
    "Checkpoint",
    "FormatError",
    "LorankError",
    "Matrix",
    "NumericalError",
    "__version__",
    "alpha_hill",
    "analyze",
    "available_threads",
    "marchenko_pastur",
    "marchenko_pastur_median",
    "spectral_metrics",
    "spectrum",
]
__version__: str

class LorankError(Exception): ...
class FormatError(LorankError): ...
class NumericalError(LorankError): ...

@final
class Matrix:
    @staticmethod
    def from_array(array: npt.NDArray[Any], dtype: str | None = None) -> Matrix: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> str: ...

@final
class Checkpoint:
    def __new__(cls, path: str | PathLike[str]) -> Checkpoint: ...
    def tensors(self) -> list[tuple[str, str, list[int], Path]]: ...
    def matrix(self, position: int, rows: int, cols: int, index: int = 0) -> Matrix: ...

def available_threads() -> int: ...
def spectrum(matrix: Matrix, threads: int) -> npt.NDArray[np.float64]: ...
def alpha_hill(eigenvalues: npt.ArrayLike, convention: str) -> float: ...
def marchenko_pastur(eigenvalues: npt.ArrayLike, shape: tuple[int, int], scale: str) -> tuple[float, int]: ...
def marchenko_pastur_median(ratio: float) -> float: ...
def spectral_metrics(eigenvalues: npt.ArrayLike, shape: tuple[int, int]) -> dict[str, Any]: ...
def analyze(
    matrices: Sequence[Matrix],
    threads: int,
    keep_eigenvalues: bool,
    on_result: Callable[[int, Any], object],
) -> None: ...
