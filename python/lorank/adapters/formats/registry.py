"""Looks up the format of an adapter."""

from __future__ import annotations

from lorank.adapters.content import AdapterContent
from lorank.adapters.formats.base import AdapterFormat
from lorank.adapters.formats.kohya import KOHYA
from lorank.adapters.formats.peft import PEFT

_FORMATS: dict[str, AdapterFormat] = {PEFT.name: PEFT, KOHYA.name: KOHYA}


def format_of(adapter: AdapterContent) -> AdapterFormat:
    """Return the format of an adapter's files."""
    return _FORMATS[adapter.format]
