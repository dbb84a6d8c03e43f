"""Sums over the rows of a stream of samples, for each fold of a cross-validation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from lorank.sources.arrays import as_numpy
from lorank.sources.mapped import unmapped
from lorank.task_spectra.least_squares import Array, Factor, factor

# Number of rows that are converted to float64 at a time, so that a large float32 input is never copied whole.
_CHUNK = 8192
# Largest absolute value whose products can be summed in float64 without overflow.
_LARGEST = 1e140


def checked_rows(name: str, values: npt.ArrayLike, width: int | None) -> npt.NDArray[Any]:
    """Return a batch as a 2-D array of finite numbers, in its own element type.

    Raises
    ------
    ValueError
        If the batch is not a 2-D array of real numbers, has no columns or another number than `width`, or
        has NaN, infinite values or values beyond 1e140.
    """
    array = as_array(name, values)
    if array.ndim != 2:
        raise ValueError(f"{name} must have the shape (samples, features), not {array.shape}")
    if array.shape[1] == 0:
        raise ValueError(f"{name} has no columns")
    if width is not None and array.shape[1] != width:
        raise ValueError(f"{name} has {array.shape[1]} columns, but earlier batches had {width}")
    if array.dtype.kind in "cOSUmM":
        raise ValueError(f"{name} must hold real numbers, not {array.dtype}")
    for chunk in chunks(array):
        if not np.all(np.isfinite(chunk)):
            raise ValueError(f"{name} holds NaN or infinite values")
        if np.any(np.abs(chunk) > _LARGEST):
            raise ValueError(
                f"{name} holds values beyond {_LARGEST:g}: their squares exceed the range of float64"
            )
    return array


def as_array(name: str, values: npt.ArrayLike) -> npt.NDArray[Any]:
    """Return an array-like object, such as a tensor of any element type and device, as an array.

    Raises
    ------
    ValueError
        If NumPy cannot hold its values (ragged, sparse, quantized, on the meta device).
    """
    try:
        return as_numpy(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be read as one array of real numbers: {error}") from error


def chunks(array: npt.NDArray[Any]) -> Iterator[Array]:
    """Yield the rows in float64, some thousands at a time."""
    for start in range(0, len(array), _CHUNK):
        yield unmapped(array[start : start + _CHUNK]).astype(np.float64)


def rows_of_fold(chunk: Array, first: int, fold: int, folds: int) -> Array:
    """Return the rows of a fold, whose indices in the stream are `fold` modulo `folds`.

    `first` is the index of the chunk's first row in the stream.
    """
    return chunk[(fold - first) % folds :: folds]


def after(sums: Array, rows: int) -> Array:
    """Return sums by fold as if `rows` other rows preceded them in the stream."""
    return np.roll(sums, rows % len(sums), axis=0)


def others(sums: Array, fold: int | None) -> Array:
    """Return the sum over all folds but one; over all folds for None.

    The folds are added, not subtracted from the total, so that a column of zeros stays exactly zero.
    """
    total: Array = np.zeros_like(sums[0])
    for index, part in enumerate(sums):
        if index != fold:
            total += part
    return total


class InputMoments:
    """Sums ``X^T X`` of a stream of inputs, for each fold, and their factorisations.

    Tasks with the same inputs can share one object: pass it to the `TaskSpectrum` of each task, and update it
    once for each batch.

    Parameters
    ----------
    folds
        Number of folds: row ``i`` of the stream belongs to fold ``i % folds``. Memory is ``folds * d_in^2``
        numbers, and the same again after the first estimate of a task.

    Attributes
    ----------
    folds
        Number of folds.
    num_samples
        Number of rows so far.

    Raises
    ------
    ValueError
        If `folds` is not an integer of at least 2.

    Examples
    --------
    >>> import numpy as np
    >>> from lorank.task_spectra import InputMoments, TaskSpectrum
    >>> inputs = InputMoments()
    >>> query, key = TaskSpectrum(inputs=inputs), TaskSpectrum(inputs=inputs)
    >>> rng = np.random.default_rng(0)
    >>> for _ in range(3):
    ...     X = rng.standard_normal((50, 8))
    ...     inputs.update(X)
    ...     query.update(X, X[:, :4])
    ...     key.update(X, X @ X[:8])
    >>> query.estimate().num_samples
    150
    """

    def __init__(self, *, folds: int = 10) -> None:
        if isinstance(folds, bool) or not isinstance(folds, (int, np.integer)) or folds < 2:
            raise ValueError(f"folds must be an integer of at least 2, not {folds!r}")
        self.folds = int(folds)
        self.num_samples = 0
        self._grams: Array | None = None
        self._factors: dict[int | None, Factor] = {}

    @property
    def width(self) -> int | None:
        """Number of columns ``d_in``; None before the first batch."""
        return None if self._grams is None else self._grams.shape[1]

    def update(self, X: npt.ArrayLike) -> None:
        """Add a batch of inputs.

        Parameters
        ----------
        X
            Inputs, shape ``(rows, d_in)``, of any real type and any number of rows.

        Raises
        ------
        ValueError
            If the batch is malformed, has another width than earlier batches, or has NaN, infinite values or
            values beyond 1e140. The sums then stay unchanged.
        """
        self.add(checked_rows("X", X, self.width))

    def add(self, X: npt.NDArray[Any]) -> None:
        """Add rows that `checked_rows` has returned."""
        if self._grams is None:
            self._grams = np.zeros((self.folds, X.shape[1], X.shape[1]))
        self._factors.clear()
        for chunk in chunks(X):
            for fold in range(self.folds):
                rows = rows_of_fold(chunk, self.num_samples, fold, self.folds)
                self._grams[fold] += rows.T @ rows
            self.num_samples += len(chunk)

    def merge(self, other: InputMoments) -> None:
        """Add the sums of another stream, as if its batches followed those of this stream.

        Raises
        ------
        ValueError
            If the numbers of folds or of columns differ.
        """
        if other.folds != self.folds:
            raise ValueError(f"moments over {self.folds} folds cannot be merged with {other.folds} folds")
        if other._grams is None:
            return
        if self.width not in (None, other.width):
            raise ValueError(f"moments of {self.width} columns cannot be merged with {other.width} columns")
        sums = after(other._grams, self.num_samples)
        self._grams = sums if self._grams is None else self._grams + sums
        self.num_samples += other.num_samples
        self._factors.clear()

    def gram(self, fold: int) -> Array:
        """Return ``X^T X`` of one fold, shape ``(d_in, d_in)``."""
        assert self._grams is not None
        gram: Array = self._grams[fold]
        return gram

    def factor(self, without: int | None = None) -> Factor:
        """Return the factor of ``X^T X`` over all folds but `without`; None for all folds.

        The factor is cached until the next update.
        """
        assert self._grams is not None
        if without not in self._factors:
            self._factors[without] = factor(others(self._grams, without))
        return self._factors[without]
