"""Plans the changes that put an adapter into a live model, before any change is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lorank.adapters.content import AdapterContent
from lorank.adapters.factors import MatrixFactors, in_memory
from lorank.adapters.live import tensors as live_tensors
from lorank.adapters.live.groups import live_groups, tied_to
from lorank.adapters.live.layers import AdaptedLayer, LiveModel, is_training_wrapper
from lorank.adapters.module import LoraModule
from lorank.adapters.stored_factors import padded_factors
from lorank.peft_format.name_matching import KnownNames
from lorank.peft_format.names import BIAS, INSIDE, MAGNITUDE, PREFIX, TOKENS, layer_path

OTHER_NAME = "insert the adapter under a new name"

# Largest relative difference between the updates of tied tables that rounding may cause.
_TIE_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Plan:
    """New values of layers and of other tensors.

    Attributes
    ----------
    layers
        Layers with their new ranks and scalings.
    values
        Tensors of the model with their new values.
    ties
        Pairs of a layer and an embedding; the layer uses the transposed factors of the embedding.
    dropped
        Layers from which the adapter is removed.
    """

    layers: list[tuple[AdaptedLayer, int, float]] = field(default_factory=list)
    values: list[tuple[Any, Any]] = field(default_factory=list)
    ties: list[tuple[AdaptedLayer, AdaptedLayer]] = field(default_factory=list)
    dropped: list[AdaptedLayer] = field(default_factory=list)

    def set(self, tensor: Any, value: Any) -> None:
        """Record a copy of a tensor's new values, because `value` may belong to the model."""
        import torch

        values = torch.as_tensor(value).detach()
        self.values.append((tensor, values.to(tensor, copy=True).contiguous()))

    def apply(self) -> None:
        """Apply the planned changes to the model."""
        for tensor, values in self.values:
            if tensor.shape != values.shape:
                tensor.grad = None
            # Not overwritten in place: adapters that were read from the model share the old values.
            tensor.data = values
        for layer, source in self.ties:
            (a, b), (source_a, source_b) = layer.factors, source.factors
            if a.shape[0] != source_a.shape[0]:
                a.grad = b.grad = None
            a.data, b.data = source_b.data.t(), source_a.data.t()
        for layer, rank, scaling in self.layers:
            layer.set_rank(rank)
            layer.set_scaling(scaling)


def planned(live: LiveModel, adapter: AdapterContent, name: str) -> Plan:
    """Return the changes that put an adapter into a model.

    Raises
    ------
    ValueError
        If modules or other tensors of the adapter do not fit the model.
    """
    layers = live.layers(name)
    modules = _by_layer(adapter, layers)
    magnitudes = {layer_path(key) for key in adapter.carried if f".{MAGNITUDE}" in key}
    plan = Plan()
    ties = tied_to(layers.values())
    ties_tables = bool(getattr(live.configs.get(name), "ensure_weight_tying", False))
    for group in live_groups(layers.values(), ties_tables=ties_tables):
        present = [modules[layer.name] for layer in group if layer.name in modules]
        rank = max((module.rank for module in present), default=0)
        if not rank and not any(module.carried or module.name in magnitudes for module in present):
            plan.dropped.extend(group)
            continue
        for layer in group:
            if layer.name in ties:
                _tie(plan, layer, layers[ties[layer.name]], modules, max(rank, 1))
            elif layer.name in modules or layer.name not in ties.values():
                _set_layer(plan, layer, modules.get(layer.name), max(rank, 1))
    _keep_wrappers(plan, list(layers.values()))
    _set_others(plan, live, adapter, name)
    return plan


def _by_layer(adapter: AdapterContent, layers: Mapping[str, AdaptedLayer]) -> dict[str, LoraModule]:
    known = KnownNames(layers)
    found: dict[str, LoraModule] = {}
    for module in adapter.modules.values():
        if (name := known.only(module.name)) is None:
            continue
        if name in found:
            raise ValueError(f"{found[name].name!r} and {module.name!r} fit the same module of the model")
        found[name] = module
    return found


