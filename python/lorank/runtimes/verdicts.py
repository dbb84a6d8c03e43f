"""Verdicts about an adapter's files: which runtimes load them correctly, incorrectly, or not at all.

Each runtime multiplies ``B A`` by a scale of its own. The right scale is PEFT's: ``alpha_l / r_l``, after
`rank_pattern` and `alpha_pattern` are applied to module `l`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorank.adapters.content import Profile
from lorank.adapters.formats.registry import format_of
from lorank.adapters.profiles import PROFILES
from lorank.adapters.reading import read_as_stored
from lorank.peft_format.names import PREFIX
from lorank.runtimes.base_model import BaseModel
from lorank.runtimes.finite import not_finite
from lorank.runtimes.found import Found
from lorank.runtimes.rules import RUNTIMES, Runtime

Status = Literal["right", "wrong", "refuses"]

_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict about an adapter in one runtime.

    Attributes
    ----------
    runtime
        The name of the runtime.
    status
        ``"right"``, ``"wrong"`` if the runtime loads the adapter and computes something else, or
        ``"refuses"``.
    reason
        The reason on one line, with the runtime as its subject; a remark if the status is right.
    factors
        Smallest and largest ratio of the applied scale to the right one over all modules, 0 for a module that
        is left out; None if the adapter is not loaded.
    version
        The version of the runtime whose rules were used.
    reads_format
        False if the runtime does not read adapters of this format.
    """

    runtime: str
    status: Status
    reason: str = ""
    factors: tuple[float, float] | None = None
    version: str = ""
    reads_format: bool = True


def check(
    folder: str | Path, runtimes: Sequence[str] | None = None, *, base: Any | None = None
) -> list[Verdict]:
    """Find the runtimes that load an adapter correctly, incorrectly, or not at all.

    Parameters
    ----------
    folder
        A PEFT adapter folder, or an image adapter's `.safetensors` file. Its values are read once, a part at
        a time, to find those that are not finite.
    runtimes
        Names in `RUNTIMES` (default: all).
    base
        The base model: a folder with its `config.json`, that file, a hub id, or a live model. If it is given,
        the check also finds names that match no module, shapes that do not fit, and modules that PEFT cannot
        adapt.

    Returns
    -------
    list of Verdict
        One verdict per runtime, in the order of `RUNTIMES`.

    Raises
    ------
    FormatError, OSError
        If the adapter cannot be read, so that no runtime loads it.
    TypeError
        If `folder` is not a path.
    ValueError
        If a runtime is unknown, or the base model's modules are unknown.

    Notes
    -----
    If tensors have another rank than the settings, the scale in the settings counts as the right one, because
    the live layer from which such files are saved uses it.

    Examples
    --------
    >>> import json, pathlib, tempfile
    >>> import lorank, numpy, safetensors.numpy
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q"]}
    >>> _ = (folder / "adapter_config.json").write_text(json.dumps(settings))
    >>> shapes = {"lora_A": (4, 16), "lora_B": (16, 4)}
    >>> tensors = {f"base_model.model.q.{x}.weight": numpy.ones(s, "float32") for x, s in shapes.items()}
    >>> safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    >>> for verdict in lorank.check(folder, ["peft", "lorax"]):
    ...     print(verdict.runtime, verdict.status, verdict.factors)
    PEFT right (1.0, 1.0)
    LoRAX wrong (0.5, 0.5)
    """
    if not isinstance(folder, (str, Path)):
        raise TypeError(
            f"check reads files, not a {type(folder).__name__}: save the adapter, and give its path"
        )
    selected = list(RUNTIMES) if runtimes is None else list(runtimes)
    if unknown := [name for name in selected if name not in RUNTIMES]:
        raise ValueError(f"unknown runtime {unknown[0]!r}: choose among {', '.join(RUNTIMES)}")
    stored = read_as_stored(folder)
    model = None if base is None else BaseModel.of(base, stored.adapter.modules)
    found = Found(stored, model)
    non_finite = not_finite(stored.tensors)
    return [_verdict(RUNTIMES[name], found, non_finite) for name in RUNTIMES if name in selected]


