"""What every runtime makes of an adapter's files: which load it right, wrong, or not at all.

Each runtime multiplies ``B A`` by a scale of its own formula; the right one is PEFT's,
``alpha_l / r_l`` with the patterns. Known as of October 2026.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorank import naming
from lorank.adapters.adapter import LoraAdapter, Profile
from lorank.adapters.module import LoraModule
from lorank.adapters.peft_format import without_magnitude
from lorank.adapters.reading import CONFIG, read_as_stored, read_config

Status = Literal["right", "wrong", "refuses"]

_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one runtime does with an adapter.

    Attributes
    ----------
    runtime
        Its name and version.
    status
        ``"right"``, ``"wrong"`` (loads, and computes something else) or ``"refuses"``.
    reason
        Why, in a line; what to know, where it is right.
    factors
        Smallest and largest ratio of the scale that it applies to the right one; None if it loads none.
    """

    runtime: str
    status: Status
    reason: str = ""
    factors: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class _Adapter:
    """An adapter and what the formulas look at."""

    adapter: LoraAdapter
    config: Mapping[str, Any]

    @property
    def modules(self) -> list[LoraModule]:
        return self.adapter.adapted

    @property
    def rank(self) -> float:
        return float(self.config.get("r", 8))

    @property
    def alpha(self) -> float:
        return float(self.config.get("lora_alpha", 8))

    @property
    def rank_stabilized(self) -> bool:
        return bool(self.config.get("use_rslora"))

    @property
    def dora(self) -> bool:
        return bool(self.config.get("use_dora"))

    @property
    def extra_weights(self) -> list[str]:
        return [key for key in self.adapter.carried if "lora_magnitude_vector" not in key]

    def mixed_ranks(self) -> list[LoraModule]:
        """Modules whose tensors have another rank than the settings' one."""
        return [module for module in self.modules if module.rank != self.rank]

    def only_linear(self) -> list[LoraModule]:
        """Modules that are no plain linear layers."""
        return [module for module in self.modules if module.kind != "linear"]


def _global_scale(a: _Adapter, module: LoraModule) -> float:
    del module
    return a.alpha / a.rank


def _global_or_stabilized(a: _Adapter, module: LoraModule) -> float:
    del module
    return a.alpha / (math.sqrt(a.rank) if a.rank_stabilized else a.rank)


def _by_tensor(a: _Adapter, module: LoraModule) -> float:
    return a.alpha / module.rank


def _as_peft(a: _Adapter, module: LoraModule) -> float:
    del a
    return module.scaling


Refusal = Callable[[_Adapter], str]


def _nothing(a: _Adapter) -> str:
    del a
    return ""


def _vllm(a: _Adapter) -> str:
    if a.dora:
        return "DoRA is not supported"
    if a.config.get("modules_to_save"):
        return f"modules_to_save is not supported: {', '.join(a.config['modules_to_save'])}"
    if a.config.get("bias", "none") != "none":
        return f"bias={a.config['bias']!r} is not supported"
    return ""


def _sglang(a: _Adapter) -> str:
    if isinstance(a.config.get("target_modules"), str):
        return "target_modules is a regular expression: it wants a list"
    if mixed := a.mixed_ranks():
        return f"{len(mixed)} modules have another rank than r = {a.rank:g}, the first is {mixed[0].name}"
    if incomplete := _incomplete_attention(a.modules):
        return f"wants q_proj, k_proj and v_proj together: {incomplete} lacks one"
    return _plain_only(a)


def _lorax(a: _Adapter) -> str:
    if mixed := a.mixed_ranks():
        return f"stacks layers, which need one rank: {len(mixed)} modules differ from r = {a.rank:g}"
    return _plain_only(a)


def _plain_only(a: _Adapter) -> str:
    if other := a.only_linear():
        return f"{other[0].name} is no plain linear layer ({other[0].kind})"
    return "DoRA is not supported" if a.dora else ""


def _incomplete_attention(modules: Sequence[LoraModule]) -> str | None:
    by_parent: dict[str, set[str]] = defaultdict(set)
    for module in modules:
        parent, _, last = module.name.rpartition(".")
        if last in ("q_proj", "k_proj", "v_proj"):
            by_parent[parent].add(last)
    return next((parent for parent, found in by_parent.items() if len(found) < 3), None)


def _missing_types(modules: Sequence[LoraModule]) -> list[str]:
    """Module types that some blocks adapt and others do not."""
    by_type: dict[str, set[str]] = defaultdict(set)
    for module in modules:
        block = naming.block_of(module.name)
        if block != module.name:
            by_type[module.name[len(block) + 1 :]].add(block)
    blocks = set().union(*by_type.values()) if by_type else set()
    return [kind for kind, found in by_type.items() if len(found) < len(blocks)]


