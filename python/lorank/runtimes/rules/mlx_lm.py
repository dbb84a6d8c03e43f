"""The rules of MLX-LM."""

from __future__ import annotations

from lorank.runtimes.rules.runtime import Runtime, by_module

MLX_LM = Runtime("MLX-LM", "November 2026", by_module, profiles=(), needs_prefix=False, reads="MLX folders")