def _set_layer(plan: Plan, layer: AdaptedLayer, module: LoraModule | None, rank: int) -> None:
    """Plan the values of a layer's factors and bias, with zeros where the adapter has no values."""
    a, b = layer.factors
    scaling = layer.scaling if module is None or not module.rank else module.scaling
    if module is None:
        new_b = np.zeros((b.shape[0], rank * layer.copies, *b.shape[2:]), np.float32)
        new_a = np.zeros((rank * layer.copies, *a.shape[1:]), np.float32)
    else:
        new_b, new_a = padded_factors(module, rank)
    kind = module is None or (module.kind == "embedding") == layer.is_embedding
    if not kind or new_a.shape != (rank * layer.copies, *a.shape[1:]) or new_b.shape[0] != b.shape[0]:
        raise ValueError(
            f"module {layer.name!r} has factors of shapes {tuple(b.shape)} and {tuple(a.shape)} in the model "
            f"and of {new_b.shape} and {new_a.shape} in the adapter: the adapter belongs to another model"
        )
    plan.set(a, new_a)
    plan.set(b, new_b)
    plan.layers.append((layer, rank, scaling))
    bias = None if module is None else module.carried.get(BIAS)
    if layer.bias is not None:
        plan.set(layer.bias, np.zeros(tuple(layer.bias.shape), np.float32) if bias is None else bias)
    elif bias is not None:
        raise ValueError(
            f"module {layer.name!r} has a bias (lora_bias) in the adapter, but not in the model: {OTHER_NAME}"
        )


def _tie(
    plan: Plan, layer: AdaptedLayer, source: AdaptedLayer, modules: Mapping[str, LoraModule], rank: int
) -> None:
    """Plan a head that shares factors with an embedding; the adapter may hold the update of either."""
    head, table = modules.get(layer.name), modules.get(source.name)
    scaling = layer.scaling
    if table is None:
        assert head is not None
        _set_layer(plan, source, _transposed(head), rank)
        scaling = head.scaling
    elif head is not None and head.rank:
        scaling = table.scaling * _ratio(head, table)
    plan.ties.append((layer, source))
    plan.layers.append((layer, rank, scaling))


def _transposed(head: LoraModule) -> LoraModule:
    """Return the transposed update of a head, as an update of its embedding."""
    factors = MatrixFactors([in_memory(head.A.T, head.B.T)] if head.rank else [])
    shape = head.shape[::-1]
    return replace(head, kind="embedding", shape=shape, factors=factors, a_tail=shape[1:], carried={})


def _ratio(head: LoraModule, table: LoraModule) -> float:
    """Return the ratio of a head's update to the update of its embedding.

    Raises
    ------
    ValueError
        If the two updates are not proportional.
    """
    b, a = (head.scaling * head.B.astype(np.float64)), head.A.astype(np.float64)
    if not table.rank:
        table_b, table_a = np.zeros((table.shape[0], 1)), np.zeros((1, table.shape[1]))
    else:
        table_b, table_a = table.scaling * table.B.astype(np.float64), table.A.astype(np.float64)
    product = float(((table_a @ b) * (a @ table_b).T).sum())
    square = float(((table_a @ table_a.T) * (table_b.T @ table_b)).sum())
    norm = float(((a @ a.T) * (b.T @ b)).sum())
    ratio = product / square if square > 0 else 1.0
    if abs(norm - ratio * product) > _TIE_TOLERANCE**2 * max(norm, square):
        raise ValueError(
            f"modules {table.name!r} and {head.name!r} share one update in the model, but have two "
            f"in the adapter: {OTHER_NAME}, with ensure_weight_tying=False"
        )
    return ratio


