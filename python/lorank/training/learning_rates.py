r"""Learning rates for modules of different ranks.

With the update ``dW = s B A``, the rows of A random and B = 0, the first step of Adam, which moves every
entry of B by the learning rate, changes a module's output in proportion to ``lr * s * r``: all `r` ranks
push the same way. The rules undo what of this the scaling `s` leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from lorank.training.layers import AdaptedLayer, lora_layers

Rule = Literal["constant", "rank", "sqrt-rank"]

_MULTIPLIERS: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "rank": lambda ratio: ratio,
    "sqrt-rank": math.sqrt,
}


def param_groups(
    model: Any,
    lr: float,
    *,
    rule: Rule = "constant",
    lora_plus_ratio: float | None = None,
    weight_decay: float = 0.0,
    adapter_name: str = "default",
) -> list[dict[str, Any]]:
    """Parameter groups for torch's optimizers, with a learning rate by rank.

    A module of rank `r_l` is trained with ``lr * m(mean(r) / r_l)``, where ``mean(r)`` is the average
    rank of the adapted modules.

    Parameters
    ----------
    model
        A PEFT model with LoRA, unwrapped.
    lr
        The learning rate of a module of average rank, and of everything else that is trained.
    rule
        ``"constant"``: ``m(x) = 1``, one learning rate for all. Right where ``scaling * r`` is the same
        everywhere (one `lora_alpha` for all ranks), and the common choice under any scaling.
        ``"sqrt-rank"``: ``m(x) = sqrt(x)``, which makes Adam's first steps equally large where the
        scaling goes with ``1 / sqrt(r)`` (the scale rule "rank-stabilized").
        ``"rank"``: ``m(x) = x``, which does so where all scalings are equal (the scale rule "constant").
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
        If nothing is trainable, or an argument is out of range.
    NotImplementedError
        If the adapter is no LoRA.

    Notes
    -----
    Groups hold the ranks of now: after `resize_lora` parameters stay where they are.
    LoRA+ is Hayou, Ghosh and Yu, *LoRA+: Efficient Low Rank Adaptation of Large Models*.

    Examples
    --------
    >>> groups = param_groups(model, 2e-4, rule="rank", lora_plus_ratio=16)  # doctest: +SKIP
    >>> optimizer = torch.optim.AdamW(groups)  # doctest: +SKIP
    """
    _check(lr, rule, lora_plus_ratio, weight_decay)
    layers = lora_layers(model, adapter_name)
    mean = sum(layer.rank for layer in layers.values()) / max(len(layers), 1)
    placed = {
        id(factor): place
        for layer in layers.values()
        for factor, place in zip(
            layer.factors, _places(layer, lr, rule, mean, lora_plus_ratio or 1.0), strict=True
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
        group["name"] = f"{kind} lr={rate:.4g}"
    return list(groups.values())


def _places(
    layer: AdaptedLayer, lr: float, rule: str, mean: float, lora_plus_ratio: float
) -> tuple[tuple[str, float], tuple[str, float]]:
    """Kind and learning rate of A and of B."""
    rate = lr * _MULTIPLIERS[rule](mean / layer.rank)
    if layer.is_embedding or lora_plus_ratio == 1.0:
        return ("lora", rate), ("lora", rate)
    return ("lora_A", rate), ("lora_B", rate * lora_plus_ratio)


def _check(lr: float, rule: str, lora_plus_ratio: float | None, weight_decay: float) -> None:
    if rule not in _MULTIPLIERS:
        raise ValueError(f"rule must be one of {', '.join(_MULTIPLIERS)}, not {rule!r}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be a positive number, not {lr!r}")
    if lora_plus_ratio is not None and not 0 < lora_plus_ratio < math.inf:
        raise ValueError(f"lora_plus_ratio must be a positive number, not {lora_plus_ratio!r}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be a number of at least 0, not {weight_decay!r}")
