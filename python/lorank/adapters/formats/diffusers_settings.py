"""PEFT's settings in the metadata of diffusers' files, for each part of a pipeline."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorank._core import FormatError
from lorank._internal.json_files import parse_json
from lorank.peft_format.fields import ONLY_FOR_TRAINING
from lorank.peft_format.rank_patterns import rank_keys
from lorank.peft_format.settings import Settings
from lorank.peft_format.validation import checked_kind

KEY = "lora_adapter_metadata"


@dataclass(frozen=True, slots=True)
class PartSettings:
    """Settings of the parts of a pipeline, such as ``"unet"`` or ``"transformer"``.

    Attributes
    ----------
    parts
        Settings by the part's name.
    tables
        Ranks and scalings by the part's name.
    """

    parts: Mapping[str, Mapping[str, Any]] = field(repr=False)
    tables: Mapping[str, Settings] = field(repr=False)

    @classmethod
    def of(cls, label: str, metadata: Mapping[str, str]) -> PartSettings:
        """Return the settings in a file's metadata, which may hold none.

        Raises
        ------
        FormatError
            If the entry is not a JSON object with settings of LoRA.
        """
        if KEY not in metadata:
            return cls({}, {})
        label = f"{label}: metadata {KEY}"
        try:
            content = parse_json(metadata[KEY])
        except ValueError as error:
            raise FormatError(f"{label}: is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise FormatError(f"{label}: holds an object of type {type(content).__name__}, not settings")
        parts: dict[str, dict[str, Any]] = defaultdict(dict)
        for key, value in content.items():
            part, _, setting = key.rpartition(".")
            parts[part][setting] = value
        for settings in parts.values():
            checked_kind(label, settings)
        return cls(dict(parts), {part: Settings(label, settings) for part, settings in parts.items()})

    def part_of(self, name: str) -> str | None:
        """Return the part that a module belongs to; None if the part has no settings."""
        return next((part for part in self.parts if not part or name.startswith(f"{part}.")), None)

    def rank_and_scaling(self, name: str) -> tuple[int, float] | None:
        """Return the rank and the scaling of a module; None if its part has no settings."""
        part = self.part_of(name)
        return None if part is None else self.tables[part].rank_and_scaling(_within(part, name))

    def rewritten(self, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> str:
        """Return the metadata for other ranks and alphas of the modules."""
        by_part: dict[str, dict[str, int]] = defaultdict(dict)
        of_part: dict[str, dict[str, float]] = defaultdict(dict)
        for name, rank in ranks.items():
            if (part := self.part_of(name)) is not None:
                by_part[part][_within(part, name)] = rank
                of_part[part][_within(part, name)] = alphas[name]
        content = {}
        for part, written in by_part.items():
            for key, value in {**_kept(self.parts[part]), **_settings(written, of_part[part])}.items():
                content[f"{part}.{key}" if part else key] = value
        return json.dumps(content, indent=2, sort_keys=True)


def _within(part: str, name: str) -> str:
    return name[len(part) + 1 :] if part else name


def _kept(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in ONLY_FOR_TRAINING}


def _settings(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    largest = max(ranks.values())
    alpha = max(alphas.values())
    return {
        "r": largest,
        "lora_alpha": alpha,
        "rank_pattern": {key: rank for rank, key in rank_keys(ranks).items() if rank != largest},
        "alpha_pattern": {key: value for value, key in rank_keys(alphas).items() if value != alpha},
        "target_modules": sorted(ranks),
        "exclude_modules": None,
        "use_rslora": False,
        "init_lora_weights": True,
    }
