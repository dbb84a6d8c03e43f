"""Public names of a package that are imported at their first use."""

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
    """Return the `__getattr__` and `__dir__` of a package.

    `__dir__` lists the public names, ``__all__``, and the double-underscore names of the package. Modules
    inside the package, which imports bind as attributes, are not listed.

    Parameters
    ----------
    package
        ``__name__`` of the package.
    places
        Mapping of each public name to the module inside the package that defines it.
    packages
        Names of public packages inside the package.
    needs_torch_for
        Purpose for which the names need torch, as the end of an error message; None if they need no torch.
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

    def listed() -> list[str]:
        special = {name for name in content if name.startswith("__") and name.endswith("__")}
        return sorted(special.union(content["__all__"]))

    return get, listed
