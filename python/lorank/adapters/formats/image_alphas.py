"""Alphas of an image adapter that give the same update in every program that reads it.

Programs scale a module by ``alpha / rank`` of its tensors, and by 1 if it has no alpha (kohya's scripts,
ComfyUI, diffusers 0.42). Diffusers has further rules:

- Files without alphas: diffusers refuses the file if an alpha is added (SD 3, Wan, Qwen-Image).
- Files of UNets (SD, SDXL): diffusers applies the most frequent alpha to all attention layers and text
  encoders. One alpha for all modules is correct.
- `transformer.` keys (Flux): diffusers looks up alphas by ends of names, and many names end with
  ``proj_out``. One alpha for all modules is correct.
- Files of other transformers: diffusers multiplies the factors by ``alpha / rank`` (Wan, Z-Image, Flux), or
  drops alphas (the last layer of Flux; before 0.42 Qwen-Image). An alpha that equals the rank is correct.
- A few of diffusers' converters expect every module of a block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from lorank.adapters.formats.image_style import ImageStyle

# Names whose alphas diffusers looks up, or takes from other modules.
_LOOKED_UP = re.compile(r"lora_unet_(?:input|output|middle|down|up|mid)_block.*|transformer\..*")
_TEXT_ENCODER = re.compile(r"lora_te\d?_.*")

# Names of blocks that diffusers reads as a whole: Wan of musubi-tuner, Flux control, Lumina 2.
_WHOLE_BLOCKS = re.compile(
    r"lora_unet_blocks_\d+_(?:self_attn|cross_attn|ffn)_.+|(?:double|single)_blocks\.\d+\.(?!processor).+"
    r"|diffusion_model\..+\.attention\.qkv"
)


def reads_whole_blocks(names: Iterable[str]) -> bool:
    """Return True if diffusers reads blocks of these modules as a whole, so that none may be missing."""
    return any(map(_WHOLE_BLOCKS.fullmatch, names))


def written_alphas(style: ImageStyle, ranks: Mapping[str, int]) -> dict[str, int]:
    """Return the alphas to write, by module; none where the settings in the metadata hold them."""
    names = [name for name in ranks if style.settings.part_of(name) is None]
    if not style.has_alphas or not names:
        return {}
    if any(map(_LOOKED_UP.fullmatch, names)) or all(map(_TEXT_ENCODER.fullmatch, names)):
        return dict.fromkeys(names, max(ranks[name] for name in names))
    return {name: ranks[name] for name in names}
