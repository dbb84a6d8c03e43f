"""Optional dependencies, imported where they are used, with an error that names the extra."""

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
        Purpose of the dependency, as the end of a sentence.

    Raises
    ------
    ImportError
        If the dependency is not installed. The message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed {purpose}: pip install 'lorank[{extra}]'", name=module
        ) from error
