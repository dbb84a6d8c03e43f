"""Imports optional dependencies; the error for a missing one gives the extra that installs it."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str, purpose: str) -> Any:
    """Import an optional dependency.

    Parameters
    ----------
    module
        Import name of the dependency.
    extra
        Extra of lorank that installs the dependency.
    purpose
        Purpose of the dependency, as the end of the message "<module> is needed": for example "for plots".

    Raises
    ------
    ImportError
        If the dependency is not installed. The message gives the command to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed {purpose}: pip install 'lorank[{extra}]'", name=module
        ) from error
