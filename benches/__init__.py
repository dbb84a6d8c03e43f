"""Measurements of speed, memory and accuracy beside the peers: ``python -m benches.NAME``."""
