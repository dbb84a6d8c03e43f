"""`LoraAdapter`: a trained adapter, read from and written to files and live models."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorank.adapters import hub_upload
from lorank.adapters.content import AdapterContent, Dtype, Profile
from lorank.adapters.live import reading as live_reading
from lorank.adapters.live import writing as live_writing
from lorank.adapters.reading import read_adapter
from lorank.adapters.writing import write_adapter
from lorank.compression.knobs import KnobArguments, checked_knobs
from lorank.compression.truncation import compress
from lorank.runtimes.base_model import base_weights

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LoraAdapter(AdapterContent):
    """A trained adapter: its modules, settings, and all other tensors of its files.

    An adapter can be pickled and copied. A pickled or deep copy holds the values of all tensors, and depends
    neither on the adapter's files nor on a live model. See `lorank.adapters.content.AdapterContent` for the
    attributes.

    Examples
    --------
    >>> import peft, torch
    >>> import lorank
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
    >>> config = peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False)
    >>> adapter = lorank.LoraAdapter.from_model(peft.get_peft_model(model, config))
    >>> adapter
    LoraAdapter("adapter 'default'", peft, 2 modules, rank 4, 96 parameters)
    >>> adapter.ranks
    {'0': 4, '1': 4}
    >>> adapter.modules["0"]
    LoraModule('0', linear, 6x8, rank 4, scaling 2, float32)
    """

    __slots__ = ()

    @classmethod
    def from_content(cls, content: AdapterContent) -> LoraAdapter:
        """Return an adapter with the same content."""
        return cls.copied(content)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        base: Any | None = None,
        threads: int | None = None,
        progress: bool = False,
        **knobs: Unpack[KnobArguments],
    ) -> LoraAdapter:
        """Read an adapter. Factors stay on disk until they are needed.

        Parameters
        ----------
        path
            A PEFT folder (`adapter_config.json` and `adapter_model.safetensors` or `.bin`), a folder of
            MLX-LM, a `.safetensors` file with the keys of kohya, diffusers or ComfyUI, a GGUF file of
            llama.cpp, or a hub id ``name`` or ``name@revision``.
        base
            The base model, as in `lorank.convert`. Files of llama.cpp and torchtune need it, because they
            permute rows of queries and keys.
        threads, progress
            Options of the truncation, as in `lorank.compress`.
        **knobs
            Arguments of `lorank.compress`, to truncate the adapter. An elastic adapter is truncated without a
            decomposition.

        Raises
        ------
        FileNotFoundError, OSError
            If the files cannot be read.
        FormatError
            If the files are damaged, or hold another kind of adapter (LoHa, LoKr, IA3, ...).

        Examples
        --------
        >>> import tempfile
        >>> import peft, torch
        >>> import lorank
        >>> config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     adapter = lorank.LoraAdapter.load(folder, avg_rank=2)
        >>> adapter.ranks
        {'0': 2}
        """
        adapter = cls.from_content(read_adapter(path, None if base is None else base_weights(base)))
        return compress(adapter, checked_knobs(knobs), threads, progress) if knobs else adapter

    @classmethod
    def from_model(cls, peft_model: Any, adapter_name: str = "default") -> LoraAdapter:
        """Read an adapter of a live model without copies of its tensors.

        Parameters
        ----------
        peft_model
            A PEFT model, or a model with injected PEFT layers (`add_adapter` and `load_adapter` of
            transformers and diffusers, `peft.inject_adapter_in_model`). It may be compiled or wrapped for
            data parallelism.
        adapter_name
            Name of the adapter to read.

        Raises
        ------
        TypeError
            If the model is not a `torch.nn.Module`.
        ValueError
            If the model lacks the adapter, the adapter's update is not a product of two factors, or its
            factors are sharded or have no values.

        Examples
        --------
        >>> import peft, torch
        >>> import lorank
        >>> config = peft.LoraConfig(r=4, target_modules=["0"])
        >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), config)
        >>> lorank.LoraAdapter.from_model(model).modules["0"].A.shape
        (4, 8)
        """
        return cls.from_content(live_reading.from_model(peft_model, adapter_name))

    def into_model(self, peft_model: Any, adapter_name: str = "default") -> None:
        """Put the adapter into a live model, in place of an adapter of the same name.

        Layers change in place to the adapter's ranks and scalings. PEFT's config of the adapter changes too,
        so that a saved model computes the same after loading. Parameters stay the same objects; build the
        optimizer again if ranks change. Modules of rank 0 lose the adapter. Other adapters, the active
        adapters, the training modes of layers and the choice of trained parameters do not change. A new
        adapter is neither active nor trained. If an error is raised, the model does not change.

        Parameters
        ----------
        peft_model
            A model that `from_model` accepts.
        adapter_name
            Name of an adapter of the model, or a new name.

        Raises
        ------
        TypeError
            If the model has no PEFT layers.
        ValueError
            If the adapter is not in PEFT's format, names or shapes do not fit the model, or the model's
            adapter of that name is merged or of another kind (DoRA, AdaLoRA, other saved modules).

        Examples
        --------
        >>> import peft, torch
        >>> import lorank
        >>> config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), config)
        >>> adapter = lorank.LoraAdapter.from_model(model)
        >>> lorank.compress(adapter, avg_rank=2, progress=False).into_model(model)
        >>> model.peft_config["default"].r
        2
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
            The folder to write; for adapters with kohya's keys, a `.safetensors` file.
        profile
            ``"compact"``: true ranks (PEFT, vLLM); experts that are separate modules are padded to their
            largest rank, because PEFT stacks them. ``"portable"``: all ranks padded to the largest, for
            every runtime. ``"tensor-rank"``: true ranks and an empty `alpha_pattern` (PEFT, recent
            vLLM, llama.cpp, TensorRT-LLM). ``"exact"``: factors and scalings unchanged; alphas hold the
            scalings.
        dtype
            Element type of the factors: a name or a torch dtype (default: the stored type).
        overwrite
            True to replace the files of another adapter. A `README.md` that lorank did not write is
            kept in any case.
        threads
            Largest number of threads (default: all that the process may use).

        Returns
        -------
        Path
            The file of the factors.

        Raises
        ------
        FileExistsError
            If the target holds files and `overwrite` is false.
        ValueError
            If every rank is 0, `threads` is not positive, or a PEFT adapter's folder ends with
            `.safetensors`.
        NumericalError
            If a value does not fit the element type. Nothing is written in this case.

        Examples
        --------
        >>> import tempfile
        >>> import peft, torch
        >>> import lorank
        >>> config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
        >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), config)
        >>> adapter = lorank.LoraAdapter.from_model(model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     adapter.save(folder, "portable", "bfloat16").name
        'adapter_model.safetensors'
        """
        return write_adapter(self, Path(folder), profile, dtype, overwrite=overwrite, threads=threads).path

    def push_to_hub(
        self,
        repo_id: str,
        profile: Profile = "compact",
        dtype: Dtype | Any | None = None,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
        threads: int | None = None,
    ) -> str:
        """Write the adapter to a repository of the Hugging Face hub, in one commit.

        Parameters
        ----------
        repo_id
            The repository; it is created if it does not exist.
        profile, dtype, threads
            As in `save`.
        private
            True to create a private repository (default: the choice of the account).
        revision
            The branch (default: the main branch).
        commit_message
            The message of the commit.
        token
            The token of the hub (default: the one that is logged in).

        Returns
        -------
        str
            The address of the commit.

        Raises
        ------
        ImportError
            If `huggingface_hub` is not installed.
        ValueError, NumericalError
            As in `save`; nothing is uploaded.

        Notes
        -----
        A `README.md` in the repository that lorank did not write is kept.
        """
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, "adapter.gguf") if self.format == "gguf" else Path(folder)
            self.save(target, profile, dtype, overwrite=True, threads=threads)
            message = commit_message or f"Upload {repo_id.rpartition('/')[2]} by lorank"
            return hub_upload.upload(Path(folder), repo_id, private, revision, message, token)
