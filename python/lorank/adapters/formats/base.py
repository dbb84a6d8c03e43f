"""The operations that differ between the formats of adapters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy.typing as npt

from lorank import _core
from lorank._core import Checkpoint, Matrix
from lorank.adapters.certificate import Certificate
from lorank.adapters.content import AdapterContent, Format, Profile
from lorank.adapters.formats.base_weights import BaseWeights
from lorank.adapters.formats.expert_layout import Parameter
from lorank.adapters.module import LoraModule
from lorank.adapters.profiles import WrittenRank
from lorank.adapters.stored import Stored
from lorank.adapters.tensors import FileTensors, Tensors

Array = npt.NDArray[Any]
WrittenTensor = tuple[str, list[int], Matrix | tuple[Checkpoint, int] | bytes, str]
"""Name, shape, values, and element type by safetensors' name."""

Files = Literal["folders", "image files", "MLX folders", "GGUF files", "torchtune files", "other"]
"""The kind of files of an adapter, as in `lorank.runtimes.rules.Runtime.reads`."""


@dataclass(frozen=True, slots=True)
class AsStored:
    """An adapter with the ranks of the file's tensors, and its differences from the file.

    Attributes
    ----------
    adapter
        The adapter with the ranks of the tensors, including padding, even if the settings state others.
    tensors
        The tensors by their names without wrappers.
    wrappers
        Names of wrappers in the file's keys.
    stored_as
        Key without wrappers -> the file's key, for keys with a wrapper's name.
    swapped
        Stacks of experts in the layout of PEFT before 0.19.
    files
        The kind of the adapter's files, if it is not that of the adapter's format.
    with_base
        A function that returns the adapter as it is if the base model is known; None if that changes nothing.
    """

    adapter: AdapterContent
    tensors: Tensors
    wrappers: tuple[str, ...] = ()
    stored_as: Mapping[str, str] = field(default_factory=dict)
    swapped: tuple[Parameter, ...] = ()
    files: Files | None = None
    with_base: Callable[[BaseWeights], AdapterContent] | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """The folder and the file that an adapter is written to.

    Attributes
    ----------
    folder
        The folder of all files.
    weights
        The name of the file of tensors within the folder.
    is_alone
        True if only the file of tensors is written, because the folder may hold other files.
    address
        The path to read the adapter from.
    """

    folder: Path
    weights: str
    is_alone: bool
    address: Path


