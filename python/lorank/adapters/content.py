"""The content of an adapter's files: its modules, its settings, and all other tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lorank._internal.short_text import counted, spanned
from lorank.adapters.certificate import Certificate
from lorank.adapters.claims import Claims
from lorank.adapters.formats.image_style import ImageStyle
from lorank.adapters.module import LoraModule
from lorank.adapters.stored import Stored

Format = Literal["peft", "kohya", "peft-0.18", "mlx", "torchtune", "gguf"]
Profile = Literal["compact", "portable", "tensor-rank", "exact"]
Dtype = Literal["float32", "float16", "bfloat16", "float64"]

Adapter = TypeVar("Adapter", bound="AdapterContent")
"""The type of an adapter that a function takes and returns with changes."""


_VERIFIED = ("certificate", "is_spectral", "notes")
"""Attributes that depend on a digest of the factors."""


@dataclass(frozen=True, slots=True)
class AdapterContent:
    """The content of an adapter's files.

    The first use of `certificate`, `is_spectral` or `notes` of an adapter with a certificate reads the
    factors and compares them with the digest that binds the certificate to them.

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
        The layout of the files to write: ``"peft"`` for all adapters of language models that were read,
        ``"kohya"`` for files of image adapters, or a layout that `lorank.convert` has chosen.
    label
        The adapter's name in messages.
    is_spectral
        True if factors are in balanced spectral form, which can be truncated without a decomposition.
    certificate
        The errors of compression, merging or extraction, read from `lorank.json` in a PEFT adapter's folder;
        None for an adapter straight from training, and if the factors or scales changed since.
    key_style
        The spelling of an image adapter's keys; None for PEFT adapters.
    claims
        Statements of the adapter's file that are not verified yet; None if there are none.
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
    claims: Claims | None = field(default=None, init=False, repr=False, compare=False)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Verify the claims on the first use of an attribute that depends on them."""
            if name not in _VERIFIED:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            if (claims := self.claims) is not None:
                verified = claims.verified()
                for entry in _VERIFIED:
                    object.__setattr__(self, entry, getattr(verified, entry))
                object.__setattr__(self, "claims", None)
            return object.__getattribute__(self, name)

    @classmethod
    def copied(cls: type[Adapter], content: AdapterContent) -> Adapter:
        """Return an adapter of this class with the same content, without verifying its claims."""
        lazy = _VERIFIED if content.claims is not None else ()
        names = [entry.name for entry in fields(content) if entry.init and entry.name not in lazy]
        result = cls(**{name: getattr(content, name) for name in names})
        return result if content.claims is None else result.claiming(content.claims)

    def claiming(self: Adapter, claims: Claims) -> Adapter:
        """Return the same adapter with statements of its file, which are verified on first use."""
        result = replace(self)
        object.__setattr__(result, "claims", claims)
        for name in _VERIFIED:
            object.__delattr__(result, name)
        return result

    @property
    def stated_notes(self) -> Sequence[str]:
        """Remarks that do not depend on the certificate, if it is not verified yet; else all notes."""
        return self.claims.notes if self.claims is not None else self.notes

    @property
    def states_spectral_form(self) -> bool:
        """True if a flag of the file, or the operation that made the factors, states spectral form."""
        return self.claims is not None or self.is_spectral

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
