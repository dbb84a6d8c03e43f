"""Adapters of llama.cpp: one GGUF file.

A is ``(r, in)`` and B is ``(out, r)``; stacks have the number of the expert first, and A of the token
embedding is transposed. The scale of a tensor is alpha divided by its rank, or 1 if alpha is 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from lorank._core import FormatError
from lorank._internal.short_text import shown
from lorank.adapters.certificate import Certificate
from lorank.adapters.content import Adapter, AdapterContent, Profile
from lorank.adapters.formats import expert_stacks, gguf_tensors, rotary
from lorank.adapters.formats.base import Array, AsStored, Files, Place, WrittenTensor
from lorank.adapters.formats.base_weights import BaseWeights
from lorank.adapters.formats.derived_factors import Arrays
from lorank.adapters.formats.folder_form import ConvertedFormat, adapted_ranks, refuse_carried
from lorank.adapters.formats.gguf_names import Names, architecture_of, blocks_in, is_permuted
from lorank.adapters.formats.gguf_tensors import GgufTensors
from lorank.adapters.formats.one_scale import common_alpha, with_one_alpha
from lorank.adapters.formats.stored_arrays import ArrayFactors
from lorank.adapters.module import LoraModule
from lorank.adapters.profiles import WrittenRank
from lorank.adapters.tensors import Tensors
from lorank.modules import naming
from lorank.modules.weight import Kind

FILES: Files = "GGUF files"

_KEY = re.compile(r"(?P<tensor>.+)\.(?P<part>lora_[ab])")
_EMBEDDING = "token_embd.weight"
_ARCHITECTURE, _TYPE, _KIND = "general.architecture", "general.type", "adapter.type"
_ALPHA, _TOKENS = "adapter.lora.alpha", "adapter.alora.invocation_tokens"

# Entries of `config` that hold what a GGUF file needs and the adapter's other settings lack.
_ARCHITECTURE_SETTING = "gguf_architecture"


def read(path: Path) -> AsStored:
    """Read an adapter of llama.cpp as an adapter of PEFT.

    Raises
    ------
    FormatError
        If the file is damaged, or holds a model.
    ImportError
        If the package `gguf` is not installed.
    """
    tensors = GgufTensors(path)
    if tensors.field(_TYPE) != "adapter":
        raise FormatError(f"{path}: {_TYPE} is {shown(tensors.field(_TYPE))}: the file is no adapter")
    if tensors.field(_KIND) != "lora":
        raise FormatError(f"{path}: {_KIND} is {shown(tensors.field(_KIND))}: only lora can be read")
    alpha = tensors.field(_ALPHA)
    if not isinstance(alpha, (int, float)) or not np.isfinite(alpha):
        raise FormatError(f"{path}: {_ALPHA} is {shown(alpha)}: an adapter of llama.cpp needs it")
    keys: dict[str, dict[str, str]] = {}
    for key in tensors.shapes():
        match = _KEY.fullmatch(key)
        if match is None:
            raise FormatError(f"{path}: tensor {key!r}: is no factor (lora_a, lora_b): only LoRA can be read")
        keys.setdefault(match["tensor"], {})[match["part"]] = key
    if not keys:
        raise FormatError(f"{path}: holds no LoRA factors (lora_a, lora_b)")
    architecture = str(tensors.field(_ARCHITECTURE))

    def with_base(base: BaseWeights | None) -> AdapterContent:
        return _adapter(tensors, keys, float(alpha), architecture, base)

    return AsStored(with_base(None), tensors, files=FILES, with_base=with_base)


def _adapter(
    tensors: GgufTensors,
    keys: Mapping[str, Mapping[str, str]],
    alpha: float,
    architecture: str,
    base: BaseWeights | None,
) -> AdapterContent:
    names = Names(architecture, blocks_in(keys))
    known = names.modules(base)
    modules = {}
    for tensor, parts in keys.items():
        name = known.get(tensor) or names.usual(tensor)
        if name is None:
            raise FormatError(
                f"{tensors.label}: tensor {tensor!r}: {architecture!r} has no module of that name that "
                "lorank knows: name the base model (lorank convert --base MODEL)"
            )
        module = _module(tensors, name, tensor, parts, alpha)
        if is_permuted(architecture) and rotary.is_rotated(name):
            config = base.config if base is not None else {}
            module = rotary.reordered(tensors.label, module, config, neighbours=False)
        modules[name] = module
    ordered = {name: modules[name] for name in sorted(modules, key=naming.natural_key)}
    tokens = tensors.field(_TOKENS)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base.label if base is not None else None,
        "task_type": "CAUSAL_LM",
        "target_modules": [name for name, module in ordered.items() if module.kind != "expert"],
        **({"alora_invocation_tokens": [int(token) for token in tokens]} if tokens else {}),
    }
    notes = ["read from the format of llama.cpp"]
    if base is None:
        notes.append("names of modules are those of most decoders, because the base model was not named")
    adapter = AdapterContent(ordered, config, notes=notes, label=tensors.label)
    return expert_stacks.stacked(adapter)


def _module(
    tensors: GgufTensors, name: str, tensor: str, parts: Mapping[str, str], alpha: float
) -> LoraModule:
    def fail(reason: str) -> NoReturn:
        raise FormatError(f"{tensors.label}: tensor {tensor!r}: {reason}")

    for part in ("lora_a", "lora_b"):
        if part not in parts:
            fail(f"has no {part}")
    shapes = tensors.shapes()
    a, b = shapes[parts["lora_a"]], shapes[parts["lora_b"]]
    is_embedding = tensor == _EMBEDDING
    a_sides = a[:-2] + (a[:-3:-1] if is_embedding else a[-2:])
    if len(a) != len(b) or len(b) not in (2, 3) or a_sides[-2] != b[-1] or a[:-2] != b[:-2] or 0 in (*a, *b):
        fail(f"factors of shapes {list(b)} and {list(a)} do not fit each other")
    rank, copies = b[-1], b[0] if len(b) == 3 else 1
    kind: Kind = "embedding" if is_embedding else "expert" if len(b) == 3 else "linear"
    factors = ArrayFactors(
        tensors,
        parts["lora_b"],
        parts["lora_a"],
        _turned if is_embedding else _plain if len(b) == 2 else _stack,
    )
    shape = (b[-2], a_sides[-1])
    scaling = alpha / rank if alpha else 1.0
    dtype = tensors.dtype(parts["lora_b"])
    return LoraModule(name, kind, shape, rank, scaling, dtype, factors, copies)


def _plain(b: Array, a: Array) -> Arrays:
    return [(b, a)]


def _turned(b: Array, a: Array) -> Arrays:
    return [(b, a.T)]


def _stack(b: Array, a: Array) -> Arrays:
    return list(zip(b, a, strict=True))


class _Gguf(ConvertedFormat):
    """GGUF files of llama.cpp."""

    name = "gguf"
    title = "llama.cpp"
    files = FILES
    weights = "adapter.gguf"
    rearranges = True

    def certificate(self, path: Path, metadata: Mapping[str, str]) -> Callable[[], Any] | None:
        del path, metadata
        return None

    def place(self, target: Path) -> Place:
        if target.suffix != ".gguf":
            raise ValueError(f"{target}: an adapter of llama.cpp is a file: name a file that ends with .gguf")
        return Place(target.parent, target.name, is_alone=True, address=target)

    def member_name(self, name: str) -> str:
        return f"{name}.gguf"

    def written_ranks(self, adapter: AdapterContent, profile: Profile) -> dict[str, WrittenRank]:
        del profile
        return with_one_alpha(adapter, adapted_ranks(adapter))

    def keys(self, adapter: AdapterContent, names: Iterable[str]) -> dict[str, tuple[str, str]]:
        names = list(names)
        table = Names(str(adapter.config.get(_ARCHITECTURE_SETTING)), blocks_in(names))
        found = {}
        for name in names:
            tensor = table.tensor(name)
            if tensor is None:
                raise ValueError(f"{adapter.label}: module {name!r}: llama.cpp has no name for it")
            found[name] = (f"{tensor}.lora_b", f"{tensor}.lora_a")
        return found

    def metadata(
        self,
        adapter: AdapterContent,
        written: Mapping[str, WrittenRank],
        certificate: Certificate | None,
    ) -> dict[str, str]:
        del certificate
        fields = {
            _KIND: "lora",
            _ALPHA: common_alpha(adapter, {name: entry.rank for name, entry in written.items()}),
            _TOKENS: adapter.config.get("alora_invocation_tokens"),
        }
        return {
            _ARCHITECTURE: str(adapter.config[_ARCHITECTURE_SETTING]),
            **{name: json.dumps(value) for name, value in fields.items() if value},
        }

    def write(
        self,
        file: Path,
        tensors: list[WrittenTensor],
        metadata: Mapping[str, str],
        threads: int,
        seal: tuple[str, bytes],
    ) -> str:
        del threads, seal
        fields = {name: json.loads(metadata[name]) for name in (_KIND, _ALPHA, _TOKENS) if name in metadata}
        fields[_ALPHA] = float(fields[_ALPHA])
        gguf_tensors.write(file, tensors, metadata[_ARCHITECTURE], fields)
        return ""

    def open(self, file: Path) -> Tensors:
        return GgufTensors(file)

    def arranged(self, module: LoraModule, b: Array, a: Array) -> tuple[Array, Array]:
        if module.kind == "embedding":
            return b, a.T
        if module.kind != "expert":
            return b, a
        out, copies = module.shape[0], module.copies
        return b.reshape(out, -1, copies).transpose(2, 0, 1), a.reshape(copies, -1, a.shape[1])

    def restored(self, module: LoraModule, b: Array, a: Array) -> tuple[Array, Array]:
        if module.kind == "embedding":
            return b, a.T
        if module.kind != "expert":
            return b, a
        return b.transpose(1, 2, 0).reshape(module.shape[0], -1), a.reshape(-1, a.shape[-1])

    def settings_files(self, adapter: AdapterContent, profile: Profile) -> dict[str, str]:
        del adapter, profile
        return {}


GGUF = _Gguf()


def convertible(adapter: Adapter, base: BaseWeights | None) -> Adapter:
    """Return an adapter in the form of llama.cpp.

    Raises
    ------
    ValueError
        If the base model is not given, or llama.cpp cannot hold the adapter.
    """
    gguf_tensors.package()
    if base is None:
        raise ValueError(
            f"{adapter.label}: a GGUF file names the architecture of the base model: name the model (--base)"
        )
    architecture = architecture_of(base.config)
    refuse_carried(adapter, GGUF.title)
    split = expert_stacks.split_gate_and_up(expert_stacks.without_parameters(expert_stacks.stacked(adapter)))
    modules = {}
    for name, module in split.modules.items():
        if module.kind not in ("linear", "embedding", "expert"):
            raise ValueError(f"{adapter.label}: module {name!r}: llama.cpp adapts no {module.kind} layers")
        if base.config.get("tie_word_embeddings") and name.endswith(("embed_tokens", "lm_head")):
            raise ValueError(
                f"{adapter.label}: module {name!r}: is tied in the base model: llama.cpp does not load "
                "its factors"
            )
        if is_permuted(architecture) and rotary.is_rotated(name):
            module = rotary.reordered(adapter.label, module, base.config, neighbours=True)
        modules[name] = module
    config = {**split.config, _ARCHITECTURE_SETTING: architecture}
    return replace(split, modules=modules, config=config)
