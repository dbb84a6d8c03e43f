"""Adapters of MLX-LM: a folder with `adapter_config.json` and `adapters.safetensors`.

`lora_a` is A transposed and `lora_b` is B transposed, except for stacks of experts, whose factors have the
number of the expert first. One scale holds for all modules; ranks are those of the tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from lorank._core import FormatError
from lorank._internal.short_text import shown
from lorank.adapters.content import Adapter, AdapterContent, Profile
from lorank.adapters.factors import Factors
from lorank.adapters.formats import expert_stacks
from lorank.adapters.formats.base import Array, AsStored, Files
from lorank.adapters.formats.derived_factors import Arrays
from lorank.adapters.formats.folder_form import ConvertedFormat, adapted_ranks, refuse_carried
from lorank.adapters.formats.one_scale import common_scale, with_one_scale
from lorank.adapters.formats.peft_notes import dora_note
from lorank.adapters.formats.stored_arrays import ArrayFactors
from lorank.adapters.metadata import SPECTRAL_KEY
from lorank.adapters.module import LoraModule
from lorank.adapters.profiles import WrittenRank
from lorank.adapters.stored import Stored
from lorank.adapters.tensors import FileTensors, Tensors
from lorank.modules import naming
from lorank.modules.weight import Kind
from lorank.peft_format import config_file
from lorank.peft_format.names import CONFIG_FILE, MAGNITUDE, PREFIX, layer_key

WEIGHTS_FILE = "adapters.safetensors"
FILES: Files = "MLX folders"

_KEY = re.compile(r"(?P<path>.+)\.(?P<part>lora_a|lora_b|m)")
_EMBEDDING = re.compile(r".*(?:embed_tokens|wte|word_embeddings|tok_embeddings)")
_BLOCK = re.compile(r".*?\.\d+\.(?P<rest>.+)")
_SWITCH, _EXPERTS = ".switch_mlp.", ".experts."


def is_folder(path: Path) -> bool:
    """Return True for a folder with an adapter of MLX-LM."""
    return (path / WEIGHTS_FILE).is_file() and (path / CONFIG_FILE).is_file()


def read(path: Path) -> AsStored:
    """Read an adapter of MLX-LM as an adapter of PEFT.

    Raises
    ------
    FormatError
        If the files are damaged, or hold a full fine-tune.
    """
    config = config_file.read(path / CONFIG_FILE)
    tensors = FileTensors(path / WEIGHTS_FILE)
    method = config.get("fine_tune_type", "lora")
    if method not in ("lora", "dora"):
        raise FormatError(
            f"{path / CONFIG_FILE}: fine_tune_type is {shown(method)}: only lora and dora are adapters"
        )
    scale = _scale(path, config)
    keys: dict[str, dict[str, str]] = {}
    for key in tensors.shapes():
        match = _KEY.fullmatch(key)
        if match is None or (match["part"] == "m" and method != "dora"):
            raise FormatError(
                f"{tensors.label}: tensor {key!r}: is no factor of LoRA (lora_a, lora_b), and "
                f"fine_tune_type is {method}"
            )
        keys.setdefault(match["path"], {})[match["part"]] = key
    modules = [_module(tensors, name, parts, scale) for name, parts in keys.items()]
    magnitudes = {
        layer_key(name, MAGNITUDE): tensors.stored(parts["m"]) for name, parts in keys.items() if "m" in parts
    }
    names = sorted((module.name for module in modules), key=naming.natural_key)
    by_name = {module.name: module for module in modules}
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": config.get("model"),
        "r": max((module.rank for module in modules), default=1),
        "task_type": "CAUSAL_LM",
        "target_modules": [name for name in names if by_name[name].kind != "expert"],
        **({"use_dora": True} if method == "dora" else {}),
    }
    if not modules:
        raise FormatError(f"{tensors.label}: holds no LoRA factors (lora_a, lora_b)")
    adapter = AdapterContent(
        {name: by_name[name] for name in names},
        settings,
        magnitudes,
        ["read from the format of MLX-LM", *([dora_note(len(magnitudes))] if magnitudes else [])],
        label=str(path),
        is_spectral=SPECTRAL_KEY in tensors.metadata,
    )
    return AsStored(expert_stacks.stacked(adapter), tensors, files=FILES)


def _scale(path: Path, config: Mapping[str, Any]) -> float:
    parameters = config.get("lora_parameters")
    places = [config, parameters] if isinstance(parameters, Mapping) else [config]
    found = next((place["scale"] for place in reversed(places) if "scale" in place), None)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not np.isfinite(found):
        raise FormatError(
            f"{path / CONFIG_FILE}: lora_parameters.scale is {shown(found)}: the scale of an adapter "
            "is a number"
        )
    return float(found)


def _module(tensors: Tensors, name: str, parts: Mapping[str, str], scale: float) -> LoraModule:
    def fail(reason: str) -> NoReturn:
        raise FormatError(f"{tensors.label}: module {name!r}: {reason}")

    for part in ("lora_a", "lora_b"):
        if part not in parts:
            fail(f"has no {part}")
    shapes = tensors.shapes()
    a, b = shapes[parts["lora_a"]], shapes[parts["lora_b"]]
    dtype = tensors.dtype(parts["lora_b"])
    if len(b) == 3:
        copies, outputs, rank = b
        if 0 in (*a, *b) or a not in ((copies, rank, a[-1]), (copies * rank, a[-1])):
            fail(f"factors of shapes {list(a)} and {list(b)} do not fit each other")
        factors: Factors = ArrayFactors(tensors, parts["lora_b"], parts["lora_a"], _stack)
        path = name.replace(_SWITCH, _EXPERTS)
        return LoraModule(path, "expert", (outputs, a[-1]), rank, scale, dtype, factors, copies)
    if len(a) != 2 or len(b) != 2 or a[1] != b[0] or 0 in (*a, *b):
        fail(f"factors of shapes {list(a)} and {list(b)} do not fit each other")
    kind: Kind = "embedding" if _EMBEDDING.fullmatch(name) else "linear"
    factors = ArrayFactors(tensors, parts["lora_b"], parts["lora_a"], _turned)
    return LoraModule(name, kind, (b[1], a[0]), a[1], scale, dtype, factors, a_tail=(a[0],))


def _turned(b: Array, a: Array) -> Arrays:
    return [(b.T, a.T)]


def _stack(b: Array, a: Array) -> Arrays:
    a = a.reshape(b.shape[0], b.shape[2], -1)
    return list(zip(b, a, strict=True))


class _Mlx(ConvertedFormat):
    """Folders of MLX-LM."""

    name = "mlx"
    title = "MLX-LM"
    files = FILES
    weights = WEIGHTS_FILE
    card_entries = ("library_name: mlx",)
    library = "mlx"
    rearranges = True

    def written_ranks(self, adapter: AdapterContent, profile: Profile) -> dict[str, WrittenRank]:
        del profile
        return with_one_scale(adapter, adapted_ranks(adapter))

    def keys(self, adapter: AdapterContent, names: Iterable[str]) -> dict[str, tuple[str, str]]:
        paths = {name: _path(adapter.modules[name]) for name in names}
        return {name: (f"{path}.lora_b", f"{path}.lora_a") for name, path in paths.items()}

    def carried(self, adapter: AdapterContent, names: Collection[str]) -> dict[str, Stored]:
        ends = f".{MAGNITUDE}"
        return {
            f"{key.removeprefix(PREFIX).removesuffix(ends)}.m": stored
            for key, stored in adapter.carried.items()
            if key.removeprefix(PREFIX).removesuffix(ends) in set(names)
        }

    def arranged(self, module: LoraModule, b: Array, a: Array) -> tuple[Array, Array]:
        if module.kind != "expert":
            return b.T, a.T
        out, copies = module.shape[0], module.copies
        return b.reshape(out, -1, copies).transpose(2, 0, 1), a.reshape(copies, -1, a.shape[1])

    def restored(self, module: LoraModule, b: Array, a: Array) -> tuple[Array, Array]:
        if module.kind != "expert":
            return b.T, a.T
        return b.transpose(1, 2, 0).reshape(module.shape[0], -1), a.reshape(-1, a.shape[-1])

    def settings_files(self, adapter: AdapterContent, profile: Profile) -> dict[str, str]:
        ranks = {name: entry.rank for name, entry in self.written_ranks(adapter, profile).items()}
        paths = [_path(adapter.modules[name]) for name in ranks]
        content = {
            "fine_tune_type": "dora" if adapter.carried else "lora",
            "lora_parameters": {
                "rank": max(ranks.values()),
                "scale": common_scale(adapter, ranks),
                "dropout": 0.0,
                "keys": sorted({match["rest"] if (match := _BLOCK.fullmatch(p)) else p for p in paths}),
            },
            "model": adapter.base_model,
            # All blocks: those without tensors keep a B of zeros.
            "num_layers": -1,
        }
        return {CONFIG_FILE: json.dumps(content, indent=4, sort_keys=True) + "\n"}


MLX = _Mlx()


def convertible(adapter: Adapter) -> Adapter:
    """Return an adapter in the form of MLX-LM.

    Raises
    ------
    ValueError
        If the format cannot hold the adapter.
    """
    split = expert_stacks.split_gate_and_up(expert_stacks.without_parameters(adapter))
    own = {layer_key(name, MAGNITUDE) for name in split.modules}
    refuse_carried(split, MLX.title, but=own)
    magnitudes = own & split.carried.keys()
    if magnitudes and len(magnitudes) < len(split.modules):
        raise ValueError(
            f"{adapter.label}: some modules have magnitudes of DoRA and some have none, which "
            "MLX-LM cannot hold"
        )
    for module in split.modules.values():
        if module.kind not in ("linear", "embedding", "expert"):
            raise ValueError(
                f"{adapter.label}: module {module.name!r}: MLX-LM has no adapters of its kind ({module.kind})"
            )
        if magnitudes and module.kind != "linear":
            raise ValueError(
                f"{adapter.label}: module {module.name!r}: the DoRA of MLX-LM and of PEFT differ for "
                f"{module.kind} layers"
            )
    return split


def _path(module: LoraModule) -> str:
    return module.name.replace(_EXPERTS, _SWITCH) if module.kind == "expert" else module.name
