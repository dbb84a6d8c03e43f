r"""What an optimizer remembers about a factor, carried over to another rank.

A factor changes along its rank axis only. Shrinking changes the basis, ``A' = T_A A`` and ``B' = B T_B``
with ``T_A T_B = I``, so that gradients become ``T_B^T dA`` and ``dB T_A^T``: first moments are averages of
gradients and follow them exactly. Second moments follow with the squares of the coefficients, which is
exact if the gradients of different ranks are uncorrelated, and an approximation otherwise.

New ranks begin without a first moment, and with the mean second moment of the others: step counters stay,
so that Adam's bias correction is over, and second moments that began at zero would make steps several
times as long as the learning rate, until they have caught up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class FactorChange:
    """A LoRA factor at a new rank.

    Attributes
    ----------
    parameter
        The factor, still as it was.
    axis
        Where the rank is: 0 for A ``(r, in)``, 1 for B ``(out, r)``.
    rank
        The new rank.
    values
        The factor's values at the new rank.
    of_values, of_gradients
        ``(kept, old rank)`` coefficients of the new basis, for values and for gradients; None if the old
        ranks stay what they are. Ranks beyond those that are kept are new ones.
    """

    parameter: torch.nn.Parameter
    axis: int
    rank: int
    values: torch.Tensor
    of_values: torch.Tensor | None = None
    of_gradients: torch.Tensor | None = None

    def gradient(self, tensor: torch.Tensor) -> torch.Tensor:
        """A gradient, or an average of gradients, at the new rank."""
        return self._extended(self._kept(tensor, self.of_gradients), tensor.new_zeros(()))

    def mean_square(self, tensor: torch.Tensor) -> torch.Tensor:
        """An average of squared gradients at the new rank; that of a new rank is the others' mean."""
        kept = self._kept(tensor, _squared(self.of_gradients))
        return self._extended(kept, kept.mean(self.axis, keepdim=True))

    def sum_of_squares(self, tensor: torch.Tensor, start: float) -> torch.Tensor:
        """A sum of squared gradients at the new rank; that of a new rank begins at `start`."""
        kept = self._kept(tensor, _squared(self.of_gradients))
        return self._extended(kept, tensor.new_full((), start))

    def largest_gradient(self, tensor: torch.Tensor) -> torch.Tensor:
        """A bound of gradients at the new rank, by the triangle inequality."""
        coefficients = None if self.of_gradients is None else self.of_gradients.abs()
        return self._extended(self._kept(tensor, coefficients), tensor.new_zeros(()))

    def mean_squared_step(self, tensor: torch.Tensor) -> torch.Tensor:
        """An average of squared steps of the factor at the new rank; that of a new rank is the mean."""
        kept = self._kept(tensor, _squared(self.of_values))
        return self._extended(kept, kept.mean(self.axis, keepdim=True))

    def _kept(self, tensor: torch.Tensor, coefficients: torch.Tensor | None) -> torch.Tensor:
        """What is known of the ranks that are kept, in their new basis."""
        if coefficients is None:
            return tensor
        ranks_last = tensor.movedim(self.axis, -1).to(coefficients.dtype)
        return (ranks_last @ coefficients.T).movedim(-1, self.axis).to(tensor.dtype).contiguous()

    def _extended(self, kept: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """The same with new ranks behind."""
        shape = list(kept.shape)
        shape[self.axis] = self.rank - shape[self.axis]
        return torch.cat([kept, new.expand(shape)], self.axis)

    def apply(self) -> None:
        """Give the parameter its new values, in place, and its pending gradient the new rank.

        The parameter stays the same object: optimizers, gradient scalers and hooks go on with it.
        """
        parameter, gradient = self.parameter, self.parameter.grad
        parameter.grad = None
        # A graph that is still alive, such as that of the last loss, keeps the parameter's accumulator
        # of gradients, which insists on the old shape. Another element type makes torch drop it.
        other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
        if parameter.device.type == "mps":
            other = torch.float16 if parameter.dtype == torch.float32 else torch.float32
        parameter.data = torch.empty(0, dtype=other, device=parameter.device)
        parameter.data = self.values
        if gradient is not None:
            parameter.grad = self.gradient(gradient)


def _squared(coefficients: torch.Tensor | None) -> torch.Tensor | None:
    return None if coefficients is None else coefficients.square()


_Carry = Callable[[FactorChange, torch.Tensor], torch.Tensor]

# By the names that torch.optim and its imitators give them.
_RULES: dict[str, _Carry] = {
    "exp_avg": FactorChange.gradient,  # Adam, AdamW, Adamax, NAdam, RAdam, Lion
    "momentum_buffer": FactorChange.gradient,  # SGD, RMSprop, Muon
    "grad_avg": FactorChange.gradient,  # RMSprop, centered
    "exp_avg_sq": FactorChange.mean_square,
    "max_exp_avg_sq": FactorChange.mean_square,  # amsgrad
    "square_avg": FactorChange.mean_square,  # RMSprop, Adadelta
    "exp_inf": FactorChange.largest_gradient,  # Adamax: a maximum needs no time to catch up
    "acc_delta": FactorChange.mean_squared_step,  # Adadelta
}
# Adagrad's sums begin with a number of its own.
_SUM = "sum"


def unwrapped(optimizer: Any) -> Any:
    """The torch optimizer under Accelerate's wrapper."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer, not {optimizer!r}")
    return optimizer


def check(optimizer: Any, factors: Mapping[str, Sequence[torch.nn.Parameter]]) -> None:
    """Refuse what cannot be carried over, before anything is changed.

    Parameters
    ----------
    optimizer
        A torch optimizer.
    factors
        The parameters that will change, by module.

    Raises
    ------
    NotImplementedError
        If the state of a parameter holds a tensor of another shape or an unknown meaning.
    ValueError
        If a parameter is trained, but not by this optimizer.
    """
    label = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise NotImplementedError(f"{label} keeps all parameters in one vector, which has no ranks")
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for module, parameters in factors.items():
        for parameter in parameters:
            if id(parameter) in known:
                _check_state(label, module, parameter, optimizer.state.get(parameter, {}))
            elif parameter.requires_grad:
                raise ValueError(
                    f"module {module!r}: {label} does not hold its factors: it belongs to another model, or "
                    "holds copies of the parameters as DeepSpeed's optimizers do"
                )


def _check_state(label: str, module: str, parameter: torch.nn.Parameter, state: Mapping[str, Any]) -> None:
    for key, value in state.items():
        is_counter = not _has_elements(value) and not isinstance(value, (list, tuple, dict))
        is_known = key in _RULES or key == _SUM
        # Numbers in fewer bits are subclasses (torchao), which cannot be cut or extended along an axis.
        is_plain = type(value) is torch.Tensor and value.shape == parameter.shape
        if not is_counter and not (is_known and is_plain):
            raise NotImplementedError(
                f"module {module!r}: the state {key!r} of {label} cannot be carried over to another rank: "
                "what it says about each rank of a factor is not known"
            )


def _has_elements(value: Any) -> bool:
    """Whether it is a tensor that is more than a counter."""
    return isinstance(value, torch.Tensor) and value.ndim > 0


def carry(optimizer: Any, change: FactorChange) -> None:
    """Give the state of a parameter the new rank; call it before the parameter changes."""
    state = optimizer.state.get(change.parameter, {})
    for key, value in state.items():
        if not _has_elements(value):
            continue
        if key == _SUM:
            state[key] = change.sum_of_squares(value, _adagrad_start(optimizer, change.parameter))
        else:
            state[key] = _RULES[key](change, value)


def _adagrad_start(optimizer: Any, parameter: torch.nn.Parameter) -> float:
    """What Adagrad's sums begin with."""
    for group in optimizer.param_groups:
        if any(member is parameter for member in group["params"]):
            return float(group.get("initial_accumulator_value", 0.0))
    return 0.0
