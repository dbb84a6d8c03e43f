"""Makes the keys of factors in a PEFT file, and sorts the keys of a file by role."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from lorank._core import FormatError
from lorank.adapters.formats.expert_layout import held_order
from lorank.adapters.module import LoraModule
from lorank.adapters.stored import Stored
from lorank.adapters.tensors import Tensors
from lorank.peft_format import names
from lorank.peft_format.names import BIAS_KEY, FACTOR_KEY, INSIDE, LIVE_FACTOR_KEY, PREFIX

# The sampler of MonteCLoRA, which only training needs, and whose size is the rank before truncation.
_ONLY_FOR_TRAINING = ".lora_monteclora_sampler"


@dataclass(frozen=True, slots=True)
class FoundKeys:
    """The keys of a file by their roles.

    Attributes
    ----------
    factors
        Keys of factors by path and letter.
    biases
        Keys of the biases of B by path.
    carried
        All other tensors by key.
    """

    factors: dict[str, dict[str, str]]
    biases: dict[str, str]
    carried: dict[str, Stored]

    @classmethod
    def of(cls, tensors: Tensors) -> FoundKeys:
        """Sort the keys of a file.

        Raises
        ------
        FormatError
            If there are no factors, two tensors for one factor, or keys that PEFT does not load.
        """
        found = cls(defaultdict(dict), {}, {})
        for key in tensors.shapes():
            found._add(key, tensors)
        if not found.factors:
            raise FormatError(f"{tensors.label}: holds no LoRA factors (keys that end with .lora_A.weight)")
        if orphans := [key for path, key in found.biases.items() if path not in found.factors]:
            raise FormatError(f"{tensors.label}: tensor {orphans[0]!r}: its module has no factors")
        return found

    def _add(self, key: str, tensors: Tensors) -> None:
        label = tensors.label
        if (name := FACTOR_KEY.fullmatch(key)) or (name := BIAS_KEY.fullmatch(key)):
            path = name["path"].removeprefix(PREFIX)
            is_bias = name.re is BIAS_KEY
            table, entry = (self.biases, path) if is_bias else (self.factors[path], name["factor"])
            if entry in table:
                raise FormatError(f"{label}: tensors {table[entry]!r} and {key!r} define the same parameter")
            table[entry] = key
        elif ".lora_diag" in key:
            raise FormatError(f"{label}: tensor {key!r} belongs to KaSA: only LoRA can be read")
        elif name := LIVE_FACTOR_KEY.fullmatch(key):
            raise FormatError(
                f"{label}: tensor {key!r} has an adapter's name ({name['adapter']!r}) in its "
                "key, as in a live model: PEFT does not load it; save the adapter with save_pretrained"
            )
        elif _ONLY_FOR_TRAINING not in key:
            self.carried[key] = tensors.stored(key)


def factor_keys(modules: Iterable[LoraModule]) -> dict[str, tuple[str, str]]:
    """Return the keys of B and A of every module by name."""
    modules = list(modules)
    depths = _depths(modules)
    found = {}
    for module in modules:
        path = module.name
        if module.kind == "expert":
            path = path.rpartition(".")[0] + INSIDE * depths[module.name]
        found[module.name] = names.factor_keys(path, is_embedding=module.kind == "embedding")
    return found


def _depths(modules: Iterable[LoraModule]) -> dict[str, int]:
    """Count the layers around a stacked parameter's own layer: one for each later parameter of its module."""
    by_module: dict[str, list[str]] = {}
    for module in modules:
        if module.kind == "expert":
            owner, _, parameter = module.name.rpartition(".")
            by_module.setdefault(owner, []).append(parameter)
    return {
        f"{owner}.{parameter}": depth
        for owner, parameters in by_module.items()
        for depth, parameter in enumerate(reversed(held_order(parameters)))
    }
