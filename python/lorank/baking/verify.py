"""Checks that a model holds the updates of adapters, by adding them to the base model again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lorank import _core
from lorank._core import Matrix, UpdatedMatrix
from lorank._internal import core_calls
from lorank._internal.progress import progress_bar, waiting
from lorank._internal.threads import thread_count
from lorank.adapters.content import AdapterContent
from lorank.baking.bake import checked_weights, loaded_adapters
from lorank.baking.checkpoint import StoredModel, StoredTensor, open_model
from lorank.baking.matching import matched
from lorank.baking.plan import Change, plan
from lorank.baking.rounding_limits import wrong_rows
from lorank.sources import OPENING

Status = Literal["holds", "lost", "differs", "unknown"]

# Largest distance to the expected values, relative to the update, of a tensor that holds it. Products in 16
# bits have errors of a hundredth. Each row has a limit of its own, too.
_TOLERANCE = 0.1
# Least share of the update's energy that rounding must leave, so that its absence is no effect of rounding.
_VISIBLE = 1e-4
# Largest difference of a packed weight in ulp, because libraries round scales and products to 16 bits.
_DECODED = 2.0


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """The comparison of one tensor with its expected values.

    Attributes
    ----------
    name
        The name of the tensor in the base model.
    modules
        The modules whose updates the tensor should hold; empty for other tensors.
    status
        ``"holds"`` the expected values up to rounding, ``"lost"``: equal to the base model, ``"differs"``
        from both, or ``"unknown"``.
    relative_error
        Norm of the difference from the exact values, relative to the norm of the update; None without one.
    largest_error
        Largest difference in units of the last place of the stored type; None if it is unknown.
    share
        The factor of the update that the tensor holds: 1 if it holds the update, 0 if the update is lost.
    reason
        The reason for a status other than ``"holds"``.
    wrong_rows
        Number of rows that differ from the expected values by more than rounding can; None if they were not
        counted.
    """

    name: str
    modules: tuple[str, ...]
    status: Status
    relative_error: float | None = None
    largest_error: float | None = None
    share: float | None = None
    reason: str = ""
    wrong_rows: int | None = None


@dataclass(frozen=True, slots=True)
class Verification:
    """The comparison of a model with its base model and the updates of adapters.

    Attributes
    ----------
    tensors
        The tensors that should hold an update, or be replaced.
    others
        The tensors without an update whose values changed, or that are missing.
    unchanged
        Number of tensors without an update that are equal to the base model's.
    notes
        Remarks on shared weights and new tensors.
    """

    tensors: tuple[TensorCheck, ...]
    others: tuple[TensorCheck, ...]
    unchanged: int
    notes: tuple[str, ...] = field(default=())

    @property
    def status(self) -> Status:
        """The status of the worst tensor."""
        found = {check.status for check in (*self.tensors, *self.others)}
        order: tuple[Status, ...] = ("lost", "differs", "unknown")
        return next((status for status in order if status in found), "holds")


def verify(
    base: str | Path,
    adapters: Sequence[AdapterContent | str | Path] | AdapterContent | str | Path,
    baked: str | Path,
    weights: Sequence[float] | None = None,
    *,
    threads: int | None = None,
    progress: bool = True,
) -> Verification:
    """Check that a model is its base model with the updates of adapters.

    Parameters
    ----------
    base, adapters, weights
        The base model, the adapters and their weights, as in `bake`.
    baked
        The model to check: a safetensors file, a folder or a hub id, written by any program.
    threads, progress
        As in `bake`.

    Returns
    -------
    Verification
        The comparison of every tensor with its expected values.

    Raises
    ------
    FormatError
        If a module of an adapter is not in the base model, or files are damaged.
    ValueError
        If an adapter is no change of weights.

    Notes
    -----
    A tensor holds an update if it differs from the base weight plus the update, rounded once to the stored
    type, by at most a tenth of the update's norm, and no row differs by more than rounding can. An element
    may differ from the exact sum by half a unit in the last place (ulp) of the weight for each adapter and
    for the base weight, and by ``4 u + r 2^-24`` times ``sum |weight scaling| |B| |A|``; ``u`` is the
    relative rounding of the stored type, and ``r`` the rank. A merge by PEFT in that type stays below this
    limit. Where updates are smaller than an ulp, a row must also hold most of the changes that rounding
    leaves, if there are at least 16. A tensor has lost the update if it differs from the base weight by at
    most a tenth of the update's norm. If rounding leaves nothing of the update, the status is ``"unknown"``.

    NumPy computes the limits, and repeats some rows of every tensor; this does not use the core's kernel.

    Examples
    --------
    >>> import tempfile
    >>> import peft, safetensors.numpy, torch
    >>> import lorank
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     values = {name: x.numpy() for name, x in model.state_dict().items()}
    ...     safetensors.numpy.save_file(values, f"{folder}/model.safetensors")
    ...     config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    ...     peft.get_peft_model(model, config).save_pretrained(f"{folder}/adapter")
    ...     base, adapter = f"{folder}/model.safetensors", f"{folder}/adapter"
    ...     _ = lorank.bake(base, adapter, f"{folder}/baked", progress=False)
    ...     held = lorank.verify(base, adapter, f"{folder}/baked", progress=False)
    ...     lost = lorank.verify(base, adapter, base, progress=False)
    >>> held.status, lost.status, lost.tensors[0].modules
    ('holds', 'lost', ('0',))
    """
    loaded = loaded_adapters(adapters)
    shares = checked_weights(loaded, weights)
    count = thread_count(threads)
    with waiting(OPENING, enabled=progress):
        model, other = open_model(base), open_model(baked)
        changes = plan(model, loaded, shares)
        found = matched(model, other)
    # Parts of packed weights that the other model stores plain.
    lost = model.parts([w for w in model.codes if w in found and not found[w].is_decoded])
    checks: list[TensorCheck] = []
    others: list[TensorCheck] = []
    unchanged = 0
    total = sum(math.prod(tensor.shape) for tensor in model.tensors.values())
    with progress_bar("verifying", total, enabled=progress) as advance:
        for name in [*model.tensors, *(name for name in changes.changes if name not in model.tensors)]:
            change = changes.changes.get(name)
            place = found.get(name) or other.tensors.get(name)
            if place is None and name in lost:
                continue
            if change is not None:
                checks.append(_changed(name, change, place, other, count))
            elif (check := _unchanged(model.tensors[name], place, model, count)) is not None:
                others.append(check)
            else:
                unchanged += 1
            if name in model.tensors:
                advance(math.prod(model.tensors[name].shape), name)
    return Verification(tuple(checks), tuple(others), unchanged, tuple(changes.notes))


def _changed(
    name: str, change: Change, found: StoredTensor | None, other: StoredModel, threads: int
) -> TensorCheck:
    """Compare a tensor that should hold an update."""
    modules = tuple(change.modules)
    if reason := _unreadable(found, other, change.full_shape):
        differs = found is not None and found.is_float and found.shape != change.full_shape
        return TensorCheck(name, modules, "differs" if differs else "unknown", reason=reason)
    assert found is not None
    if change.is_copy:
        return _replaced(name, change, found, threads)
    rows, cols = change.shape
    sums = _sums(change.matrices, found, (rows, cols), threads)
    check = _judged(name, modules, sums)
    if check.status not in ("holds", "differs") or not sums["update"] or check.largest_error is None:
        return check
    wrong = wrong_rows(change, found, sample=sums["exact"] == sums["elements"])
    if not wrong.rows:
        return replace(check, wrong_rows=0)
    of = f"{wrong.rows} of {change.count * rows} rows"
    reason = f"{of} differ by more than rounding can, the first at {wrong.first}"
    reason = f"{check.reason}; {reason}" if check.reason else reason
    return replace(check, status="differs", reason=reason, wrong_rows=wrong.rows)


def _judged(name: str, modules: tuple[str, ...], sums: dict[str, float]) -> TensorCheck:
    """Return the check of a tensor from the sums over its elements."""
    update, visible = sums["update"], sums["rounded_update"]
    error = math.sqrt(sums["error"] / update) if update else None
    if not all(map(math.isfinite, sums.values())):
        return TensorCheck(name, modules, "differs", reason="the tensor holds NaN or infinite values")
    largest = sums["largest_error"]
    if visible == 0:
        if sums["rounded_error"] == 0:
            reason = "rounding to the stored type leaves nothing of the update"
            return TensorCheck(
                name,
                modules,
                "unknown" if update else "holds",
                error,
                largest,
                reason=reason if update else "",
            )
        return TensorCheck(
            name, modules, "differs", error, largest, reason="the values differ from the base weight"
        )
    share = sums["overlap"] / visible
    if math.sqrt(sums["rounded_error"] / visible) <= _TOLERANCE:
        return TensorCheck(name, modules, "holds", error, largest, share)
    if math.sqrt(sums["change"] / visible) <= _TOLERANCE:
        if visible < _VISIBLE * update:
            reason = "rounding to the stored type leaves next to nothing of the update"
            return TensorCheck(name, modules, "unknown", error, largest, share, reason)
        return TensorCheck(
            name, modules, "lost", error, largest, share, "the values are those of the base model"
        )
    rest = sums["change"] - share * share * visible
    if rest <= (_TOLERANCE * share) ** 2 * visible:
        reason = f"the values hold {share:.3g} times the update"
    else:
        reason = "the values are neither those of the base model nor those with the update"
    return TensorCheck(name, modules, "differs", error, largest, share, reason)


def _replaced(name: str, change: Change, found: StoredTensor, threads: int) -> TensorCheck:
    """Compare a tensor that an adapter saves."""
    assert change.saved is not None
    shape = found.matrix_shape
    saved = Change(change.tensor, change.saved, shape=shape)
    sums = _sums(saved.matrices, found, shape, threads)
    if sums["rounded_error"] == 0:
        return TensorCheck(name, (), "holds", None, sums["largest_error"])
    if change.tensor is not None and change.tensor.shape == found.shape:
        base = Change(change.tensor, shape=shape)
        if _sums(base.matrices, found, shape, threads)["rounded_error"] == 0:
            reason = "the values are those of the base model, not those that the adapter saves"
            return TensorCheck(name, (), "lost", None, sums["largest_error"], reason=reason)
    reason = "the values are not those that the adapter saves"
    return TensorCheck(name, (), "differs", None, sums["largest_error"], reason=reason)


def _unchanged(
    tensor: StoredTensor, found: StoredTensor | None, model: StoredModel, threads: int
) -> TensorCheck | None:
    """Compare a tensor without an update; return None if it is equal to the base model's."""
    name = tensor.name
    if found is None:
        if model.config.content.get("tie_word_embeddings") and name.endswith("lm_head.weight"):
            return None
        return TensorCheck(name, (), "unknown", reason="the model holds no such tensor")
    if found.shape != tensor.shape:
        reason = f"the shape is {list(found.shape)}, not {list(tensor.shape)}"
        return TensorCheck(name, (), "differs", reason=reason)
    is_exact = tensor.is_decoded or not tensor.is_float or tensor.dtype.startswith("F8")
    if found.dtype == tensor.dtype and is_exact:
        same = tensor.content() == found.content()
        return None if same else TensorCheck(name, (), "differs", reason="the stored bytes differ")
    if not (found.is_float and tensor.is_float) or found.is_decoded or found.dtype.startswith("F8"):
        reason = f"{found.dtype} values are not compared with {tensor.dtype} values"
        return TensorCheck(name, (), "unknown", reason=reason)
    shape = tensor.matrix_shape
    sums = _sums(Change(tensor, shape=shape).matrices, found, shape, threads)
    if sums["rounded_error"] == 0 or (tensor.is_decoded and sums["largest_error"] <= _DECODED):
        return None
    count = int(sums["elements"] - sums["exact"])
    reason = f"{count} of {int(sums['elements'])} values changed, although no adapter changes this tensor"
    return TensorCheck(name, (), "differs", None, sums["largest_error"], reason=reason)


