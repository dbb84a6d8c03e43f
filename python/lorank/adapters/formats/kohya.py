"""Image adapters: the keys of kohya's scripts and of diffusers, in one `.safetensors` file."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorank._core import FormatError
from lorank._internal.json_files import parse_json
from lorank.adapters import carried as carried_tensors
from lorank.adapters import profiles
from lorank.adapters.certificate import Certificate
from lorank.adapters.content import AdapterContent, Profile
from lorank.adapters.formats import kohya_reading
from lorank.adapters.formats.base import AdapterFormat, AsStored, Place
from lorank.adapters.formats.base_weights import BaseWeights
from lorank.adapters.formats.diffusers_settings import KEY as SETTINGS_KEY
from lorank.adapters.formats.diffusers_settings import PartSettings
from lorank.adapters.formats.image_alphas import reads_whole_blocks, written_alphas
from lorank.adapters.formats.image_keys import alpha_key
from lorank.adapters.formats.image_style import ImageStyle
from lorank.adapters.metadata import CERTIFICATE_KEY, DIGEST_KEY, RANKS_KEY, SPECTRAL_KEY
from lorank.adapters.module import LoraModule
from lorank.adapters.profiles import EXACT, WrittenRank
from lorank.adapters.stored import Stored
from lorank.adapters.tensors import FileTensors
from lorank.peft_format.names import CONFIG_FILE
from lorank.peft_format.scaling import alpha_of
from lorank.sources import recognise

_WEIGHTS = "adapter.safetensors"
"""The name of the file if the caller gives only a folder."""

# Keys of metadata that describe the ranks, scales or bytes of the file that was read: not written again.
_STALE = re.compile(
    r"ss_network_(?:dim|alpha)|(?:lora_|network_)?(?:alpha|rank|dim)|sshs_\w+|modelspec\.hash_\w+"
    rf"|{'|'.join(map(re.escape, (SPECTRAL_KEY, RANKS_KEY, CERTIFICATE_KEY, DIGEST_KEY, SETTINGS_KEY)))}"
)


class _Kohya(AdapterFormat):
    """Image adapters' files."""

    name = "kohya"
    files = "image files"
    key_prefix = ""
    holds_settings = False
    rewrites_certificate = True
    certificate_place = CERTIFICATE_KEY
    card_entries = ()
    carried_remark = ""

    def read(self, path: Path, *, contradictions: bool, changed_base: bool) -> AsStored:
        del contradictions, changed_base
        file = path if path.is_file() else _only_safetensors(path)
        if file.suffix != ".safetensors":
            raise FormatError(f"{file}: is neither a PEFT folder nor a .safetensors file")
        tensors = FileTensors(file)
        recognise.check_adapter_tensors(tensors.label, tensors.shapes())
        adapter = kohya_reading.read(tensors)

        def with_base(base: BaseWeights) -> AdapterContent:
            return kohya_reading.with_kernels(adapter, base)

        return AsStored(adapter, tensors, with_base=with_base)

    def certificate(self, path: Path, metadata: Mapping[str, str]) -> Callable[[], Any] | None:
        del path
        text = metadata.get(CERTIFICATE_KEY, "")
        return (lambda: parse_json(text)) if text else None

    def place(self, target: Path) -> Place:
        if target.suffix == ".safetensors":
            return Place(target.parent, target.name, is_alone=True, address=target)
        return Place(target, _WEIGHTS, is_alone=False, address=target / _WEIGHTS)

    def member_name(self, name: str) -> str:
        return f"{name}.safetensors"

    def written_ranks(self, adapter: AdapterContent, profile: Profile) -> dict[str, WrittenRank]:
        written = profiles.written_ranks(adapter, profile, _needed(adapter))
        ranks = {name: entry.rank for name, entry in written.items()}
        if reads_whole_blocks(adapter.modules):
            ranks = {name: ranks.get(name, 1) for name in adapter.modules}
        if profile == EXACT:
            return {
                name: WrittenRank.unscaled(rank, adapter.modules[name].scaling)
                for name, rank in ranks.items()
            }
        alphas = written_alphas(_style(adapter), ranks)
        return {name: WrittenRank(rank, rank / alphas.get(name, rank)) for name, rank in ranks.items()}

    def keys(self, adapter: AdapterContent, names: Iterable[str]) -> dict[str, tuple[str, str]]:
        keys = _style(adapter).keys
        return {name: keys[name] for name in names}

    def alphas(self, adapter: AdapterContent, written: Mapping[str, WrittenRank]) -> dict[str, float]:
        if any(entry.keeps_scaling for entry in written.values()):
            return {alpha_key(name): alpha for name, alpha in _kept_alphas(adapter, written).items()}
        ranks = {name: entry.rank for name, entry in written.items()}
        return {alpha_key(name): alpha for name, alpha in written_alphas(_style(adapter), ranks).items()}

    def carried(self, adapter: AdapterContent, names: Collection[str]) -> dict[str, Stored]:
        del names
        return dict(adapter.carried)

    def metadata(
        self,
        adapter: AdapterContent,
        written: Mapping[str, WrittenRank],
        certificate: Certificate | None,
    ) -> dict[str, str]:
        style = _style(adapter)
        kept = {key: value for key, value in style.metadata.items() if not _STALE.fullmatch(key)}
        if style.settings.parts:
            ranks = {name: entry.rank for name, entry in written.items()}
            alphas = {
                name: alpha_of(entry.scaling(adapter.modules[name]), entry.rank, rank_stabilized=False)
                for name, entry in written.items()
                if entry.keeps_scaling
            }
            kept[SETTINGS_KEY] = style.settings.rewritten(ranks, alphas or ranks)
        if certificate:
            kept[CERTIFICATE_KEY] = certificate.to_text(adapter.notes)
        return kept

    def settings_files(self, adapter: AdapterContent, profile: Profile) -> dict[str, str]:
        del adapter, profile
        return {}

    def readers(self, profile: Profile) -> str:
        del profile
        return "programs that read the keys of kohya's scripts or diffusers"

    def carried_by_sum(self, adapter: AdapterContent, after: Collection[LoraModule]) -> dict[str, Stored]:
        del after
        return dict(adapter.carried)

    def adds_up(self, key: str) -> bool:
        return carried_tensors.is_added(key)

    def sum_fields(
        self, adapters: Sequence[AdapterContent], acting: Sequence[AdapterContent], *, ties_tables: bool
    ) -> dict[str, Any]:
        del acting, ties_tables
        return {"config": {}, "key_style": _summed_style([_style(adapter) for adapter in adapters])}


