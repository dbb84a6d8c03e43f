r"""Learning rates for modules of different ranks.

Let a module have the update ``dW = s B A`` with random rows of A and ``B = 0``. The first step of Adam
moves every entry of B by the learning rate. The contributions of all `r` ranks have the same sign, so that
the module's output changes in proportion to ``lr * s * r``. The rules choose rates for which this product is
the same in all modules. "scale" uses scalings and ranks; "rank" and "sqrt-rank" use ranks alone, for
scalings that follow a known rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from lorank.adapters.live.layers import AdaptedLayer
from lorank.training.layers import lora_layers

Rule = Literal["uniform", "scale", "rank", "sqrt-rank"]

# Significant digits of learning rates.
_DIGITS = 12

# For each rule: the strength of a module, and the multiplier of its rate as a function of the mean strength
# divided by the strength of the module.
_Strength = Callable[[AdaptedLayer], float]
_RULES: dict[str, tuple[_Strength, Callable[[float], float]]] = {
    "uniform": (lambda layer: layer.rank, lambda _: 1.0),
    "scale": (lambda layer: abs(layer.scaling) * layer.rank, lambda ratio: ratio),
    "rank": (lambda layer: layer.rank, lambda ratio: ratio),
    "sqrt-rank": (lambda layer: layer.rank, math.sqrt),
}


def param_groups(
    model: Any,
    lr: float,
    *,
    rule: Rule = "uniform",
    lora_plus_ratio: float | None = None,
    weight_decay: float = 0.0,
    adapter_name: str = "default",
) -> list[dict[str, Any]]:
    """Make parameter groups for torch's optimizers, with a learning rate by rank and scaling.

    A module of rank `r_l` and scaling `s_l` gets the learning rate ``lr`` times the rule's multiplier. Means
    are over the adapted modules.

    Parameters
    ----------
    model
        The PEFT model with a LoRA adapter, without wrappers.
    lr
        Learning rate of an average module, and of all other trainable parameters.
    rule
        ``"uniform"``: multiplier 1, the common choice.
        ``"scale"``: ``mean(s r) / (s_l r_l)``. Adam's first steps are equally large for any scalings. The
        multiplier is 1 if `lora_alpha` is the same for all ranks, because ``s r`` is then constant.
        ``"rank"``: ``mean(r) / r_l``. Equal to "scale" for equal scalings, as under the scale rule
        "constant", the default of `RankAllocation.to_lora_config`.
        ``"sqrt-rank"``: ``sqrt(mean(r) / r_l)``. Nearly equal to "scale" for scalings in proportion to
        ``1 / sqrt(r)``, as under the scale rule "rank-stabilized" [RSLORA].
    lora_plus_ratio
        Ratio of B's learning rate to that of A [LORA+]; 16 is usual. None for 1. Embeddings keep one rate for
        both factors: their A has one-hot inputs and needs no smaller steps.
    weight_decay
        Weight decay of factors and other matrices; that of biases and other vectors is 0.
    adapter_name
        Name of the adapter.

    Returns
    -------
    list of dict
        Groups with the keys "params", "lr", "weight_decay" and "name". Every trainable parameter is in one
        group; modules with equal settings share a group.

    Raises
    ------
    ValueError
        If nothing is trainable, an argument is out of range, or the rule is "scale" and a scaling is 0.
    NotImplementedError
        If the adapter is not a LoRA adapter.

    Notes
    -----
    Groups follow ranks and scalings at the time of the call. After a change of ranks (`resize_lora`,
    `GardCallback`), parameters stay in their groups, with their rates. To resume such a training, call this
    function before `restore_ranks`: a saved optimizer can be loaded only into the groups of the first run.

    Examples
    --------
    >>> import torch
    >>> from peft import LoraConfig, get_peft_model
    >>> from lorank.training import param_groups
    >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    >>> config = LoraConfig(target_modules=["0", "1"], rank_pattern={"0": 2, "1": 6}, lora_alpha=4)
    >>> groups = param_groups(get_peft_model(base, config), 1e-3, rule="rank")
    >>> [(group["name"], len(group["params"])) for group in groups]
    [('lora lr=0.002', 2), ('lora lr=0.000666666666667', 2)]
    >>> optimizer = torch.optim.AdamW(groups)
    """
    _check(lr, rule, lora_plus_ratio, weight_decay)
    layers = lora_layers(model, adapter_name)
    rates = _rates(layers, lr, rule)
    placed = {
        id(factor): place
        for name, layer in layers.items()
        for factor, place in zip(
            layer.factors, _places(layer, rates[name], lora_plus_ratio or 1.0), strict=True
        )
    }
    groups: dict[tuple[str, float, float], dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        decay = weight_decay if parameter.ndim > 1 else 0.0
        kind, rate = placed.get(id(parameter), ("other" if parameter.ndim > 1 else "vectors", lr))
        group = groups.setdefault((kind, rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    if not groups:
        raise ValueError("no parameter of the model is trainable")
    for (kind, rate, _), group in groups.items():
        group["name"] = f"{kind} lr={rate:.{_DIGITS}g}"
    return list(groups.values())


def _rates(layers: Mapping[str, AdaptedLayer], lr: float, rule: str) -> dict[str, float]:
    """Return the learning rate of each module."""
    strength, multiplier = _RULES[rule]
    strengths = {name: strength(layer) for name, layer in layers.items()}
    if unscaled := [name for name, value in strengths.items() if not value]:
        raise ValueError(f"module {unscaled[0]!r} has scaling 0: rule='scale' cannot give it a learning rate")
    mean = sum(strengths.values()) / max(len(strengths), 1)
    # Rates are rounded, so that rates that differ by rounding errors share a group.
    return {name: float(f"{lr * multiplier(mean / value):.{_DIGITS}g}") for name, value in strengths.items()}


def _places(
    layer: AdaptedLayer, rate: float, lora_plus_ratio: float
) -> tuple[tuple[str, float], tuple[str, float]]:
    """Return kind and learning rate of A, and of B."""
    if layer.is_embedding or lora_plus_ratio == 1.0:
        return ("lora", rate), ("lora", rate)
    return ("lora_A", rate), ("lora_B", rate * lora_plus_ratio)


def _check(lr: float, rule: str, lora_plus_ratio: float | None, weight_decay: float) -> None:
    """Raise ValueError for an argument that is out of range."""
    if rule not in _RULES:
        raise ValueError(f"rule must be one of {', '.join(_RULES)}, not {rule!r}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be a positive number, not {lr!r}")
    if lora_plus_ratio is not None and not 0 < lora_plus_ratio < math.inf:
        raise ValueError(f"lora_plus_ratio must be a positive number, not {lora_plus_ratio!r}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be a number of at least 0, not {weight_decay!r}")
