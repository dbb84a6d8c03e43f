"""Fisher importance: the sensitivity of the loss to each singular value of an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from lorank._internal import extras
from lorank.adapters.content import AdapterContent
from lorank.adapters.formats import peft_reading
from lorank.adapters.live.reading import from_model
from lorank.adapters.tensors import ArrayTensors
from lorank.compression.orthogonality import are_orthogonal
from lorank.peft_format.names import factor_pattern

Loss = Callable[[Any, Any], Any]


def fisher_scores(
    peft_model: Any,
    batches: Iterable[Any],
    *,
    adapter_name: str = "default",
    loss: Loss | None = None,
) -> dict[str, npt.NDArray[np.float64]]:
    """Compute scores of an elastic adapter's singular values, for `compress(..., scores=...)`.

    Parameters
    ----------
    peft_model
        A live PEFT model with an adapter in balanced spectral form: the result of `elastic`, put
        in by `LoraAdapter.into_model` or loaded by PEFT from files.
    batches
        Validation batches: mappings that the model takes as keyword arguments, including labels.
    adapter_name
        Name of the adapter.
    loss
        Function ``loss(model, batch)`` (default: the model's own loss).

    Returns
    -------
    dict
        Module name -> one score per singular value, float64. A score is the mean over the batches of the
        squared gradient, summed over the entries of the value's column of ``B`` and row of ``A``.

    Raises
    ------
    ValueError
        If there is no batch, the model lacks the adapter, or a module's factors are not singular vectors.

    Notes
    -----
    Source: [PARA], the ablation of importance scores. Parameters, gradients and the training mode do not
    change.

    Examples
    --------
    >>> import peft, torch
    >>> import lorank
    >>> class Model(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.q_proj = torch.nn.Linear(8, 4)
    ...     def forward(self, x):
    ...         return self.q_proj(x)
    >>> config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    >>> model = peft.get_peft_model(Model(), config)
    >>> adapter = lorank.LoraAdapter.from_model(model)
    >>> lorank.elastic(adapter, progress=False).into_model(model)
    >>> batches = [{"x": torch.randn(3, 8)}]
    >>> scores = lorank.fisher_scores(
    ...     model, batches, loss=lambda model, batch: model(**batch).square().mean()
    ... )
    >>> {name: values.shape for name, values in scores.items()}
    {'q_proj': (2,)}
    """
    torch = extras.require("torch", "peft", "for gradients")
    from lorank.profiling import passes  # Imports torch.

    adapter = from_model(peft_model, adapter_name)
    _check_spectral(adapter)
    parameters = _factors(peft_model, adapter_name)
    sums = {name: torch.zeros_like(p, dtype=torch.float64, device="cpu") for name, p in parameters.items()}
    count = 0
    with passes.frozen(peft_model), _evaluating(peft_model):
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for batch in batches:
            value = passes.loss_of(peft_model, batch, loss)
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    sums[name] += gradient.detach().double().cpu().square()
            count += 1
    if not count:
        raise ValueError("Fisher importance needs at least one batch")
    means = {name: (total / count).numpy() for name, total in sums.items()}
    return _by_value(adapter, means)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Turn dropout off while the block runs."""
    training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(training)


def _check_spectral(adapter: AdapterContent) -> None:
    """Refuse factors that are not singular vectors, because a score belongs to one singular value."""
    for module in adapter.adapted:
        for b, a in module.factors():
            if not all(are_orthogonal(side, module.dtype) for side in (b.to_array().T, a.to_array())):
                raise ValueError(
                    f"module {module.name!r}: its factors are not singular vectors: insert "
                    "lorank.elastic(adapter) first"
                )


def _factors(peft_model: Any, adapter_name: str) -> dict[str, Any]:
    """Map keys in a file to the adapter's factors."""
    name_of_factor = factor_pattern(adapter_name)
    return {
        found[1] + (found[2] or ""): parameter
        for name, parameter in peft_model.named_parameters()
        if (found := name_of_factor.fullmatch(name))
    }


def _by_value(adapter: AdapterContent, means: Mapping[str, Any]) -> dict[str, npt.NDArray[np.float64]]:
    """Return sums over the entries of every column of B and row of A."""
    squares = peft_reading.read(ArrayTensors(means, adapter.label), adapter.config)
    scores = {}
    for name, module in squares.modules.items():
        b, a = module.B, module.A
        scores[name] = b.sum(axis=-2) + a.sum(axis=-1)
        if module.copies > 1:
            scores[name] = scores[name].sum(axis=0)
    return scores
