"""PEFT's adapters of parameters (`target_parameters`): the parameter of each path, and its orientation.

PEFT wraps a module once for each adapted parameter, in the module's order of parameters. Each wrapper holds
the previous one as its `base_layer`, so the innermost belongs to the first parameter. One tensor holds the
factors of all experts of a stack: A is `(experts * r, in)`, B is `(out, r * experts)`.

Before 0.19, PEFT took the last dimension of a stack for its outputs. Most models store `(experts, out, in)`,
so that A held the outputs and B the inputs. PEFT 0.19 swapped them, except for stacks that a model declares
to be stored `(experts, in, out)` (`is_transposed`): these have the same factors in all releases.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorank._core import FormatError
from lorank.adapters.tensors import Tensors
from lorank.modules import naming
from lorank.peft_format.names import INSIDE, innermost

ExpertLayout = Literal["current", "earlier"]

FIRST_VERSION = "0.19.0"
"""The first release of PEFT with the current layout of experts."""

_GATED = re.compile(r"gate_up|w13")
_AFTER_ALL = re.compile(r"down|out|w2|wo$")
_AFTER_THE_GATE = re.compile(r"(?<!gate_)up|w3|v1|wi_1")

# Names of models whose stacks are stored (in, out): models that declare it, and models that do not.
_DECLARED = re.compile(r"gpt[-_]?oss", re.IGNORECASE)
_UNDECLARED = re.compile(r"llama[-_]?4", re.IGNORECASE)
_MAY_BE_UNDECLARED = ".feed_forward.experts"

# Attention projections whose inputs, or whose outputs, have the width of the model.
_TAKES_HIDDEN = ("q_proj", "k_proj", "v_proj", "qkv_proj")
_GIVES_HIDDEN = ("o_proj",)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter and the layout of its factors.

    Attributes
    ----------
    name
        Dotted name in the base model.
    layout
        ``"earlier"`` if A holds the outputs and B the inputs, as PEFT before 0.19 wrote them.
    contradicts_version
        True if the shapes show another layout than `peft_version` implies.
    """

    name: str
    layout: ExpertLayout = "current"
    contradicts_version: bool = False


Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""The shapes of A and B by path."""


def parameters(
    tensors: Tensors, config: Mapping[str, Any], factors: Mapping[str, Mapping[str, str]]
) -> dict[str, Parameter]:
    """Map each path of factors to its parameter.

    Parameters
    ----------
    tensors, config
        The contents of the adapter's two files.
    factors
        The keys of factors, by path and letter.

    Returns
    -------
    dict
        The parameter by path, for the paths that `target_parameters` selects.

    Raises
    ------
    FormatError
        If a module has more factors than `target_parameters` names.
    """
    named = _named(tensors.label, config, factors)
    if not named:
        return {}
    known = tensors.shapes()
    shapes = {
        path: (known[keys["A"]], known[keys["B"]])
        for path, keys in factors.items()
        if "A" in keys and "B" in keys and len(known[keys["A"]]) == len(known[keys["B"]]) == 2
    }
    by_module: dict[str, list[str]] = defaultdict(list)
    for path in named:
        by_module[innermost(path)].append(path)
    shown = {module: _shown(paths, named, shapes) for module, paths in by_module.items()}
    # One release wrote all blocks: a layout that shows in one block holds in all.
    seen = {layout for layout in shown.values() if layout is not None}
    common = seen.pop() if len(seen) == 1 else None
    found: dict[str, Parameter] = {}
    for module, paths in by_module.items():
        layout, contradicts = _decided(config, module, shown[module] or common)
        found |= {path: Parameter(named[path], layout, contradicts) for path in paths}
    return found


def is_earlier(config: Mapping[str, Any]) -> bool:
    """Return True if `peft_version` is before 0.19, so that experts have the earlier layout."""
    numbers = re.match(r"(\d{1,6})\.(\d{1,6})", str(config.get("peft_version") or ""))
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < (0, 19)


def held_order(names: Sequence[str]) -> list[str]:
    """Sort parameters in a module's order: gate, up, then the projections back to the hidden size."""

    def place(name: str) -> tuple[bool, bool, int]:
        return bool(_AFTER_ALL.search(name)), bool(_AFTER_THE_GATE.search(name)), names.index(name)

    return sorted(names, key=place)


