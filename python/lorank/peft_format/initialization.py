"""Checks that a config of PEFT allows other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorank.peft_format.settings import CHANGES_THE_BASE


def check_config(config: Any, new_ranks: Sequence[int]) -> None:
    """Refuse initialisations that PEFT repeats on loading, with the new ranks."""
    init = config.init_lora_weights
    if not new_ranks or not isinstance(init, str):
        return
    if init.lower().startswith(CHANGES_THE_BASE):
        # Loading such an adapter derives the base model from the rank once more.
        raise NotImplementedError(
            f"the adapter was initialised by {init!r}, which derives the base model from the rank: with "
            "other ranks the saved adapter would be loaded into another base model. Save the base model as "
            "it is now, and set init_lora_weights to True in the adapter's config"
        )
    if init == "orthogonal" and any(rank % 2 for rank in new_ranks):
        raise ValueError(
            "the adapter was initialised by 'orthogonal': PEFT loads even ranks only. Set init_lora_weights "
            "to True in the adapter's config: what is loaded is the same, whatever it began with"
        )
