"""The content of an adapter's files: its modules, its settings, and all other tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from lorank._internal.short_text import counted, spanned
from lorank.adapters.certificate import Certificate
from lorank.adapters.formats.image_style import ImageStyle
from lorank.adapters.module import LoraModule
from lorank.adapters.stored import Stored

Format = Literal["peft", "kohya"]
Profile = Literal["compact", "portable", "tensor-rank"]
Dtype = Literal["float32", "float16", "bfloat16", "float64"]

Adapter = TypeVar("Adapter", bound="AdapterContent")
"""The type of an adapter that a function takes and returns with changes."""


@dataclass(frozen=True, slots=True)
class AdapterContent:
    """The content of an adapter's files.

    Attributes
    ----------
    modules
        Modules by name, in the order of block numbers. Modules of rank 0 stay listed.
    config
        PEFT's `adapter_config.json`; empty for other formats.
    carried
        Tensors that are not factors (`modules_to_save`, biases, DoRA magnitudes), written untouched. Their
        keys in PEFT's format are those of a file in which every listed module has factors; see
        `lorank.adapters.carried`.
    notes
        Remarks on settings that reading normalised, and on tensors that are carried untouched.
    format
        ``"peft"`` or ``"kohya"``: the naming of keys in the files.
    label
        The adapter's name in messages.
    is_spectral
        True if factors are in balanced spectral form, which can be truncated without a decomposition.
    certificate
        The errors of compression, merging or extraction, read from `lorank.json` in a PEFT adapter's folder;
        None for an adapter straight from training.
    key_style
        The spelling of an image adapter's keys; None for PEFT adapters.
    """

    modules: Mapping[str, LoraModule]
    config: Mapping[str, Any] = field(default_factory=dict)
    carried: Mapping[str, Stored] = field(default_factory=dict)
    notes: Sequence[str] = ()
    format: Format = "peft"
    label: str = ""
    is_spectral: bool = False
    certificate: Certificate | None = None
    key_style: ImageStyle | None = None

    @property
    def adapted(self) -> list[LoraModule]:
        """Modules with a rank above 0."""
        return [module for module in self.modules.values() if module.rank]

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each module by name."""
        return {name: module.rank for name, module in self.modules.items()}

    @property
    def num_parameters(self) -> int:
        """Number of parameters in all factors."""
        return sum(module.num_parameters for module in self.modules.values())

    @property
    def base_model(self) -> str | None:
        """Path or hub id of the base model, as the adapter names it."""
        return self.config.get("base_model_name_or_path")

    def __repr__(self) -> str:
        ranks = [module.rank for module in self.modules.values()]
        modules, span = counted(len(ranks), "module"), spanned(ranks, "rank")
        return (
            f"{type(self).__name__}({self.label!r}, {self.format}, {modules}, {span}, "
            f"{self.num_parameters:,} parameters)"
        )

    def with_certificate(self: Adapter, certificate: Certificate) -> Adapter:
        """Return the same adapter with another certificate."""
        return replace(self, certificate=certificate)
