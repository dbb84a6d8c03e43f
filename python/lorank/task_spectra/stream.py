"""Task spectra of arrays, and of streams of any length."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lorank._internal.short_text import counted
from lorank.task_spectra.curve import TargetMoments
from lorank.task_spectra.estimate import Space, TaskEstimate, check_options, estimate
from lorank.task_spectra.moments import InputMoments, after, as_array, checked_rows, chunks, rows_of_fold


class TaskSpectrum:
    """The spectrum of a task whose samples come in batches.

    The model is ``Y = X W + noise`` without an intercept, as in `task_spectrum`.

    Each fold keeps the sums ``X^T X`` and ``X^T Y``, and the sums and sums of squares of `Y`. Memory is
    ``folds * d_in * (d_in + d_out)`` numbers for any number of samples. The division into batches changes the
    result by rounding errors only.

    Parameters
    ----------
    folds
        Number of folds of the cross-validation: row ``i`` of the stream belongs to fold ``i % folds``. None
        for the folds of `inputs`, or 10 without `inputs`.
    inputs
        Moments shared with other tasks of the same inputs. The caller updates them once for each batch;
        `update` then adds nothing to them.

    Raises
    ------
    ValueError
        If `folds` is not an integer of at least 2, or differs from that of `inputs`.

    Examples
    --------
    >>> import numpy as np
    >>> from lorank.task_spectra import TaskSpectrum
    >>> rng = np.random.default_rng(0)
    >>> W = np.diag([4.0, 2.0, 1.0, 0.0])
    >>> task = TaskSpectrum()
    >>> for _ in range(10):
    ...     X = rng.standard_normal((100, 4))
    ...     task.update(X, X @ W + 0.1 * rng.standard_normal((100, 4)))
    >>> task.estimate().predicted_rank
    3
    """

    def __init__(self, *, folds: int | None = None, inputs: InputMoments | None = None) -> None:
        if inputs is not None and folds not in (None, inputs.folds):
            raise ValueError(f"folds={folds!r} contradicts inputs with {inputs.folds} folds")
        self._shares = inputs is not None
        self._inputs = inputs if inputs is not None else InputMoments(folds=10 if folds is None else folds)
        self._targets: TargetMoments | None = None
        self._rows = 0

    def __repr__(self) -> str:
        widths = "no widths yet"
        if self._targets is not None:
            _, d_in, d_out = self._targets.cross.shape
            widths = f"{counted(d_in, 'input')}, {counted(d_out, 'output')}"
        return f"TaskSpectrum({counted(self._rows, 'sample')}, {widths}, {self._inputs.folds} folds)"

    @property
    def num_samples(self) -> int:
        """Number of rows so far."""
        return self._rows

    def update(self, X: npt.ArrayLike, Y: npt.ArrayLike) -> None:
        """Add a batch of samples.

        Parameters
        ----------
        X
            Inputs, shape ``(rows, d_in)``, of any real type and any number of rows.
        Y
            Targets, shape ``(rows, d_out)``, or ``(rows,)`` for a single output.

        Raises
        ------
        ValueError
            If the batch is malformed, has other widths than earlier batches, or has NaN, infinite values or
            values beyond 1e140. The sums then stay unchanged.
        """
        d_in, d_out = self._inputs.width, None
        if self._targets is not None:
            _, d_in, d_out = self._targets.cross.shape
        inputs = checked_rows("X", X, d_in)
        column = as_array("Y", Y)
        outputs = checked_rows("Y", column[:, None] if column.ndim == 1 else column, d_out)
        if len(inputs) != len(outputs):
            raise ValueError(f"X has {len(inputs)} rows and Y has {len(outputs)}")
        if not self._shares:
            self._inputs.add(inputs)
        self._add(inputs, outputs)

    def _add(self, inputs: npt.NDArray[Any], outputs: npt.NDArray[Any]) -> None:
        """Add checked rows to the sums over targets."""
        folds = self._inputs.folds
        if self._targets is None:
            self._targets = _zeros(folds, inputs.shape[1], outputs.shape[1])
        sums = self._targets
        for x, y in zip(chunks(inputs), chunks(outputs), strict=True):
            for fold in range(folds):
                mine = rows_of_fold(y, self._rows, fold, folds)
                sums.cross[fold] += rows_of_fold(x, self._rows, fold, folds).T @ mine
                sums.squares[fold] += np.sum(np.square(mine), axis=0)
                sums.sums[fold] += np.sum(mine, axis=0)
            self._rows += len(x)

    def merge(self, other: TaskSpectrum) -> None:
        """Add the samples of another task, as if its batches followed those of this task.

        Shared inputs stay unchanged: merge them once, with `InputMoments.merge`.

        Raises
        ------
        ValueError
            If numbers of folds or widths differ, or only one of the two tasks shares its inputs.
        """
        if other._shares != self._shares:
            raise ValueError("a task that shares its inputs cannot be merged with one that does not")
        if other._inputs.folds != self._inputs.folds:
            raise ValueError(f"{self._inputs.folds} folds cannot be merged with {other._inputs.folds} folds")
        if other._targets is None:
            return
        mine = self._targets or _zeros(*other._targets.cross.shape)
        if mine.cross.shape != other._targets.cross.shape:
            raise ValueError(f"widths differ: {mine.cross.shape[1:]} and {other._targets.cross.shape[1:]}")
        if not self._shares:
            self._inputs.merge(other._inputs)
        self._targets = TargetMoments(
            mine.cross + after(other._targets.cross, self._rows),
            mine.squares + after(other._targets.squares, self._rows),
            mine.sums + after(other._targets.sums, self._rows),
        )
        self._rows += other._rows

    def estimate(
        self, *, noise: float | None = None, leading: float | None = None, space: Space = "weights"
    ) -> TaskEstimate:
        """Compute the estimate from all samples so far; more samples may follow.

        Parameters and result are those of `task_spectrum`.

        Raises
        ------
        ValueError
            If there is no sample, an option is out of range, or shared inputs have another number of samples.
        """
        check_options(noise, leading, space)
        if self._targets is None or self._rows == 0:
            raise ValueError("no samples: a task spectrum needs at least one row of X and Y")
        if self._inputs.num_samples != self._rows:
            raise ValueError(
                f"the shared inputs have {self._inputs.num_samples} samples and this task has {self._rows}: "
                "update the inputs once for each batch"
            )
        return estimate(self._inputs, self._targets, noise=noise, leading=leading, space=space)


def _zeros(folds: int, d_in: int, d_out: int) -> TargetMoments:
    """Return the sums of no samples."""
    return TargetMoments(np.zeros((folds, d_in, d_out)), np.zeros((folds, d_out)), np.zeros((folds, d_out)))


def task_spectrum(
    X: npt.ArrayLike,
    Y: npt.ArrayLike,
    *,
    noise: float | None = None,
    leading: float | None = None,
    space: Space = "weights",
    folds: int = 10,
) -> TaskEstimate:
    """Estimate the rank of a task from its samples alone.

    The model is ``Y = X W + noise``. Its least-squares solution gives three estimates: K*, the rank at
    which a geometric decay of the singular values reaches the noise; K* of a decay in pieces; and the
    predicted rank, the smallest rank that predicts held-out samples nearly as well as the full rank. The
    predicted rank is the most accurate. No intercept is fitted: centre `X` and `Y` first, or add a column
    of ones to `X`.

    Parameters
    ----------
    X
        Inputs, shape ``(n, d_in)``, of any real type: arrays, or torch tensors on any device.
    Y
        Targets, shape ``(n, d_out)``, or ``(n,)`` for a single output.
    noise
        Standard deviation of the noise in an entry of `Y`. By default estimated from the residuals, with
        ``n - rank(X)`` degrees of freedom; with zero degrees of freedom, from the errors on held-out samples,
        with a flag.
    leading
        The constant `C` in K*, in the unit of the singular values. By default the largest singular value, so
        that K* does not depend on units; equation 2 of the paper has ``1.0``.
    space
        ``"weights"``: singular values of `W` against ``tau = noise (1 + sqrt(d_in / n))``. This threshold
        assumes inputs of unit variance: K* depends on the unit of `X`, but not on that of `Y`.
        ``"prediction"``: singular values of ``Q^T Y`` with ``X = Q R`` against the exact edge of their noise,
        ``tau = noise (sqrt(rank(X)) + sqrt(d_out))``. K* does not depend on units.
    folds
        Number of folds of the cross-validation: row ``i`` belongs to fold ``i % folds``.

    Returns
    -------
    TaskEstimate
        The estimates `k_star`, `predicted_rank` and `piecewise`, the curve of R^2 and the spectrum.

    Raises
    ------
    ValueError
        If an array is malformed or empty, or has NaN, infinite values or values beyond 1e140; if the numbers
        of rows differ, or an option is out of range.

    Notes
    -----
    Source: [KSTAR], equations 2 to 6. The predicted rank, prediction space and the piecewise decay are
    additions to the paper. All numbers come from ``X^T X`` and ``X^T Y``. Therefore noise below 1e-6 of the
    targets cannot be estimated, inputs below 1e-150 count as zero, and an output whose mean is a million
    times its deviation counts as constant.

    Examples
    --------
    >>> import numpy as np
    >>> from lorank.task_spectra import task_spectrum
    >>> rng = np.random.default_rng(0)
    >>> X, W = rng.standard_normal((500, 16)), rng.standard_normal((16, 3)) @ rng.standard_normal((3, 8))
    >>> found = task_spectrum(X, X @ W + rng.standard_normal((500, 8)))
    >>> found.predicted_rank, found.num_above, round(found.noise, 1)
    (3, 3, 1.0)
    """
    stream = TaskSpectrum(folds=folds)
    stream.update(X, Y)
    return stream.estimate(noise=noise, leading=leading, space=space)
