"""PEFT's format: a folder with `adapter_config.json` and a file of tensors."""

from __future__ import annotations

# ruff: noqa: D102  # The base class documents the methods.
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from lorank._core import FormatError
from lorank._internal.json_files import read_json
from lorank.adapters import carried as carried_tensors
from lorank.adapters import profiles
from lorank.adapters.certificate import Certificate
from lorank.adapters.content import AdapterContent, Format, Profile
from lorank.adapters.formats import peft_keys, peft_reading, peft_settings, product_reading, torchtune
from lorank.adapters.formats.base import AdapterFormat, AsStored, Place
from lorank.adapters.formats.expert_tensors import ExpertTensors
from lorank.adapters.formats.key_wrappers import Unwrapped
from lorank.adapters.metadata import CERTIFICATE_FILE
from lorank.adapters.module import LoraModule
from lorank.adapters.profiles import EXACT, WrittenRank
from lorank.adapters.stored import Stored
from lorank.adapters.tensors import ArrayTensors, FileTensors, Tensors
from lorank.peft_format import config_file, nesting
from lorank.peft_format.merged_settings import merged
from lorank.peft_format.names import (
    BASE_WEIGHT,
    CONFIG_FILE,
    PICKLED_WEIGHTS_FILE,
    PREFIX,
    WEIGHTS_FILE,
    is_in_layer,
    layer_path,
)
from lorank.peft_format.scaling import alpha_of
from lorank.peft_format.validation import kind_of
from lorank.sources import recognise

_READERS = {
    "compact": "PEFT and vLLM 0.32 or later",
    "exact": "PEFT and vLLM 0.32 or later",
    "portable": "PEFT, vLLM, SGLang, LoRAX, llama.cpp and TensorRT-LLM",
    "tensor-rank": "PEFT, vLLM 0.32 or later, llama.cpp and TensorRT-LLM",
}

# A save replaces both files within milliseconds.
_TRIES = 100


class PeftFormat(AdapterFormat):
    """PEFT's folders."""

    name: ClassVar[Format] = "peft"
    files = "folders"
    key_prefix = PREFIX
    holds_settings = True
    rewrites_certificate = False
    certificate_place = CERTIFICATE_FILE
    card_entries = ("library_name: peft",)
    carried_remark = (
        "The adapter also holds saved modules, biases or magnitudes, which some of these programs do not "
        "load: `lorank check` shows which programs load them."
    )

    def read(self, path: Path, *, contradictions: bool, changed_base: bool) -> AsStored:
        config, tensors = _saved_together(path)
        if torchtune.is_native(tensors):
            return torchtune.read(tensors, config)
        if kind_of(config) in product_reading.KINDS:
            return product_reading.read_peft(tensors, config)
        unwrapped = Unwrapped.of(tensors, config.get("target_modules"))
        experts = ExpertTensors.of(unwrapped.tensors)
        if experts.keys and not any(".lora_" in key for key in experts.others.shapes()):
            reading = peft_reading.Reading(AdapterContent({}, dict(config), label=str(path)))
        else:
            reading = peft_reading.read_all(
                experts.others, config, contradictions=contradictions, changed_base=changed_base
            )
        notes = [*([unwrapped.note()] if unwrapped.wrappers else []), *reading.adapter.notes]
        adapter = replace(reading.adapter, label=str(path), notes=notes)
        if experts.keys:
            adapter = experts.added_to(adapter, config)
            return AsStored(
                adapter, unwrapped.tensors, unwrapped.wrappers, unwrapped.stored_as, files="other"
            )
        return AsStored(
            adapter, unwrapped.tensors, unwrapped.wrappers, unwrapped.stored_as, tuple(reading.swapped)
        )

    def certificate(self, path: Path, metadata: Mapping[str, str]) -> Callable[[], Any] | None:
        del metadata
        file = path / CERTIFICATE_FILE
        return (lambda: read_json(file)) if file.is_file() else None

    def place(self, target: Path) -> Place:
        if target.suffix == ".safetensors":
            raise ValueError(f"{target}: a PEFT adapter is a folder with settings and factors: name a folder")
        return Place(target, WEIGHTS_FILE, is_alone=False, address=target)

    def member_name(self, name: str) -> str:
        return name

    def written_ranks(self, adapter: AdapterContent, profile: Profile) -> dict[str, WrittenRank]:
        return profiles.written_ranks(adapter, profile, _needed(adapter))

    def keys(self, adapter: AdapterContent, names: Iterable[str]) -> dict[str, tuple[str, str]]:
        return peft_keys.factor_keys([adapter.modules[name] for name in names])

    def alphas(self, adapter: AdapterContent, written: Mapping[str, WrittenRank]) -> dict[str, float]:
        del adapter, written
        return {}

    def carried(self, adapter: AdapterContent, names: Collection[str]) -> dict[str, Stored]:
        after = [module for name, module in adapter.modules.items() if name in names]
        kept = {key: x for key, x in adapter.carried.items() if not _lost_its_layer(key, adapter, names)}
        return nesting.respelled(kept, adapter.modules.values(), after)

    def metadata(
        self,
        adapter: AdapterContent,
        written: Mapping[str, WrittenRank],
        certificate: Certificate | None,
    ) -> dict[str, str]:
        del adapter, written, certificate
        return {}

    def settings(self, adapter: AdapterContent, profile: Profile) -> dict[str, Any]:
        """Return the content of `adapter_config.json` for an adapter in a profile."""
        written = self.written_ranks(adapter, profile)
        ranks = {name: entry.rank for name, entry in written.items()}
        return peft_settings.settings(adapter, ranks, _alphas(adapter, written, profile))

    def settings_files(self, adapter: AdapterContent, profile: Profile) -> dict[str, str]:
        content = self.settings(adapter, profile)
        return {CONFIG_FILE: json.dumps(content, indent=2, sort_keys=True) + "\n"}

    def readers(self, profile: Profile) -> str:
        return _READERS[profile]

    def carried_by_sum(self, adapter: AdapterContent, after: Collection[LoraModule]) -> dict[str, Stored]:
        return nesting.respelled(adapter.carried, adapter.modules.values(), after)

    def adds_up(self, key: str) -> bool:
        del key
        return False

    def sum_fields(
        self, adapters: Sequence[AdapterContent], acting: Sequence[AdapterContent], *, ties_tables: bool
    ) -> dict[str, Any]:
        del adapters
        config = merged([(adapter.label, adapter.config) for adapter in acting])
        return {"config": config | ({"ensure_weight_tying": True} if ties_tables else {})}


