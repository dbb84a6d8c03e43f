"""Experts as separate modules (transformers 4), and as stacks under one parameter (transformers 5).

A stack of gate and up has the outputs of both; separate experts have a module for each. A gate and an up that
share A become one update of their rank; others become one of the sum of the ranks, with blocks of zeros in B.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lorank.adapters.content import Adapter, AdapterContent
from lorank.adapters.formats.derived_factors import Array, Arrays, DerivedFactors
from lorank.adapters.module import LoraModule
from lorank.modules import naming

_SEPARATE = re.compile(r"(?P<container>.*\bexperts)\.(?P<index>\d{1,6})\.(?P<projection>[^.]+)")
_STACK = re.compile(r"(?P<container>.*\bexperts)\.(?P<parameter>[^.]+)")

GATE_UP, DOWN = "gate_up_proj", "down_proj"

# Names of the projections of separate experts, and their places in the stacks.
_PLACES = {
    "gate_proj": (GATE_UP, 0),
    "w1": (GATE_UP, 0),
    "up_proj": (GATE_UP, 1),
    "w3": (GATE_UP, 1),
    "down_proj": (DOWN, 0),
    "w2": (DOWN, 0),
}
_PARTS = {GATE_UP: ("gate_proj", "up_proj"), DOWN: ("down_proj",)}
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

# transformers 5 renamed the blocks of Mixtral.
_RENAMED = (".block_sparse_moe.", ".mlp.")

# Models whose stacks are stored in another order; transformers 4 has no separate experts for them.
_OTHER_ORDERS = re.compile(r"gpt[-_]?oss|llama[-_]?4", re.IGNORECASE)


def container_of(name: str) -> str | None:
    """Return the container of a stack of experts by the stack's name; None for other names."""
    match = _STACK.fullmatch(name)
    return match["container"] if match else None


def refuse_other_orders(adapter: AdapterContent) -> None:
    """Refuse to split the stacks of models that interleave gate and up, or transpose them.

    Raises
    ------
    ValueError
        If the adapter's settings name such a model.
    """
    model = f"{adapter.base_model} {adapter.config.get('auto_mapping')}"
    if match := _OTHER_ORDERS.search(model):
        raise ValueError(
            f"{adapter.label}: the experts of {match[0]} have no separate modules, because gate and up are "
            "interleaved or transposed in one parameter: keep the layout of PEFT"
        )


def has_stacks(adapter: AdapterContent) -> bool:
    """Return True if an adapter holds stacks of gate and up, or of down."""
    return any(m.kind == "expert" and m.name.endswith(tuple(_PARTS)) for m in adapter.modules.values())


def has_separate_experts(adapter: AdapterContent) -> bool:
    """Return True if an adapter holds experts as separate modules."""
    return any(map(_SEPARATE.fullmatch, adapter.modules))


def separated(adapter: Adapter, names: str = "") -> Adapter:
    """Return an adapter whose stacks are separate modules ``experts.N.gate_proj``, as in transformers 4.

    Parameters
    ----------
    adapter
        The adapter.
    names
        The name of the model's architecture, which decides the names of projections.
    """
    refuse_other_orders(adapter)
    modules: dict[str, LoraModule] = {}
    for name, module in adapter.modules.items():
        match = _STACK.fullmatch(name)
        if module.kind != "expert" or match is None or match["parameter"] not in _PARTS:
            modules[name] = module
            continue
        container, parts = match["container"], _PARTS[match["parameter"]]
        if "mixtral" in f"{names} {adapter.base_model}".lower():
            container = container.replace(_RENAMED[1], _RENAMED[0])
            parts = tuple(_MIXTRAL[part] for part in parts)
        for expert in range(module.copies):
            for place, part in enumerate(parts):
                one = _one_expert(module, expert, place, len(parts))
                one = replace(one, name=f"{container}.{expert}.{part}")
                modules[one.name] = one
    return _with(adapter, modules, [])


def _one_expert(stack: LoraModule, expert: int, place: int, parts: int) -> LoraModule:
    rows = stack.shape[0] // parts

    def change(values: Sequence[Arrays]) -> Arrays:
        b, a = values[0][expert]
        return [(b[place * rows : (place + 1) * rows], a)]

    factors = DerivedFactors([stack.factors], change)
    return replace(stack, kind="linear", shape=(rows, stack.shape[1]), copies=1, factors=factors)


