"""The rules of a runtime, and those that several runtimes share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from lorank.adapters.content import Profile
from lorank.adapters.module import LoraModule
from lorank.peft_format.names import PREFIX, layer_path
from lorank.peft_format.scaling import divisor
from lorank.runtimes.found import Found

Unknown = Literal["ignores", "refuses"]
"""A loader's treatment of keys that name no module of the model."""

Scale = Callable[[Found, LoraModule], float]
Refuses = Callable[[Found], str]
Loses = Callable[[Found], Iterable[str]]


def nothing(a: Found) -> Iterable[str]:
    """Lose nothing."""
    del a
    return ()


def no_remark(a: Found) -> str:
    """Return an empty remark."""
    del a
    return ""


def any_form(a: Found) -> str:
    """Refuse nothing."""
    del a
    return ""


@dataclass(frozen=True, slots=True)
class Runtime:
    """One runtime's rules.

    Attributes
    ----------
    name
        Its name.
    version
        The version that the rules were read from.
    scale
        The factor by which it multiplies a module's update; 0 if it leaves the module out.
    refuses
        The reason why it does not load the adapter; empty if it does.
    loses
        The parts of the adapter that it silently leaves out or computes otherwise.
    remark
        A remark on an adapter that it loads right.
    profiles
        Those of lorank's profiles that it loads right.
    unknown
        Its treatment of keys that name no module of the model.
    by_suffix
        True if it finds a module by the end of its key, so that names at the front do no harm.
    needs_prefix
        True if it finds no key without the prefix `base_model.model.`.
    reads
        The files that it reads: PEFT's folders, image adapters' files, or neither.
    """

    name: str
    version: str
    scale: Scale
    refuses: Refuses = any_form
    loses: Loses = nothing
    remark: Callable[[Found], str] = no_remark
    profiles: tuple[Profile, ...] = ("portable",)
    unknown: Unknown = "ignores"
    by_suffix: bool = False
    needs_prefix: bool = True
    reads: Literal["folders", "image files", "neither"] = "folders"

    def misses(self, a: Found) -> dict[str, str]:
        """Find the modules that its loader does not find by their keys, and why."""
        missed = {}
        for name, key in a.wrapped.items():
            if not (self.by_suffix and _is_tail(name, key)):
                missed[name] = f"keys hold {', '.join(a.stored.wrappers)}, as in {key}"
        if self.needs_prefix:
            missed |= {
                name: f"keys lack the prefix {PREFIX}, as those of {name}"
                for name in a.unprefixed
                if name not in missed
            }
        if a.base is not None:
            missed = a.base.missing(m for m in a.modules if m.name not in missed) | missed
        return missed


def _is_tail(name: str, key: str) -> bool:
    """Return whether a key ends with a module's whole name."""
    path = layer_path(key)
    return path == name or path.endswith(f".{name}")


def by_settings(a: Found, module: LoraModule) -> float:
    """Scale by the one alpha and rank of the settings."""
    del module
    return a.alpha / a.rank


def by_settings_or_stabilized(a: Found, module: LoraModule) -> float:
    """Scale by the one alpha and rank of the settings, or the root of the rank for rsLoRA."""
    del module
    return a.alpha / divisor(a.rank, a.rank_stabilized)


def by_module(a: Found, module: LoraModule) -> float:
    """Scale as PEFT does: by the alpha and the rank that the patterns give the module."""
    del a
    return module.scaling


def by_tensor(a: Found, module: LoraModule) -> float:
    """Scale by alpha and the rank of the tensor; an alpha of 0 stands for no scale."""
    return a.alpha / module.rank if a.alpha else 1.0


def not_plain(a: Found, *, but: tuple[str, ...] = ()) -> str:
    """Name the first module that is neither a linear layer nor of an accepted kind; empty if none."""
    kinds = [kind for kind in ("conv", "embedding", "expert") if kind not in but]
    if other := a.of_kinds(*kinds):
        return f"{other[0].name} is not a plain linear layer ({other[0].kind})"
    return ""


def is_router(module: LoraModule) -> bool:
    """Return whether a module is a router's weight, which PEFT adapts as a parameter of two dimensions."""
    return module.kind == "expert" and module.copies == 1 and module.name.endswith(".weight")


def no_lora_biases(a: Found) -> str:
    """Name the first bias of `lora_bias`; empty if there is none."""
    return f"lora_bias is not supported: {a.lora_biases[0]}" if a.lora_biases else ""


def no_others(a: Found, but: Callable[[str], bool] = lambda _: False) -> str:
    """Name the first tensor beside the factors that is not accepted; empty if there is none."""
    others = [key for key in (*a.others, *a.base_copies) if not but(key)]
    return f"takes nothing but factors, and there are {len(others)} others: {others[0]}" if others else ""


def others_lost(a: Found) -> Iterable[str]:
    """Report trained tensors beside the factors."""
    return leaves_out([*a.others, *a.lora_biases])


def leaves_out(keys: Iterable[str]) -> Iterable[str]:
    """Report trained tensors that are left out."""
    if left := list(keys):
        yield f"leaves out {len(left)} trained tensors, such as {left[0]}"


def every_token(a: Found) -> Iterable[str]:
    """Report an aLoRA that acts on every token."""
    if a.alora:
        yield "applies aLoRA to every token, as it ignores alora_invocation_tokens"


def original_base(a: Found) -> Iterable[str]:
    """Report factors that belong to weights which the initialisation had changed."""
    if a.base_change:
        yield f"applies factors to the original weights, which {a.base_change!r} had changed for the training"


def no_replication(a: Found) -> str:
    """Refuse `layer_replication`, whose layers are not in the model."""
    return "layer_replication is not supported: there are no such layers in the model" if a.replicated else ""


def first_of(*reasons: str) -> str:
    """Return the first reason that is not empty."""
    return next((reason for reason in reasons if reason), "")
