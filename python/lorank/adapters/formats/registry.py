"""Looks up the format of an adapter."""

from __future__ import annotations

from lorank.adapters.content import AdapterContent
from lorank.adapters.formats.base import AdapterFormat
from lorank.adapters.formats.earlier_peft import EARLIER_PEFT
from lorank.adapters.formats.gguf_files import GGUF
from lorank.adapters.formats.kohya import KOHYA
from lorank.adapters.formats.mlx import MLX
from lorank.adapters.formats.peft import PEFT
from lorank.adapters.formats.torchtune import TORCHTUNE

_FORMATS: dict[str, AdapterFormat] = {
    form.name: form for form in (PEFT, KOHYA, EARLIER_PEFT, MLX, TORCHTUNE, GGUF)
}


def format_of(adapter: AdapterContent) -> AdapterFormat:
    """Return the format of an adapter's files."""
    return _FORMATS[adapter.format]
