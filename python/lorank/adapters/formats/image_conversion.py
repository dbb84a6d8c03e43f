"""Converts adapters between PEFT's folders and the files of kohya's scripts, diffusers and ComfyUI.

Only the spelling of names changes: a module keeps the name that the model's own code gives it. kohya's
scripts write underscores for dots, so that the base model is needed to read such names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lorank.adapters.content import Adapter, AdapterContent
from lorank.adapters.formats.base_weights import BaseWeights
from lorank.adapters.formats.diffusers_settings import PartSettings
from lorank.adapters.formats.image_style import ImageStyle
from lorank.adapters.module import LoraModule
from lorank.adapters.stored import Stored
from lorank.modules import naming
from lorank.peft_format.names import BIAS, MAGNITUDE, PREFIX, layer_key

_FLAT = re.compile(r"lora_(?P<part>unet|transformer|te\d?)_(?P<path>.+)")
_DOTTED = re.compile(
    r"(?:(?:model\.)?(?P<part>diffusion_model|transformer|unet|text_encoder(?:_\d)?)|pipe\.(?P<pipe>dit))\.(?P<path>.+)"
)
_TEXT_PARTS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}
_SAME_MODEL = {"diffusion_model": "", "dit": ""}

# Tensors that belong to one module, by the ends of their keys.
_OF_MODULES = re.compile(rf"(?P<stem>.+)\.(?P<end>diff|diff_b|dora_scale|{MAGNITUDE})")
_UNETS = re.compile(r"(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)\..+")
_TEXT_MODELS = re.compile(r"text_model\.encoder\..+")


@dataclass(frozen=True, slots=True)
class _Name:
    """The part of a pipeline that a module belongs to, and its name within that part.

    Attributes
    ----------
    part
        ``"unet"``, ``"transformer"``, ``"text_encoder"``, ...; empty for the image model of unknown kind.
    path
        The name; with underscores for dots if `is_flat`.
    is_flat
        True for a name in kohya's spelling whose dots are unknown.
    """

    part: str
    path: str
    is_flat: bool = False

    @classmethod
    def of(cls, label: str, name: str, base: BaseWeights | None) -> _Name:
        if match := _FLAT.fullmatch(name):
            part = _TEXT_PARTS.get(match["part"], "unet" if match["part"] == "unet" else "transformer")
            # kohya's scripts write "unet" for transformers, too.
            part = "" if part in ("unet", "transformer") else part
            if base is None:
                return cls(part, match["path"], is_flat=True)
            path = base.unflattened(match["path"])
            if path is None:
                raise ValueError(
                    f"{label}: module {name!r}: {base.label} has no module, or several, whose name with "
                    f"underscores for dots is {match['path']!r}"
                )
            return cls(part, path)
        if match := _DOTTED.fullmatch(name):
            part = match["part"] or match["pipe"]
            return cls(_SAME_MODEL.get(part, part), match["path"])
        return cls("", name)


def to_image(adapter: Adapter, to: str, base: BaseWeights | None) -> Adapter:
    """Return an adapter with the keys of ``"kohya"``, ``"diffusers"`` or ``"comfyui"``.

    Raises
    ------
    ValueError
        If names cannot be spelled, or a tensor has no place in the layout.
    """
    kind = _kind(adapter, base)
    for module in adapter.modules.values():
        if module.kind not in ("linear", "conv"):
            raise ValueError(
                f"{adapter.label}: module {module.name!r}: files of image adapters hold linear layers and "
                f"convolutions, not {module.kind} layers"
            )
    parts = {_Name.of(adapter.label, name, base).part for name in adapter.modules}

    def spelled(name: str) -> str:
        found = _Name.of(adapter.label, name, base)
        _check(adapter, found, base)
        part = found.part or kind
        if to == "kohya":
            return f"lora_{_kohya_part(part, parts)}_{found.path.replace('.', '_')}"
        if found.is_flat:
            raise ValueError(
                f"{adapter.label}: module {name!r}: its name has underscores for dots: "
                "name the base model (--base)"
            )
        if to == "comfyui" and part.startswith("text_encoder"):
            raise ValueError(
                f"{adapter.label}: module {name!r}: ComfyUI reads text encoders in kohya's spelling"
            )
        return f"{'diffusion_model' if to == 'comfyui' else part}.{found.path}"

    up, down = ("lora_up", "lora_down") if to == "kohya" else ("lora_B", "lora_A")
    modules = _renamed(adapter, spelled)
    keys = {name: (f"{name}.{up}.weight", f"{name}.{down}.weight") for name in modules}
    settings = PartSettings({}, {})
    if to == "diffusers":
        settings = PartSettings({part or kind: {} for part in sorted(parts)}, {})
    before = adapter.key_style.metadata if adapter.key_style is not None else {}
    style = ImageStyle(keys, before, settings, has_alphas=to == "kohya")
    magnitude = MAGNITUDE if to == "diffusers" else "dora_scale"
    carried = {}
    for key, stored in adapter.carried.items():
        stem, end = _owner(adapter, key)
        if end in ("diff", "diff_b") and to == "diffusers":
            raise ValueError(
                f"{adapter.label}: tensor {key!r}: is a full difference, which the layout of "
                "diffusers cannot hold"
            )
        is_magnitude = end in ("dora_scale", MAGNITUDE)
        carried[f"{spelled(stem)}.{magnitude if is_magnitude else end}"] = (
            _magnitude(adapter, key, stored, column=to != "diffusers") if is_magnitude else stored
        )
    return replace(adapter, modules=modules, config={}, carried=carried, key_style=style)


def to_peft(adapter: Adapter, base: BaseWeights | None) -> Adapter:
    """Return an image adapter's modules as an adapter of PEFT.

    Raises
    ------
    ValueError
        If the file adapts several models, names cannot be read, or a tensor has no place in PEFT's format.
    """
    names = {name: _Name.of(adapter.label, name, base) for name in adapter.modules}
    if len(parts := sorted({name.part or "the image model" for name in names.values()})) > 1:
        raise ValueError(
            f"{adapter.label}: adapts several models ({', '.join(parts)}), but a folder of PEFT "
            "belongs to one: convert it to diffusers"
        )
    for name, found in names.items():
        _check(adapter, found, base)
        if found.is_flat:
            raise ValueError(
                f"{adapter.label}: module {name!r}: its name has underscores for dots: "
                "name the base model (--base)"
            )

    def spelled(name: str) -> str:
        return names[name].path if name in names else _Name.of(adapter.label, name, base).path

    modules = _renamed(adapter, spelled)
    carried = {}
    for key, stored in adapter.carried.items():
        stem, end = _owner(adapter, key)
        path = spelled(stem)
        if end == "diff_b" and path in modules and BIAS not in modules[path].carried:
            module = modules[path]
            bias = stored.to_array().astype(np.float64) / module.scaling
            modules[path] = replace(module, carried={BIAS: bias.astype(np.float32)})
        elif end in ("dora_scale", MAGNITUDE) and path in modules:
            carried[layer_key(path, MAGNITUDE)] = _magnitude(adapter, key, stored, column=False)
        else:
            raise ValueError(
                f"{adapter.label}: tensor {key!r}: is a full difference, which PEFT cannot hold: only "
                "factors, magnitudes and biases of adapted layers are converted"
            )
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base.label if base is not None else None,
        "target_modules": list(modules),
        **({"use_dora": True} if carried else {}),
        **({"lora_bias": True} if any(module.carried for module in modules.values()) else {}),
    }
    return replace(adapter, modules=modules, config=config, carried=carried, key_style=None, format="peft")


def _renamed(adapter: AdapterContent, spelled: Callable[[str], str]) -> dict[str, LoraModule]:
    found: dict[str, LoraModule] = {}
    for name, module in adapter.modules.items():
        new = spelled(name)
        if new in found:
            raise ValueError(
                f"{adapter.label}: modules {name!r} and another have one name in the layout: {new!r}"
            )
        found[new] = replace(module, name=new)
    return {name: found[name] for name in sorted(found, key=naming.natural_key)}


def _kind(adapter: AdapterContent, base: BaseWeights | None) -> str:
    """Return the part of a pipeline that modules without a part belong to."""
    mapping = adapter.config.get("auto_mapping")
    name = base.class_name if base is not None else ""
    if not name and isinstance(mapping, Mapping):
        name = str(mapping.get("base_model_class") or "")
    paths = [_Name.of(adapter.label, name, None).path for name in adapter.modules]
    if "UNet" in name or (not name and any(map(_UNETS.fullmatch, paths))):
        return "unet"
    if "CLIPText" in name or "T5Encoder" in name or (not name and any(map(_TEXT_MODELS.fullmatch, paths))):
        return "text_encoder"
    return "transformer"


def _kohya_part(part: str, parts: set[str]) -> str:
    if part in ("unet", "transformer"):
        return "unet"
    number = part.removeprefix("text_encoder").removeprefix("_")
    return f"te{number or ('1' if 'text_encoder_2' in parts else '')}"


def _check(adapter: AdapterContent, name: _Name, base: BaseWeights | None) -> None:
    """Refuse a module of the image model that the base model lacks."""
    if base is not None and not name.part.startswith("text_encoder") and name.path not in base.shapes:
        raise ValueError(f"{adapter.label}: module {name.path!r}: is no module of {base.label}")


def _owner(adapter: AdapterContent, key: str) -> tuple[str, str]:
    """Return the module of a carried tensor, and the end of its key."""
    match = _OF_MODULES.fullmatch(key.removeprefix(PREFIX))
    if match is None:
        raise ValueError(
            f"{adapter.label}: tensor {key!r}: is no factor, and the layout has no place for it: "
            "keep the format"
        )
    return match["stem"], match["end"]


def _magnitude(adapter: AdapterContent, key: str, stored: Stored, *, column: bool) -> Stored:
    """Return the magnitudes of a linear layer as a vector or as a column."""
    values = stored.to_array()
    if values.size != values.shape[0]:
        raise ValueError(
            f"{adapter.label}: tensor {key!r}: magnitudes of shape {list(values.shape)} are not those of "
            "outputs, as in PEFT"
        )
    return Stored(values.reshape(-1, 1) if column else values.reshape(-1), dtype=stored.dtype)
