"""Models built from their `config.json` on the meta device: no weights, no memory, no remote code."""

from __future__ import annotations

import importlib.util
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorank.modules.skeleton import Skeleton

# Numbers of a config that decide how many modules are built.
_DEPTHS = re.compile(
    r".*(?:layers?|blocks?|depths?|experts?|stages?|levels?|heads?|codebooks?|quantizers?)", re.IGNORECASE
)
# A model has at least one tensor a layer. Some layers are shared, and files may hold a part of a model.
_LAYERS_A_TENSOR = 16
_ALWAYS_ALLOWED = 4096
# transformers gives every label a name. The largest data sets have some 20,000 classes.
_LABELS = re.compile(r"(?:num|n)_(?:\w+_)?(?:labels|classes)", re.IGNORECASE)
_MOST_LABELS = 1_000_000
# The classes that build a model with a head, tried in this order where a config names no class.
_WITH_HEADS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModelForCTC")

# The errors of the libraries' constructors for a config that they do not fit.
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
        A clause for messages.
    is_foreign
        True if there is a config of a model whose code is not at hand: names may then mean anything.
    """

    reason: str
    is_foreign: bool = False


def build(folder: Path, config: Mapping[str, Any], names: Collection[str]) -> Skeleton | Unknown:
    """Build the skeleton of the model that a folder's `config.json` describes.

    Parameters
    ----------
    folder
        The folder that holds `config.json`.
    config
        Its content; empty if there is no such file.
    names
        The names of the checkpoint's tensors: their number bounds how many layers a config may ask for, and
        they decide between a base model and one with a head where the config names no class.
    """
    library = library_of(config, len(names))
    if isinstance(library, Unknown):
        return library
    try:
        return Skeleton.of_model(model_of(folder, config, names))
    except _misfits() as error:
        name = config.get("_class_name") or config.get("model_type")
        reason = _first_line(error)
        return Unknown(f"{library} does not build a model of type {name!r}: {reason}", True)


def library_of(config: Mapping[str, Any], num_tensors: int) -> str | Unknown:
    """Return the library that builds the model of a config, or the reason why none can.

    Parameters
    ----------
    config
        The content of `config.json`; empty if there is no such file.
    num_tensors
        The number of tensors in the checkpoint.
    """
    if not config:
        return Unknown("there is no config.json beside the weights")
    if too_many := _excess(config, num_tensors):
        return Unknown(f"config.json asks for {too_many}, but the files hold {num_tensors} tensors", True)
    if "_class_name" not in config and not isinstance(config.get("model_type"), str):
        return Unknown("config.json names no model type")
    library = "diffusers" if "_class_name" in config else "transformers"
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec(library) is None:
        return Unknown(f"{library} is not installed")
    return library


def model_of(folder: Path, config: Mapping[str, Any], names: Collection[str]) -> Any:
    """Build the model of a config on the meta device, without the libraries' messages; see `build`."""
    with _quiet():
        if "_class_name" in config:
            return _diffusers_model(config)
        return _transformers_model(folder, config, names)


def _misfits() -> tuple[type[Exception], ...]:
    """Return the errors for a config that does not fit; transformers 5 has one of its own."""
    errors = importlib.import_module("huggingface_hub.errors")
    strict = getattr(errors, "StrictDataclassError", None)
    return (*_MISFITS, strict) if strict is not None else _MISFITS


def _transformers_model(folder: Path, config: Mapping[str, Any], names: Collection[str]) -> Any:
    import torch
    import transformers

    settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if getattr(settings, "use_pretrained_backbone", False):
        settings.use_pretrained_backbone = False
    with torch.device("meta"):
        for name in _architectures(config):
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


def _architectures(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _diffusers_model(config: Mapping[str, Any]) -> Any:
    import torch

    diffusers: Any = importlib.import_module("diffusers")
    found = getattr(diffusers, str(config["_class_name"]), None)
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise ValueError("diffusers has no model class of that name")
    model_class: Any = found
    with torch.device("meta"):
        return model_class.from_config(dict(config))


def _excess(config: Mapping[str, Any], num_tensors: int) -> str:
    """Return the setting that asks for more modules than the files could fill, or an empty string."""
    allowed = _ALWAYS_ALLOWED + _LAYERS_A_TENSOR * num_tensors
    for key, value in _numbers(config):
        if _DEPTHS.fullmatch(key) and value > allowed:
            return f"{key}={value}"
        if _LABELS.fullmatch(key) and value > _MOST_LABELS:
            return f"{key}={value}"
    return ""


def _first_line(error: Exception) -> str:
    """Return what an error states, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return text[:200] or type(error).__name__


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _numbers(entry, str(name))
    elif isinstance(value, list):
        for entry in value:
            yield from _numbers(entry, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings of libraries while they are imported and while they build a model that will not run.

    Loggers of torch, torchao, transformers and others report at import, each in its own way, which kernels
    are missing. Errors are still logged.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
