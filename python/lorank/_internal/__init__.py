"""Tools without any knowledge of LoRA: optional packages, threads, progress, files written whole."""
