"""Recognises the content of a path or of a set of tensors: a model, an adapter, or neither.

Readers of models and readers of adapters use these checks, so that each refuses the input of the other with
an error that names the right command.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from lorank._core import FormatError
from lorank._internal.json_files import read_json
from lorank._internal.regular_files import SETTINGS_BYTES
from lorank._internal.short_text import shown
from lorank.modules import model_config, naming
from lorank.peft_format.names import CONFIG_FILE, INSIDE, PICKLED_WEIGHTS_FILE, PREFIX, WEIGHTS_FILE

_PIPELINE = "model_index.json"

# Kinds of adapters by the pattern of their keys; keys follow the name of the module.
_ADAPTERS = {
    re.compile(rf"(?P<module>.+?){key}"): kind
    for key, kind in {
        r"\.lora_(?:embedding_)?[ABE](?:\.\w+)?(?:\.(?:weight|bias))?": "LoRA",
        r"\.lora_magnitude_vector(?:\.\w+)*": "DoRA",
        r"(?:\.lora_|_lora\d?\.|\.lora\.|\.lora_linear_layer\.)(?:up|down|mid)\.weight": "LoRA",
        r"_lora\.[AB]\.weight": "LoRA",
        r"\.lora_[ab](?:\.weight)?": "LoRA of MLX or torchtune",
        r"\.hada_\w+": "LoHa",
        r"\.lokr_\w+": "LoKr",
        r"\.b?oft_\w+(?:\.weight)?": "OFT",
        r"\.ia3_l(?:\.\w+)*": "IA3",
        r"\.vera_lambda_\w+(?:\.\w+)*": "VeRA",
        r"\.on_input": "IA3",
    }.items()
}
_READABLE = (
    *("LoRA", "DoRA", "LORA", "ADALORA", "LoHa", "LoKr", "LOHA", "LOKR"),
    "LoRA of MLX or torchtune",
)

# Files of adapters, training runs and tokenizers, which hold no weights of a model.
_ADAPTER_FILES = re.compile(
    rf"{re.escape(WEIGHTS_FILE)}|{re.escape(PICKLED_WEIGHTS_FILE)}|(?:\d+_)?adapters\.safetensors"
)
_TRAINING_FILES = re.compile(
    r"(?:optimizer|scheduler|scaler|rng_state\w*|training_args|random_states\w*|lorank_gard)(?:_\d+)?\.\w+"
)
_TOKENIZER_FILES = re.compile(r"tokenizer.*|vocab\..*|merges\.txt|spiece\.model|sentencepiece.*")

_OTHER_ADAPTERS = re.compile(r"\.(?:diff|diff_b|dora_scale|alpha|[ab][12]\.weight)$")

# The number of a part of a GGUF model.
_PART = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")

_COPY = re.compile(r"\.modules_to_save\.\w+\.")


def model_weights(path: Path, label: str) -> Path:
    """Return the file, index or folder with the weights of a model; leave out an adapter beside them.

    Raises
    ------
    FormatError
        If the path holds an adapter and no model, or no weights at all.
    """
    if path.is_file():
        if path.name == CONFIG_FILE or _ADAPTER_FILES.fullmatch(path.name):
            raise FormatError(_not_a_model(label, path.parent))
        if path.name == _PIPELINE:
            raise FormatError(_pipeline(label, path.parent))
        return path
    names = sorted(file.name for file in path.iterdir())
    weights = [name for name in names if _may_be_model(name)]
    if not weights and (found := [name for name in names if name.endswith(".gguf")]):
        return path / _first_part(label, found)
    if weights:
        is_mixed = len(weights) == 1 and any(map(_ADAPTER_FILES.fullmatch, names))
        return path / weights[0] if is_mixed else path
    if CONFIG_FILE in names or any(map(_ADAPTER_FILES.fullmatch, names)):
        raise FormatError(_not_a_model(label, path))
    if _PIPELINE in names:
        raise FormatError(_pipeline(label, path))
    raise FormatError(
        f"{label}: holds no .safetensors or .bin file, and no .gguf file{_contents(names, 'model')}"
    )


def _first_part(label: str, names: list[str]) -> str:
    """Return the GGUF file of a folder, or the first part of its only model."""
    stems = {_PART.sub("", name) for name in names}
    if len(stems) > 1:
        raise FormatError(f"{label}: holds several GGUF files: name one of them ({shown(names)})")
    return names[0]


def _may_be_model(name: str) -> bool:
    """Return True if a file of this name may hold weights of a model, or an index of them."""
    is_weights = name.endswith((".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json"))
    return is_weights and not _ADAPTER_FILES.fullmatch(name) and not _TRAINING_FILES.fullmatch(name)


def _pipeline(label: str, folder: Path) -> str:
    """Return the error message for a pipeline of diffusers, whose models are in subfolders."""
    parts = sorted(
        part.name
        for part in folder.iterdir()
        if part.is_dir() and any(_may_be_model(file.name) for file in part.iterdir())
    )
    models = f": name one of its models ({', '.join(parts)})" if parts else " without its models"
    return f"{label}: is a pipeline of diffusers{models}"


def _contents(names: Collection[str], expected: str) -> str:
    """Describe a folder without weights, as the end of a sentence."""
    if not names:
        return ": the folder is empty"
    for files, content in (
        (_TRAINING_FILES, "the state of a training run"),
        (_TOKENIZER_FILES, "a tokenizer"),
    ):
        if any(map(files.fullmatch, names)):
            return f", but {content}: name the folder of the {expected}"
    return ", but a model's settings" if model_config.FILE_NAME in names else ""


def base_tensors(label: str, names: Collection[str]) -> Mapping[str, str]:
    """Map the stored names of the base model's tensors to their names in the model; leave out adapters.

    Raises
    ------
    FormatError
        If the tensors are those of an adapter, or the state of an optimizer.
    """
    naming.check_sizes(label, names)
    if {"state", "param_groups"} <= set(names):
        raise FormatError(f"{label}: is the state of an optimizer, which holds no weights of a model")
    owners = _owners(names)
    if not owners:
        return {name: name for name in names}
    if not _holds_model(names, owners):
        raise FormatError(refusal(label, f"an adapter ({next(iter(owners.values()))})"))
    base = {name: _without_peft(name) for name in names if _method(name) is None and not _COPY.search(name)}
    seen: dict[str, str] = {}
    for name, bare in base.items():
        if (other := seen.setdefault(bare, name)) != name:
            raise FormatError(f"{label}: tensors {other!r} and {name!r} define the same parameter {bare!r}")
    return base


def exclusion_reason(name: str) -> str:
    """Return the reason why `base_tensors` does not return a tensor."""
    return "a copy of a base weight that PEFT trained" if _COPY.search(name) else "a factor of an adapter"


def check_adapter_folder(path: Path) -> None:
    """Raise FormatError for a folder that holds a model or no weights."""
    names = sorted(file.name for file in path.iterdir())
    weights = [name for name in names if _may_be_model(name)]
    is_model = any(name.endswith(".index.json") for name in weights) or any(
        name.startswith(("model", "pytorch_model")) for name in weights
    )
    if is_model or (model_config.FILE_NAME in names and weights):
        raise FormatError(_not_an_adapter(str(path), "a model"))
    if not weights and not any(map(_ADAPTER_FILES.fullmatch, names)):
        found = _contents(names, "adapter")
        raise FormatError(f"{path}: holds neither {CONFIG_FILE} nor a .safetensors file{found}")


def check_adapter_tensors(label: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise FormatError for the tensors of a model."""
    owners = _owners(shapes)
    if owners and _holds_model(shapes, owners):
        raise FormatError(_not_an_adapter(label, "a model with an adapter in it"))
    is_weight = any(name.endswith("weight") and len(shape) >= 2 for name, shape in shapes.items())
    is_other = any(map(_OTHER_ADAPTERS.search, shapes))
    if not owners and is_weight and not is_other:
        raise FormatError(_not_an_adapter(label, "the weights of a model"))