KOHYA = _Kohya()


def _kept_alphas(adapter: AdapterContent, written: Mapping[str, WrittenRank]) -> dict[str, float]:
    """Return the alphas of modules that keep their scalings; none if all scalings are 1."""
    style = _style(adapter)
    scalings = {
        name: entry.scaling(adapter.modules[name])
        for name, entry in written.items()
        if style.settings.part_of(name) is None
    }
    if not style.has_alphas and all(scaling == 1 for scaling in scalings.values()):
        return {}
    return {
        name: alpha_of(scaling, written[name].rank, rank_stabilized=False)
        for name, scaling in scalings.items()
    }


def _style(adapter: AdapterContent) -> ImageStyle:
    assert adapter.key_style is not None
    return adapter.key_style


def _only_safetensors(folder: Path) -> Path:
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if len(files) != 1:
        found = (
            "several .safetensors files: name one"
            if files
            else f"neither {CONFIG_FILE} nor a .safetensors file"
        )
        raise FormatError(f"{folder}: holds {found}")
    return files[0]


def _needed(adapter: AdapterContent) -> set[str]:
    """Return the modules with tensors other than factors: readers require factors in such modules."""
    names = adapter.modules.keys()
    others = {name for key in adapter.carried for name in carried_tensors.starts(key) if name in names}
    return carried_tensors.with_own_tensors(adapter) | others


def _summed_style(styles: Sequence[ImageStyle]) -> ImageStyle:
    """Return the key spelling of a sum of adapters; if they differ, the first adapter decides."""
    keys: dict[str, tuple[str, str]] = {}
    parts: dict[str, Mapping[str, Any]] = {}
    for style in reversed(styles):
        keys |= style.keys
        parts |= style.settings.parts
    settings = PartSettings(parts, {})
    # Diffusers takes settings for all parts or for none.
    if any(settings.part_of(name) is None for name in keys):
        settings = PartSettings({}, {})
    return ImageStyle(keys, {}, settings, has_alphas=any(style.has_alphas for style in styles))
