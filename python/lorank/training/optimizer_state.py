r"""Converts an optimizer's state for a LoRA factor to another rank.

A factor changes along its rank axis only. Shrinking changes the basis: ``A' = T_A A`` and ``B' = B T_B`` with
``T_A T_B = I``. Gradients become ``T_B^T dA`` and ``dB T_A^T``. First moments are averages of gradients and
transform exactly like them. Second moments transform with the squares of the coefficients, which is exact if
the gradients of different ranks are uncorrelated, and an approximation otherwise.

New ranks start with a first moment of zero and the mean second moment of the other ranks. Step counters are
kept, so Adam does not correct the bias of moments that start at zero. With second moments of zero, the first
steps would therefore be several times as long as the learning rate.
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
        The factor at its old rank.
    axis
        Axis of the ranks: 0 for A ``(r, in)``, 1 for B ``(out, r)``.
    rank
        The new rank.
    values
        Values of the factor at the new rank.
    value_coefficients, gradient_coefficients
        Coefficients ``(kept, old rank)`` of the new basis, for values and for gradients; None if all old
        ranks are kept. The first `kept` ranks are in this basis, the others are new.
    """

    parameter: torch.nn.Parameter
    axis: int
    rank: int
    values: torch.Tensor
    value_coefficients: torch.Tensor | None = None
    gradient_coefficients: torch.Tensor | None = None

    def gradient(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a gradient, or an average of gradients, at the new rank."""
        return self._extended(self._kept(tensor, self.gradient_coefficients), tensor.new_zeros(()))

    def mean_square(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return an average of squared gradients at the new rank; new ranks get the mean of the others."""
        kept = self._kept(tensor, _squared(self.gradient_coefficients))
        return self._extended(kept, kept.mean(self.axis, keepdim=True))

    def sum_of_squares(self, tensor: torch.Tensor, start: float) -> torch.Tensor:
        """Return a sum of squared gradients at the new rank; new ranks get `start`."""
        kept = self._kept(tensor, _squared(self.gradient_coefficients))
        return self._extended(kept, tensor.new_full((), start))

    def largest_gradient(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return an upper bound on absolute gradients at the new rank, by the triangle inequality."""
        coefficients = None if self.gradient_coefficients is None else self.gradient_coefficients.abs()
        return self._extended(self._kept(tensor, coefficients), tensor.new_zeros(()))

    def mean_squared_step(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return an average of squared steps at the new rank; new ranks get the mean of the others."""
        kept = self._kept(tensor, _squared(self.value_coefficients))
        return self._extended(kept, kept.mean(self.axis, keepdim=True))

    def _kept(self, tensor: torch.Tensor, coefficients: torch.Tensor | None) -> torch.Tensor:
        """Return the part of a tensor that belongs to the kept ranks, in their new basis."""
        if coefficients is None:
            return tensor
        ranks_last = tensor.movedim(self.axis, -1).to(coefficients.dtype)
        return (ranks_last @ coefficients.T).movedim(-1, self.axis).to(tensor.dtype).contiguous()

    def _extended(self, kept: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Append a value for each new rank."""
        shape = list(kept.shape)
        shape[self.axis] = self.rank - shape[self.axis]
        return torch.cat([kept, new.expand(shape)], self.axis)

    def apply(self) -> None:
        """Set the parameter's new values in place, and convert its pending gradient to the new rank.

        The parameter stays the same object, so that optimizers, gradient scalers and hooks stay valid.
        """
        parameter, gradient = self.parameter, self.parameter.grad
        parameter.grad = None
        # The graph of the last loss may still hold the node that accumulates the parameter's gradient, and
        # this node rejects other shapes. After a change of the element type, torch creates a new node.
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

# The conversion of each state tensor, by its key in torch.optim. Other packages use the same keys.
_RULES: dict[str, _Carry] = {
    "exp_avg": FactorChange.gradient,  # Adam, AdamW, Adamax, NAdam, RAdam, Lion
    "momentum_buffer": FactorChange.gradient,  # SGD, RMSprop, Muon
    "grad_avg": FactorChange.gradient,  # RMSprop, centered
    "exp_avg_sq": FactorChange.mean_square,
    "max_exp_avg_sq": FactorChange.mean_square,  # amsgrad
    "square_avg": FactorChange.mean_square,  # RMSprop, Adadelta
    "exp_inf": FactorChange.largest_gradient,  # Adamax: a maximum; correct one step after it starts at zero
    "acc_delta": FactorChange.mean_squared_step,  # Adadelta
}
# The key of Adagrad's sum of squares. Its initial value is an option of the optimizer.
_SUM = "sum"


def unwrapped(optimizer: Any) -> Any:
    """Return the torch optimizer under Accelerate's wrapper.

    Raises
    ------
    TypeError
        If there is no torch optimizer.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer, not {optimizer!r}")
    return optimizer


def check(optimizer: Any, factors: Mapping[str, Sequence[torch.nn.Parameter]]) -> None:
    """Check that the optimizer's state can be converted to other ranks.

    Parameters
    ----------
    optimizer
        A torch optimizer.
    factors
        The parameters that will change, by module.

    Raises
    ------
    NotImplementedError
        If a parameter's state has a tensor with an unknown key, or a tensor of a different shape.
    ValueError
        If a parameter is trained, but not by this optimizer.
    """
    label = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise NotImplementedError(
            f"{label} keeps all parameters in one vector, which cannot be resized by rank: use another "
            "optimizer"
        )
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for module, parameters in factors.items():
        for parameter in parameters:
            if id(parameter) in known:
                _check_state(label, module, parameter, optimizer.state.get(parameter, {}))
            elif parameter.requires_grad:
                raise ValueError(
                    f"module {module!r}: {label} does not hold the module's factors: the optimizer belongs "
                    "to another model, or holds copies of the parameters, as DeepSpeed's optimizers do"
                )


def _check_state(label: str, module: str, parameter: torch.nn.Parameter, state: Mapping[str, Any]) -> None:
    """Raise NotImplementedError for state of a parameter that no rule can convert."""
    for key, value in state.items():
        is_counter = not _has_elements(value) and not isinstance(value, (list, tuple, dict))
        is_known = key in _RULES or key == _SUM
        # torchao stores low-bit states in tensor subclasses, which cannot be cut or extended along an axis.
        is_plain = type(value) is torch.Tensor and value.shape == parameter.shape
        if not is_counter and not (is_known and is_plain):
            raise NotImplementedError(
                f"module {module!r}: the state {key!r} of {label} cannot be carried over to another rank: "
                "lorank has no rule for this state; use another optimizer"
            )


def _has_elements(value: Any) -> bool:
    """Return True for a tensor with dimensions; counters are scalars."""
    return isinstance(value, torch.Tensor) and value.ndim > 0


def carry(optimizer: Any, change: FactorChange) -> None:
    """Convert the state of a parameter to the new rank. Call this before `FactorChange.apply`."""
    state = optimizer.state.get(change.parameter, {})
    for key, value in state.items():
        if not _has_elements(value):
            continue
        if key == _SUM:
            state[key] = change.sum_of_squares(value, _adagrad_start(optimizer, change.parameter))
        else:
            state[key] = _RULES[key](change, value)


def _adagrad_start(optimizer: Any, parameter: torch.nn.Parameter) -> float:
    """Return the initial value of Adagrad's sums for a parameter."""
    for group in optimizer.param_groups:
        if any(member is parameter for member in group["params"]):
            return float(group.get("initial_accumulator_value", 0.0))
    return 0.0
