"""The truncated difference of two models as an adapter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lorank import _core
from lorank._internal.progress import waiting
from lorank._internal.threads import thread_count
from lorank.adapters.content import AdapterContent
from lorank.compression import twins
from lorank.compression.difference import DEFAULT_MAX_RANK, MatrixPair, difference_forms
from lorank.compression.knobs import checked_knobs, with_counted_budget
from lorank.compression.spectral_form import SpectralForm
from lorank.compression.truncation import truncated
from lorank.modules import naming
from lorank.peft_format.target_expressions import accidental_matches
from lorank.sources import OPENING, AnySource, Source, open_source
from lorank.sources.guesses import doubtful
from lorank.sources.shared_weights import by_name


def extract(
    base: AnySource,
    tuned: AnySource,
    knobs: Mapping[str, object],
    *,
    include: naming.Targets,
    exclude: naming.Targets,
    prefix: str,
    guess: bool,
    threads: int | None,
    progress: bool,
) -> AdapterContent:
    """Return the best adapter of given ranks for the difference of two models; see `lorank.extract`."""
    if knobs.get("rank_ratio") is not None:
        raise ValueError("rank_ratio has no meaning for a dense difference: use avg_rank, energy or budget")
    given = {"max_rank": DEFAULT_MAX_RANK, **{k: v for k, v in knobs.items() if v is not None}}
    # This check precedes the opening of files and does not depend on the size of the base model.
    checked_knobs(with_counted_budget(given, 0))
    with waiting(OPENING, enabled=progress):
        before, after = open_source(base), open_source(tuned)
    chosen = checked_knobs(with_counted_budget(given, before.num_parameters, before.unknown_parameters))
    if before.facts.doubts and not guess:
        raise ValueError(doubtful(before.label, before.facts, "extract"))
    pairs, notes = _pairs(before.select(include, exclude), after.select(include, exclude))
    notes += [*_other_changes(before, after), *_unmatched(exclude, before, after)]
    notes += _naming_notes(before, prefix)
    assert chosen.max_rank is not None
    computed = difference_forms(pairs, chosen.max_rank, thread_count(threads), progress)
    if all(form.energy == 0 for form in computed):
        raise ValueError(f"{before.label} and {after.label}: no selected matrix differs")
    forms, tying, more = _held(computed, before, exclude, prefix)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": _name_of(base),
        "task_type": None,
        **_targets(forms, before, prefix),
        **tying,
    }
    modules = {form.module.name: form.module for form in forms}
    label = f"{after.label} - {before.label}"
    total = AdapterContent(modules, config, notes=[*notes, *more], label=label)
    return truncated(total, forms, chosen, f"extract {label}, {chosen}", threads)


def _held(
    computed: Sequence[SpectralForm], before: Source, exclude: naming.Targets, prefix: str
) -> tuple[list[SpectralForm], dict[str, Any], list[str]]:
    """Return the forms that an adapter can hold, PEFT's setting that ties them, and notes."""
    held, refused = _without_refused(computed, before)
    found, copies = (held, []) if before.skeleton else _without_copies(held)
    every, tying, tied = twins.added(found, before, exclude)
    return [_renamed(form, prefix) for form in every], tying, [*refused, *copies, *tied]


def _targets(forms: Sequence[SpectralForm], before: Source, prefix: str) -> dict[str, Any]:
    """Return PEFT's settings that select exactly the modules; empty if the model's names are unknown."""
    if before.skeleton is None or prefix:
        return {}
    names = [form.module.name for form in forms if form.module.kind != "expert"]
    chosen = set(names)
    others = [name for name in before.skeleton.modules if name not in chosen]
    return {"target_modules": names, "exclude_modules": accidental_matches(names, others)}


def _name_of(base: AnySource) -> str | None:
    """Return the path or hub id of the base model; None for a model in memory that has no name."""
    if isinstance(base, (str, Path)):
        return str(base)
    name = getattr(base, "name_or_path", None)
    return name if isinstance(name, str) and name else None


def _renamed(form: SpectralForm, prefix: str) -> SpectralForm:
    name = ".".join(part for part in (prefix.strip("."), form.module.name) if part)
    return replace(form, module=replace(form.module, name=name))


def _unmatched(exclude: naming.Targets, *sources: Source) -> list[str]:
    """Return notes on entries of `exclude` that match no module and are probably misspelt."""
    names = {matrix.info.module for source in sources for matrix in source.matrices}
    names = names.union(*(others for source in sources for others in source.facts.ties.values()))
    if isinstance(exclude, str):
        unmatched = [] if any(map(naming.matcher(exclude, "exclude"), names)) else [exclude]
    else:
        unmatched = naming.unknown(exclude or (), names)
    return [f"exclude={entry!r} matches no module" for entry in unmatched]