def without_parameters(adapter: Adapter) -> Adapter:
    """Return an adapter whose adapted parameters of two dimensions, such as routers, are linear modules."""
    modules = {}
    for module in adapter.modules.values():
        if module.kind == "expert" and module.copies == 1 and module.name.endswith(".weight"):
            module = replace(module, name=module.name.removesuffix(".weight"), kind="linear")
        modules[module.name] = module
    return _with(adapter, modules, [])


def split_gate_and_up(adapter: Adapter) -> Adapter:
    """Return an adapter with one stack for gate and one for up, as MLX and llama.cpp store them."""
    modules: dict[str, LoraModule] = {}
    for name, module in adapter.modules.items():
        if module.kind != "expert" or not name.endswith(f".{GATE_UP}"):
            modules[name] = module
            continue
        refuse_other_orders(adapter)
        for place, part in enumerate(_PARTS[GATE_UP]):
            half = _half(module, place)
            modules[name.removesuffix(GATE_UP) + part] = replace(half, name=name.removesuffix(GATE_UP) + part)
    return _with(adapter, modules, [])


def _half(stack: LoraModule, place: int) -> LoraModule:
    rows = stack.shape[0] // 2
    factors = DerivedFactors(
        [stack.factors], lambda values: [(b[place * rows : (place + 1) * rows], a) for b, a in values[0]]
    )
    return replace(stack, shape=(rows, stack.shape[1]), factors=factors)


@dataclass(frozen=True, slots=True)
class _Place:
    """One projection of one expert, or of all experts of a stack."""

    module: LoraModule
    expert: int
    half: int


def stacked(adapter: Adapter, num_experts: int | None = None) -> Adapter:
    """Return an adapter whose separate experts, and separate stacks of gate and up, are PEFT's stacks.

    Parameters
    ----------
    adapter
        The adapter.
    num_experts
        Number of experts of a block in the base model; None if it is unknown.

    Raises
    ------
    ValueError
        If the number of experts is unknown, or an expert or shape does not fit.
    """
    places: dict[str, list[_Place]] = defaultdict(list)
    modules: dict[str, LoraModule] = {}
    for name, module in adapter.modules.items():
        if match := _SEPARATE.fullmatch(name):
            projection, expert = match["projection"], int(match["index"])
        elif (match := _STACK.fullmatch(name)) and module.copies > 1:
            projection, expert = match["parameter"], -1
        if match is None or projection not in _PLACES:
            modules[name] = module
            continue
        parameter, half = _PLACES[projection]
        container = match["container"].replace(*_RENAMED)
        places[f"{container}.{parameter}"].append(_Place(module, expert, half))
    notes = []
    for name, parts in places.items():
        modules[name], remarks = _Stack.of(adapter.label, name, parts, num_experts).module()
        notes += [remark for remark in remarks if remark not in notes]
    return _with(adapter, modules, notes)


