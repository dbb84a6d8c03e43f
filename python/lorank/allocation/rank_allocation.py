"""The result of an allocation: a rank for every adapted module."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from lorank._internal import extras
from lorank._internal.atomic import write_text
from lorank._internal.json_fields import Fields, check_unique, reading
from lorank._internal.json_files import read_json
from lorank._internal.printable import printable_name
from lorank._internal.short_text import counted, listing
from lorank.modules.facts import ModelFacts
from lorank.modules.targets import AdaptedModule
from lorank.modules.weight import Kind
from lorank.peft_format import lora_config
from lorank.peft_format.lora_config import ScaleRule
from lorank.report.json_values import plain

if TYPE_CHECKING:
    from peft import LoraConfig

ALLOCATION_FILE = "allocation.json"
_FORMAT = "lorank.RankAllocation"
_VERSION = 1
_LARGEST_RANK = 2**31 - 1


@dataclass(frozen=True, slots=True, repr=False)
class RankAllocation:
    """The rank of every adapted module.

    Attributes
    ----------
    modules
        The adapted modules, in the model's order.
    ranks
        Rank of each module by its name, in the same order.
    scores
        Score of each module by its name, in the unit of the method.
    method
        Name of the method.
    other_modules
        Names of the modules that are not adapted, which the patterns of a `LoraConfig` must not match.
    flags
        Remarks by module name, including modules that get no rank.
    source
        Name of the source that the ranks were derived from.
    base_parameters
        Number of parameters of the base model; None if unknown.
    facts
        Facts about the model other than its matrices.

    Examples
    --------
    >>> import lorank, numpy
    >>> weights = {"q_proj.weight": numpy.eye(8), "up_proj.weight": numpy.ones((32, 8))}
    >>> allocation = lorank.allocate(weights, "uniform", r_min=1, r_max=4, progress=False)
    >>> allocation.ranks
    {'q_proj': 4, 'up_proj': 4}
    >>> allocation.num_parameters, allocation.average_rank
    (224, 4.0)
    """

    modules: Sequence[AdaptedModule]
    ranks: Mapping[str, int]
    scores: Mapping[str, float]
    method: str
    other_modules: Sequence[str] = ()
    flags: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    base_parameters: int | None = None
    facts: ModelFacts = field(default_factory=ModelFacts)

    def __repr__(self) -> str:
        title = (
            f"RankAllocation of {printable_name(self.source or 'an unnamed model')} "
            f"by {printable_name(self.method)}: "
            f"{counted(len(self.modules), 'module')}, {counted(self.num_parameters, 'parameter')}"
        )
        lines = (f"{printable_name(name)}: rank {rank}" for name, rank in self.ranks.items())
        return listing(title, lines, len(self.ranks), "allocation.ranks")

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the adapter: ``sum rank * copies * (out + in)``."""
        return sum(self.ranks[module.name] * module.cost for module in self.modules)

    @property
    def average_rank(self) -> float:
        """The mean rank over the modules."""
        return float(np.mean(list(self.ranks.values())))

    def to_lora_config(
        self, model: Any = None, *, scale_rule: ScaleRule = "constant", **lora_config_kwargs: Any
    ) -> LoraConfig:
        """Return a `peft.LoraConfig` with these ranks.

        Parameters
        ----------
        model
            The base model, before PEFT adapts it. If it is given, each name must match exactly one of
            its modules. If not, names match as suffixes, so that prefixes may differ.
        scale_rule
            ``"constant"`` scales every module by ``lora_alpha / r`` as plain LoRA does, with `r` the rounded
            average rank; ``"rank-stabilized"`` scales by ``lora_alpha / sqrt(rank)``.
        **lora_config_kwargs
            The other arguments of `LoraConfig`: `lora_alpha`, `lora_dropout`, `task_type`, ...

        Raises
        ------
        ImportError
            If PEFT (extra ``peft``) is not installed.
        ValueError
            If an argument sets `r`, patterns, targets or `use_rslora`, which the allocation sets, or if
            names do not fit the model.
        """
        peft = extras.require("peft", "peft", "to build a LoraConfig")
        settings = self.lora_settings(model, scale_rule=scale_rule, **lora_config_kwargs)
        config: LoraConfig = peft.LoraConfig(**settings)
        return config

    def lora_settings(
        self, model: Any = None, *, scale_rule: ScaleRule = "constant", **lora_config_kwargs: Any
    ) -> dict[str, Any]:
        """Return the arguments of `LoraConfig` as JSON values; PEFT is not needed.

        The parameters are those of `to_lora_config`.

        Examples
        --------
        >>> import lorank, numpy
        >>> allocation = lorank.allocate({"q.weight": numpy.eye(8)}, "uniform", r_max=4, progress=False)
        >>> settings = allocation.lora_settings(lora_alpha=16)
        >>> settings["r"], settings["target_modules"]
        (4, ['q'])
        """
        return lora_config.settings(
            self.modules,
            self.ranks,
            self.other_modules,
            model,
            scale_rule,
            lora_config_kwargs,
            knows_all=not self.facts.are_guessed,
        )

    def save(self, path: str | Path) -> None:
        """Write the allocation to a JSON file atomically."""
        write_text(Path(path), json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    def to_json(self) -> dict[str, Any]:
        """Return the allocation as JSON values."""
        modules = [
            {
                "name": module.name,
                "kind": module.kind,
                "shape": list(module.shape),
                "copies": module.copies,
                "rank": self.ranks[module.name],
                "score": plain(self.scores[module.name]),
                "flag": self.flags.get(module.name),
            }
            for module in self.modules
        ]
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "source": self.source,
            "method": self.method,
            "num_parameters": self.num_parameters,
            "average_rank": self.average_rank,
            "base_parameters": self.base_parameters,
            "modules": modules,
            "other_modules": list(self.other_modules),
            "other_flags": {name: flag for name, flag in self.flags.items() if name not in self.ranks},
            "model": self.facts.to_json(),
        }

    @classmethod
    def load(cls, path: str | Path) -> RankAllocation:
        """Read an allocation that `save` wrote.

        Parameters
        ----------
        path
            The file, or a folder that ``lorank allocate -o`` wrote.

        Raises
        ------
        FormatError
            If the file does not hold an allocation.
        OSError
            If the file cannot be read.
        """
        path = Path(path)
        file = path / ALLOCATION_FILE if path.is_dir() else path
        with reading(file, "a rank allocation"):
            return cls._from_json(Fields(read_json(file)))

    @classmethod
    def _from_json(cls, content: Fields) -> RankAllocation:
        content.check_format(_FORMAT, _VERSION)
        entries = content.objects("modules")
        modules = [
            AdaptedModule(
                entry.text("name"),
                entry.choice("kind", get_args(Kind)),
                entry.matrix_shape("shape"),
                entry.integer("copies", 1, _LARGEST_RANK),
            )
            for entry in entries
        ]
        names = [module.name for module in modules]
        check_unique(names)
        flags = {
            name: entry.text("flag")
            for name, entry in zip(names, entries, strict=True)
            if entry.value("flag")
        }
        if "other_flags" in content:
            others = content.object("other_flags")
            flags |= {name: others.text(name) for name in others}
        return cls(
            modules,
            {
                name: entry.integer("rank", 0, _LARGEST_RANK)
                for name, entry in zip(names, entries, strict=True)
            },
            {name: entry.measure("score") for name, entry in zip(names, entries, strict=True)},
            content.text("method"),
            list(content.texts("other_modules")),
            flags,
            content.text("source"),
            content.optional_integer("base_parameters"),
            ModelFacts.from_json(content.object("model")) if "model" in content else ModelFacts(),
        )