def _verdict(runtime: Runtime, a: Found, non_finite: Sequence[tuple[str, str]]) -> Verdict:
    """Return the verdict about an adapter in one runtime; `non_finite` are tensors that are not finite."""
    if other := _other_format(runtime, a):
        return Verdict(runtime.name, "refuses", other, version=runtime.version, reads_format=False)
    missed = runtime.misses(a)
    if refusal := _unknown_names(runtime, missed) or _unfit_shapes(a) or runtime.refuses(a):
        return Verdict(runtime.name, "refuses", refusal, version=runtime.version)
    ratios = [
        0.0 if module.name in missed else runtime.scale(a, module) / module.scaling
        for module in a.modules
        if module.scaling
    ]
    factors = (min(ratios, default=1.0), max(ratios, default=1.0))
    reasons = [
        *_not_numbers(non_finite),
        *_not_found(missed, len(a.modules)),
        *_scaled([ratio for ratio in ratios if ratio]),
        *runtime.loses(a),
    ]
    if reasons:
        return Verdict(runtime.name, "wrong", "; ".join(reasons), factors, runtime.version)
    return Verdict(runtime.name, "right", runtime.remark(a), factors, runtime.version)


def _other_format(runtime: Runtime, a: Found) -> str:
    """Return the reason for refusing the format; empty if the runtime reads it."""
    if runtime.reads == (a.stored.files or format_of(a.adapter).files):
        return ""
    return {
        "folders": "reads PEFT folders only",
        "image files": "reads files of image adapters only, not PEFT folders",
    }.get(runtime.reads, "reads files of its own format only")


def _unknown_names(runtime: Runtime, missed: dict[str, str]) -> str:
    """Return the reason for refusing unknown names; empty if the runtime ignores them."""
    if not missed or runtime.unknown == "ignores":
        return ""
    return f"stops at names that the model lacks: {next(iter(missed.values()))}"


def _unfit_shapes(a: Found) -> str:
    """Return the reason for refusing updates that do not fit the base model; empty if all fit."""
    reasons = a.base.misfits(a.modules) if a.base is not None else []
    return f"sizes do not match: {reasons[0]}" if reasons else ""


def _not_found(missed: dict[str, str], count: int) -> Iterable[str]:
    """Yield a reason if modules are left out without an error."""
    if missed:
        all_of = "all" if len(missed) == count else f"{len(missed)} of"
        yield f"leaves out {all_of} {count} modules without an error: {next(iter(missed.values()))}"


def _not_numbers(non_finite: Sequence[tuple[str, str]]) -> Iterable[str]:
    """Yield a reason if tensors hold values that are not finite."""
    if non_finite:
        key, value = non_finite[0]
        owner, found, rest = key.removeprefix(PREFIX).rpartition(".lora_")
        factor = rest.removesuffix(".weight")
        named = f"lora_{factor} of {owner}" if found else key
        others = f", and {len(non_finite) - 1} other tensors hold such values" if len(non_finite) > 1 else ""
        yield f"computes NaN, because {named} holds {value}{others}"


def _scaled(ratios: Sequence[float]) -> Iterable[str]:
    """Yield a reason if a scale differs from the right one."""
    low, high = min(ratios, default=1.0), max(ratios, default=1.0)
    if max(abs(low - 1), abs(high - 1)) <= _TOLERANCE:
        return
    if high - low <= _TOLERANCE * high:
        yield f"applies {high:.4g} times the right scale to every update"
    else:
        yield f"applies {low:.4g} to {high:.4g} times the right scale"


def right_profile(runtimes: Sequence[str] | None = None) -> Profile:
    """Return the first profile that every runtime loads with the right scale.

    Parameters
    ----------
    runtimes
        Names in `RUNTIMES` (default: all).

    Examples
    --------
    >>> right_profile(["vllm"]), right_profile(["vllm", "sglang"])
    ('compact', 'portable')
    """
    selected = RUNTIMES if runtimes is None else runtimes
    for profile in PROFILES[:1] + PROFILES[2:]:
        if all(profile in RUNTIMES[name].profiles for name in selected):
            return profile
    return "portable"
