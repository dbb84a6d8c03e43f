"""Spectral reports: rows, files, tables."""

from lorank.report.spectral import METRICS, ModuleSpectrum, SpectralReport

__all__ = ["METRICS", "ModuleSpectrum", "SpectralReport"]
