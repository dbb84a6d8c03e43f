"""Trained adapters: what they hold, the formats they come in, the profiles they go out in."""

# What reads and writes adapters comes with them, not at the first call in the middle of somebody's work.
from lorank.adapters import reading, writing
from lorank.adapters.content import LoraAdapter
from lorank.adapters.module import LoraModule

__all__ = ["LoraAdapter", "LoraModule", "reading", "writing"]
