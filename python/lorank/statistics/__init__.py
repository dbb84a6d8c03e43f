"""Statistics of single spectra, one per file."""