@dataclass(frozen=True, slots=True)
class _Stack:
    """The parts of a stack.

    Attributes
    ----------
    name
        The name of the stack's parameter.
    halves
        The modules of gate and up, or of down, by the number of the expert; -1 holds all experts.
    copies
        Number of experts.
    rows
        Number of outputs of one half.
    """

    name: str
    halves: tuple[Mapping[int, LoraModule], ...]
    copies: int
    rows: int
    scaling: float

    @classmethod
    def of(cls, label: str, name: str, parts: Sequence[_Place], num_experts: int | None) -> _Stack:
        halves: tuple[dict[int, LoraModule], ...] = ({}, {}) if name.endswith(GATE_UP) else ({},)
        for part in parts:
            halves[part.half][part.expert] = part.module
        shapes = {part.module.shape for part in parts}
        if len(shapes) > 1:
            raise ValueError(f"{label}: experts of {name!r} have several shapes: {sorted(shapes)}")
        whole = [part.module.copies for part in parts if part.expert < 0]
        largest = max(part.expert for part in parts)
        count = num_experts or (whole[0] if whole else largest + 1)
        if any(copies != count for copies in whole) or largest >= count:
            raise ValueError(f"{label}: {name!r} has {max(*whole, largest + 1)} experts, not {count}")
        missing = not whole and any(set(half) != set(range(count)) for half in halves if half)
        if missing and num_experts is None:
            raise ValueError(
                f"{label}: some experts of {name!r} have no factors, and their number "
                "is unknown: name the base model (--base)"
            )
        ((scaling, _),) = Counter(part.module.scaling for part in parts).most_common(1)
        ((rows, _),) = shapes
        return cls(name, halves, count, rows, scaling)

    def module(self) -> tuple[LoraModule, list[str]]:
        """Return the stack, and notes on what is not as before."""
        modules = [module for half in self.halves for module in half.values()]
        first = modules[0]
        shares = len(self.halves) == 1 or self._share_a()
        rank = max(m.rank for m in modules) if shares else sum(self._rank(half) for half in self.halves)
        notes = []
        if len({m.rank for m in modules}) > 1:
            notes.append(
                "experts of unequal ranks were padded with zeros to the largest, because a stack has one"
            )
        if any(m.scaling != self.scaling for m in modules):
            notes.append("scalings of single experts were folded into B, because a stack has one scaling")
        if not shares:
            notes.append("gate and up have factors A of their own: their stack has the sum of both ranks")
        factors = DerivedFactors([m.factors for m in modules if m.rank], self._change(modules, rank, shares))
        return (
            replace(
                first,
                name=self.name,
                kind="expert",
                shape=(self.rows * len(self.halves), first.shape[1]),
                rank=rank,
                scaling=self.scaling,
                factors=factors,
                copies=self.copies,
                a_tail=(),
                b_tail=(),
            ),
            notes,
        )

    @staticmethod
    def _rank(half: Mapping[int, LoraModule]) -> int:
        return max((module.rank for module in half.values()), default=0)

    def _share_a(self) -> bool:
        """Return True if every expert's gate and up have the same A."""
        gate, up = self.halves
        if gate.keys() != up.keys():
            return False
        return all(
            gate[e].rank == up[e].rank
            and gate[e].scaling == up[e].scaling
            and all(
                np.array_equal(a.to_array(), a2.to_array())
                for (_, a), (_, a2) in zip(gate[e].factors(), up[e].factors(), strict=True)
            )
            for e in gate
        )

    def _change(
        self, modules: Sequence[LoraModule], rank: int, shares: bool
    ) -> Callable[[Sequence[Arrays]], Arrays]:
        read = [module for module in modules if module.rank]
        inputs = modules[0].shape[1]

        def change(values: Sequence[Arrays]) -> Arrays:
            by_module = {id(module): value for module, value in zip(read, values, strict=True)}
            return [self._expert(by_module, expert, rank, inputs, shares) for expert in range(self.copies)]

        return change

    def _expert(
        self, values: Mapping[int, Arrays], expert: int, rank: int, inputs: int, shares: bool
    ) -> tuple[Array, Array]:
        dtype = np.result_type(np.float32, *(b.dtype for arrays in values.values() for b, _ in arrays[:1]))
        b_all = np.zeros((self.rows * len(self.halves), rank), dtype)
        a_all = np.zeros((rank, inputs), dtype)
        start = 0
        for place, half in enumerate(self.halves):
            module = half.get(expert) or half.get(-1)
            if module is not None and module.rank:
                b, a = values[id(module)][expert if module.copies > 1 else 0]
                if module.scaling != self.scaling:
                    b = (b.astype(np.float64) * (module.scaling / self.scaling)).astype(b.dtype)
                b_all[place * self.rows : (place + 1) * self.rows, start : start + b.shape[1]] = b
                a_all[start : start + a.shape[0]] = a
            start += 0 if shares else self._rank(half)
        return b_all, a_all


def _with(adapter: Adapter, modules: Mapping[str, LoraModule], notes: Sequence[str]) -> Adapter:
    ordered = {name: modules[name] for name in sorted(modules, key=naming.natural_key)}
    config = dict(adapter.config)
    if ordered.keys() == adapter.modules.keys():
        return replace(adapter, notes=[*adapter.notes, *notes])
    if "target_modules" in config:
        config |= {"target_modules": _targets(ordered.values()), "exclude_modules": None}
        config |= {"layers_to_transform": None}
    return replace(
        adapter,
        modules=ordered,
        config=config,
        notes=[*adapter.notes, *notes],
        is_spectral=False,
        certificate=None,
    )


def _targets(modules: Iterable[LoraModule]) -> list[str]:
    """Return target modules: the ends of names if there are separate experts, as PEFT needs."""
    names = [module.name for module in modules if module.kind != "expert"]
    if any(map(_SEPARATE.fullmatch, names)):
        return sorted({name.rpartition(".")[2] for name in names})
    return names
