"""Modules that share a weight, and so have one update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lorank.compression.spectral_form import SpectralForm, Triplets
from lorank.modules import naming
from lorank.modules.weight import Weight
from lorank.sources import Source
from lorank.sources.shared_weights import weight_of

# PEFT shares one update between input embeddings and tied heads if one of them has such a name.
_PEFT_TIES = {"embed_tokens", "lm_head"}


def refused(source: Source) -> dict[str, str]:
    """Map modules that PEFT cannot adapt, and modules tied to them, to reasons."""
    found = dict(source.facts.refused)
    for owner, others in source.facts.ties.items():
        for other in others:
            if other in source.facts.refused:
                found.setdefault(owner, f"it shares the weight of {other}: {source.facts.refused[other]}")
    return found


def added(
    forms: Sequence[SpectralForm], before: Source, exclude: naming.Targets = None
) -> tuple[list[SpectralForm], dict[str, Any], list[str]]:
    """Give the update of a shared weight to each of its modules.

    Parameters
    ----------
    forms
        The updates of the modules that have a matrix.
    before
        The base model. A module that shares a weight only in the base model has its own update.
    exclude
        Modules that get no update, as in `lorank.extract`.

    Returns
    -------
    list of SpectralForm
        The update of every module.
    dict
        The setting by which PEFT ties the modules; empty if there is none.
    list of str
        Notes on shared weights.
    """
    known = {form.module.name for form in forms}
    is_excluded = naming.matcher(exclude or [], "exclude")
    result: list[SpectralForm] = []
    settings: dict[str, Any] = {}
    notes: list[str] = []
    for form in forms:
        result.append(form)
        owner = form.module.name
        others = [
            weight
            for other in before.facts.ties.get(owner, ())
            if other not in known and form.energy > 0 and (weight := weight_of(before.skeleton, other))
        ]
        notes += [
            f"{weight.module} shares the weight of {owner}, but is excluded: PEFT leaves it unchanged"
            for weight in others
            if is_excluded(weight.module)
        ]
        others = [weight for weight in others if not is_excluded(weight.module)]
        if not others:
            continue
        result += [_twin(form, weight) for weight in others]
        names = ", ".join(weight.module for weight in others)
        note = f"the update and the weight of {owner} are shared with {names}"
        if _peft_ties(form, others):
            settings["ensure_weight_tying"] = True
            note = f"{note} (ensure_weight_tying)"
        notes.append(f"{note}: untie the modules before merging, or PEFT adds the update to the weight twice")
    return result, settings, notes


def _peft_ties(form: SpectralForm, others: Sequence[Weight]) -> bool:
    """Return True if PEFT's `ensure_weight_tying` shares an embedding's update with the other modules."""
    names = [form.module.name, *(weight.module for weight in others)]
    return (
        form.module.kind == "embedding"
        and all(weight.kind == "linear" for weight in others)
        and any(name.rpartition(".")[2] in _PEFT_TIES for name in names)
    )


def _twin(form: SpectralForm, weight: Weight) -> SpectralForm:
    """Return the same update for another module, which may use the weight transposed."""
    assert weight.kind is not None
    module = form.module
    is_turned = (module.kind == "embedding") != (weight.kind == "embedding")
    shape = module.shape[::-1] if is_turned else module.shape
    parts = form.parts
    if is_turned:
        parts = [
            Triplets(part.a_rows, part.singular_values, part.b_columns)
            for part in form.parts
            if isinstance(part, Triplets)
        ]
    twin = replace(module, name=weight.module, kind=weight.kind, shape=shape, a_tail=shape[1:], b_tail=())
    return replace(form, module=twin, parts=parts)
