"""The part that formats of folders for language models have in common."""

from __future__ import annotations

# ruff: noqa: D102  # The base class documents the methods.
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lorank._internal.json_files import read_json
from lorank.adapters.certificate import Certificate
from lorank.adapters.content import AdapterContent, Profile
from lorank.adapters.formats.base import AdapterFormat, AsStored, Place
from lorank.adapters.metadata import CERTIFICATE_FILE
from lorank.adapters.module import LoraModule
from lorank.adapters.profiles import WrittenRank
from lorank.adapters.stored import Stored


class ConvertedFormat(AdapterFormat):
    """A format that adapters are converted to. Adapters of it are read as adapters of PEFT.

    Attributes
    ----------
    title
        The name of the format in messages.
    weights
        The name of the file of tensors.
    """

    title: ClassVar[str]
    weights: ClassVar[str]
    key_prefix = ""
    holds_settings = False
    rewrites_certificate = False
    certificate_place = CERTIFICATE_FILE
    card_entries: ClassVar[Sequence[str]] = ()

    def read(self, path: Path, *, contradictions: bool, changed_base: bool) -> AsStored:
        del contradictions, changed_base
        raise NotImplementedError(f"{path}: read as an adapter of PEFT")

    def certificate(self, path: Path, metadata: Mapping[str, str]) -> Callable[[], Any] | None:
        del metadata
        file = path / CERTIFICATE_FILE
        return (lambda: read_json(file)) if file.is_file() else None

    def place(self, target: Path) -> Place:
        if target.suffix == ".safetensors":
            raise ValueError(f"{target}: an adapter of {self.title} is a folder: name a folder")
        return Place(target, self.weights, is_alone=False, address=target)

    def member_name(self, name: str) -> str:
        return name

    def alphas(self, adapter: AdapterContent, written: Mapping[str, WrittenRank]) -> dict[str, float]:
        del adapter, written
        return {}

    def carried(self, adapter: AdapterContent, names: Collection[str]) -> dict[str, Stored]:
        del names
        return dict(adapter.carried)

    def metadata(
        self,
        adapter: AdapterContent,
        written: Mapping[str, WrittenRank],
        certificate: Certificate | None,
    ) -> dict[str, str]:
        del adapter, written, certificate
        return {}

    def readers(self, profile: Profile) -> str:
        del profile
        return self.title

    def carried_by_sum(self, adapter: AdapterContent, after: Collection[LoraModule]) -> dict[str, Stored]:
        del after
        return dict(adapter.carried)

    def adds_up(self, key: str) -> bool:
        del key
        return False

    def sum_fields(
        self, adapters: Sequence[AdapterContent], acting: Sequence[AdapterContent], *, ties_tables: bool
    ) -> dict[str, Any]:
        del acting, ties_tables
        raise ValueError(
            f"{adapters[0].label}: adapters converted to {self.title} are not merged: merge first"
        )


def adapted_ranks(adapter: AdapterContent) -> dict[str, int]:
    """Return the ranks of the adapted modules.

    Raises
    ------
    ValueError
        If no module has any rank left.
    """
    ranks = {module.name: module.rank for module in adapter.adapted}
    if not ranks:
        raise ValueError(f"{adapter.label}: no module has any rank left")
    return ranks


def refuse_carried(adapter: AdapterContent, title: str, *, but: Iterable[str] = ()) -> None:
    """Refuse tensors other than factors, which a format cannot hold.

    Raises
    ------
    ValueError
        If the adapter has such tensors; the message names the first.
    """
    if left := sorted(set(adapter.carried) - set(but)):
        raise ValueError(
            f"{adapter.label}: tensor {left[0]!r}: {title} holds factors only, but {len(left)} tensors "
            "are not (saved modules, biases, magnitudes): keep PEFT's format"
        )
    if biased := [module.name for module in adapter.modules.values() if module.carried]:
        raise ValueError(
            f"{adapter.label}: module {biased[0]!r}: {title} has no biases of LoRA layers: keep PEFT's format"
        )
