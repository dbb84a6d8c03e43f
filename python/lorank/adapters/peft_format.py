"""PEFT's names: from `adapter_config.json` and tensors to modules. Factors are not read yet."""

from __future__ import annotations

import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lorank import naming
from lorank._core import FormatError, Matrix
from lorank.adapters.adapter import LoraAdapter
from lorank.adapters.module import LoraModule, in_memory
from lorank.adapters.tensors import Stored, Tensors
from lorank.sources import arrays

PREFIX = "base_model.model."
SPECTRAL_KEY = "lorank.spectral"
"""Metadata of a file whose factors are in balanced spectral form."""

_KEY = re.compile(r"(?P<name>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[ABE])(\.weight)?")
_BIAS = re.compile(r"(?P<name>.+)\.lora_B\.bias")

# Their saved factors are relative to a base model that the method has changed.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read(tensors: Tensors, config: Mapping[str, Any]) -> LoraAdapter:
    """An adapter over PEFT's tensors.

    Raises
    ------
    FormatError
        If the adapter is no LoRA, or tensors and settings contradict each other.
    """
    kind = _checked_kind(tensors.label, config)
    factors: dict[str, dict[str, str]] = defaultdict(dict)
    biases: dict[str, str] = {}
    carried: dict[str, Stored] = {}
    for key in tensors.shapes():
        if found := _KEY.fullmatch(key):
            factors[found["name"].removeprefix(PREFIX)][found["factor"]] = key
        elif found := _BIAS.fullmatch(key):
            biases[found["name"].removeprefix(PREFIX)] = key
        else:
            carried[key] = tensors.stored(key)
    if not factors:
        raise FormatError(f"{tensors.label}: holds no LoRA factors (keys that end with .lora_A.weight)")
    parameters = _stacked_parameters(tensors, config, factors)
    table = _Settings(tensors.label, config)
    modules = []
    for path, keys in factors.items():
        reader = _Reader(tensors, table, path, keys, parameters.get(path))
        module = reader.adalora() if kind == "ADALORA" else reader.module()
        if path in biases:
            module = replace(module, carried={"lora_B.bias": _vector(tensors, biases[path])})
        modules.append(module)
    modules.sort(key=lambda module: naming.natural_key(module.name))
    return LoraAdapter(
        {module.name: module for module in modules},
        dict(config),
        carried,
        _notes(config, carried, kind, without_magnitude(config, carried, factors)),
        label=tensors.label,
        is_spectral=SPECTRAL_KEY in tensors.metadata,
    )


def _checked_kind(label: str, config: Mapping[str, Any]) -> str:
    kind = str(config.get("peft_type", "LORA")).upper().rpartition(".")[2]
    if kind not in ("LORA", "ADALORA"):
        raise FormatError(f"{label}: is a {kind} adapter: only LoRA (and AdaLoRA) can be read")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_THE_BASE):
        raise FormatError(
            f"{label}: was initialised by {init!r}, which changes the base model: its factors are no update "
            "of the original weights. Save it again with PEFT's path_initial_model_for_weight_conversion"
        )
    return kind


def without_magnitude(
    config: Mapping[str, Any], carried: Mapping[str, Any], names: Iterable[str]
) -> list[str]:
    """Modules of a DoRA adapter whose file has no magnitudes: PEFT starts theirs anew."""
    if not config.get("use_dora"):
        return []
    found = {key.partition(".lora_magnitude_vector")[0].removeprefix(PREFIX) for key in carried}
    return [name for name in names if name not in found]


def _notes(
    config: Mapping[str, Any], carried: Mapping[str, Any], kind: str, without: Sequence[str]
) -> list[str]:
    notes = []
    if kind == "ADALORA":
        notes.append("AdaLoRA: its values were folded into B; the result is a plain LoRA adapter")
    if config.get("use_rslora"):
        notes.append("rsLoRA: its scaling lora_alpha / sqrt(r) was taken over")
    magnitudes = [key for key in carried if "lora_magnitude_vector" in key]
    if config.get("use_dora") or magnitudes:
        notes.append(
            f"DoRA: {len(magnitudes)} magnitude vectors are kept as they are; the certificate is about B A, "
            "before the columns are normalised"
        )
    if without:
        notes.append(f"DoRA: {len(without)} modules have no magnitude vector, the first is {without[0]}")
    if others := len(carried) - len(magnitudes):
        notes.append(f"{others} tensors that are no factors are kept as they are")
    return notes


