"""The comparison of two models, matrix by matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from lorank import _core
from lorank._internal import core_calls
from lorank._internal.progress import progress_bar, waiting
from lorank._internal.threads import thread_count
from lorank.analysis.pairs import ComparedPair, paired, skipped_tensors
from lorank.modules import naming
from lorank.report.comparison import ComparisonReport, ModuleComparison
from lorank.sources import OPENING, AnySource, open_source
from lorank.statistics.leading_subspaces import LeadingSubspaces, leading_subspaces, power_of_two_scale
from lorank.statistics.principal_angles import principal_angles
from lorank.statistics.spectrum import Accuracy, check_accuracy

DEFAULT_RANK = 8
LARGEST_RANK = 256

# Largest number of pairs that are analysed together if their matrices are read in place.
_BATCH = 64
# Entries of a matrix that are subtracted at a time.
_BLOCK = 1 << 20
# Bound on the error of angles, in degrees, above which a row has a flag.
_UNCERTAIN = 0.01
_ANGLES = ("left_angle_max", "left_angle_mean", "right_angle_max", "right_angle_mean")


def compare(
    a: AnySource,
    b: AnySource,
    *,
    include: naming.Targets = None,
    exclude: naming.Targets = None,
    rank: int = DEFAULT_RANK,
    accuracy: Accuracy = "exact",
    threads: int | None = None,
    progress: bool = True,
) -> ComparisonReport:
    """Compare the weight matrices of two models of one architecture.

    The models may be a base model and its fine-tune, two moments of a training run, or a model before and
    after quantization.

    Parameters
    ----------
    a, b
        The models, as in `analyze`.
    include, exclude
        Modules to select and to leave out, as in `analyze`.
    rank
        Dimension `k` of the compared subspaces, from 1 to 256.
    accuracy
        Arithmetic of the spectra, as in `analyze`. Changes and angles are computed in float64.
    threads
        Largest number of threads of the core; by default all processors that the process may use. The angles
        use the threads of NumPy.
    progress
        True to draw a progress bar on standard error, if that is a terminal.

    Returns
    -------
    ComparisonReport
        A row for each matrix that both models have. Matrices of one model only, and tensors that are not
        matrices, are listed as skipped.

    Raises
    ------
    FileNotFoundError, OSError
        If a model cannot be read.
    FormatError
        If a file is damaged. The message names file, tensor and reason.
    ValueError
        If matrices of one name have different shapes, or the models have no selected matrix in common.
    MemoryError, OSError
        If the system lacks the memory for a matrix, or cannot start threads.

    Notes
    -----
    - The relative change is ``||B - A||_F / ||A||_F``.
    - With the singular value decompositions ``A = U S V^T`` and ``B = U' S' V'^T``, the left angles are the
      principal angles between the first `k` columns of `U` and of `U'`, the right angles those of `V` and
      `V'`, in degrees [ANGLES]. `k` is the smallest of `rank`, the rank of A and the rank of B. If
      ``s_k`` is nearly ``s_{k+1}``, the subspace is ill-conditioned: an angle ``theta`` obeys
      ``sin(theta) <= ||B - A||_2 / (s_k(A) - s_{k+1}(B))`` [WEDIN], and the row's `subspace_gap` is small.
      Equal matrices have angles of 0.
    - Vocabularies: if embeddings or output heads differ only in their number of rows, the rows that both
      models have are compared, as if the other rows did not exist.
    - Names: if no name is equal, because one model holds the other under a prefix such as ``bert``, the
      prefix is dropped.

    Memory is bounded by the largest pair: both matrices in float32 (float64 if stored so), and blocks. Pairs
    of equal matrices are analysed once.

    Examples
    --------
    >>> import numpy as np, lorank
    >>> base = {"mlp.weight": np.diag([3.0, 2.0, 1.0])}
    >>> turned = {"mlp.weight": np.diag([3.0, 2.0, 1.0])[:, [1, 0, 2]]}
    >>> row = lorank.compare(base, turned, rank=1)["mlp"]
    >>> row.left_angle_max, row.right_angle_max, row.stable_rank_change
    (0.0, 90.0, 0.0)
    """
    check_accuracy(accuracy)
    if not 1 <= rank <= LARGEST_RANK:
        raise ValueError(f"rank must be from 1 to {LARGEST_RANK}, not {rank}")
    count = thread_count(threads)
    with waiting(OPENING, enabled=progress):
        sources = open_source(a), open_source(b)
    pairing = paired(*sources, include, exclude)
    rows: dict[str, ModuleComparison] = {}
    total = sum(2 * _work(pair) for pair in pairing.pairs)
    with progress_bar("comparing", total, enabled=progress) as advance:
        for batch in _batches(pairing.pairs, count):
            for row in _compared(batch, rank, accuracy, count, advance):
                rows[row.name] = row
    return ComparisonReport(
        [rows[pair.info.name] for pair in pairing.pairs],
        (*pairing.skipped, *skipped_tensors(*sources, pairing.prefix_a, pairing.prefix_b)),
        sources[0].label,
        sources[1].label,
        pairing.prefix_a.rstrip("."),
        pairing.prefix_b.rstrip("."),
        accuracy,
        rank,
        sources[0].num_parameters,
        sources[0].unknown_parameters,
    )


def _batches(pairs: Sequence[ComparedPair], threads: int) -> Iterator[Sequence[ComparedPair]]:
    """Yield batches of pairs that can be read in place, then batches of a pair per thread."""

    def takes_memory(pair: ComparedPair) -> bool:
        return any(operand.matrix.lazy or operand.rows is not None for operand in (pair.a, pair.b))

    direct = (pair for pair in pairs if not takes_memory(pair))
    while batch := list(islice(direct, _BATCH)):
        yield batch
    lazy = (pair for pair in pairs if takes_memory(pair))
    while batch := list(islice(lazy, threads)):
        yield batch


def _work(pair: ComparedPair) -> int:
    """Return the work for one matrix of a pair, in thousands of multiplications."""
    short, long = sorted(pair.info.shape)
    return max(1, short * short * (long + 4 * short) // 1000)


def _compared(
    batch: Sequence[ComparedPair],
    rank: int,
    accuracy: Accuracy,
    threads: int,
    advance: Callable[[int, str], None],
) -> Iterator[ModuleComparison]:
    """Yield the rows of some pairs."""
    loaded, changes = [], []
    for pair in batch:
        with _naming(pair):
            matrices = pair.a.load(), pair.b.load()
            loaded.append(matrices)
            changes.append(_relative_change(pair.a.oriented(matrices[0]), pair.b.oriented(matrices[1])))
    spectra = _spectra(batch, loaded, changes, accuracy, threads, advance)
    for index, pair in enumerate(batch):
        with _naming(pair):
            row = _row(pair, loaded[index], changes[index], spectra[2 * index : 2 * index + 2], rank)
        yield row
        advance(_work(pair), pair.info.name)


@contextmanager
def _naming(pair: ComparedPair) -> Iterator[None]:
    """Name the module in errors of the block."""
    try:
        yield
    except (_core.LorankError, OSError, MemoryError) as error:
        raise core_calls.named(error, pair.info.name) from error


def _relative_change(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Return ``||B - A||_F / ||A||_F``; NaN if an entry is not finite, infinity if only A is zero."""
    scale = power_of_two_scale(a, b)
    if math.isnan(scale):
        return math.nan
    step = max(1, _BLOCK // max(1, a.shape[1]))
    norms, changes = [], []
    for first in range(0, len(a), step):
        one, other = (np.multiply(x[first : first + step], scale, dtype=np.float64) for x in (a, b))
        norms.append(float(np.square(one).sum()))
        changes.append(float(np.square(other - one).sum()))
    norm, change = math.sqrt(math.fsum(norms)), math.sqrt(math.fsum(changes))
    if change == 0.0:
        return 0.0
    return change / norm if norm > 0.0 else math.inf


def _spectra(
    batch: Sequence[ComparedPair],
    loaded: Sequence[tuple[_core.Matrix, _core.Matrix]],
    changes: Sequence[float],
    accuracy: Accuracy,
    threads: int,
    advance: Callable[[int, str], None],
) -> list[Any]:
    """Return the metrics of A and B of each pair, or the NumericalError of a matrix.

    Equal matrices have one spectrum.
    """
    found: list[Any] = [None] * (2 * len(batch))
    todo = [i for i in range(2 * len(batch)) if not (i % 2 and changes[i // 2] == 0.0)]

    def on_result(position: int, outcome: Any) -> None:
        pair, index = batch[todo[position] // 2], todo[position]
        if isinstance(outcome, Exception) and not isinstance(outcome, _core.NumericalError):
            raise core_calls.named(outcome, pair.info.name)
        found[index] = outcome if isinstance(outcome, Exception) else outcome[1]
        advance(_work(pair) // 2, pair.info.name)

    _core.analyze([loaded[i // 2][i % 2] for i in todo], accuracy, threads, False, on_result)
    return [found[i - 1] if x is None else x for i, x in enumerate(found)]


def _row(
    pair: ComparedPair,
    loaded: tuple[_core.Matrix, _core.Matrix],
    change: float,
    spectra: Sequence[Any],
    rank: int,
) -> ModuleComparison:
    """Return the row of a pair."""
    identity: dict[str, Any] = {
        "name": pair.info.name,
        "module": pair.info.module,
        "kind": pair.info.kind,
        "shape": pair.info.shape,
        "dtype_a": pair.a.matrix.info.dtype,
        "dtype_b": pair.b.matrix.info.dtype,
    }
    failures = tuple(
        f"{side}: {outcome}"
        for side, outcome in zip("AB", spectra, strict=True)
        if isinstance(outcome, Exception)
    )
    if failures:
        return ModuleComparison(**identity, flags=(*pair.flags, *failures))
    numbers = {
        f"{name}_{side}": metrics[name]
        for name in ("alpha_hill", "mp_spikes", "stable_rank")
        for side, metrics in zip("ab", spectra, strict=True)
    }
    zeros = tuple(
        f"{side}: zero matrix"
        for side, metrics in zip("AB", spectra, strict=True)
        if metrics["num_nonzero"] == 0
    )
    common = min(rank, *(metrics["num_nonzero"] for metrics in spectra))
    angles, flags = _angles(pair, loaded, change, common)
    flags = (*pair.flags, *zeros, *flags)
    return ModuleComparison(**identity, relative_change=change, **numbers, **angles, flags=flags)


def _angles(
    pair: ComparedPair, loaded: tuple[_core.Matrix, _core.Matrix], change: float, rank: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the fields of a row about its subspaces, and flags."""
    if rank == 0:
        return {"subspace_rank": 0}, ()
    if change == 0.0:
        return {"subspace_rank": rank, **dict.fromkeys(_ANGLES, 0.0)}, ()
    a = leading_subspaces(pair.a.oriented(loaded[0]), rank)
    b = leading_subspaces(pair.b.oriented(loaded[1]), rank)
    left, right = principal_angles(a.left, b.left), principal_angles(a.right, b.right)
    error = min(90.0, a.error + b.error)
    flags = () if error <= _UNCERTAIN else (_uncertain(rank, error, a, b),)
    return {
        "subspace_rank": rank,
        "subspace_gap": min(a.gap, b.gap),
        "left_angle_max": float(left.max()),
        "left_angle_mean": float(left.mean()),
        "right_angle_max": float(right.max()),
        "right_angle_mean": float(right.mean()),
    }, flags


def _uncertain(rank: int, error: float, a: LeadingSubspaces, b: LeadingSubspaces) -> str:
    side = "A" if a.gap < b.gap else "B"
    return (
        f"singular values {rank} and {rank + 1} of {side} are nearly equal: "
        f"angles may be wrong by {error:.2g} degrees"
    )