def _named(label: str, config: Mapping[str, Any], paths: Iterable[str]) -> dict[str, str]:
    """Map each path of factors to the name of its parameter."""
    targets = config.get("target_parameters")
    if not targets:
        return {}
    by_module: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        by_module[innermost(path)].append(path)
    owners: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for position, target in enumerate(targets):
        owner, _, name = target.rpartition(".")
        if name:
            owners[owner].append((position, name))
    is_selected = _selection(label, config)
    found: dict[str, str] = {}
    for module, inner in by_module.items():
        names = _candidates(is_selected, owners, module, len(inner))
        if not names:
            continue
        if len(names) < len(inner):
            raise FormatError(
                f"{label}: module {module!r}: has {len(inner)} adapted parameters, but "
                f"target_parameters names {len(names)}"
            )
        for path in inner:
            depth = (len(path) - len(module)) // len(INSIDE)
            if depth >= len(names):
                raise FormatError(
                    f"{label}: module {path!r}: is nested too deep for the {len(names)} parameters that "
                    "target_parameters names"
                )
            found[path] = f"{module}.{held_order(names)[len(names) - 1 - depth]}"
    return found


def _candidates(
    is_selected: Callable[[str], bool],
    owners: Mapping[str, Sequence[tuple[int, str]]],
    module: str,
    count: int,
) -> list[str]:
    """Find the names of a module's parameters that targets select, as PEFT matches them.

    A target without a dot selects a parameter of that name in every module, and the file does not list the
    modules that have one. Such targets are used if the others select too few parameters of the module, and
    `target_modules` does not select the module.

    Parameters
    ----------
    is_selected
        A function that returns True if `target_modules` selects a module.
    owners
        The names of parameters in `target_parameters` with their positions, by the names of their modules.
    module, count
        The module, and the number of its adapted parameters.
    """
    fitting = sorted(entry for owner in naming.suffixes(module) if owner for entry in owners.get(owner, ()))
    names = list(dict.fromkeys(name for _, name in fitting))
    if len(names) < count and not is_selected(module):
        names = list(dict.fromkeys([*names, *(name for _, name in owners.get("", ()))]))
    return names


def _selection(label: str, config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return a function that returns True if `target_modules` selects a module."""
    targets = config.get("target_modules")
    if targets is None:
        return lambda _: False
    if targets == naming.ALL_LINEAR:
        return lambda module: not naming.is_in_experts(module)
    try:
        return naming.matcher(targets, f"{label}: the settings' target_modules")
    except ValueError as error:
        raise FormatError(str(error)) from None


def _shown(paths: Sequence[str], named: Mapping[str, str], shapes: Shapes) -> ExpertLayout | None:
    """Find the layout that the shapes of one module's factors show; None if the shapes fit both layouts."""
    if any(path not in shapes for path in paths):
        return None
    sides = {named[path].rpartition(".")[2]: (shapes[path][0][1], shapes[path][1][0]) for path in paths}
    return _by_gate(sides) or _by_hidden_size(innermost(paths[0]), sides, shapes)


def _by_gate(sides: Mapping[str, tuple[int, int]]) -> ExpertLayout | None:
    """Infer the layout from the fused gate and up, which has twice as many outputs as down has inputs."""
    gates = [side for name, side in sides.items() if _GATED.search(name)]
    downs = [side for name, side in sides.items() if _AFTER_ALL.search(name)]
    if len(gates) != 1 or len(downs) != 1:
        return None
    (gate_a, gate_b), (down_a, down_b) = gates[0], downs[0]
    current = gate_b == 2 * down_a and gate_a == down_b
    earlier = gate_a == 2 * down_b and gate_b == down_a
    return None if current == earlier else "current" if current else "earlier"


def _by_hidden_size(module: str, sides: Mapping[str, tuple[int, int]], shapes: Shapes) -> ExpertLayout | None:
    """Infer the layout from the hidden size, which adapted attention projections of the block show."""
    block = naming.block_of(module)
    hidden: set[int] = set()
    for path, (a, b) in shapes.items():
        last = path.rpartition(".")[2]
        if path.startswith(f"{block}.") and last in (*_TAKES_HIDDEN, *_GIVES_HIDDEN):
            hidden.add(a[1] if last in _TAKES_HIDDEN else b[0])
    if len(hidden) != 1:
        return None
    (width,) = hidden
    seen: set[ExpertLayout] = set()
    for name, (inputs, outputs) in sides.items():
        first, second = (outputs, inputs) if _AFTER_ALL.search(name) else (inputs, outputs)
        if (first == width) != (second == width):
            seen.add("current" if first == width else "earlier")
    return seen.pop() if len(seen) == 1 else None


def _decided(config: Mapping[str, Any], module: str, shown: ExpertLayout | None) -> tuple[ExpertLayout, bool]:
    """Return a module's layout by shapes, version and model, and True if it contradicts `peft_version`."""
    model = f"{config.get('base_model_name_or_path')} {config.get('auto_mapping')}"
    version = config.get("peft_version")
    if shown is None:
        return ("earlier" if is_earlier(config) and not _DECLARED.search(model) else "current"), False
    if shown == "current" or not version or is_earlier(config):
        return shown, False
    # Without a declaration, PEFT today gives stacks stored (in, out) the layout of others before 0.19.
    if _UNDECLARED.search(model) or module.endswith(_MAY_BE_UNDECLARED):
        return "current", False
    return "earlier", True
