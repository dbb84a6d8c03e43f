"""JSON files of unknown origin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorank._internal.regular_files import TABLE_BYTES, read_text

# A value takes up to 100 bytes of memory, and as little as two bytes of a file.
_MOST_VALUES = 32_000_000


def read_json(path: Path, limit: int = TABLE_BYTES) -> Any:
    """Return the content of a JSON file of at most `limit` bytes.

    Raises
    ------
    OSError
        If the file cannot be read, is not a regular file, or is larger; `filename` is the path.
    ValueError
        If the file is not JSON, is nested too deeply for the parser, or holds too many values.
    """
    return parse_json(read_text(path, limit))


def parse_json(text: str) -> Any:
    """Return the content of a JSON text.

    Raises
    ------
    ValueError
        If the text is not JSON, is nested too deeply for the parser, or holds too many values.
    """
    if len(text) > _MOST_VALUES and sum(map(text.count, ",[{")) > _MOST_VALUES:
        raise ValueError(f"holds more than {_MOST_VALUES:,} values")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