def _naming_notes(before: Source, prefix: str) -> list[str]:
    model = f"the {before.facts.class_name} of {before.label}" if before.skeleton else before.label
    names = f"modules are named as in {model}{f' with the prefix {prefix!r}' if prefix else ''}"
    advice = "" if prefix else "; otherwise, give a prefix"
    note = f"{names}: PEFT finds them only in a model with these names{advice}"
    return [note, *([before.facts.remark] if before.facts.remark else [])]


def _without_refused(forms: Sequence[SpectralForm], before: Source) -> tuple[list[SpectralForm], list[str]]:
    """Return the forms of modules that PEFT can adapt, and notes on other changed modules.

    Raises
    ------
    ValueError
        If PEFT can adapt none of the changed modules.
    """
    refused = twins.refused(before)
    changed = [form.module.name for form in forms if form.module.name in refused and form.energy > 0]
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name in changed:
        by_reason[refused[name]].append(name)
    notes = [
        f"{len(names)} changed modules are left out; the first is {names[0]}: {reason}"
        for reason, names in by_reason.items()
    ]
    held = [form for form in forms if form.module.name not in refused]
    if not any(form.energy > 0 for form in held):
        raise ValueError(f"PEFT can adapt none of the modules that differ: {'; '.join(notes)}")
    return held, notes


def _pairs(before: Source, after: Source) -> tuple[list[MatrixPair], list[str]]:
    """Pair the matrices of both models by name; return notes on matrices that only one model has.

    If only one model shares a matrix between modules, the matrix is paired once for each module.
    """
    old, new = by_name(before), by_name(after)
    own = [{matrix.info.name for matrix in source.matrices} for source in (before, after)]
    pairs = []
    for name, matrix in old.items():
        other = new.get(name)
        if other is None or not (name in own[0] or name in own[1]):
            continue
        if other.info.shape != matrix.info.shape:
            raise ValueError(
                f"{name}: {matrix.info.shape} in {before.label}, {other.info.shape} in {after.label}: "
                "exclude this module to extract the others"
            )
        pairs.append(MatrixPair(matrix, other))
    if not pairs:
        raise ValueError(f"{before.label} and {after.label} have no selected matrix in common")
    alone = [name for name in own[0] if name not in new], [name for name in own[1] if name not in old]
    notes = [
        f"{len(names)} matrices are in {label} only; the first is {min(names, key=naming.natural_key)}"
        for label, names in zip((before.label, after.label), alone, strict=True)
        if names
    ]
    return pairs, notes


def _other_changes(before: Source, after: Source) -> list[str]:
    """Return notes on changes outside the matrices of modules, which an adapter cannot hold."""
    old, new = before.skipped_values, after.skipped_values
    shapes = [{entry.name: entry.shape for entry in source.skipped} for source in (before, after)]
    changed = [
        name
        for name in old
        if name in new and not (shapes[0][name] == shapes[1][name] and _are_equal(old[name](), new[name]()))
    ]
    some = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
    notes = [f"{len(changed)} tensors changed, but an adapter cannot hold them: {some}"] if changed else []
    only = ((before.label, [n for n in old if n not in new]), (after.label, [n for n in new if n not in old]))
    return notes + [
        f"{len(names)} tensors that are not matrices are in {label} only; the first is {names[0]}"
        for label, names in only
        if names
    ]


def _are_equal(a: _core.Matrix, b: _core.Matrix) -> bool:
    return np.array_equal(a.to_array(), b.to_array(), equal_nan=True)


def _without_copies(forms: Sequence[SpectralForm]) -> tuple[list[SpectralForm], list[str]]:
    """Leave out output heads that are stored copies of the embedding; return the other forms and notes.

    Changes of tied weights are equal to the last bit; changes of separate weights are not.
    """
    embeddings = [form for form in forms if form.module.kind == "embedding" and form.energy > 0]
    kept, notes = [], []
    for form in forms:
        name = form.module.name
        twins = [x for x in embeddings if naming.is_output_head(name) and _change_alike(x, form)]
        if twins:
            notes.append(f"{name} is {twins[0].module.name} under another name, and is extracted with it")
        else:
            kept.append(form)
    return kept, notes


def _change_alike(a: SpectralForm, b: SpectralForm) -> bool:
    return sorted(a.module.shape) == sorted(b.module.shape) and np.array_equal(a.values, b.values)
