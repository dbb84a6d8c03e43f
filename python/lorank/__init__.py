"""LoRA ranks from spectra: before, during and after fine-tuning."""

from lorank._core import FormatError, LorankError, NumericalError, __version__
from lorank.allocation import RankAllocation, allocate
from lorank.analysis import analyze
from lorank.budget import fit_ranks
from lorank.report import ModuleSpectrum, SpectralReport
from lorank.spectra import MarchenkoPastur, alpha_hill, marchenko_pastur, spectrum

__all__ = [
    "FormatError",
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
    "fit_ranks",
    "marchenko_pastur",
    "spectrum",
]
