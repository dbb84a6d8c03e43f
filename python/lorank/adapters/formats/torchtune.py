"""Native adapters of torchtune: its names of modules, and the rows of queries and keys in its order.

The file holds no scale: `adapter_config.json` beside it does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

from lorank._core import FormatError
from lorank.adapters.content import Adapter, AdapterContent, Profile
from lorank.adapters.factors import TensorFactors
from lorank.adapters.formats import rotary
from lorank.adapters.formats.base import AsStored, Files
from lorank.adapters.formats.base_weights import BaseWeights
from lorank.adapters.formats.folder_form import ConvertedFormat, adapted_ranks, refuse_carried
from lorank.adapters.formats.one_scale import common_alpha, with_one_alpha
from lorank.adapters.formats.peft_notes import dora_note
from lorank.adapters.metadata import SPECTRAL_KEY
from lorank.adapters.module import LoraModule
from lorank.adapters.profiles import WrittenRank
from lorank.adapters.stored import Stored
from lorank.adapters.tensors import Tensors
from lorank.modules import naming
from lorank.peft_format.names import CONFIG_FILE, MAGNITUDE, WEIGHTS_FILE, layer_key
from lorank.peft_format.settings import Settings

FILES: Files = "torchtune files"

_KEY = re.compile(r"(?P<path>.+)\.(?P<part>lora_a\.weight|lora_b\.weight|magnitude)")

# The names of modules in torchtune, and in transformers.
_NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w3": "mlp.up_proj",
    "mlp.w2": "mlp.down_proj",
}
_HEADS = {"output": "lm_head"}
_TUNE_NAMES = {name: tune for tune, name in _NAMES.items()}
_BLOCK = re.compile(r"layers\.(?P<block>\d+)\.(?P<rest>.+)")

# The families whose rows of queries and keys torchtune orders as in Meta's checkpoints.
_PERMUTED = ("llama", "mistral", "gemma", "gemma2", "mllama")
_UNPERMUTED = ("qwen2", "qwen3", "phi3")


def is_native(tensors: Tensors) -> bool:
    """Return True for tensors with the keys of torchtune."""
    return any(key.endswith((".lora_a.weight", ".lora_b.weight")) for key in tensors.shapes())


def read(tensors: Tensors, config: Mapping[str, Any]) -> AsStored:
    """Read an adapter of torchtune as an adapter of PEFT.

    Raises
    ------
    FormatError
        If names, shapes or settings are not those of torchtune.
    """
    label = tensors.label
    for key in ("r", "lora_alpha"):
        if key not in config:
            raise FormatError(
                f"{label}: an adapter of torchtune holds no scale, and there is no {CONFIG_FILE} with {key}"
            )
    scaling = Settings(label, config)
    keys: dict[str, dict[str, str]] = {}
    for key in tensors.shapes():
        match = _KEY.fullmatch(key)
        if match is None:
            raise FormatError(f"{label}: tensor {key!r}: is no factor or magnitude of torchtune")
        keys.setdefault(_name(label, match["path"]), {})[match["part"]] = key
    modules = {
        name: _module(tensors, name, keys[name], scaling) for name in sorted(keys, key=naming.natural_key)
    }
    magnitudes = {
        layer_key(name, MAGNITUDE): tensors.stored(parts["magnitude"])
        for name, parts in keys.items()
        if "magnitude" in parts
    }
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "r": scaling.rank,
        "target_modules": list(modules),
        "task_type": "CAUSAL_LM",
        **({"use_dora": True} if magnitudes else {}),
    }
    notes = ["read from the native format of torchtune"]
    notes += [dora_note(len(magnitudes))] if magnitudes else []
    spectral = SPECTRAL_KEY in tensors.metadata
    adapter = AdapterContent(modules, settings, magnitudes, notes, label=label, is_spectral=spectral)

    def with_base(base: BaseWeights) -> AdapterContent:
        return reordered(adapter, base, neighbours=False)

    return AsStored(reordered(adapter, None, neighbours=False), tensors, files=FILES, with_base=with_base)


def reordered(adapter: Adapter, base: BaseWeights | None, *, neighbours: bool) -> Adapter:
    """Return an adapter with the rows of queries and keys in the other order, if the model's are permuted.

    Raises
    ------
    ValueError
        If torchtune has no such model.
    """
    family = str(base.config.get("model_type", "")) if base is not None else ""
    if base is not None and family not in (*_PERMUTED, *_UNPERMUTED):
        raise ValueError(f"{adapter.label}: torchtune has no model of the type {family!r} that lorank knows")
    if family in _UNPERMUTED:
        return adapter
    config = base.config if base is not None else {}
    modules = {
        name: rotary.reordered(adapter.label, module, config, neighbours=neighbours)
        if rotary.is_rotated(name)
        else module
        for name, module in adapter.modules.items()
    }
    carried = dict(adapter.carried)
    for name in filter(rotary.is_rotated, modules):
        key = layer_key(name, MAGNITUDE)
        if key in carried and (heads := rotary.heads_of(config, name)):
            order = rotary.to_neighbours if neighbours else rotary.to_halves
            values = carried[key].to_array()
            carried[key] = Stored(order(values.reshape(-1, 1), heads).reshape(-1), dtype=carried[key].dtype)
    return replace(adapter, modules=modules, carried=carried)


def _name(label: str, path: str) -> str:
    match = _BLOCK.fullmatch(path)
    if match and match["rest"] in _NAMES:
        return f"model.layers.{match['block']}.{_NAMES[match['rest']]}"
    if path in _HEADS:
        return _HEADS[path]
    raise FormatError(f"{label}: module {path!r}: is no module of torchtune's decoders that lorank knows")


def _tune_name(label: str, name: str) -> str:
    match = _BLOCK.fullmatch(name.removeprefix("model."))
    if match and name.startswith("model.") and match["rest"] in _TUNE_NAMES:
        return f"layers.{match['block']}.{_TUNE_NAMES[match['rest']]}"
    if name == "lm_head":
        return "output"
    raise ValueError(f"{label}: module {name!r}: torchtune has no name for it")


def _module(tensors: Tensors, name: str, parts: Mapping[str, str], settings: Settings) -> LoraModule:
    def fail(reason: str) -> NoReturn:
        raise FormatError(f"{tensors.label}: module {name!r}: {reason}")

    for part in ("lora_a.weight", "lora_b.weight"):
        if part not in parts:
            fail(f"has no {part}")
    shapes = tensors.shapes()
    a, b = shapes[parts["lora_a.weight"]], shapes[parts["lora_b.weight"]]
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in (*a, *b):
        fail(f"factors of shapes {list(b)} and {list(a)} do not fit each other")
    stored = TensorFactors(tensors, parts["lora_b.weight"], parts["lora_a.weight"], (b[0], a[1]), a[0])
    # torchtune divides alpha by the rank of the settings, which is that of all tensors.
    if a[0] != settings.rank:
        fail(f"has rank {a[0]}, but the settings state {settings.rank}")
    scaling = settings.alpha / settings.rank
    return LoraModule(name, "linear", stored.shape, a[0], scaling, tensors.dtype(stored.b_key), stored)


class _Torchtune(ConvertedFormat):
    """Folders with a native adapter of torchtune."""

    name = "torchtune"
    title = "torchtune"
    files = FILES
    weights = WEIGHTS_FILE

    def written_ranks(self, adapter: AdapterContent, profile: Profile) -> dict[str, WrittenRank]:
        del profile
        largest = max(adapted_ranks(adapter).values())
        return with_one_alpha(adapter, dict.fromkeys(adapted_ranks(adapter), largest))

    def keys(self, adapter: AdapterContent, names: Iterable[str]) -> dict[str, tuple[str, str]]:
        paths = {name: _tune_name(adapter.label, name) for name in names}
        return {name: (f"{path}.lora_b.weight", f"{path}.lora_a.weight") for name, path in paths.items()}

    def carried(self, adapter: AdapterContent, names: Collection[str]) -> dict[str, Stored]:
        keys = {layer_key(name, MAGNITUDE): f"{_tune_name(adapter.label, name)}.magnitude" for name in names}
        return {keys[key]: stored for key, stored in adapter.carried.items() if key in keys}

    def settings_files(self, adapter: AdapterContent, profile: Profile) -> dict[str, str]:
        ranks = {name: entry.rank for name, entry in self.written_ranks(adapter, profile).items()}
        content = {
            "peft_type": "LORA",
            "base_model_name_or_path": adapter.base_model,
            "r": max(ranks.values()),
            "lora_alpha": common_alpha(adapter, ranks),
            "target_modules": sorted({_tune_name(adapter.label, n).rpartition(".")[2] for n in ranks}),
        }
        return {CONFIG_FILE: json.dumps(content, indent=2, sort_keys=True) + "\n"}


TORCHTUNE = _Torchtune()


def convertible(adapter: Adapter, base: BaseWeights | None) -> Adapter:
    """Return an adapter in the form of torchtune.

    Raises
    ------
    ValueError
        If the base model is needed and not given, or torchtune cannot hold the adapter.
    """
    refuse_carried(adapter, TORCHTUNE.title, but=[layer_key(name, MAGNITUDE) for name in adapter.modules])
    for name, module in adapter.modules.items():
        if module.kind != "linear":
            raise ValueError(f"{adapter.label}: module {name!r}: torchtune adapts linear layers only")
        _tune_name(adapter.label, name)
    if base is None and any(map(rotary.is_rotated, adapter.modules)):
        raise ValueError(
            f"{adapter.label}: torchtune permutes the rows of queries and keys within heads: name the "
            "base model (--base), whose configuration gives their number"
        )
    return reordered(adapter, base, neighbours=True) if base is not None else adapter
