"""From a source to a report: every matrix analysed, in parallel and in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from lorank import _core
from lorank._internal import core_calls
from lorank._internal.progress import progress_bar, waiting
from lorank._internal.threads import thread_count
from lorank.analysis.journal import Journal
from lorank.modules import naming
from lorank.report import ModuleSpectrum, SpectralReport
from lorank.sources import OPENING, AnySource, SourceMatrix, open_source
from lorank.statistics.spectrum import Accuracy, check_accuracy


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
) -> SpectralReport:
    """Spectral metrics of every weight matrix of a model.

    Parameters
    ----------
    source
        A safetensors file, a shard index, a folder of shards; a ``.bin``, ``.pt`` or ``.pth`` state
        dict; a hub id (``name`` or ``name@revision``, the local cache first); a mapping name ->
        array; a live ``torch.nn.Module``.
    include, exclude
        Which modules: a list of names or suffixes, or one regular expression for whole names,
        exactly as PEFT reads ``target_modules``.
    accuracy
        ``"exact"``: float64 arithmetic. ``"fast"``: float32 for the Gram matrices and their reduction,
        float64 again for a matrix whose error bounds would not hold the exponent to 1e-3 and the
        spikes to 1, or of whose eigenvalues more than one in 32 could be zero, and for those that are 32
        times as long as wide, as tables of embeddings are. The rows tell which
        (`accuracy`), and the bounds. ``"sampled"``: estimates by stochastic Lanczos quadrature where
        both sides are 2048 or more, ``"fast"`` elsewhere: a tenth of the time at 8192x8192. The exponent
        and the spikes come with error bars (`alpha_hill_error`, `mp_spikes_error`) that covered the exact
        values of 98 % of the matrices of two real models; the other metrics come without, and kept
        eigenvalues are quantiles.
    threads
        At most so many (default: all that the process may use). The numbers do not depend on it.
    resume
        A journal file: every finished matrix is written there, and a run that finds one goes on
        where it ended. For sources on disk. With a journal, a lack of memory or a defect met by one matrix
        does not stop the others: the run raises at its end, and the next run tries that matrix again.
    progress
        Draw a progress bar on standard error, if that is a terminal.
    keep_eigenvalues
        Keep each matrix's spectrum in its row.

    Returns
    -------
    SpectralReport
        One row a matrix (one per expert of a stack), and what was skipped and why. A matrix with
        NaN or infinite values has a row with a flag and no numbers.

    Raises
    ------
    FileNotFoundError, OSError
        If the source cannot be read.
    FormatError
        If a file is damaged; the message names file, tensor and reason.
    ValueError
        If nothing is left to analyse, or the journal belongs to another run.
    MemoryError, OSError
        If the system has no memory for a matrix, or does not start threads; fewer `threads` need less of
        both.
    LorankError
        If the analysis of a matrix meets a defect of lorank. The message asks to report it.

    Notes
    -----
    Memory: per thread one matrix as stored, plus about ``p^2 + 700 p`` float64 numbers with
    ``p = min(out, in)``. Matrices so large that a core needs some seconds for them are
    done one at a time by all threads together. ``accuracy="sampled"`` takes ``out * in`` float32
    numbers instead.
    """
    check_accuracy(accuracy)
    count = thread_count(threads)
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
            identity = {"fingerprint": _fingerprint(chosen.fingerprint), "keep_eigenvalues": keep_eigenvalues}
            journal = stack.enter_context(Journal(Path(resume), {**identity, "accuracy": accuracy}))
            rows |= journal.finished
        todo = [matrix for matrix in chosen.matrices if matrix.info.name not in rows]
        total = sum(_work(matrix) for matrix in todo)
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

        for batch in _batches(todo, count):
            _analyze_batch(batch, accuracy, count, keep_eigenvalues, finish, fail)
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
    )


def _analyze_batch(
    batch: Sequence[SourceMatrix],
    accuracy: Accuracy,
    threads: int,
    keep_eigenvalues: bool,
    finish: Callable[[SourceMatrix, ModuleSpectrum], None],
    fail: Callable[[Exception], None],
) -> None:
    def on_result(index: int, outcome: Any) -> None:
        matrix = batch[index]
        # Only a property of the numbers is a result: it would be the same in any other run.
        if isinstance(outcome, _core.NumericalError):
            finish(matrix, ModuleSpectrum.failed(matrix.info, str(outcome)))
        elif isinstance(outcome, Exception):
            fail(core_calls.named(outcome, matrix.info.name))
        else:
            finish(matrix, ModuleSpectrum.of(matrix.info, *outcome))

    _core.analyze([matrix.load() for matrix in batch], accuracy, threads, keep_eigenvalues, on_result)


def _incomplete(failures: Sequence[Exception], total: int, journal: str | Path | None) -> Exception:
    """Return the first exception, whose message also counts the others and names the journal."""
    rest = f"{len(failures)} of {total} matrices failed, and the next run with {journal} tries them again"
    return core_calls.reworded(failures[0], lambda message: f"{message}; {rest}")


def _batches(matrices: Sequence[SourceMatrix], threads: int) -> Iterator[Sequence[SourceMatrix]]:
    """All matrices that cost no memory before they are read, then the lazy ones, a few at a time."""
    direct = [matrix for matrix in matrices if not matrix.lazy]
    if direct:
        yield direct
    lazy = [matrix for matrix in matrices if matrix.lazy]
    for first in range(0, len(lazy), threads):
        yield lazy[first : first + threads]


def _work(matrix: SourceMatrix) -> int:
    """Arithmetic that a matrix takes, in thousands of multiplications."""
    short, long = sorted(matrix.info.shape)
    return max(1, int(np.ceil(short * short * (long + 4 * short) / 1000)))


def _fingerprint(fingerprint: str | None) -> str:
    if fingerprint is None:
        raise ValueError("resume needs safetensors files on disk: only their content can be recognised again")
    return fingerprint


def _nothing_to_analyse(label: str, available: int, include: naming.Targets, exclude: naming.Targets) -> str:
    if not available:
        return f"{label}: holds no weight matrix"
    return f"{label}: none of its {available} matrices is left by include={include!r} and exclude={exclude!r}"
