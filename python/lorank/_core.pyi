"""Types of the Rust core. Private: use the functions that `lorank` exports."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt

__all__ = [
    "Checkpoint",
    "Decomposition",
    "FormatError",
    "LorankError",
    "Matrix",
    "NumericalError",
    "UpdatedMatrix",
    "__version__",
    "_panicking_matrix",
    "alpha_hill",
    "analyze",
    "available_threads",
    "check_thread_memory",
    "compare",
    "copy_mapped",
    "decompose",
    "energy_rank",
    "exchange",
    "gguf_types",
    "marchenko_pastur",
    "marchenko_pastur_median",
    "rebuild",
    "sample",
    "select_budget",
    "select_energy",
    "select_largest",
    "select_smallest",
    "spectral_metrics",
    "spectrum",
    "subtract",
    "write_safetensors",
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
    def to_array(self) -> npt.NDArray[Any]: ...
    def transposed(self) -> Matrix: ...
    @staticmethod
    def arranged(matrices: Sequence[Matrix], by: str, heads: int = 1) -> Matrix: ...

@final
class Checkpoint:
    def __new__(cls, path: str | PathLike[str], *, repeated: bool = False) -> Checkpoint: ...
    def tensors(self) -> list[tuple[str, str, list[int]]]: ...
    def files(self) -> list[tuple[Path, int, int]]: ...
    def metadata(self) -> dict[str, str]: ...
    def matrix(self, position: int, rows: int, cols: int, index: int = 0) -> Matrix: ...
    def dequantized(
        self,
        scheme: str,
        parts: Mapping[str, int],
        settings: Mapping[str, float],
        shape: tuple[int, int],
        index: int = 0,
        view: tuple[int, int] | None = None,
    ) -> Matrix: ...
    def digest(self, seed: bytes, threads: int) -> str: ...
    def stored_bytes(self, position: int) -> bytes: ...

def gguf_types() -> list[str]: ...

@final
class Decomposition:
    @property
    def singular_values(self) -> npt.NDArray[np.float64]: ...

@final
class UpdatedMatrix:
    def __new__(
        cls,
        base: Matrix,
        terms: Sequence[tuple[Matrix, Matrix, float, bool]],
        magnitude: tuple[Sequence[float], bool] | None = None,
    ) -> UpdatedMatrix: ...

def _panicking_matrix(rows: int, cols: int) -> Matrix: ...
def available_threads() -> int: ...
def check_thread_memory() -> None: ...
def spectrum(matrix: Matrix, accuracy: str, threads: int) -> npt.NDArray[np.float64]: ...
def alpha_hill(eigenvalues: npt.ArrayLike, convention: str) -> float: ...
def marchenko_pastur(eigenvalues: npt.ArrayLike, shape: tuple[int, int], scale: str) -> tuple[float, int]: ...
def marchenko_pastur_median(ratio: float) -> float: ...
def energy_rank(eigenvalues: npt.ArrayLike, energy: float) -> int: ...
def spectral_metrics(eigenvalues: npt.ArrayLike, shape: tuple[int, int]) -> dict[str, Any]: ...
def analyze(
    matrices: Sequence[Matrix],
    accuracy: str,
    threads: int,
    keep_eigenvalues: bool,
    on_result: Callable[[int, Any], object],
) -> None: ...
def copy_mapped(array: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint8], int] | None: ...
def sample(matrix: Matrix) -> dict[str, Any]: ...
def decompose(
    updates: Sequence[Sequence[tuple[Matrix, Matrix, float]]],
    threads: int,
    on_result: Callable[[int, Any], object],
) -> None: ...
def rebuild(
    choices: Sequence[tuple[Decomposition, Sequence[bool]]],
    threads: int,
    on_result: Callable[[int, Any], object],
) -> None: ...
def subtract(
    pairs: Sequence[tuple[Matrix, Matrix]],
    max_rank: int,
    threads: int,
    on_result: Callable[[int, Any], object],
) -> None: ...
def compare(
    pairs: Sequence[tuple[UpdatedMatrix, Matrix]],
    threads: int,
    on_result: Callable[[int, Any], object],
) -> None: ...
def select_largest(scores: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.bool_]: ...
def select_smallest(scores: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.bool_]: ...
def select_energy(values: npt.NDArray[np.float64], fraction: float) -> npt.NDArray[np.bool_]: ...
def select_budget(
    values: npt.NDArray[np.float64], lengths: Sequence[int], costs: Sequence[int], parameters: int
) -> npt.NDArray[np.bool_]: ...
def exchange(a: str | PathLike[str], b: str | PathLike[str]) -> None: ...
def write_safetensors(
    path: str | PathLike[str],
    tensors: Sequence[
        tuple[str, Sequence[int], Matrix | tuple[Checkpoint, int] | bytes | list[UpdatedMatrix], str]
    ],
    metadata: Mapping[str, str],
    threads: int,
    seal: tuple[str, bytes] | None = None,
) -> str | None: ...
