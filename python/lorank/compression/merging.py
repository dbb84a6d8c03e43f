"""The weighted sum of several adapters' updates, truncated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from lorank._internal.patterns import Expression, TimeLimit
from lorank._internal.threads import thread_count
from lorank.adapters import carried
from lorank.adapters.content import Adapter, AdapterContent
from lorank.adapters.formats.registry import format_of
from lorank.adapters.module import LoraModule
from lorank.compression.carried_sum import carried_sum
from lorank.compression.dense_merging import Sources, merged_forms
from lorank.compression.difference import DEFAULT_MAX_RANK
from lorank.compression.knobs import Knobs
from lorank.compression.merge_methods import MergeMethod
from lorank.compression.mergeable import check_one_model, ties_tables
from lorank.compression.spectral_form import Term, Update, spectral_form
from lorank.compression.truncation import truncated
from lorank.modules import naming
from lorank.peft_format import nesting
from lorank.peft_format.name_matching import proper_suffixes
from lorank.peft_format.names import PREFIX, TOKENS


def merge(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None,
    knobs: Knobs,
    *,
    method: MergeMethod,
    force: bool,
    threads: int | None,
    progress: bool,
) -> Adapter:
    """Return the best adapter of given ranks for the merged updates; see `lorank.merge`."""
    if not method.is_sum:
        knobs = _dense_knobs(knobs, method)
    parts = list(adapters)
    shares = _checked_weights(parts, weights)
    check_one_model(parts, force=force)
    weighted = list(zip(parts, shares, strict=True))
    # An adapter of weight 0 gives neither settings nor carried tensors, unless all weights are 0.
    acting = [adapter for adapter, weight in weighted if weight] or parts
    ties = ties_tables(acting)
    by_name = {name: [(a.modules[name], w) for a, w in weighted if _has(a, name)] for name in _names(parts)}
    updates = [_update(name, sources) for name, sources in by_name.items()]
    modules = {update.module.name: update.module for update in updates}
    settings = format_of(parts[0]).sum_fields(parts, acting, ties_tables=ties)
    others, other_notes = carried_sum(weighted, modules.values())
    _check_layers(settings["config"], others, modules)
    low_rank = [update for update in updates if update.module.rank]
    if method.is_sum:
        forms = spectral_form(low_rank, thread_count(threads), progress, label="merging")
    else:
        assert knobs.max_rank is not None
        # A method that divides by the number of updates takes the mean if all weights are 1.
        is_mean = weights is None and method.divides
        sources = [
            Sources(u.module, [(m, 1.0 if is_mean else w) for m, w in by_name[u.module.name] if m.rank])
            for u in low_rank
        ]
        forms = merged_forms(sources, method, knobs.max_rank, thread_count(threads), progress)
    total = replace(
        parts[0],
        modules=modules,
        carried=others,
        notes=[*_notes(parts), *other_notes],
        certificate=None,
        is_spectral=False,
        label=" + ".join(f"{weight:g} {a.label}" for a, weight in zip(parts, shares, strict=True)),
        **settings,
    )
    by = "" if method.is_sum else f" by {method}"
    return truncated(total, forms, knobs, f"merge of {total.label}{by}, {knobs}", threads)


def _dense_knobs(knobs: Knobs, method: MergeMethod) -> Knobs:
    if knobs.rank_ratio is not None:
        raise ValueError(
            f"rank_ratio has no meaning for the dense updates of method={method.name!r}: "
            "use avg_rank, energy or budget"
        )
    return knobs if knobs.max_rank is not None else replace(knobs, max_rank=DEFAULT_MAX_RANK)


def _has(adapter: AdapterContent, name: str) -> bool:
    return name in adapter.modules and _acts(adapter.modules[name])


def _acts(module: LoraModule) -> bool:
    """Return True if a module adds anything to outputs: a product of factors, or a bias."""
    return module.rank > 0 or bool(module.carried)


def _checked_weights(adapters: Sequence[AdapterContent], weights: Sequence[float] | None) -> list[float]:
    if not adapters:
        raise ValueError("give at least one adapter")
    shares = [1 / len(adapters)] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(adapters) or not np.all(np.isfinite(shares)):
        raise ValueError(f"{len(adapters)} adapters need as many finite weights, not {weights!r}")
    if len({adapter.format for adapter in adapters}) > 1:
        raise ValueError("adapters of PEFT and of kohya or diffusers cannot be merged with each other")
    for adapter in adapters:
        if adapter.config.get("use_dora") or carried.magnitudes(adapter.carried, adapter.modules.keys()):
            raise ValueError(
                f"{adapter.label}: DoRA magnitudes do not add up: merge the adapter into its model"
            )
    _check_prefixes(adapters)
    return shares


def _check_prefixes(adapters: Sequence[AdapterContent]) -> None:
    """Refuse names that differ by a prefix: the sum would hold both, and PEFT would load one of them."""
    owners = {name: adapter for adapter in reversed(adapters) for name in adapter.modules}
    for adapter in adapters:
        for name in adapter.modules:
            for short in proper_suffixes(name):
                other = owners.get(short)
                # Two names within one adapter belong to two modules of the model.
                if other is not None and short not in adapter.modules and name not in other.modules:
                    raise ValueError(
                        f"{adapter.label} adapts {name!r}, but {other.label} adapts {short!r}: they name one "
                        "module with and without a prefix. Load one adapter into the kind of model that the "
                        "other was trained in, and save it again from there"
                    )


def _names(adapters: Sequence[AdapterContent]) -> list[str]:
    names = {name for adapter in adapters for name in adapter.modules if _has(adapter, name)}
    return sorted(names, key=naming.natural_key)


def _update(name: str, sources: Sequence[tuple[LoraModule, float]]) -> Update:
    first = sources[0][0]
    for module, _ in sources:
        same = (module.kind, module.shape, module.copies, module.a_tail)
        if same != (first.kind, first.shape, first.copies, first.a_tail):
            raise ValueError(
                f"module {name!r} is {first.kind} {first.shape} in one adapter and {module.kind} "
                f"{module.shape} in another: the adapters belong to different models"
            )
    biases: dict[str, Any] = {}
    for module, weight in sources:
        for ending, value in module.carried.items():
            biases[ending] = biases.get(ending, 0) + value * np.float32(weight * module.scaling)
    rank = sum(module.rank for module, _ in sources)
    module = replace(first, rank=rank, scaling=1.0, carried=biases, dtype=_widest(sources))
    return Update(module, partial(_terms, [source for source in sources if source[0].rank]))


def _widest(sources: Sequence[tuple[LoraModule, float]]) -> str:
    dtypes = {module.dtype for module, _ in sources}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def _terms(sources: Sequence[tuple[LoraModule, float]]) -> list[list[Term]]:
    by_source = [[(b, a, weight * module.scaling) for b, a in module.factors()] for module, weight in sources]
    return [list(terms) for terms in zip(*by_source, strict=True)]


def _check_layers(
    config: Mapping[str, Any], others: Mapping[str, Any], modules: Mapping[str, LoraModule]
) -> None:
    """Refuse modules whose factors PEFT cannot load together with other adapters' tensors or layers."""
    saved = _saved(config.get("modules_to_save") or ())
    for module in modules:
        owner = next((name for name, pattern in saved.items() if pattern.spans("match", module)), None)
        if any(key.startswith(f"{PREFIX}{module}{TOKENS}") for key in others):
            owner = "trainable_token_indices"
        if owner is not None:
            raise ValueError(
                f"module {module!r} has factors in one adapter, but another trains its weights ({owner}): "
                "PEFT cannot do both"
            )
    if pair := nesting.misnamed(modules.values()):
        raise ValueError(
            f"module {pair[0]!r} lies inside {pair[1]!r}, which another adapter adapts: PEFT would rename "
            f"{pair[0]!r} and not load its factors"
        )


def _saved(names: Sequence[str]) -> dict[str, Expression]:
    """Return the expressions by which PEFT finds the modules that it saves whole."""
    limit = TimeLimit("modules_to_save")
    try:
        return {name: Expression(rf"(^|.*\.){name}($|\..*)", limit) for name in names}
    except ValueError as error:
        raise ValueError(f"the settings' modules_to_save: {error}") from None


def _notes(adapters: Sequence[AdapterContent]) -> list[str]:
    notes = list(dict.fromkeys(note for adapter in adapters for note in adapter.stated_notes))
    # A note, not an error: a hub id and a folder may name one model, and the shapes were compared before.
    bases = {adapter.base_model for adapter in adapters if adapter.base_model}
    if len(bases) > 1:
        notes.append(
            f"base models have different names ({', '.join(sorted(bases))}), but a sum needs one base model"
        )
    return notes
