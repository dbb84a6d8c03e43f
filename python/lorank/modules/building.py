"""Builds models from their `config.json` on the meta device, without weights, memory or remote code."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from lorank.modules.model_config import FILE_NAME, ModelConfig
from lorank.modules.skeleton import Skeleton

# The classes that build a model with a head, tried in this order if a configuration does not give the class.
_WITH_HEADS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModelForCTC")

# The errors that the libraries' constructors raise for a configuration that they cannot build.
_MISFITS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class Unknown:
    """The reason why a model's skeleton is not known.

    Attributes
    ----------
    reason
        The reason, as a clause for messages.
    is_foreign
        True if a configuration exists but the model's code is not available; names of tensors then follow
        no known convention.
    """

    reason: str
    is_foreign: bool = False


def build(config: ModelConfig, names: Collection[str]) -> Skeleton | Unknown:
    """Build the skeleton of the model that a configuration describes.

    Parameters
    ----------
    config
        The model's configuration.
    names
        The names of the checkpoint's tensors. The number of names limits the number of layers of the model.
        If the configuration does not give the model's class, the names decide whether the model has a head.
    """
    library = library_of(config, len(names))
    if isinstance(library, Unknown):
        return library
    try:
        return Skeleton.of_model(model_of(config, names))
    except _misfits() as error:
        name = config.diffusers_class or config.content.get("model_type")
        reason = _first_line(error)
        return Unknown(f"{library} cannot build a model of type {name!r}: {reason}", True)


def library_of(config: ModelConfig, num_tensors: int) -> str | Unknown:
    """Return the library that builds the model of a configuration, or the reason why no library can.

    Parameters
    ----------
    config
        The model's configuration.
    num_tensors
        The number of tensors in the checkpoint.
    """
    if config.is_empty:
        return Unknown("there is no config.json beside the weights")
    if too_many := config.excess(num_tensors):
        return Unknown(f"{config.origin} has {too_many}, but the files hold only {num_tensors} tensors", True)
    library = config.library
    if not library:
        return Unknown(f"{config.origin} does not give the model type")
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec(library) is None:
        return Unknown(f"{library} is not installed")
    return library


def model_of(config: ModelConfig, names: Collection[str]) -> Any:
    """Build the model of a configuration on the meta device and silence the libraries; see `build`."""
    with _quiet():
        if config.library == "diffusers":
            return _diffusers_model(config)
        return _transformers_model(config, names)


def _misfits() -> tuple[type[Exception], ...]:
    """Return the errors for a configuration that cannot be built, with the one that transformers 5 adds."""
    errors = importlib.import_module("huggingface_hub.errors")
    strict = getattr(errors, "StrictDataclassError", None)
    return (*_MISFITS, strict) if strict is not None else _MISFITS


def _transformers_model(config: ModelConfig, names: Collection[str]) -> Any:
    """Build a model of transformers; `names` decide whether the model has a head."""
    import torch
    import transformers

    if config.origin == FILE_NAME:
        settings = transformers.AutoConfig.from_pretrained(
            config.folder, trust_remote_code=False, local_files_only=True
        )
    else:
        settings = transformers.AutoConfig.for_model(**config.content)
    if getattr(settings, "use_pretrained_backbone", False):
        settings.use_pretrained_backbone = False
    with torch.device("meta"):
        for name in config.architectures:
            found = getattr(transformers, name, None)
            if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
                return found(settings)
        base = transformers.AutoModel.from_config(settings, trust_remote_code=False)
        if not any(name.startswith(f"{base.base_model_prefix}.") for name in names):
            return base
        for auto_class in _WITH_HEADS:
            with suppress(ValueError):
                return getattr(transformers, auto_class).from_config(settings, trust_remote_code=False)
        return base


def _diffusers_model(config: ModelConfig) -> Any:
    """Build a model of diffusers."""
    import torch

    diffusers: Any = importlib.import_module("diffusers")
    found = getattr(diffusers, config.diffusers_class, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise ValueError("diffusers has no model class of that name")
    model_class: Any = found
    with torch.device("meta"):
        return model_class.from_config(dict(config.content))


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message (two if it ends with a colon), cut to 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return text[:200] or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of libraries while they are imported and build a model.

    torch, torchao, transformers and others warn of missing kernels, but the model will not run. Errors are
    still logged.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
