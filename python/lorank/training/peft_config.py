"""Ranks and alphas in the terms of PEFT's config."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lorank.lora_config import rank_keys

if TYPE_CHECKING:
    from lorank.training.layers import AdaptedLayer

# Loading such an adapter derives the base model from the rank once more: it would be another base.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def divisor(rank: int, rank_stabilized: bool) -> float:
    """What PEFT divides alpha by."""
    return math.sqrt(rank) if rank_stabilized else float(rank)


def alpha_of(scaling: float, rank: int, rank_stabilized: bool) -> float:
    """The alpha from which PEFT computes a scaling: to the bit, where there is such an alpha."""
    by = divisor(rank, rank_stabilized)
    product = scaling * by
    candidates = [
        float(round(product)),
        product,
        math.nextafter(product, math.inf),
        math.nextafter(product, 0),
    ]
    alpha = next((alpha for alpha in candidates if alpha / by == scaling), product)
    return int(alpha) if alpha.is_integer() else alpha


def write_config(config: Any, layers: Iterable[AdaptedLayer]) -> None:
    """Write the ranks and alphas of all layers into PEFT's config.

    `r` becomes the rounded average rank, `lora_alpha` what gives the config's own scaling with it, and
    the patterns say what differs: a key per rank and per alpha.
    """
    layers = list(layers)
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


def check_config(config: Any, new_ranks: Sequence[int]) -> None:
    """Refuse initialisations that PEFT repeats on loading, with the new ranks."""
    init = config.init_lora_weights
    if not new_ranks or not isinstance(init, str):
        return
    if init.lower().startswith(_CHANGES_THE_BASE):
        raise NotImplementedError(
            f"the adapter was initialised by {init!r}, which derives the base model from the rank: with "
            "other ranks the saved adapter would be loaded into another base model. Save the base model as "
            "it is now, and set init_lora_weights to True in the adapter's config"
        )
    if init == "orthogonal" and any(rank % 2 for rank in new_ranks):
        raise ValueError(
            "the adapter was initialised by 'orthogonal': PEFT loads even ranks only. Set init_lora_weights "
            "to True in the adapter's config: what is loaded is the same, whatever it began with"
        )
