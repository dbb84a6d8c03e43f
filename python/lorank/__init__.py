"""LoRA ranks from spectra: before, during and after fine-tuning."""

from importlib import import_module
from typing import TYPE_CHECKING

from lorank._core import FormatError, LorankError, NumericalError, __version__
from lorank.allocation import RankAllocation, allocate
from lorank.analysis import analyze
from lorank.budget import fit_ranks
from lorank.report import ModuleSpectrum, SpectralReport
from lorank.spectra import MarchenkoPastur, alpha_hill, marchenko_pastur, spectrum

if TYPE_CHECKING:
    from lorank.adapters import LoraAdapter
    from lorank.compression import compress, elastic, family
    from lorank.extraction import extract
    from lorank.fisher import fisher_scores
    from lorank.merging import merge
    from lorank.product import product_svd
    from lorank.runtimes import check

# Imported when they are asked for: who analyses a model need not wait for what adapters need.
_LAZY = {
    "LoraAdapter": "adapters",
    "check": "runtimes",
    "compress": "compression",
    "elastic": "compression",
    "extract": "extraction",
    "family": "compression",
    "fisher_scores": "fisher",
    "merge": "merging",
    "product_svd": "product",
}

__all__ = [
    "FormatError",
    "LoraAdapter",
    "LorankError",
    "MarchenkoPastur",
    "ModuleSpectrum",
    "NumericalError",
    "RankAllocation",
    "SpectralReport",
    "__version__",
    "allocate",
    "alpha_hill",
    "analyze",
    "check",
    "compress",
    "elastic",
    "extract",
    "family",
    "fisher_scores",
    "fit_ranks",
    "marchenko_pastur",
    "merge",
    "product_svd",
    "spectrum",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'lorank' has no attribute {name!r}")
    value: object = getattr(import_module(f"lorank.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
