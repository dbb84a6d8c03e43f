"""Assembles a source from the tensors of a checkpoint, under the names that the loaded model gives them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from lorank._core import Matrix
from lorank.modules import naming
from lorank.modules.building import Unknown
from lorank.modules.description import Description
from lorank.modules.facts import ModelFacts
from lorank.modules.loading import Conversion, Placement
from lorank.modules.model_config import ModelConfig
from lorank.modules.skeleton import Skeleton
from lorank.sources import arrays, guesses
from lorank.sources.base import Skipped, Source, SourceMatrix
from lorank.sources.matrix_sequences import Chained, Mapped
from lorank.sources.packing import Packing, total
from lorank.sources.quantization import Quantization
from lorank.sources.stored_tensors import StoredTensors
from lorank.sources.tensor_matrices import MatrixFinder, MatrixSlice, has_spectrum, matrices_of, type_name


def assemble(
    label: str,
    tensors: StoredTensors,
    config: ModelConfig,
    describe: Callable[[Mapping[str, tuple[int, ...]]], Description | Unknown],
) -> Source:
    """Open a source that reads a checkpoint's tensors.

    Parameters
    ----------
    label
        The name of the source in tables and reports.
    tensors
        The tensors of the checkpoint.
    config
        The model's configuration.
    describe
        A function that describes the model, given the shapes of the tensors that are not packed.
    """
    quantization = Quantization(config.quantization)
    packing = Packing(tensors.entries(), quantization, tensors.content, tensors.metadata)
    tensors = tensors.decoded(packing, quantization)
    entries = tensors.entries()
    plain = {name: shape for name, (_, shape) in entries.items() if packing.reason(name) is None}
    found = describe(plain)
    if isinstance(found, Unknown):
        return _by_names(label, tensors, config, packing, found)
    model, placement = found.skeleton, found.placement
    if misfit := placement.misfit(plain, model):
        unknown = Unknown(f"{config.origin} describes a {model.label}, whose {misfit}", is_foreign=True)
        return _by_names(label, tensors, config, packing, unknown)
    return _by_skeleton(label, tensors, config, packing, model, placement)


def _by_names(
    label: str, tensors: StoredTensors, config: ModelConfig, packing: Packing, unknown: Unknown
) -> Source:
    """Open a source for an unknown model, guessing modules from the names and shapes of tensors."""
    entries = tensors.entries()
    shapes = {name: shape for name, (_, shape) in entries.items()}
    finder = MatrixFinder(shapes, config, has_packed=bool(packing.codes))
    matrices: list[Sequence[SourceMatrix]] = []
    skipped: list[Skipped] = []
    counts: list[int | str] = []
    for name, (_, shape) in entries.items():
        if owner := tensors.shared_with(name):
            skipped.append(Skipped(name, shape, f"tied to {owner}"))
            continue
        counts.append(packing.parameters(name))
        if reason := packing.reason(name):
            skipped.append(Skipped(name, shape, reason))
        else:
            _sort_out(tensors, finder, name, matrices, skipped)
    num_parameters, unknown_parameters = total(counts)
    return Source(
        label,
        _ordered(matrices) if tensors.is_unordered else Chained(matrices),
        tuple(skipped),
        num_parameters,
        unknown_parameters=unknown_parameters,
        facts=ModelFacts(
            doubts=guesses.doubts(shapes, unknown), reason="" if unknown.is_foreign else unknown.reason
        ),
        skipped_values=_rows(tensors, skipped),
    )


def _by_skeleton(
    label: str,
    tensors: StoredTensors,
    config: ModelConfig,
    packing: Packing,
    model: Skeleton,
    placement: Placement,
) -> Source:
    """Open a source for a known model."""
    entries = tensors.entries()
    shapes = {name: shape for name, (_, shape) in entries.items()}
    described = {name: model.weights[to] for name, to in placement.renamed.items() if to in model.weights}
    finder = MatrixFinder(shapes, config, described, bool(packing.codes))
    matrices: list[Sequence[SourceMatrix]] = []
    skipped: list[Skipped] = []
    copies = _copies(tensors, model, placement)
    for name, (_, shape) in entries.items():
        if owner := tensors.shared_with(name) or copies.get(name):
            skipped.append(Skipped(name, shape, f"tied to {owner}"))
        elif reason := packing.reason(name):
            skipped.append(Skipped(name, shape, reason))
        elif name in placement.strangers:
            skipped.append(Skipped(name, shape, placement.strangers[name]))
        elif name in described:
            _sort_out(tensors, finder, name, matrices, skipped)
        elif name in placement.renamed:
            skipped.append(Skipped(name, shape, "a buffer of the model"))
    for conversion in placement.conversions:
        matrices += _converted(tensors, conversion, model)
    facts = model.facts({part[0].info.module for part in Chained(matrices).parts})
    plain = {to: shapes[name] for name, to in placement.renamed.items() if packing.reason(name) is None}
    return Source(
        label,
        _ordered(matrices),
        tuple(skipped),
        model.num_parameters(plain),
        facts=facts,
        skeleton=model,
        skipped_values=_rows(tensors, skipped),
    )


def _ordered(matrices: Sequence[Sequence[SourceMatrix]]) -> Chained[SourceMatrix]:
    """Sort the matrices of parameters by name, and numbers in names by value: files list 10 before 2."""
    parts = Chained(matrices).parts
    return Chained(sorted(parts, key=lambda part: naming.natural_key(part[0].info.name)))


def _sort_out(
    tensors: StoredTensors,
    finder: MatrixFinder,
    name: str,
    matrices: list[Sequence[SourceMatrix]],
    skipped: list[Skipped],
) -> None:
    """Add a tensor's matrices to `matrices`, or add the tensor and the reason to `skipped`."""
    dtype, shape = tensors.entries()[name]
    found = finder.matrices(name, dtype)
    if isinstance(found, str):
        skipped.append(Skipped(name, shape, found))
        return
    lazy = tensors.is_lazy(name)

    def matrix(m: MatrixSlice) -> SourceMatrix:
        values = partial(tensors.matrix, name, m.rows, m.cols, m.index)
        return SourceMatrix(m.info, values, lazy=lazy, transposed=m.transposed, kernel=m.kernel)

    matrices.append(Mapped(matrix, found) if len(found) > 1 else [matrix(m) for m in found])


