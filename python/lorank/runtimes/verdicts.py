"""What runtimes make of an adapter's files: which load it right, wrong, or not at all.

Each multiplies ``B A`` by a scale of its own formula; the right one is PEFT's, ``alpha_l / r_l`` with the
patterns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorank.adapters.adapter import Profile
from lorank.adapters.reading import CONFIG, read_as_stored, read_config
from lorank.runtimes.found import Found
from lorank.runtimes.rules import RUNTIMES, Runtime

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
        Smallest and largest ratio of the scale that it applies to the right one, 0 for a module that it
        leaves out; None if it loads none.
    """

    runtime: str
    status: Status
    reason: str = ""
    factors: tuple[float, float] | None = None


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

    Notes
    -----
    Where tensors have another rank than the settings say, the settings' scale is taken for the right one:
    so does the layer in memory that such files are saved from.
    """
    wanted = list(RUNTIMES) if runtimes is None else list(runtimes)
    if unknown := [name for name in wanted if name not in RUNTIMES]:
        raise ValueError(f"no runtime {unknown[0]!r}: choose among {', '.join(RUNTIMES)}")
    adapter = read_as_stored(folder)
    if adapter.format != "peft":
        raise ValueError(f"{folder}: only PEFT adapters can be checked, not the keys of kohya or diffusers")
    found = Found(adapter, read_config(Path(folder).expanduser() / CONFIG))
    return [_verdict(RUNTIMES[name], found) for name in RUNTIMES if name in wanted]


def _verdict(runtime: Runtime, a: Found) -> Verdict:
    if refusal := runtime.refuses(a):
        return Verdict(runtime.name, "refuses", refusal)
    ratios = [runtime.scale(a, module) / module.scaling for module in a.modules if module.scaling]
    factors = (min(ratios, default=1.0), max(ratios, default=1.0))
    reasons = [*_scaled([ratio for ratio in ratios if ratio]), *runtime.loses(a)]
    if reasons:
        return Verdict(runtime.name, "wrong", "; ".join(reasons), factors)
    return Verdict(runtime.name, "right", runtime.remark(a), factors)


def _scaled(ratios: Sequence[float]) -> Iterable[str]:
    low, high = min(ratios, default=1.0), max(ratios, default=1.0)
    if max(abs(low - 1), abs(high - 1)) <= _TOLERANCE:
        return
    if high - low <= _TOLERANCE * high:
        yield f"scales every update by {high:.4g}"
    else:
        yield f"scales updates by {low:.4g} to {high:.4g}"


def right_profile(runtimes: Sequence[str] | None = None) -> Profile:
    """The first of the three profiles that, by the table of scales, every one of the runtimes loads right."""
    wanted = set(RUNTIMES if runtimes is None else runtimes)
    if wanted <= {"peft", "vllm"}:
        return "compact"
    return "tensor-rank" if wanted <= {"peft", "vllm", "llama.cpp", "tensorrt-llm"} else "portable"
