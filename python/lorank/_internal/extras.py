"""Optional dependencies, imported where they are used, with an error that names the extra."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str, purpose: str) -> Any:
    """Import an optional dependency.

    Parameters
    ----------
    module
        Its import name.
    extra
        lorank's extra that installs it.
    purpose
        What it is needed for, as the end of a sentence.

    Raises
    ------
    ImportError
        If it is not installed: says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed {purpose}: pip install 'lorank[{extra}]'", name=module
        ) from error