def _rows(tensors: StoredTensors, skipped: Iterable[Skipped]) -> dict[str, Callable[[], Matrix]]:
    """Return functions that read skipped tensors as one row each, by name.

    Tied, empty and non-float tensors are left out.
    """
    entries = tensors.entries()
    return {
        entry.name: partial(tensors.matrix, entry.name, 1, size)
        for entry in skipped
        if not entry.is_tied and (size := math.prod(entry.shape)) > 0 and has_spectrum(entries[entry.name][0])
    }


def _copies(tensors: StoredTensors, model: Skeleton, placement: Placement) -> dict[str, str]:
    """Map the name of each stored copy of a tied tensor to the name of the original.

    transformers ties two stored tensors only if they are equal.
    """
    by_owner: dict[str, list[str]] = defaultdict(list)
    for name, target in placement.renamed.items():
        if target in model.weights:
            by_owner[model.owners.get(target, target)].append(name)
    found = {}
    for names in by_owner.values():
        ordered = sorted(names, key=lambda name: placement.renamed[name] in model.owners)
        for name in ordered[1:]:
            if tensors.shared_with(name) is None and tensors.are_equal(ordered[0], name):
                found[name] = ordered[0]
    return found


def _converted(
    tensors: StoredTensors, conversion: Conversion, model: Skeleton
) -> Iterator[Sequence[SourceMatrix]]:
    """Yield the matrices of parameters whose values are computed from several tensors on reading."""
    dtype = tensors.entries()[conversion.names[0]][0]
    if not has_spectrum(dtype):
        return
    for name, weight in model.weights.items():
        if name not in conversion.targets:
            continue
        found = matrices_of(weight, weight.shape, type_name(dtype))
        if not isinstance(found, str):
            yield Mapped(partial(_converted_matrix, tensors, conversion, name), found)


def _converted_matrix(
    tensors: StoredTensors, conversion: Conversion, name: str, m: MatrixSlice
) -> SourceMatrix:
    part = m.info.expert if conversion.by_expert else None
    values = partial(_computed, tensors, conversion, name, part, m.index, m.rows, m.cols)
    return SourceMatrix(m.info, values, lazy=True, transposed=m.transposed, kernel=m.kernel)


def _computed(
    tensors: StoredTensors,
    conversion: Conversion,
    parameter: str,
    part: int | None,
    index: int,
    rows: int,
    cols: int,
) -> Matrix:
    """Return a matrix of a converted parameter. If `part` is given, convert only this expert's tensors."""
    import torch

    def fetch(name: str, expert: int | None) -> Any:
        shape = tensors.entries()[name][1]
        if expert is None:
            flat = tensors.matrix(name, 1, math.prod(shape)).to_array()
            return torch.from_numpy(flat).reshape(shape)
        one = tensors.matrix(name, shape[1], shape[2], expert).to_array()
        return torch.from_numpy(one).unsqueeze(0)

    value = conversion.run(fetch, part)[parameter]
    if value.ndim == 3 and tuple(value.shape[1:]) == (rows, cols):
        value = value[index if part is None else 0]
    return arrays.matrix(value.reshape(rows, cols).contiguous())
