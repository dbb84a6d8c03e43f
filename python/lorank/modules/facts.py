"""Facts about a model other than its matrices.

Reports store them so that allocation respects PEFT's limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorank._internal.json_fields import Fields


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts about a model that decide which modules can be adapted.

    Attributes
    ----------
    class_name
        The name of the model's class, whose code gives the names of modules; empty if these were guessed.
    doubts
        The reasons why guessed names, kinds or orientations may be wrong.
    refused
        The reason why PEFT cannot adapt a module, by the name of the module.
    ties
        The other modules that share a weight, by the name of the module with the row in the report.
    modules
        The names of all modules, including containers and norms, so that a target matches none by mistake.
    reason
        The reason why names were guessed; empty if no names were, or if `doubts` holds the reason.
    """

    class_name: str = ""
    doubts: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    ties: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    reason: str = ""

    @property
    def are_guessed(self) -> bool:
        """True if names, kinds and orientations were read from the names and shapes of tensors alone."""
        return not self.class_name

    @property
    def remark(self) -> str:
        """The sentence that a report shows if names were guessed; empty if they were not."""
        if not self.are_guessed:
            return ""
        reason = f" ({self.reason})" if self.reason else ""
        return "; ".join([f"modules are guessed from names{reason}", *self.doubts])

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        return {
            "class_name": self.class_name,
            "doubts": list(self.doubts),
            "refused": dict(self.refused),
            "ties": {name: list(others) for name, others in self.ties.items()},
            "modules": list(self.modules),
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, content: Fields) -> ModelFacts:
        """Return the facts from the values that `to_json` returns.

        Raises
        ------
        ValueError
            If the content has another structure.
        """
        refused, ties = content.object("refused"), content.object("ties")
        return cls(
            content.text("class_name"),
            content.texts("doubts"),
            {name: refused.text(name) for name in refused},
            {name: ties.texts(name) for name in ties},
            content.texts("modules"),
            content.text("reason", ""),
        )