def _keep_wrappers(plan: Plan, layers: Sequence[AdaptedLayer]) -> None:
    """Keep all wrappers of a layer that has an adapted parameter, and set the unused ones to zero.

    PEFT nests a layer's wrappers and derives the names of tensors from the nesting.
    """
    dropped = {layer.name for layer in plan.dropped}
    kept = {_owner(layer) for layer in layers if layer.is_stack and layer.name not in dropped}
    for layer in [layer for layer in plan.dropped if layer.is_stack and _owner(layer) in kept]:
        plan.dropped.remove(layer)
        _set_layer(plan, layer, None, 1)


def _owner(layer: AdaptedLayer) -> str:
    return layer.name.rpartition(".")[0]


def _set_others(plan: Plan, live: LiveModel, adapter: AdapterContent, name: str) -> None:
    """Plan tensors other than factors: magnitudes, saved modules, tokens, trained parts of the base model."""
    dropped = {layer.name for layer in plan.dropped}
    own = {
        f"{layer.path}.{MAGNITUDE}": layer.magnitude
        for layer in live.layers(name).values()
        if layer.magnitude is not None and layer.name not in dropped
    }
    originals = dict(_originals(live, name))
    saved = {key.removeprefix(PREFIX): x for key, x in live_tensors.saved_modules(live, name).items()}
    base = {path.replace(INSIDE, ""): x for path, x in live_tensors.base_tensors(live).items()}
    names = {id(table): KnownNames(table) for table in (own, saved, base)}
    for key, stored in adapter.carried.items():
        short = key.removeprefix(PREFIX).removesuffix(".weight" if MAGNITUDE in key else "")
        value = stored.for_torch()
        tables = [(own, short), (saved, short)]
        if not _is_saved_module(adapter, short):
            tables.append((base, short.replace(INSIDE, "")))
        for table, path in tables:
            if (found := names[id(table)].only(path)) in table:
                assert found is not None
                _set_other(plan, key, table[found], value, is_shared=table is base)
                originals.pop(found, None)
                if table is own:
                    del own[found]
                break
        else:
            raise ValueError(f"adapter {name!r} of the model has no tensor for {key!r}: {OTHER_NAME}")
    if own and adapter.config.get("use_dora") and any(MAGNITUDE in key for key in adapter.carried):
        raise ValueError(f"the adapter has no DoRA magnitudes for {next(iter(own))!r}: {OTHER_NAME}")
    known = {id(tensor) for tensor, _ in plan.values}
    for tensor, original in originals.values():
        if id(tensor) not in known:  # Tied modules share their trained copy.
            plan.set(tensor, original)


def _is_saved_module(adapter: AdapterContent, path: str) -> bool:
    """Return True if a tensor belongs to a module that was trained as a copy, not to the base model."""
    names = adapter.config.get("modules_to_save") or ()
    return TOKENS in path or any(f".{name}." in f".{path}" for name in names)


def _set_other(plan: Plan, key: str, tensor: Any, value: Any, *, is_shared: bool) -> None:
    import torch

    value = torch.as_tensor(value)
    if tensor.shape != value.shape:
        raise ValueError(
            f"{key!r} has shape {tuple(value.shape)} in the adapter, {tuple(tensor.shape)} in the model: "
            "the adapter belongs to another model"
        )
    if is_shared and torch.equal(tensor.detach(), value.to(tensor)):
        return  # Other adapters use the base model, too.
    plan.set(tensor, value)


def _originals(live: LiveModel, name: str) -> Mapping[str, tuple[Any, Any]]:
    """Return the tensors of saved modules and tokens, with the base model's tensors that they replace."""
    found: dict[str, tuple[Any, Any]] = {}
    for path, module in live.modules.items():
        if not is_training_wrapper(module) or name not in module._adapters:
            continue
        if hasattr(module, "modules_to_save"):
            original = module.original_module.state_dict()
            copies = module.modules_to_save[name].state_dict(keep_vars=True)
            found |= {f"{path}.{k}": (x, original[k]) for k, x in copies.items() if k in original}
        else:
            tokens = module.token_adapter
            key = f"{path}{TOKENS}trainable_tokens_delta"
            found[key] = (tokens.trainable_tokens_delta[name], tokens.trainable_tokens_original[name])
    return found
