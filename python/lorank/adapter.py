"""`LoraAdapter`: a trained adapter, read from and written to files and live models."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorank.adapters.content import AdapterContent, Dtype, Profile
from lorank.adapters.live import reading as live_reading
from lorank.adapters.live import writing as live_writing
from lorank.adapters.reading import read_adapter
from lorank.adapters.writing import write_adapter
from lorank.compression.knobs import KnobArguments, checked_knobs
from lorank.compression.truncation import compress

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LoraAdapter(AdapterContent):
    """A trained adapter. See `AdapterContent` for its attributes."""

    __slots__ = ()

    @classmethod
    def from_content(cls, content: AdapterContent) -> LoraAdapter:
        """Return an adapter with the same content."""
        return cls(**{field.name: getattr(content, field.name) for field in fields(content)})

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
        adapter = cls.from_content(read_adapter(path))
        return compress(adapter, checked_knobs(knobs), threads, progress) if knobs else adapter

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
        return cls.from_content(live_reading.from_model(peft_model, adapter_name))

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
        live_writing.into_model(self, peft_model, adapter_name)

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
            True to replace the files of another adapter. A `README.md` that lorank did not write is
            kept in any case.
        threads
            The largest number of threads (default: all that the process may use).

        Returns
        -------
        Path
            The file of the factors.

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
        return write_adapter(self, Path(folder), profile, dtype, overwrite=overwrite, threads=threads).path
