"""An adapter as a whole: its modules, and everything else that its files carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorank.adapters.module import LoraModule
from lorank.adapters.tensors import Stored

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lorank.adapters.certificate import Certificate
    from lorank.adapters.formats.image_keys import ImageStyle
    from lorank.compression.selection import KnobArguments

Format = Literal["peft", "kohya"]
Profile = Literal["compact", "portable", "tensor-rank"]
Dtype = Literal["float32", "float16", "bfloat16", "float64"]


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """A trained adapter.

    Attributes
    ----------
    modules
        By name, in the order of their numbers. A module that lost all its rank stays listed.
    config
        PEFT's `adapter_config.json`; empty for other formats.
    carried
        Tensors that are not factors (`modules_to_save`, biases, DoRA magnitudes), written untouched. Their
        keys in PEFT's format are those of a file in which every listed module has factors; see
        `lorank.adapters.carried`.
    notes
        What was normalised on reading, and what is carried untouched.
    format
        ``"peft"`` or ``"kohya"``: which names the files use.
    label
        What to call it.
    is_spectral
        Whether factors are in balanced spectral form, so that any rank is cut without a decomposition.
    certificate
        What compressing, merging or extracting left out, read from `lorank.json` beside a PEFT adapter;
        None for an adapter as it was trained.
    key_style
        The spelling of an image file's keys; None for PEFT adapters.
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

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        threads: int | None = None,
        progress: bool = False,
        **knobs: Unpack[KnobArguments],
    ) -> LoraAdapter:
        """Read an adapter; factors stay on disk until they are needed.

        Parameters
        ----------
        path
            A PEFT folder (`adapter_config.json` and `adapter_model.safetensors` or `.bin`), or a
            `.safetensors` file with the keys of kohya or diffusers.
        threads, progress
            As in `compress`.
        **knobs
            As in `compress`: the adapter is cut to them, without a decomposition if it is elastic.

        Raises
        ------
        FileNotFoundError, OSError
            If it cannot be read.
        FormatError
            If it is damaged, or an adapter of another kind (LoHa, LoKr, IA3, ...), which is named.
        """
        from lorank.adapters.reading import read_adapter

        adapter = read_adapter(path)
        if not knobs:
            return adapter
        from lorank.compression.compress import compress

        return compress(adapter, threads=threads, progress=progress, **knobs)

    @classmethod
    def from_model(cls, peft_model: Any, adapter_name: str = "default") -> LoraAdapter:
        """Read an adapter of a live model; its tensors are not copied.

        Parameters
        ----------
        peft_model
            A PEFT model, or a model with injected PEFT layers (`add_adapter` and `load_adapter` of
            transformers and diffusers, `peft.inject_adapter_in_model`). It may be compiled or wrapped for
            data parallelism.
        adapter_name
            The name of the adapter to read.

        Raises
        ------
        TypeError
            If the model is not a `torch.nn.Module`.
        ValueError
            If the model has no such adapter, the adapter's update is not a product of two factors, or its
            factors are sharded or have no values.
        """
        from lorank.adapters.live.reading import from_model

        return from_model(peft_model, adapter_name)

    def into_model(self, peft_model: Any, adapter_name: str = "default") -> None:
        """Put the adapter into a live model; it replaces an adapter of the same name.

        The layers change in place to the adapter's ranks and scalings, and PEFT's config of the adapter
        follows, so that a saved model computes the same after loading. Parameters stay the same objects; an
        optimizer has to be built anew where ranks change. Modules of rank 0 lose the adapter. Other adapters,
        the active adapters, the modes of layers and the choice of trained parameters stay as they are; a new
        adapter is neither active nor trained. Nothing changes if an error is raised.

        Parameters
        ----------
        peft_model
            A model as for `from_model`.
        adapter_name
            The name of an adapter of the model, or a new one.

        Raises
        ------
        TypeError
            If the model has no PEFT layers.
        ValueError
            If the adapter is not in PEFT's format, names or shapes do not fit the model, or the adapter of
            that name is of another kind (DoRA, AdaLoRA, other saved modules) or merged.
        """
        from lorank.adapters.live.writing import into_model

        into_model(self, peft_model, adapter_name)

    def save(
        self,
        folder: str | Path,
        profile: Profile = "compact",
        dtype: Dtype | Any | None = None,
        *,
        overwrite: bool = False,
        threads: int | None = None,
    ) -> Path:
        """Write the adapter.

        Parameters
        ----------
        folder
            The folder; for adapters with kohya's keys, a `.safetensors` file.
        profile
            ``"compact"``: true ranks (PEFT, vLLM); experts that are modules of their own are padded to their
            largest rank, as PEFT stacks them. ``"portable"``: all ranks padded to the largest, right in
            every runtime. ``"tensor-rank"``: true ranks and no `alpha_pattern` (PEFT, recent
            vLLM, llama.cpp, TensorRT-LLM).
        dtype
            The factors' element type, by name or as torch's own (default: as they were stored).
        overwrite
            Whether to replace the files of another adapter. A `README.md` that lorank did not write is
            kept in any case.
        threads
            At most so many (default: all that the process may use).

        Returns
        -------
        Path
            Where the factors were written.

        Raises
        ------
        FileExistsError
            If the target holds something and `overwrite` is false.
        ValueError
            If no module has any rank left, `threads` is not positive, or a PEFT adapter's folder is named
            like a file.
        NumericalError
            If a value does not fit the element type; nothing is written then.
        """
        from lorank.adapters.writing import write_adapter

        return write_adapter(self, Path(folder), profile, dtype, overwrite=overwrite, threads=threads).path

    @property
    def adapted(self) -> list[LoraModule]:
        """The modules with a rank above 0."""
        return [module for module in self.modules.values() if module.rank]

    @property
    def ranks(self) -> dict[str, int]:
        """Module name -> rank."""
        return {name: module.rank for name, module in self.modules.items()}

    @property
    def num_parameters(self) -> int:
        """Parameters of all factors."""
        return sum(module.num_parameters for module in self.modules.values())

    @property
    def base_model(self) -> str | None:
        """The path or hub id of the base model, as the adapter names it."""
        return self.config.get("base_model_name_or_path")

    def __repr__(self) -> str:
        ranks = [module.rank for module in self.modules.values()]
        span = f"ranks {min(ranks, default=0)} to {max(ranks, default=0)}"
        return (
            f"LoraAdapter({self.label!r}, {self.format}, {len(ranks)} modules, {span}, "
            f"{self.num_parameters:,} parameters)"
        )

    def with_certificate(self, certificate: Certificate) -> LoraAdapter:
        """The same adapter with another certificate."""
        return replace(self, certificate=certificate)
