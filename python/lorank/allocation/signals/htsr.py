"""HT-SR: ranks from the heavy tails and spikes of the weights' spectra.

Source: [HTSR-LORA], equations 5 to 8.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Literal

import numpy as np
import numpy.typing as npt

from lorank.allocation.signals.registry import Signal, linear_ranks, register
from lorank.modules import naming
from lorank.modules.targets import AdaptedModule
from lorank.report import ModuleSpectrum, SpectralReport

_EPSILON = 1e-8
_METRICS = {"median": "alpha_hill", "xmin_mid": "alpha_hill_xmin_mid"}
_SPIKES = {"mean": "mp_spikes", "median": "mp_spikes_median"}

Array = npt.NDArray[np.float64]


def _check(
    *,
    weight_alpha: float = 0.7,
    weight_spikes: float = 0.3,
    more_for: str = "higher",
    granularity: str = "module",
    convention: str = "median",
    scale: str = "mean",
) -> None:
    """Raise ValueError for values of options that `htsr` cannot use."""
    for name, weight in (("weight_alpha", weight_alpha), ("weight_spikes", weight_spikes)):
        if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be a number that is not negative, not {weight!r}")
    _check_choice("more_for", more_for, ("higher", "lower"))
    _check_choice("granularity", granularity, ("module", "block"))
    _check_choice("convention", convention, _METRICS)
    _check_choice("scale", scale, _SPIKES)


def _check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in list(choices):
        raise ValueError(f"{option} must be one of {', '.join(map(repr, choices))}, not {value!r}")


@register("htsr", needs="spectra", check=_check)
def htsr(
    report: SpectralReport,
    modules: Sequence[AdaptedModule],
    r_min: int,
    r_max: int,
    *,
    weight_alpha: float = 0.7,
    weight_spikes: float = 0.3,
    more_for: Literal["higher", "lower"] = "higher",
    granularity: Literal["module", "block"] = "module",
    convention: Literal["median", "xmin_mid"] = "median",
    scale: Literal["mean", "median"] = "mean",
) -> Signal:
    """Score modules by ``0.7 alpha + 0.3 (1 - spikes)``, both normalised; ranks are linear in the score.

    Parameters
    ----------
    report
        The result of `analyze`.
    modules, r_min, r_max
        As in `lorank.allocate`.
    weight_alpha, weight_spikes
        Weights of the exponent and of the spikes (equation 7).
    more_for
        ``"higher"`` gives more rank to higher exponents, as the paper's equations do; ``"lower"`` to lower
        ones.
    granularity
        ``"module"``, or ``"block"`` to average the metrics over the modules of a block before scoring, as
        [ALPHAPRUNING] does.
    convention
        Convention of the Hill estimator: ``"median"`` or ``"xmin_mid"``.
    scale
        Scale of the Marchenko-Pastur law, from the ``"mean"`` or the ``"median"`` eigenvalue.

    Notes
    -----
    Metrics are min-max normalised. A module without a finite exponent gets the largest finite one and is
    flagged. A module without a spectrum gets the smallest number of spikes of any module. A stack of experts
    has the mean of its experts' metrics.
    """
    rows: dict[str, list[ModuleSpectrum]] = defaultdict(list)
    for row in report.modules:
        rows[row.module].append(row)
    names = [module.name for module in modules]
    alpha, flags = _alphas(names, rows, _METRICS[convention])
    spikes = _spikes(names, rows, _SPIKES[scale])
    if granularity == "block":
        blocks = [naming.block_of(name) for name in names]
        alpha, spikes = _averaged(alpha, blocks), _averaged(spikes, blocks)

    alpha_norm = _min_max(alpha) if more_for == "higher" else 1 - _min_max(alpha)
    score = weight_alpha * alpha_norm + weight_spikes * (1 - _min_max(spikes))
    position = _min_max(score)
    return Signal(position, linear_ranks(position, r_min, r_max), flags)


def _alphas(
    names: Sequence[str], rows: dict[str, list[ModuleSpectrum]], metric: str
) -> tuple[Array, dict[str, str]]:
    """Return the exponent of each module; replace infinite and NaN ones by the largest, and flag them."""
    values = np.empty(len(names))
    flags: dict[str, str] = {}
    for i, name in enumerate(names):
        exponents = np.array([getattr(row, metric) for row in rows[name]])
        finite = exponents[np.isfinite(exponents)]
        values[i] = finite.mean() if len(finite) else np.nan
        reasons = sorted({flag for row in rows[name] for flag in row.flags})
        if len(finite) < len(exponents):
            where = (
                "" if not len(finite) else f" in {len(exponents) - len(finite)} of {len(exponents)} experts"
            )
            flags[name] = f"alpha is not finite{where} ({'; '.join(reasons) or 'too few eigenvalues'})"
    known = values[~np.isnan(values)]
    return np.where(np.isnan(values), known.max() if len(known) else 0.0, values), flags


def _spikes(names: Sequence[str], rows: dict[str, list[ModuleSpectrum]], metric: str) -> Array:
    """Return the number of spikes of each module; the smallest number for modules without a spectrum.

    The smallest number does not change the range for normalisation.
    """
    values = np.full(len(names), np.nan)
    for i, name in enumerate(names):
        if counts := [getattr(row, metric) for row in rows[name] if row.has_spectrum]:
            values[i] = np.mean(counts)
    known = values[~np.isnan(values)]
    return np.where(np.isnan(values), known.min() if len(known) else 0.0, values)


def _averaged(values: Array, blocks: Sequence[str]) -> Array:
    """Replace every value by the mean over its block."""
    by_block: dict[str, list[float]] = defaultdict(list)
    for block, value in zip(blocks, values, strict=True):
        by_block[block].append(float(value))
    return np.array([np.mean(by_block[block]) for block in blocks])


def _min_max(values: Array) -> Array:
    """Scale values to [0, 1); equal values become 0 (equations 5 and 8)."""
    if not len(values):
        return values
    scaled: Array = (values - values.min()) / (values.max() - values.min() + _EPSILON)
    return scaled
