"""What a truncation left out, exactly, from the singular values that it dropped."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class ModuleCertificate:
    """One module.

    Attributes
    ----------
    name
        The module.
    rank_before, rank_after
        Its ranks.
    parameters_before, parameters_after
        Parameters of its factors.
    energy
        ``||dW||_F^2`` of its update before.
    dropped_energy
        ``||dW - dW_hat||_F^2``.
    spectral_error
        ``||dW - dW_hat||_2``: the largest singular value dropped. Of a dense difference with both sides
        above 512 an estimate from below, as its values are.
    """

    name: str
    rank_before: int
    rank_after: int
    parameters_before: int
    parameters_after: int
    energy: float
    dropped_energy: float
    spectral_error: float

    @property
    def error(self) -> float:
        """``||dW - dW_hat||_F``."""
        return math.sqrt(self.dropped_energy)

    @property
    def retained_energy(self) -> float:
        """The share of the energy that is kept; 1 for an update of zero."""
        return 1.0 - self.dropped_energy / self.energy if self.energy > 0 else 1.0

    def to_json(self) -> dict[str, Any]:
        """All numbers as values that JSON knows."""
        numbers = {name: getattr(self, name) for name in _FIELDS}
        return {**numbers, "error": self.error, "retained_energy": self.retained_energy}

    @classmethod
    def from_json(cls, content: Any) -> ModuleCertificate:
        """What `to_json` wrote.

        Raises
        ------
        ValueError
            If it is something else.
        """
        if not isinstance(content, dict) or not isinstance(content.get("name"), str):
            raise ValueError("a module without a name")
        numbers: dict[str, Any] = {name: content.get(name) for name in _FIELDS if name != "name"}
        for key, value in numbers.items():
            wanted = (int,) if key.startswith(("rank", "parameters")) else (int, float)
            if type(value) not in wanted or not 0 <= value < math.inf:
                raise ValueError(f"{content['name']}: {key} is {value!r}")
        return cls(content["name"], **numbers)


_FIELDS = tuple(field.name for field in fields(ModuleCertificate))


@dataclass(frozen=True, slots=True)
class Certificate:
    """All modules together.

    Attributes
    ----------
    action
        What was done, in words.
    modules
        One entry a module, in the adapter's order.
    rounding_error
        ``||.||_F`` between the truncated update and what was written, where factors were rounded to a
        narrower type than float32; None before saving, and for float32. What was read and written again
        has the sum of both roundings, a bound.
    """

    action: str
    modules: Sequence[ModuleCertificate]
    rounding_error: float | None = None

    @property
    def error(self) -> float:
        """``||dW - dW_hat||_F`` over all modules."""
        return math.sqrt(math.fsum(module.dropped_energy for module in self.modules))

    @property
    def norm(self) -> float:
        """``||dW||_F`` over all modules, before."""
        return math.sqrt(math.fsum(module.energy for module in self.modules))

    @property
    def relative_error(self) -> float:
        """The error by the norm; 0 for an update of zero."""
        return self.error / self.norm if self.norm > 0 else 0.0

    @property
    def spectral_error(self) -> float:
        """The largest singular value dropped anywhere."""
        return max((module.spectral_error for module in self.modules), default=0.0)

    @property
    def retained_energy(self) -> float:
        """The share of the energy that is kept; 1 for an update of zero."""
        energy = math.fsum(module.energy for module in self.modules)
        dropped = math.fsum(module.dropped_energy for module in self.modules)
        return 1.0 - dropped / energy if energy > 0 else 1.0

    @property
    def parameters_before(self) -> int:
        """Parameters of all factors before."""
        return sum(module.parameters_before for module in self.modules)

    @property
    def parameters_after(self) -> int:
        """Parameters of all factors after."""
        return sum(module.parameters_after for module in self.modules)

    def with_rounding(self, added: float) -> Certificate:
        """The same with what rounding added to it."""
        return replace(self, rounding_error=(self.rounding_error or 0.0) + added)

    def __repr__(self) -> str:
        return (
            f"Certificate({self.action!r}, {len(self.modules)} modules, "
            f"{self.parameters_after:,} of {self.parameters_before:,} parameters, "
            f"error {self.error:.4g} of {self.norm:.4g})"
        )

    def to_json(self) -> dict[str, Any]:
        """Totals and modules as values that JSON knows."""
        totals = (
            "error",
            "norm",
            "relative_error",
            "spectral_error",
            "retained_energy",
            "parameters_before",
            "parameters_after",
        )
        return {
            "action": self.action,
            **{name: getattr(self, name) for name in totals},
            "rounding_error": self.rounding_error,
            "modules": [m.to_json() for m in self.modules],
        }

    @classmethod
    def from_json(cls, content: Any) -> Certificate:
        """What `to_json` wrote; totals are computed anew.

        Raises
        ------
        ValueError
            If it is something else.
        """
        if not isinstance(content, dict) or not isinstance(content.get("action"), str):
            raise ValueError("no action")
        modules, rounding = content.get("modules"), content.get("rounding_error")
        if not isinstance(modules, list):
            raise ValueError("no list of modules")
        if rounding is not None and (type(rounding) not in (int, float) or not 0 <= rounding < math.inf):
            raise ValueError(f"rounding_error is {rounding!r}")
        return cls(content["action"], [ModuleCertificate.from_json(module) for module in modules], rounding)

    def to_text(self, notes: Sequence[str] = ()) -> str:
        """The same, and an adapter's notes, as a JSON text with a line for every module."""
        content = {**self.to_json(), "notes": list(notes)}
        modules = ",\n".join(json.dumps(module) for module in content.pop("modules"))
        return f'{json.dumps(content)[:-1]}, "modules": [\n{modules}\n]}}\n'
