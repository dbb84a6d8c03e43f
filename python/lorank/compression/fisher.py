"""Fisher importance: how much the loss minds each singular value of an adapter."""

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
    """Scores of an elastic adapter's singular values, for `compress(..., scores=...)`.

    Parameters
    ----------
    peft_model
        A live PEFT model that holds an adapter in balanced spectral form: what `elastic` returned and
        `LoraAdapter.into_model` put in, or a saved one that PEFT loaded.
    batches
        Validation batches: mappings that the model takes as keyword arguments, labels included.
    adapter_name
        Which adapter.
    loss
        ``loss(model, batch)`` (default: the model's own).

    Returns
    -------
    dict
        Module name -> one score per singular value, float64: the sum over the entries of its column of
        ``B`` and its row of ``A`` of the mean squared gradient over the batches.

    Raises
    ------
    ValueError
        If there is no batch, the model has no such adapter, or a module's factors are no singular vectors.

    Notes
    -----
    Source: PARA, the ablation of importance scores. Parameters, gradients and the training mode are
    left as they were.
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
    """Without dropout."""
    training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(training)


def _check_spectral(adapter: AdapterContent) -> None:
    """A score belongs to a singular value: columns that mix them have none."""
    for module in adapter.adapted:
        for b, a in module.factors():
            if not all(are_orthogonal(side, module.dtype) for side in (b.to_array().T, a.to_array())):
                raise ValueError(
                    f"module {module.name!r}: its factors are no singular vectors: put "
                    "lorank.elastic(adapter) into the model first"
                )


def _factors(peft_model: Any, adapter_name: str) -> dict[str, Any]:
    """The adapter's factors by the names that its file would give them."""
    name_of_factor = factor_pattern(adapter_name)
    return {
        found[1] + (found[2] or ""): parameter
        for name, parameter in peft_model.named_parameters()
        if (found := name_of_factor.fullmatch(name))
    }


def _by_value(adapter: AdapterContent, means: Mapping[str, Any]) -> dict[str, npt.NDArray[np.float64]]:
    """Sums over the entries of every column of B and row of A."""
    squares = peft_reading.read(ArrayTensors(means, adapter.label), adapter.config)
    scores = {}
    for name, module in squares.modules.items():
        b, a = module.B, module.A
        scores[name] = b.sum(axis=-2) + a.sum(axis=-1)
        if module.copies > 1:
            scores[name] = scores[name].sum(axis=0)
    return scores
