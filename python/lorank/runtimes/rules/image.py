"""The rules of diffusers and ComfyUI, which read files of image adapters with keys of kohya or diffusers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import cache

from lorank.adapters.formats.diffusers_settings import KEY as SETTINGS_KEY
from lorank.adapters.module import LoraModule
from lorank.peft_format.names import MAGNITUDE
from lorank.runtimes.found import Found
from lorank.runtimes.rules.runtime import Runtime, by_module, leaves_out

# Names that kohya gives to modules of Stable Diffusion; diffusers renames these modules one by one.
_KOHYA_PART = re.compile(r"lora_(?P<part>unet|te1?|te2)_(?P<rest>.+)")
_UNET_BLOCKS = re.compile(r"(?:down|mid|up|input|middle|output)_block")
_UNET_ATTENTION = re.compile(r"transformer_blocks_\d+_.*attn[12]_.*(?:to_q|to_k|to_v|to_out_0)")
_TEXT_ATTENTION = re.compile(r".*self_attn_(?:q|k|v|out)_proj")

# Keys of Wan, Z-Image and Qwen-Image without "lora" that diffusers converts.
_FOLDED = re.compile(
    r"diffusion_model\.(?:blocks|patch_embedding|text_embedding|time_embedding|time_projection|head)\b.*"
    r"\.(?:alpha|diff|diff_b)"
    r"|diffusion_model\.(?:layers|noise_refiner|context_refiner)\.\d+\..+\.alpha"
    r"|(?:diffusion_model\.)?transformer_blocks\.\d+\.(?:attn|img_mlp|txt_mlp|img_mod|txt_mod)\..+\.alpha"
)
# Full differences of Wan that diffusers leaves out: weights outside the head, and biases of norms.
_LOST = re.compile(r"diffusion_model\.(?:(?!head\.).+\.diff|.*norm.*\.diff_b)")

_FLUX = "single_transformer_blocks."
_KOHYA = ".lora_down."
_MAGNITUDES = (".dora_scale", f".{MAGNITUDE}")


def _diffusers_scale(a: Found, module: LoraModule) -> float:
    part = _part_of_stable_diffusion(module.name)
    if part is None or not _loses_its_alpha(module.name):
        return by_module(a, module)
    # The pattern for the module's alpha matches nothing, so that the module gets the most frequent alpha.
    alphas = [alpha for other, alpha in a.alphas.items() if _part_of_stable_diffusion(other) == part]
    return Counter(alphas).most_common(1)[0][0] / module.rank if alphas else by_module(a, module)


@cache
def _part_of_stable_diffusion(name: str) -> str | None:
    """Return the part of a Stable Diffusion pipeline that a module with kohya's name belongs to."""
    match = _KOHYA_PART.fullmatch(name)
    if match is None or (match["part"] == "unet" and not _UNET_BLOCKS.match(match["rest"])):
        return None
    return match["part"]


def _loses_its_alpha(name: str) -> bool:
    """Return True if diffusers looks for the alpha of a module under a name that no module has."""
    pattern = _UNET_ATTENTION if name.startswith("lora_unet_") else _TEXT_ATTENTION
    return pattern.search(name) is not None


def _diffusers_refuses(a: Found) -> str:
    keys = list(a.stored.tensors.shapes())
    alphas = [key for key in keys if key.endswith(".alpha")]
    if alphas and SETTINGS_KEY in a.stored.tensors.metadata:
        return f"reads scales from alphas or from metadata, but the file holds both: {alphas[0]} and metadata"
    if any(_KOHYA in key for key in keys):
        renamed = any(_part_of_stable_diffusion(module.name) for module in a.modules)
        left = [key for key in a.adapter.carried if not key.endswith(_MAGNITUDES)]
        return f"cannot rename {left[0]}" if renamed and left else ""
    known = [key for key in keys if "lora" in key or key.endswith(_MAGNITUDES) or _FOLDED.fullmatch(key)]
    strange = sorted(set(keys) - set(known))
    if strange and not any(_FLUX in key for key in keys):
        return f"refuses a key without 'lora' for SD, SDXL, SD3, Wan and Qwen-Image: {strange[0]}"
    return ""


def _diffusers_loses(a: Found) -> Iterable[str]:
    carried = a.adapter.carried
    yield from leaves_out(key for key in carried if key.endswith(".dora_scale") or _LOST.fullmatch(key))


def _comfyui_scale(a: Found, module: LoraModule) -> float:
    return a.alphas[module.name] / module.rank if module.name in a.alphas else 1.0


def _comfyui_loses(a: Found) -> Iterable[str]:
    known = (".dora_scale", ".diff", ".diff_b")
    yield from leaves_out(key for key in a.adapter.carried if not key.endswith(known))


def _comfyui_remark(a: Found) -> str:
    del a
    return "leaves out names that the model lacks, and reports them only in its log"


DIFFUSERS = Runtime(
    "diffusers",
    "0.42",
    _diffusers_scale,
    _diffusers_refuses,
    _diffusers_loses,
    profiles=("compact", "portable", "tensor-rank"),
    reads="image files",
)

COMFYUI = Runtime(
    "ComfyUI",
    "November 2026",
    _comfyui_scale,
    loses=_comfyui_loses,
    remark=_comfyui_remark,
    profiles=("compact", "portable", "tensor-rank"),
    reads="image files",
)
