"""Task spectra of arrays, and of streams that no memory holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lorank.task_spectra.curve import TargetMoments
from lorank.task_spectra.estimate import Space, TaskEstimate, check_options, estimate
from lorank.task_spectra.moments import InputMoments, after, as_array, checked_rows, chunks, rows_of_fold


class TaskSpectrum:
    """The spectrum of a task whose samples come in batches.

    The model is ``Y = X W + noise`` without an intercept, as in `task_spectrum`.

    Only sums are kept, a set per fold: ``X^T X``, ``X^T Y``, and of `Y` the sums and sums of squares.
    Memory is ``folds * d_in * (d_in + d_out)`` numbers, whatever the number of samples, and how these
    are cut into batches changes the result by rounding at most.

    Parameters
    ----------
    folds
        Of the cross-validation: row ``i`` of the stream belongs to fold ``i % folds``. 10 if `inputs`
        does not say.
    inputs
        Moments shared with other tasks of the same inputs. Whoever shares updates them, once per
        batch; the tasks then add nothing to them.

    Raises
    ------
    ValueError
        If `folds` is no integer of at least 2, or contradicts `inputs`.

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

    @property
    def num_samples(self) -> int:
        """Rows so far."""
        return self._rows

    def update(self, X: npt.ArrayLike, Y: npt.ArrayLike) -> None:
        """Add a batch of samples.

        Parameters
        ----------
        X
            Inputs, shape ``(rows, d_in)``, any real type and any number of rows.
        Y
            Targets, shape ``(rows, d_out)``, or ``(rows,)`` for a single output.

        Raises
        ------
        ValueError
            If the batch is malformed, its widths are not those of the batches before, or it holds NaN,
            infinite values or values beyond 1e140. It then leaves no trace.
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
        folds = self._inputs.folds
        if self._targets is None:
            self._targets = _nothing(folds, inputs.shape[1], outputs.shape[1])
        sums = self._targets
        for x, y in zip(chunks(inputs), chunks(outputs), strict=True):
            for fold in range(folds):
                mine = rows_of_fold(y, self._rows, fold, folds)
                sums.cross[fold] += rows_of_fold(x, self._rows, fold, folds).T @ mine
                sums.squares[fold] += np.sum(np.square(mine), axis=0)
                sums.sums[fold] += np.sum(mine, axis=0)
            self._rows += len(x)

    def merge(self, other: TaskSpectrum) -> None:
        """Add what another object has seen, as if its batches had come after those of this one.

        Shared inputs are not touched: merge those once, with `InputMoments.merge`.

        Raises
        ------
        ValueError
            If numbers of folds or widths differ, or only one of the two shares its inputs.
        """
        if other._shares != self._shares:
            raise ValueError("a task that shares its inputs cannot be merged with one that does not")
        if other._inputs.folds != self._inputs.folds:
            raise ValueError(f"{self._inputs.folds} folds cannot take in {other._inputs.folds}")
        if other._targets is None:
            return
        mine = self._targets or _nothing(*other._targets.cross.shape)
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
        """The estimate from all samples so far; more may follow.

        Parameters and results are those of `task_spectrum`.

        Raises
        ------
        ValueError
            If there is no sample, an option is out of range, or shared inputs have seen a different
            number of samples.
        """
        check_options(noise, leading, space)
        if self._targets is None or self._rows == 0:
            raise ValueError("no samples: a task spectrum needs at least one row of X and Y")
        if self._inputs.num_samples != self._rows:
            raise ValueError(
                f"the shared inputs have seen {self._inputs.num_samples} samples and this task {self._rows}"
            )
        return estimate(self._inputs, self._targets, noise=noise, leading=leading, space=space)


def _nothing(folds: int, d_in: int, d_out: int) -> TargetMoments:
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
    """The rank that a task wants, from its samples alone.

    Least squares ``Y = X W + noise``, and three answers from it: K*, the rank at which a geometric
    decay of the singular values reaches the noise; the same with a decay in pieces; and the smallest
    rank that predicts held-out samples nearly as well as the full one, which is the most accurate.
    No intercept is fitted: where there is one, centre `X` and `Y` first, or give `X` a column of ones.

    Parameters
    ----------
    X
        Inputs, shape ``(n, d_in)``, of any real type: arrays, or torch tensors on any device.
    Y
        Targets, shape ``(n, d_out)``, or ``(n,)`` for a single output.
    noise
        Standard deviation of the noise per entry of `Y`. By default that of the residuals, with
        ``n - rank(X)`` degrees of freedom; where these are none, that of held-out samples, flagged.
    leading
        `C` in the formula, in the unit of the singular values. By default the largest of them, so that
        units do not matter; ``1.0`` is the paper's equation 2.
    space
        ``"weights"``: singular values of `W` against ``tau = noise (1 + sqrt(d_in / n))``, which
        presumes inputs of unit variance: K* changes with the unit of `X`, not with that of `Y`.
        ``"prediction"``: those of ``Q^T Y``, ``X = Q R``, against the exact edge of their noise,
        ``noise (sqrt(d_in) + sqrt(d_out))`` (with the rank of `X` in place of ``d_in``); no unit
        matters there.
    folds
        Of the cross-validation: row ``i`` belongs to fold ``i % folds``.

    Returns
    -------
    TaskEstimate
        With `k_star`, `predicted_rank`, `piecewise`, the curve and the numbers behind them.

    Raises
    ------
    ValueError
        If an array is malformed, is empty, or holds NaN, infinite values or values beyond 1e140; if
        rows do not match, or an option is out of range.

    Notes
    -----
    Source: Why Does LoRA Work? The Spectral Theory of Low-Rank Adaptation, equations 2 to 6. The
    predicted curve, prediction space and the piecewise decay are not in the paper. All numbers come
    from ``X^T X`` and ``X^T Y``, so that noise below 1e-6 of the targets cannot be estimated, inputs
    below 1e-150 count as zero, and so does an output whose mean is a million times its deviation.

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
