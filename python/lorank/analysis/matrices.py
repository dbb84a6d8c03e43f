"""The analysis of all matrices of a source, in parallel and in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lorank import _core
from lorank._internal import core_calls
from lorank._internal.progress import progress_bar, waiting
from lorank._internal.threads import thread_count
from lorank.analysis import optional_metrics
from lorank.analysis.journal import Journal
from lorank.modules import naming
from lorank.report import ModuleSpectrum, SpectralReport
from lorank.report.optional_metrics import check_groups
from lorank.sources import OPENING, AnySource, MatrixInfo, SourceMatrix, open_source
from lorank.statistics.spectrum import Accuracy, check_accuracy

# Largest number of matrices that are described and read in place together.
_BATCH = 1 << 14


def analyze(
    source: AnySource,
    *,
    include: naming.Targets = None,
    exclude: naming.Targets = None,
    accuracy: Accuracy = "exact",
    threads: int | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
    keep_eigenvalues: bool = False,
    metrics: Sequence[str] = (),
) -> SpectralReport:
    """Compute spectral metrics of every weight matrix of a model.

    Parameters
    ----------
    source
        A safetensors file, a shard index or a folder of shards; a ``.bin``, ``.pt`` or ``.pth`` state dict; a
        hub id (``name`` or ``name@revision``, looked up in the local cache first); a mapping of names to
        arrays; or a live ``torch.nn.Module``.
    include, exclude
        Modules to select and to leave out: a list of names or suffixes, or one regular expression for whole
        names, as in PEFT's ``target_modules``.
    accuracy
        Arithmetic of the analysis.

        - ``"exact"``: float64.
        - ``"fast"``: float32 for the Gram matrices and their reduction. A matrix is analysed in float64 if
          its error bounds exceed 1e-3 for the exponent or 1 for the spikes, if more than one in 32 of its
          eigenvalues may be zero, or if it is at least 32 times as long as wide, as embeddings are. The
          `accuracy` of a row names the arithmetic of its matrix.
        - ``"sampled"``: estimates by stochastic Lanczos quadrature [SLQ] if both sides are at least 2048,
          ``"fast"`` for other matrices. At 8192x8192 it takes less than a tenth of the time of ``"exact"``.
          The exponent and the spikes have error bars (`alpha_hill_error`, `mp_spikes_error`), which covered
          the exact values of 98 % of the matrices of two real models. The other metrics have no error bars.
          Kept eigenvalues are quantiles.
    threads
        Largest number of threads; by default all processors that the process may use. Results do not depend
        on the number of threads.
    resume
        Path of a journal, for sources on disk. Each finished matrix is written to the journal, and a run that
        finds the journal continues from it. If a matrix fails for lack of memory or by a defect of lorank,
        the run still analyses the others and raises the error at its end; the next run tries that matrix
        again.
    progress
        True to draw a progress bar on standard error, if that is a terminal.
    keep_eigenvalues
        True to keep the spectrum of each matrix in its row.
    metrics
        Names of groups of optional metrics, which `ModuleSpectrum` defines. With ``accuracy="sampled"`` they
        are computed from quantiles of large matrices.

        - ``"mp-distance"``: distance to the Marchenko-Pastur law.
        - ``"tracy-widom"``: Tracy-Widom threshold, and the eigenvalues above it.
        - ``"norms"``: nuclear norm and logarithms of norms.
        - ``"tail-fits"``: exponential law and truncated power law against the power law.
        - ``"entropy"``: entropies of the eigenvalues and of the singular values.
        - ``"randomized"``: distance to the spectrum of the matrix with permuted entries, and correlation
          traps. A second analysis of every matrix takes as long as the first, and a copy of one matrix per
          thread.

    Returns
    -------
    SpectralReport
        A row for each matrix, including each expert of a stack, and the skipped tensors. A matrix with NaN or
        infinite values has a row with a flag and no numbers.

    Raises
    ------
    FileNotFoundError, OSError
        If the source cannot be read.
    FormatError
        If a file is damaged. The message names file, tensor and reason.
    ValueError
        If no matrix is selected, or the journal belongs to another run.
    MemoryError, OSError
        If the system lacks the memory for a matrix, or cannot start threads. Fewer `threads` need less
        memory.
    LorankError
        If the analysis of a matrix meets a defect of lorank. Please report such errors.

    Notes
    -----
    Each thread needs memory for one stored matrix and for about ``p^2 + 700 p`` float64 numbers, with
    ``p = min(out, in)``; ``accuracy="sampled"`` needs ``out * in`` float32 numbers instead. A matrix that
    would take one core some seconds is analysed by all threads together.

    Examples
    --------
    >>> import numpy as np, lorank
    >>> weights = {"layers.0.mlp.weight": np.diag([1.0, 2.0, 3.0]), "norm.weight": np.ones(3)}
    >>> report = lorank.analyze(weights, keep_eigenvalues=True)
    >>> round(report["layers.0.mlp"].stable_rank, 4)
    1.5556
    >>> report["layers.0.mlp"].eigenvalues.round(12)
    array([1., 4., 9.])
    >>> report.skipped
    (Skipped(name='norm.weight', shape=(3,), reason='1-D tensor'),)
    """
    check_accuracy(accuracy)
    options = _Options(accuracy, thread_count(threads), keep_eigenvalues, check_groups(metrics))
    with waiting(OPENING, enabled=progress):
        opened = open_source(source)
    chosen = opened.select(include, exclude)
    if not chosen.matrices:
        raise ValueError(_nothing_to_analyse(opened.label, len(opened.matrices), include, exclude))
    rows: dict[str, ModuleSpectrum] = {}
    failures: list[Exception] = []
    with ExitStack() as stack:
        journal = None
        if resume is not None:
            run = {
                "fingerprint": _fingerprint(chosen.fingerprint),
                "keep_eigenvalues": keep_eigenvalues,
                "accuracy": accuracy,
                **({"metrics": list(options.metrics)} if options.metrics else {}),
            }
            infos = (matrix.info for matrix in opened.matrices)
            journal = stack.enter_context(Journal(Path(resume), run, infos, options.metrics))
            rows |= journal.finished
        finished = frozenset(rows)

        def todo() -> Iterator[SourceMatrix]:
            return (matrix for matrix in chosen.matrices if matrix.info.name not in finished)

        total = sum(map(_work, todo()))
        advance = stack.enter_context(progress_bar("analysing", total, enabled=progress))

        def finish(matrix: SourceMatrix, row: ModuleSpectrum) -> None:
            rows[row.name] = row
            if journal is not None:
                journal.add(row)
            advance(_work(matrix), row.name)

        def fail(error: Exception) -> None:
            if journal is None:
                raise error
            failures.append(error)

        for batch in _batches(todo, options):
            _analyze_batch(batch, options, finish, fail)
    if failures:
        raise _incomplete(failures, len(chosen.matrices), resume)
    modules = [rows[matrix.info.name] for matrix in chosen.matrices]
    return SpectralReport(
        modules,
        opened.skipped,
        opened.label,
        accuracy,
        opened.num_parameters,
        opened.unknown_parameters,
        opened.facts,
        options.metrics,
    )


@dataclass(frozen=True, slots=True)
class _Options:
    """The checked options of an analysis, as in `analyze`."""

    accuracy: Accuracy
    threads: int
    keep_eigenvalues: bool
    metrics: tuple[str, ...]


def _analyze_batch(
    batch: Sequence[SourceMatrix],
    options: _Options,
    finish: Callable[[SourceMatrix, ModuleSpectrum], None],
    fail: Callable[[Exception], None],
) -> None:
    """Analyse matrices in parallel, and pass each row to `finish` and each exception to `fail`."""
    loaded = [matrix.load() for matrix in batch]
    randomized = _randomized(loaded, options) if optional_metrics.RANDOMIZED in options.metrics else {}

    def on_result(index: int, outcome: Any) -> None:
        matrix = batch[index]
        # A matrix with values that are not finite fails in every run, so its row records the failure.
        if isinstance(outcome, _core.NumericalError):
            finish(matrix, ModuleSpectrum.failed(matrix.info, str(outcome)))
        elif isinstance(outcome, Exception):
            fail(core_calls.named(outcome, matrix.info.name))
        elif index in randomized and isinstance(randomized[index], Exception):
            fail(core_calls.named(randomized[index], matrix.info.name))
        else:
            finish(matrix, _row(matrix.info, outcome, options, randomized.get(index)))

    keep = options.keep_eigenvalues or bool(options.metrics)
    _core.analyze(loaded, options.accuracy, options.threads, keep, on_result)


def _row(info: MatrixInfo, outcome: Any, options: _Options, randomized: Any) -> ModuleSpectrum:
    """Return the row of a matrix from the results of the core."""
    row = ModuleSpectrum.of(info, *outcome)
    if not options.metrics:
        return row
    assert row.eigenvalues is not None
    row = optional_metrics.with_metrics(row, row.eigenvalues, options.metrics, randomized)
    return row if options.keep_eigenvalues else replace(row, eigenvalues=None)


def _randomized(loaded: Sequence[_core.Matrix], options: _Options) -> dict[int, Any]:
    """Return the spectra of matrices with permuted entries, or exceptions, by index.

    A matrix with values that are not finite fails again in the analysis itself.
    """
    found: dict[int, Any] = {}

    def on_result(index: int, outcome: Any) -> None:
        found[index] = outcome if isinstance(outcome, Exception) else outcome[2]

    copies = list(map(optional_metrics.permuted_matrix, loaded))
    _core.analyze(copies, options.accuracy, options.threads, True, on_result)
    return found


def _incomplete(failures: Sequence[Exception], total: int, journal: str | Path | None) -> Exception:
    """Return the first exception, with the number of failures and the journal added to its message."""
    rest = f"{len(failures)} of {total} matrices failed, and the next run with {journal} tries them again"
    return core_calls.reworded(failures[0], lambda message: f"{message}; {rest}")


def _batches(
    matrices: Callable[[], Iterable[SourceMatrix]], options: _Options
) -> Iterator[Sequence[SourceMatrix]]:
    """Yield batches of matrices that can be read in place, then batches of a lazy matrix per thread.

    Batches of matrices that are copied have a matrix per thread, too.
    """
    most = options.threads if optional_metrics.RANDOMIZED in options.metrics else _BATCH
    direct = (matrix for matrix in matrices() if not matrix.lazy)
    while batch := list(islice(direct, most)):
        yield batch
    lazy = (matrix for matrix in matrices() if matrix.lazy)
    while batch := list(islice(lazy, options.threads)):
        yield batch


def _work(matrix: SourceMatrix) -> int:
    """Return the work for a matrix, in thousands of multiplications."""
    short, long = sorted(matrix.info.shape)
    return max(1, int(np.ceil(short * short * (long + 4 * short) / 1000)))


def _fingerprint(fingerprint: str | None) -> str:
    """Return a fingerprint; raise ValueError if the source has none."""
    if fingerprint is None:
        raise ValueError("resume needs safetensors files on disk, whose content the journal can identify")
    return fingerprint


def _nothing_to_analyse(label: str, available: int, include: naming.Targets, exclude: naming.Targets) -> str:
    if not available:
        return f"{label}: holds no weight matrix"
    selection = f"include={include!r} and exclude={exclude!r}"
    return f"{label}: none of its {available} matrices is selected by {selection}"
