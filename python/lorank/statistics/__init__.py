"""Statistics of single spectra, a file each."""
