"""Truncation, merging and extraction of adapters by their singular values."""