@dataclass(frozen=True, slots=True)
class _Runtime:
    name: str
    scale: Callable[[_Adapter, LoraModule], float]
    refuses: Refusal
    ignores_extra_weights: bool = True
    drops_incomplete_types: bool = False
    remark: Callable[[_Adapter], str] = _nothing


def _hotswap(a: _Adapter) -> str:
    if a.config.get("alpha_pattern"):
        return "alpha_pattern must equal that of the adapter it replaces: only the portable profile is safe"
    return ""


def _hotswap_remark(a: _Adapter) -> str:
    del a
    return "if the adapter that it replaces adapts the same modules"


RUNTIMES: dict[str, _Runtime] = {
    "peft": _Runtime("PEFT 0.21", _as_peft, _nothing, ignores_extra_weights=False),
    "peft-hotswap": _Runtime(
        "PEFT hotswap_adapter",
        _global_or_stabilized,
        _hotswap,
        ignores_extra_weights=False,
        remark=_hotswap_remark,
    ),
    "vllm": _Runtime("vLLM 0.32 and later", _as_peft, _vllm),
    "vllm-old": _Runtime("vLLM up to 0.31", _global_or_stabilized, _vllm),
    "sglang": _Runtime("SGLang 0.5", _global_scale, _sglang),
    "lorax": _Runtime("LoRAX", _global_scale, _lorax, drops_incomplete_types=True),
    "llama.cpp": _Runtime("llama.cpp", _by_tensor, _plain_only),
    "tensorrt-llm": _Runtime("TensorRT-LLM", _by_tensor, _plain_only),
}


def check(folder: str | Path, runtimes: Sequence[str] | None = None) -> list[Verdict]:
    """What every runtime does with a PEFT adapter.

    Parameters
    ----------
    folder
        A PEFT adapter folder. Nothing is decomposed; only headers and settings are read.
    runtimes
        Some of `RUNTIMES`' names (default: all).

    Returns
    -------
    list of Verdict
        In the order of `RUNTIMES`.

    Raises
    ------
    FormatError, OSError
        If the adapter cannot be read: no runtime loads it then.
    ValueError
        For an unknown runtime.
    """
    wanted = list(RUNTIMES) if runtimes is None else list(runtimes)
    if unknown := [name for name in wanted if name not in RUNTIMES]:
        raise ValueError(f"no runtime {unknown[0]!r}: choose among {', '.join(RUNTIMES)}")
    adapter = read_as_stored(folder)
    if adapter.format != "peft":
        raise ValueError(f"{folder}: only PEFT adapters can be checked, not the keys of kohya or diffusers")
    seen = _Adapter(adapter, read_config(Path(folder).expanduser() / CONFIG))
    return [_verdict(RUNTIMES[name], seen) for name in RUNTIMES if name in wanted]


def _verdict(runtime: _Runtime, a: _Adapter) -> Verdict:
    if refusal := runtime.refuses(a):
        return Verdict(runtime.name, "refuses", refusal)
    ratios = [runtime.scale(a, module) / module.scaling for module in a.modules if module.scaling]
    factors = (min(ratios, default=1.0), max(ratios, default=1.0))
    reasons = []
    if max(abs(factors[0] - 1), abs(factors[1] - 1)) > _TOLERANCE:
        reasons.append(_scaled(factors))
    if without := without_magnitude(a.config, a.adapter.carried, a.adapter.modules):
        reasons.append(f"starts the DoRA magnitudes of {len(without)} modules anew, as the file lacks them")
    if runtime.drops_incomplete_types and (missing := _missing_types(a.modules)):
        reasons.append(f"drops {missing[0]} everywhere, as some layers have no adapter there")
    if runtime.ignores_extra_weights and (extra := a.extra_weights):
        reasons.append(f"leaves out {len(extra)} trained tensors that are no factors, such as {extra[0]}")
    if reasons:
        return Verdict(runtime.name, "wrong", "; ".join(reasons), factors)
    return Verdict(runtime.name, "right", runtime.remark(a), factors)


def _scaled(factors: tuple[float, float]) -> str:
    low, high = factors
    if high - low <= _TOLERANCE * high:
        return f"scales every update by {high:.4g}"
    return f"scales updates by {low:.4g} to {high:.4g}"


def right_profile(runtimes: Sequence[str] | None = None) -> Profile:
    """The first of the three profiles that, by the table of scales, every one of the runtimes loads right."""
    wanted = set(RUNTIMES if runtimes is None else runtimes)
    if wanted <= {"peft", "vllm"}:
        return "compact"
    return "tensor-rank" if wanted <= {"peft", "vllm", "llama.cpp", "tensorrt-llm"} else "portable"
