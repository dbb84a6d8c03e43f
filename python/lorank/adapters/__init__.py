"""Trained adapters: their content, the formats that hold it, the profiles that write it, live models."""