class AdapterFormat(ABC):
    """A format of adapters.

    Attributes
    ----------
    name
        The value of `AdapterContent.format`.
    files
        The kind of files, as in `lorank.runtimes.rules.Runtime.reads`.
    key_prefix
        The start of every key of the format's files; keys of other programs may lack it.
    holds_settings
        True if adapters have PEFT's settings, so that they can be put into a live model.
    rewrites_certificate
        True if the file of tensors holds the certificate: the file is then written again, with the rounding
        error that was measured on it.
    certificate_place
        The name of the file or of the metadata entry that holds the certificate.
    card_entries
        Lines of a model card's front matter.
    carried_remark
        A sentence of the card on tensors other than factors; empty if there is none.
    library
        The value of the metadata entry "format" in the file of tensors.
    rearranges
        True if the file stores factors in another arrangement than PEFT; see `arranged`.
    """

    name: ClassVar[Format]
    files: ClassVar[Files]
    key_prefix: ClassVar[str]
    holds_settings: ClassVar[bool]
    rewrites_certificate: ClassVar[bool]
    certificate_place: ClassVar[str]
    card_entries: ClassVar[Sequence[str]]
    carried_remark: ClassVar[str] = ""
    library: ClassVar[str] = "pt"
    rearranges: ClassVar[bool] = False

    @abstractmethod
    def read(self, path: Path, *, contradictions: bool, changed_base: bool) -> AsStored:
        """Read the adapter at a path.

        Parameters
        ----------
        path
            The folder or file.
        contradictions
            True to accept settings that contradict the tensors.
        changed_base
            True to accept an initialisation that changed the base model.

        Raises
        ------
        FormatError
            If the files hold no LoRA adapter, or a damaged one.
        """

    def write(
        self,
        file: Path,
        tensors: list[WrittenTensor],
        metadata: Mapping[str, str],
        threads: int,
        seal: tuple[str, bytes],
    ) -> str:
        """Write the file of tensors with a digest under the key of the seal; return the digest."""
        digest = _core.write_safetensors(file, tensors, metadata, threads, seal)
        assert digest is not None
        return digest

    def open(self, file: Path) -> Tensors:
        """Open a file of tensors that `write` has written."""
        return FileTensors(file)

    def arranged(self, module: LoraModule, b: Array, a: Array) -> tuple[Array, Array]:
        """Return factors in the arrangement of the file, given those of PEFT's files."""
        del module
        return b, a

    def restored(self, module: LoraModule, b: Array, a: Array) -> tuple[Array, Array]:
        """Return factors in the arrangement of PEFT's files, given those of the file: undo `arranged`."""
        del module
        return b, a

    @abstractmethod
    def certificate(self, path: Path, metadata: Mapping[str, str]) -> Callable[[], Any] | None:
        """Return a function that reads the certificate as JSON values; None if there is no certificate."""

    @abstractmethod
    def place(self, target: Path) -> Place:
        """Return the folder and file to write for the path that a caller gives.

        Raises
        ------
        ValueError
            If the path does not suit the format.
        """

    @abstractmethod
    def member_name(self, name: str) -> str:
        """Return the name of a family member's folder or file."""

    @abstractmethod
    def written_ranks(self, adapter: AdapterContent, profile: Profile) -> dict[str, WrittenRank]:
        """Return the rank and the scale of every written module."""

    @abstractmethod
    def keys(self, adapter: AdapterContent, names: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Return the keys of B and A of modules."""

    @abstractmethod
    def alphas(self, adapter: AdapterContent, written: Mapping[str, WrittenRank]) -> dict[str, float]:
        """Return the alphas that are tensors of the file, by key."""

    @abstractmethod
    def carried(self, adapter: AdapterContent, names: Collection[str]) -> dict[str, Stored]:
        """Return the carried tensors by key, for a file in which only the named modules have factors."""

    @abstractmethod
    def metadata(
        self,
        adapter: AdapterContent,
        written: Mapping[str, WrittenRank],
        certificate: Certificate | None,
    ) -> dict[str, str]:
        """Return the metadata of the file of tensors, without the entries that all formats have."""

    @abstractmethod
    def settings_files(self, adapter: AdapterContent, profile: Profile) -> dict[str, str]:
        """Return the text of every settings file, by file name."""

    @abstractmethod
    def readers(self, profile: Profile) -> str:
        """Return the names of programs that load a profile's adapters, as text for the card."""

    @abstractmethod
    def carried_by_sum(self, adapter: AdapterContent, after: Collection[LoraModule]) -> dict[str, Stored]:
        """Return an adapter's carried tensors, by their keys in a sum of adapters that adapts `after`."""

    @abstractmethod
    def adds_up(self, key: str) -> bool:
        """Return True for a carried tensor that a weighted sum of adapters adds up."""

    @abstractmethod
    def sum_fields(
        self, adapters: Sequence[AdapterContent], acting: Sequence[AdapterContent], *, ties_tables: bool
    ) -> dict[str, Any]:
        """Return the settings and the key spelling of a sum of adapters, as fields of `AdapterContent`.

        Parameters
        ----------
        adapters
            All terms of the sum.
        acting
            The terms whose settings the sum takes.
        ties_tables
            True if the sum ties its output head to the embedding.

        Raises
        ------
        ValueError
            If the terms differ in a setting that a sum has only once.
        """
