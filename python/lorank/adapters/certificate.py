"""The exact error of a truncation, from the singular values that it dropped."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class ModuleCertificate:
    """The error of truncating one module.

    Attributes
    ----------
    name
        Name of the module.
    rank_before, rank_after
        Rank before and after the truncation.
    parameters_before, parameters_after
        Number of parameters of the factors before and after the truncation.
    energy
        ``||dW||_F^2`` of the update before the truncation.
    dropped_energy
        ``||dW - dW_hat||_F^2``, where `dW_hat` is the truncated update.
    spectral_error
        ``||dW - dW_hat||_2``: the largest dropped singular value. The singular values of a dense difference
        with both sides above 512 are estimates from below, so this error is such an estimate, too.
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
        """Share of the energy that is kept; 1 for an update of zero."""
        return 1.0 - self.dropped_energy / self.energy if self.energy > 0 else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return all fields and the errors as JSON values."""
        numbers = {name: getattr(self, name) for name in _FIELDS}
        return {**numbers, "error": self.error, "retained_energy": self.retained_energy}

    @classmethod
    def from_json(cls, content: Any) -> ModuleCertificate:
        """Build a certificate from the result of `to_json`.

        Raises
        ------
        ValueError
            If the content is not such a certificate.
        """
        if not isinstance(content, dict) or not isinstance(content.get("name"), str):
            raise ValueError("a module without a name")
        numbers: dict[str, Any] = {name: content.get(name) for name in _FIELDS if name != "name"}
        for key, value in numbers.items():
            allowed = (int,) if key.startswith(("rank", "parameters")) else (int, float)
            if type(value) not in allowed or not 0 <= value <= sys.float_info.max:
                raise ValueError(f"{content['name']}: {key} is {value!r}")
        return cls(content["name"], **numbers)


_FIELDS = tuple(field.name for field in fields(ModuleCertificate))


@dataclass(frozen=True, slots=True)
class Certificate:
    """The error of truncating an adapter.

    Attributes
    ----------
    action
        Description of the operation.
    modules
        Certificates of all modules, in the adapter's order.
    rounding_error
        Frobenius norm of the difference between the truncated and the written update, if factors were rounded
        to fewer than 32 bits; None before saving, and for float32. Each further saving adds its rounding
        error; the sum is an upper bound.
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
        """``||dW||_F`` over all modules, before the truncation."""
        return math.sqrt(math.fsum(module.energy for module in self.modules))

    @property
    def relative_error(self) -> float:
        """Error divided by the norm; 0 for an update of zero."""
        return self.error / self.norm if self.norm > 0 else 0.0

    @property
    def spectral_error(self) -> float:
        """Largest dropped singular value of all modules."""
        return max((module.spectral_error for module in self.modules), default=0.0)

    @property
    def retained_energy(self) -> float:
        """Share of the energy that is kept; 1 for an update of zero."""
        energy = math.fsum(module.energy for module in self.modules)
        dropped = math.fsum(module.dropped_energy for module in self.modules)
        return 1.0 - dropped / energy if energy > 0 else 1.0

    @property
    def parameters_before(self) -> int:
        """Number of parameters of all factors before the truncation."""
        return sum(module.parameters_before for module in self.modules)

    @property
    def parameters_after(self) -> int:
        """Number of parameters of all factors after the truncation."""
        return sum(module.parameters_after for module in self.modules)

    def with_rounding(self, added: float) -> Certificate:
        """Return a copy with a further rounding error added."""
        return replace(self, rounding_error=(self.rounding_error or 0.0) + added)

    def __repr__(self) -> str:
        return (
            f"Certificate({self.action!r}, {len(self.modules)} modules, "
            f"{self.parameters_after:,} of {self.parameters_before:,} parameters, "
            f"error {self.error:.4g} of {self.norm:.4g})"
        )

    def to_json(self) -> dict[str, Any]:
        """Return totals and modules as JSON values."""
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
        """Build a certificate from the result of `to_json`; totals are computed again.

        Raises
        ------
        ValueError
            If the content is not such a certificate.
        """
        if not isinstance(content, dict) or not isinstance(content.get("action"), str):
            raise ValueError("no action")
        modules, rounding = content.get("modules"), content.get("rounding_error")
        if not isinstance(modules, list):
            raise ValueError("no list of modules")
        if rounding is not None and (type(rounding) not in (int, float) or not 0 <= rounding < math.inf):
            raise ValueError(f"rounding_error is {rounding!r}")
        found = [ModuleCertificate.from_json(module) for module in modules]
        if (
            sum(module.energy for module in found) + sum(module.dropped_energy for module in found)
            == math.inf
        ):
            raise ValueError("the sum of energies overflows")
        return cls(content["action"], found, rounding)

    def to_text(self, notes: Sequence[str] = (), **entries: Any) -> str:
        """Return the certificate, an adapter's notes and other entries as JSON; every module has a line."""
        content = {**self.to_json(), "notes": list(notes), **entries}
        modules = ",\n".join(json.dumps(module) for module in content.pop("modules"))
        return f'{json.dumps(content)[:-1]}, "modules": [\n{modules}\n]}}\n'
