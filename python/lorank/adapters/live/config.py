"""Writes the ranks, alphas and targets of live layers into PEFT's config."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from lorank.adapters.live.layers import AdaptedLayer
from lorank.peft_format.rank_groups import rank_owner
from lorank.peft_format.rank_patterns import rank_keys
from lorank.peft_format.scaling import alpha_of, divisor
from lorank.peft_format.target_expressions import accidental_matches


def write_config(config: Any, layers: Iterable[AdaptedLayer]) -> None:
    """Write the ranks and alphas of all layers into PEFT's config.

    `r` becomes the rounded average rank, and `lora_alpha` the alpha that gives the config's own scaling at
    that rank. The patterns hold the ranks and alphas that differ, one key for each value.
    """
    layers = [layer for layer in layers if rank_owner(layer.name) == layer.name]
    ranks = {layer.name: layer.rank for layer in layers}
    alphas = {layer.name: layer.layer.lora_alpha[layer.adapter] for layer in layers}
    stabilized = bool(config.use_rslora)
    scaling = config.lora_alpha / divisor(config.r, stabilized)
    config.r = math.floor(sum(ranks.values()) / len(ranks) + 0.5)
    config.lora_alpha = alpha_of(scaling, config.r, stabilized)
    config.rank_pattern = {key: rank for rank, key in rank_keys(ranks).items() if rank != config.r}
    distinct = sorted(set(alphas.values()))
    keys = rank_keys({name: distinct.index(alpha) for name, alpha in alphas.items()})
    config.alpha_pattern = {key: distinct[i] for i, key in keys.items() if distinct[i] != config.lora_alpha}


def write_targets(config: Any, layers: Iterable[AdaptedLayer], names: Iterable[str]) -> None:
    """Write targets into PEFT's config that select the modules and parameters of the layers, and no others.

    Parameters
    ----------
    config
        The config.
    layers
        All layers of the adapter.
    names
        The names of all modules of the base model.
    """
    layers = list(layers)
    linear = [x.name for x in layers if not x.is_stack and rank_owner(x.name) == x.name]
    for key, value in target_modules(linear, names).items():
        setattr(config, key, value)
    config.target_parameters = [layer.name for layer in layers if layer.is_stack] or None
    config.layers_to_transform = config.layers_pattern = None


def target_modules(targets: Sequence[str], names: Iterable[str]) -> dict[str, Any]:
    """Return PEFT's settings that select modules by their full names, and no others of the base model."""
    return {"target_modules": set(targets), "exclude_modules": accidental_matches(targets, names)}
