"""JSON files of unknown origin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If the file is not JSON, or is nested too deeply for the parser.
    """
    return parse_json(path.read_text("utf-8"))


def parse_json(text: str) -> Any:
    """Return the content of a JSON text.

    Raises
    ------
    ValueError
        If the text is not JSON, or is nested too deeply for the parser.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
