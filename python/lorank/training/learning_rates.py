r"""Learning rates for modules of different ranks.

With the update ``dW = s B A``, the rows of A random and B = 0, the first step of Adam, which moves every
entry of B by the learning rate, changes a module's output in proportion to ``lr * s * r``: all `r` ranks
push the same way. The rules give rates at which ``lr * s * r`` is the same for all modules: "scale" by the
scalings and ranks as they are, the others by the ranks alone, for scalings that follow a known rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from lorank.adapters.live.layers import AdaptedLayer
from lorank.training.layers import lora_layers

Rule = Literal["uniform", "scale", "rank", "sqrt-rank"]

# Significant ones, of rates.
_DIGITS = 12

# What is compared with its mean over the modules, and what the rate makes of the ratio.
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
    """Parameter groups for torch's optimizers, with a learning rate by rank and scaling.

    A module of rank `r_l` and scaling `s_l` is trained with ``lr`` times what the rule says; means are
    over the adapted modules.

    Parameters
    ----------
    model
        A PEFT model with LoRA, unwrapped.
    lr
        The learning rate of an average module, and of everything else that is trained.
    rule
        ``"uniform"``: 1, one learning rate for all; the common choice.
        ``"scale"``: ``mean(s r) / (s_l r_l)``, which makes Adam's first steps equally large whatever the
        scalings are; 1 where one `lora_alpha` serves all ranks, as there ``s r`` is the same everywhere.
        ``"rank"``: ``mean(r) / r_l``, the same where all scalings are equal: under the scale rule
        "constant", the default of `RankAllocation.to_lora_config`.
        ``"sqrt-rank"``: ``sqrt(mean(r) / r_l)``, nearly the same where scalings go with
        ``1 / sqrt(r)``: under the scale rule "rank-stabilized".
    lora_plus_ratio
        LoRA+: B is trained with this times the learning rate of A; 16 is usual. Embeddings are left
        out: their A sees one-hot inputs and needs no smaller steps.
    weight_decay
        Of factors and other matrices; biases and other vectors get none.
    adapter_name
        Which adapter.

    Returns
    -------
    list of dict
        Each with "params", "lr", "weight_decay" and "name"; every trainable parameter is in one of them.
        Modules with equal settings share a group.

    Raises
    ------
    ValueError
        If nothing is trainable, an argument is out of range, or the rule is "scale" and a scaling is 0.
    NotImplementedError
        If the adapter is no LoRA.

    Notes
    -----
    Groups follow the ranks and scalings of now. Where those change (`resize_lora`, `GardCallback`),
    parameters stay in their groups, with their rates. To resume such a training, build the groups
    before `restore_ranks`: a saved optimizer is loaded into the groups that it was saved with.
    LoRA+ is Hayou, Ghosh and Yu, *LoRA+: Efficient Low Rank Adaptation of Large Models*.

    Examples
    --------
    >>> groups = param_groups(model, 2e-4, rule="scale", lora_plus_ratio=16)  # doctest: +SKIP
    >>> optimizer = torch.optim.AdamW(groups)  # doctest: +SKIP
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
    """The learning rate of every module."""
    strength, multiplier = _RULES[rule]
    strengths = {name: strength(layer) for name, layer in layers.items()}
    if idle := [name for name, value in strengths.items() if not value]:
        raise ValueError(f"module {idle[0]!r} has scaling 0, for which rule='scale' knows no learning rate")
    mean = sum(strengths.values()) / max(len(strengths), 1)
    # Rates that differ by rounding alone are one rate, and one group.
    return {name: float(f"{lr * multiplier(mean / value):.{_DIGITS}g}") for name, value in strengths.items()}


def _places(
    layer: AdaptedLayer, rate: float, lora_plus_ratio: float
) -> tuple[tuple[str, float], tuple[str, float]]:
    """Kind and learning rate of A and of B."""
    if layer.is_embedding or lora_plus_ratio == 1.0:
        return ("lora", rate), ("lora", rate)
    return ("lora_A", rate), ("lora_B", rate * lora_plus_ratio)


def _check(lr: float, rule: str, lora_plus_ratio: float | None, weight_decay: float) -> None:
    if rule not in _RULES:
        raise ValueError(f"rule must be one of {', '.join(_RULES)}, not {rule!r}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be a positive number, not {lr!r}")
    if lora_plus_ratio is not None and not 0 < lora_plus_ratio < math.inf:
        raise ValueError(f"lora_plus_ratio must be a positive number, not {lora_plus_ratio!r}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be a number of at least 0, not {weight_decay!r}")