class _Settings:
    """Rank and scaling by module, as PEFT looks them up: the first key that matches wins."""

    def __init__(self, label: str, config: Mapping[str, Any]) -> None:
        self.rank = _rank(label, "r", config.get("r", 8))
        self.alpha = _alpha(label, "lora_alpha", config.get("lora_alpha", 8))
        self.rank_stabilized = bool(config.get("use_rslora"))
        is_masks = str(config.get("peft_type", "")).upper().endswith("ADALORA")
        self._ranks = {} if is_masks else _compiled(label, config, "rank_pattern", _rank)
        self._alphas = _compiled(label, config, "alpha_pattern", _alpha)

    def of(self, name: str) -> tuple[int, float]:
        """The rank that the settings name, and the scaling."""
        rank = _first(self._ranks, name, self.rank)
        alpha = _first(self._alphas, name, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def _rank(label: str, key: str, value: Any) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not 1 <= value < 2**31:
        raise FormatError(f"{label}: the settings' {key} is {value!r}: ranks are positive integers")
    return int(value)


def _alpha(label: str, key: str, value: Any) -> float:
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise FormatError(f"{label}: the settings' {key} is {value!r}: alphas are finite numbers")
    return float(value)


def _compiled(
    label: str, config: Mapping[str, Any], key: str, checked: Callable[[str, str, Any], Any]
) -> dict[re.Pattern[str], Any]:
    pattern = config.get(key) or {}
    if not isinstance(pattern, Mapping):
        raise FormatError(f"{label}: the settings' {key} is a {type(pattern).__name__}, no table of modules")
    try:
        return {
            re.compile(rf"(.*\.)?({name})$"): checked(label, f"{key}[{name!r}]", value)
            for name, value in pattern.items()
        }
    except re.error as error:
        raise FormatError(f"{label}: a key of {key} is no regular expression: {error}") from None


def _first(table: Mapping[re.Pattern[str], Any], name: str, default: Any) -> Any:
    return next((value for key, value in table.items() if key.match(name)), default)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the factors of one path within the adapter."""

    tensors: Tensors
    table: _Settings
    path: str
    keys: Mapping[str, str]
    parameter: str | None

    def module(self) -> LoraModule:
        a_shape, b_shape = self._shapes()
        name = self.parameter or self.path
        rank, scaling = self.table.of(name)
        if self.parameter is not None:
            return self._stack(name, rank, scaling, a_shape, b_shape)
        if a_shape[0] != b_shape[1] or math.prod(b_shape[2:]) != 1:
            self._fail(f"factors of shapes {list(b_shape)} and {list(a_shape)} do not fit each other")
        if a_shape[0] != rank:
            self._fail(f"has rank {a_shape[0]}, but the settings say {rank}")
        shape = (b_shape[0], math.prod(a_shape[1:]))
        is_embedding = ".lora_embedding_A" in self.keys["A"]
        kind = "embedding" if is_embedding else "linear" if len(a_shape) == 2 else "conv"
        return LoraModule(
            name,
            kind,  # type: ignore[arg-type]
            shape,
            rank,
            scaling,
            self._dtype(),
            lambda: [self._pair(shape, rank)],
            a_tail=a_shape[1:],
            b_tail=b_shape[2:],
        )

    def _stack(
        self, name: str, rank: int, scaling: float, a_shape: Sequence[int], b_shape: Sequence[int]
    ) -> LoraModule:
        """Experts: A is `(experts * r, in)`, expert slowest; B is `(out, r * experts)`, expert fastest."""
        copies, rest = divmod(a_shape[0], rank)
        if rest or len(a_shape) != 2 or len(b_shape) != 2 or b_shape[1] != a_shape[0]:
            self._fail(f"factors of shapes {b_shape} and {a_shape} are no experts of rank {rank}")
        shape = (b_shape[0], a_shape[1])

        def factors() -> list[tuple[Matrix, Matrix]]:
            b, a = (matrix.to_array() for matrix in self._pair(shape, a_shape[0]))
            parts = [(b[:, e::copies], a[e * rank : (e + 1) * rank]) for e in range(copies)]
            return [in_memory(*part) for part in parts]

        return LoraModule(name, "expert", shape, rank, scaling, self._dtype(), factors, copies)

    def adalora(self) -> LoraModule:
        """``B (A * E)`` with a value per rank; masked values are zero, and leave with the next truncation."""
        if "E" not in self.keys:
            self._fail("AdaLoRA without lora_E")
        a_shape, b_shape = self._shapes()
        rank, shape = a_shape[0], (b_shape[0], a_shape[1])
        values = self.tensors.matrix(self.keys["E"], rank, 1).to_array()

        def factors() -> list[tuple[Matrix, Matrix]]:
            b, a = self._pair(shape, rank)
            return [(b, arrays.matrix(a.to_array() * values))]

        # PEFT divides by the number of ranks that are left, plus 1e-5.
        scaling = (self.table.alpha if self.table.alpha > 0 else float(rank)) / (rank + 1e-5)
        return LoraModule(
            self.path, "linear", shape, rank, scaling, self._dtype(), factors, a_tail=a_shape[1:]
        )

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        for factor in "AB":
            if factor not in self.keys:
                self._fail(f"has no lora_{factor}")
        shapes = self.tensors.shapes()
        a, b = shapes[self.keys["A"]], shapes[self.keys["B"]]
        if len(a) < 2 or len(b) < 2 or 0 in (*a, *b):
            self._fail(
                f"factors of shapes {list(b)} and {list(a)} are no matrices: was a sharded model saved?"
            )
        return a, b

    def _pair(self, shape: tuple[int, int], rank: int) -> tuple[Matrix, Matrix]:
        b = self.tensors.matrix(self.keys["B"], shape[0], rank)
        return b, self.tensors.matrix(self.keys["A"], rank, shape[1])

    def _dtype(self) -> str:
        return self.tensors.dtype(self.keys["B"])

    def _fail(self, reason: str) -> None:
        raise FormatError(f"{self.tensors.label}: module {self.path!r}: {reason}")


def _vector(tensors: Tensors, key: str) -> np.ndarray[Any, Any]:
    (length,) = tensors.shapes()[key]
    vector: np.ndarray[Any, Any] = tensors.matrix(key, 1, length).to_array()[0]
    return vector


def _stacked_parameters(
    tensors: Tensors, config: Mapping[str, Any], factors: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:
    """Which parameter the factors under a path belong to, for `target_parameters`.

    PEFT wraps the module once per parameter, in the order in which the module holds them, and names
    the factors of the inner wrappers `base_layer`: the deepest belongs to the first parameter.
    """
    targets = config.get("target_parameters") or []
    by_module: dict[str, list[str]] = defaultdict(list)
    for path in factors:
        module = path
        while module.endswith(".base_layer"):
            module = module.removesuffix(".base_layer")
        by_module[module].append(path)
    found: dict[str, str] = {}
    for module, paths in by_module.items():
        fitting = [t for t in targets if naming.is_suffix(t.rpartition(".")[0], module)]
        names = list(dict.fromkeys(target.rpartition(".")[2] for target in fitting))
        if not names:
            continue
        if len(names) < len(paths):
            raise FormatError(
                f"{tensors.label}: module {module!r}: target_parameters names {len(names)} of "
                f"its {len(paths)} adapted parameters"
            )
        deepest_first = sorted(paths, key=len, reverse=True)
        ordered = held_order(names)[: len(paths)] if len(names) > 1 else names
        found |= {path: f"{module}.{name}" for path, name in zip(deepest_first, ordered, strict=True)}
    return found


def held_order(names: Sequence[str]) -> list[str]:
    """The order in which modules hold their expert parameters: what goes in before what comes out."""
    return sorted(names, key=lambda name: (bool(re.search(r"down|out|w2|wo$", name)), names.index(name)))
