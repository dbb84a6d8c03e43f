"""Reports: rows about the matrices or modules of a model, and their files."""

from lorank.report.rows import METRICS, ModuleSpectrum
from lorank.report.spectral import SpectralReport

__all__ = ["METRICS", "ModuleSpectrum", "SpectralReport"]