def _unreadable(found: StoredTensor | None, other: StoredModel, shape: tuple[int, ...]) -> str:
    """Return the reason why a tensor cannot be compared; empty if it can."""
    if found is None:
        return "the model holds no such tensor"
    if (reason := other.packing.reason(found.name)) is not None:
        return f"the tensor is {reason}"
    if found.is_decoded:
        return f"the tensor is packed ({found.dtype}): compare the model before it is quantized"
    if not found.is_float or found.dtype.startswith("F8"):
        return f"{found.dtype} values are not compared"
    if found.shape != shape:
        return f"the shape is {list(found.shape)}, not {list(shape)}"
    return ""


def _sums(
    expected: Callable[[], Iterator[UpdatedMatrix]],
    found: StoredTensor,
    shape: tuple[int, int],
    threads: int,
) -> dict[str, float]:
    """Compare all matrices of a tensor; return the sums over its elements."""
    total: dict[str, float] = {}
    batch: list[tuple[UpdatedMatrix, Matrix]] = []

    def add(pairs: list[tuple[UpdatedMatrix, Matrix]]) -> None:
        results: list[dict[str, Any]] = core_calls.collect(
            lambda receive: _core.compare(pairs, threads, receive), lambda _: found.name
        )
        for result in results:
            for key, value in result.items():
                total[key] = (
                    max(total.get(key, 0), value) if key == "largest_error" else total.get(key, 0) + value
                )

    for index, matrix in enumerate(expected()):
        batch.append((matrix, found.matrix(*shape, index)))
        if len(batch) == threads:
            add(batch)
            batch = []
    if batch or not total:
        add(batch)
    return {key: total.get(key, 0.0) for key in _KEYS}


_KEYS = (
    "elements",
    "update",
    "rounded_update",
    "change",
    "overlap",
    "rounded_error",
    "error",
    "rounding",
    "exact",
    "unchanged",
    "largest_error",
)
