"""Names that a package imports when they are asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module

from lorank._internal import extras


def lazy_names(
    package: str,
    places: Mapping[str, str],
    *,
    packages: Collection[str] = (),
    needs_torch_for: str | None = None,
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`.

    Parameters
    ----------
    package
        Its ``__name__``.
    places
        Name -> the module of the package that defines it.
    packages
        Names of packages within it.
    needs_torch_for
        What all of them need torch for, if they do: the end of a sentence.
    """
    content = vars(sys.modules[package])

    def get(name: str) -> object:
        if name in packages:
            return import_module(f"{package}.{name}")
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if needs_torch_for is not None:
            extras.require("torch", "peft", needs_torch_for)
        content[name] = getattr(import_module(f"{package}.{places[name]}"), name)
        return content[name]

    return get, lambda: sorted({*content, *places, *packages})
