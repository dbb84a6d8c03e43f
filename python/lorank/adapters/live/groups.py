"""Groups of live layers that must have equal ranks: tied layers, and projections of an attention module."""

from __future__ import annotations

from collections.abc import Iterable

from lorank.adapters.live.layers import AdaptedLayer
from lorank.peft_format.rank_groups import rank_owner


def live_groups(layers: Iterable[AdaptedLayer], *, ties_tables: bool) -> list[list[AdaptedLayer]]:
    """Return all layers in groups that must have equal ranks.

    Parameters
    ----------
    layers
        All layers of an adapter.
    ties_tables
        True if PEFT will tie heads to embeddings on loading (`ensure_weight_tying`), even if the live
        model does not.
    """
    layers = list(layers)
    ties = tied_to(layers)
    if ties_tables:
        embeddings = {_shape(layer)[::-1]: layer.name for layer in layers if layer.is_embedding}
        plain = [layer for layer in layers if not (layer.is_embedding or layer.is_stack)]
        ties = {x.name: embeddings[_shape(x)] for x in plain if _shape(x) in embeddings} | ties
    groups: dict[str, list[AdaptedLayer]] = {}
    for layer in layers:
        groups.setdefault(ties.get(layer.name, rank_owner(layer.name)), []).append(layer)
    return list(groups.values())


def _shape(layer: AdaptedLayer) -> tuple[int, ...]:
    """Return the shape of the update, ``(out, in, ...)``."""
    a, b = layer.factors
    return (b.shape[0], *a.shape[1:])


def tied_to(layers: Iterable[AdaptedLayer]) -> dict[str, str]:
    """Map every tied layer to the embedding whose transposed factors it uses, by name."""
    layers = list(layers)
    embeddings = {_address(layer, 0): layer.name for layer in layers if layer.is_embedding}
    found = {
        layer.name: embeddings.get(_address(layer, 1))
        for layer in layers
        if not (layer.is_embedding or layer.is_adalora)
    }
    return {name: source for name, source in found.items() if source is not None}


def _address(layer: AdaptedLayer, which: int) -> int:
    """Return the address of the values of A (0) or B (1)."""
    return int(layer.factors[which].untyped_storage().data_ptr())
