"""Live layers that have one rank because of how they compute: tied ones, and those of one attention."""

from __future__ import annotations

from collections.abc import Iterable

from lorank.adapters.live_layers import AdaptedLayer
from lorank.rank_groups import rank_owner


def live_groups(layers: Iterable[AdaptedLayer]) -> list[list[AdaptedLayer]]:
    """Return all layers, those that have one rank together."""
    layers = list(layers)
    ties = tied_to(layers)
    groups: dict[str, list[AdaptedLayer]] = {}
    for layer in layers:
        groups.setdefault(ties.get(layer.name, rank_owner(layer.name)), []).append(layer)
    return list(groups.values())


def tied_to(layers: Iterable[AdaptedLayer]) -> dict[str, str]:
    """Return the embedding whose factors a layer uses transposed, by the layer's name."""
    layers = list(layers)
    embeddings = {_address(layer, 0): layer.name for layer in layers if layer.is_embedding}
    found = {
        layer.name: embeddings.get(_address(layer, 1))
        for layer in layers
        if not (layer.is_embedding or layer.is_adalora)
    }
    return {name: source for name, source in found.items() if source is not None}


def _address(layer: AdaptedLayer, which: int) -> int:
    """Return where the values of A (0) or B (1) lie."""
    return int(layer.factors[which].untyped_storage().data_ptr())
