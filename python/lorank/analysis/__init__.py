"""Spectra of single matrices and of whole models."""
