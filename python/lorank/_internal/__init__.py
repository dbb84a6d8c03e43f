"""Tools that do not depend on LoRA: optional packages, lazy names, threads, progress, files, equality."""
