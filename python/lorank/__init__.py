"""LoRA ranks from spectra: before, during and after fine-tuning."""

from lorank._core import FormatError, LorankError, NumericalError, __version__
from lorank.adapters import LoraAdapter
from lorank.allocation import RankAllocation, allocate
from lorank.analysis import analyze
from lorank.budget import fit_ranks
from lorank.compression import compress, elastic, family
from lorank.extraction import extract
from lorank.fisher import fisher_scores
from lorank.merging import merge
from lorank.product import product_svd
from lorank.report import ModuleSpectrum, SpectralReport
from lorank.runtimes import check
from lorank.spectra import MarchenkoPastur, alpha_hill, marchenko_pastur, spectrum

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