def other_adapter(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Return the reason for refusing a folder with an adapter's settings but no PEFT weights, if known."""
    names = [file.name for file in folder.iterdir()]
    if any(name.endswith("adapters.safetensors") for name in names) and "peft_type" not in settings:
        return f"{folder}: holds factors of steps of MLX-LM, but no adapters.safetensors: rename one of them"
    if any(map(_may_be_model, names)):
        return _not_an_adapter(str(folder), f"a model beside {CONFIG_FILE}")
    return None


def _method(name: str) -> str | None:
    """Return the kind of adapter whose keys have such a name; None for other tensors."""
    return next((kind for key, kind in _ADAPTERS.items() if key.fullmatch(name)), None)


def _owners(names: Iterable[str]) -> dict[str, str]:
    """Map the name of each module with factors to the kind of its adapter."""
    found: dict[str, str] = {}
    for name in names:
        for key, kind in _ADAPTERS.items():
            if match := key.fullmatch(name):
                found.setdefault(match["module"], kind)
                break
    return found


def _holds_model(names: Iterable[str], owners: Collection[str]) -> bool:
    """Return True if most modules with factors also have their base weight."""
    based = {
        name.rpartition(".")[0].partition(INSIDE)[0]
        for name in names
        if _method(name) is None and (name.endswith("weight") or f"{INSIDE}." in name)
    }
    return 2 * sum(owner.partition(INSIDE)[0] in based for owner in owners) >= len(owners)


def _without_peft(name: str) -> str:
    """Return the name of a tensor in the base model."""
    name = name.removeprefix(PREFIX)
    return name.replace(f"{INSIDE}.", ".").replace(".original_module.", ".")


def _not_a_model(label: str, folder: Path) -> str:
    """Return the error message for an adapter's folder where a model is expected."""
    settings = _settings(folder)
    if "peft_type" not in settings:
        is_mlx = any(name.name.endswith("adapters.safetensors") for name in folder.iterdir())
        return refusal(label, "an adapter of MLX (LoRA)" if is_mlx else "a PEFT adapter (LoRA)")
    kind = str(settings["peft_type"]).upper().rpartition(".")[2]
    return refusal(label, f"a PEFT adapter ({kind})", settings.get("base_model_name_or_path"))


def refusal(label: str, content: str, base: Any = None) -> str:
    """Return the error message for content that is not a model."""
    text = f"{label}: is {content}, not a model"
    if content.endswith(tuple(f"({kind})" for kind in _READABLE)):
        text += ": `lorank info`, `lorank compress` and `lorank check` read adapters"
    if isinstance(base, str) and base:
        text += f"; its base model is {base}"
    return text


def _not_an_adapter(label: str, content: str) -> str:
    """Return the error message for content that is not an adapter."""
    return (
        f"{label}: holds {content}, not an adapter: `lorank analyze` reads models, and `lorank extract` "
        "makes an adapter from two models"
    )


def _settings(folder: Path) -> Mapping[str, Any]:
    """Return an adapter's settings; empty if they cannot be read."""
    try:
        settings = read_json(folder / CONFIG_FILE, SETTINGS_BYTES)
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}