PEFT = PeftFormat()


def _saved_together(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """Read settings and factors, again if another process has replaced them meanwhile."""
    for _ in range(_TRIES):
        before = _identities(folder)
        config, tensors = config_file.read(folder / CONFIG_FILE), _weights(folder)
        if _identities(folder) == before:
            return config, tensors
    raise FormatError(f"{folder}: the adapter changed while it was read: load it again")


def _identities(folder: Path) -> list[tuple[int, ...] | None]:
    """Return device, inode, time and size of both files, which must belong together; None for no file."""
    found: list[tuple[int, ...] | None] = []
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        file = folder / name
        stat = file.stat() if file.exists() else None
        found.append(stat and (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return found


def _weights(folder: Path) -> Tensors:
    if (folder / WEIGHTS_FILE).exists():
        return FileTensors(folder / WEIGHTS_FILE)
    pickled = folder / PICKLED_WEIGHTS_FILE
    if pickled.exists():
        from lorank.sources.torch_files import read_tensors  # Slow to import, and rarely needed.

        return ArrayTensors(read_tensors(pickled), str(pickled))
    if reason := recognise.other_adapter(folder, config_file.read(folder / CONFIG_FILE)):
        raise FormatError(reason)
    raise FormatError(f"{folder}: holds {CONFIG_FILE}, but neither {WEIGHTS_FILE} nor {PICKLED_WEIGHTS_FILE}")


def _alphas(
    adapter: AdapterContent, written: Mapping[str, WrittenRank], profile: Profile
) -> dict[str, float]:
    """Return the alphas of all modules; empty if one alpha holds for all ranks."""
    if profile not in ("compact", EXACT):
        return {}
    return {
        name: alpha_of(entry.scaling(adapter.modules[name]), entry.rank, rank_stabilized=False)
        for name, entry in written.items()
    }


def _needed(adapter: AdapterContent) -> set[str]:
    """Return the modules whose layer is needed even at rank 0.

    These are modules with tensors of their own, modules that contain another adapted module (whose name
    includes the outer layer), and modules whose base weight is saved: vLLM and llama.cpp skip
    ``X.base_layer.weight`` and refuse ``X.weight``.
    """
    layers = {
        key.removeprefix(PREFIX).removesuffix(BASE_WEIGHT)
        for key in adapter.carried
        if key.endswith(BASE_WEIGHT)
    }
    layers.update(outer for module in adapter.adapted for outer in nesting.around(module.name))
    wrapping = {name for name, module in adapter.modules.items() if nesting.wrapped(module) in layers}
    return carried_tensors.with_own_tensors(adapter) | wrapping


def _lost_its_layer(key: str, adapter: AdapterContent, names: Collection[str]) -> bool:
    """Return True for a tensor of a layer that is not written."""
    name = layer_path(key)
    return is_in_layer(key) and name in adapter.modules and name not in names
