"""The type of a runtime's rules, and the rules that several runtimes share.

The runtime is the subject of every reason that a rule returns, unless the reason names another subject.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from lorank.adapters.content import Profile
from lorank.adapters.formats.base import Files
from lorank.adapters.module import LoraModule
from lorank.peft_format.names import PREFIX, layer_path
from lorank.peft_format.scaling import divisor
from lorank.runtimes.found import Found

Unknown = Literal["ignores", "refuses"]
"""The treatment of keys that name no module of the model."""

Scale = Callable[[Found, LoraModule], float]
Refuses = Callable[[Found], str]
Loses = Callable[[Found], Iterable[str]]


def nothing(a: Found) -> Iterable[str]:
    """Return no reasons."""
    del a
    return ()


def no_remark(a: Found) -> str:
    """Return an empty remark."""
    del a
    return ""


def any_form(a: Found) -> str:
    """Accept an adapter in any form: return an empty reason."""
    del a
    return ""


@dataclass(frozen=True, slots=True)
class Runtime:
    """The rules of one runtime.

    Attributes
    ----------
    name
        The name of the runtime.
    version
        The version that the rules describe.
    scale
        A function that returns the factor of a module's update; 0 if the module is left out.
    refuses
        A function that returns the reason why the adapter is not loaded; empty if it is.
    loses
        A function that returns a reason for each part that is silently left out or computed differently.
    remark
        A function that returns a remark on an adapter that is loaded correctly.
    profiles
        The profiles of lorank that are loaded correctly.
    unknown
        The treatment of keys that name no module of the model.
    by_suffix
        True if modules are found by the end of their keys, so that names in front of them do not matter.
    needs_prefix
        True if keys without the prefix `base_model.model.` are not found.
    reads
        The kind of files that are read.
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
    reads: Files = "folders"

    def misses(self, a: Found) -> dict[str, str]:
        """Map the name of each module that is not found by its key to a reason."""
        missed = {}
        for name, key in a.wrapped.items():
            if not (self.by_suffix and _is_tail(name, key)):
                missed[name] = f"keys hold {', '.join(a.stored.wrappers)}, as in {key}"
        if self.needs_prefix:
            missed |= {
                name: f"keys lack the prefix {PREFIX}, such as the keys of {name}"
                for name in a.unprefixed
                if name not in missed
            }
        if a.base is not None:
            missed = a.base.missing(m for m in a.modules if m.name not in missed) | missed
        return missed


def _is_tail(name: str, key: str) -> bool:
    """Return True if a key ends with the full name of a module."""
    path = layer_path(key)
    return path == name or path.endswith(f".{name}")


def by_settings(a: Found, module: LoraModule) -> float:
    """Scale by the global alpha and rank."""
    del module
    return a.alpha / a.rank


def by_settings_or_stabilized(a: Found, module: LoraModule) -> float:
    """Scale by the global alpha and rank, or by the square root of the rank for rsLoRA."""
    del module
    return a.alpha / divisor(a.rank, a.rank_stabilized)


def by_module(a: Found, module: LoraModule) -> float:
    """Scale as PEFT does, by the alpha and the rank of the module in the patterns."""
    del a
    return module.scaling


def by_tensor(a: Found, module: LoraModule) -> float:
    """Scale by the global alpha and the rank of the tensor; an alpha of 0 means scale 1."""
    return a.alpha / module.rank if a.alpha else 1.0


def not_plain(a: Found, *, but: tuple[str, ...] = ()) -> str:
    """Return a reason about the first module that is neither linear nor of a kind in `but`; empty if none."""
    kinds = [kind for kind in ("conv", "embedding", "expert") if kind not in but]
    if other := a.of_kinds(*kinds):
        return f"{other[0].name} is not a plain linear layer ({other[0].kind})"
    return ""


def is_router(module: LoraModule) -> bool:
    """Return True for the weight of a router, which PEFT adapts as a parameter of two dimensions."""
    return module.kind == "expert" and module.copies == 1 and module.name.endswith(".weight")


def no_lora_biases(a: Found) -> str:
    """Return a reason about the first bias of `lora_bias`; empty if there is none."""
    return f"lora_bias is not supported: {a.lora_biases[0]}" if a.lora_biases else ""


def no_others(a: Found, but: Callable[[str], bool] = lambda _: False) -> str:
    """Return the reason for refusing tensors other than factors; empty if there are none."""
    others = [key for key in (*a.others, *a.base_copies) if not but(key)]
    return (
        f"reads only factors, but the file holds {len(others)} other tensors: {others[0]}" if others else ""
    )


def others_lost(a: Found) -> Iterable[str]:
    """Return a reason if the adapter has trained tensors other than factors."""
    return leaves_out([*a.others, *a.lora_biases])


def leaves_out(keys: Iterable[str]) -> Iterable[str]:
    """Yield a reason if trained tensors are left out."""
    if left := list(keys):
        yield f"leaves out {len(left)} trained tensors, such as {left[0]}"


def every_token(a: Found) -> Iterable[str]:
    """Yield a reason if an aLoRA is applied to every token."""
    if a.alora:
        yield "applies aLoRA to every token, because it ignores alora_invocation_tokens"


def original_base(a: Found) -> Iterable[str]:
    """Yield a reason if the initialisation changed the weights that the factors belong to."""
    if a.base_change:
        yield f"applies factors to the original weights, but {a.base_change!r} changed them before training"


def no_replication(a: Found) -> str:
    """Return a reason if the adapter uses `layer_replication`; empty if not."""
    return "layer_replication is not supported: the model lacks the added layers" if a.replicated else ""


def first_of(*reasons: str) -> str:
    """Return the first reason that is not empty."""
    return next((reason for reason in reasons if reason), "")
