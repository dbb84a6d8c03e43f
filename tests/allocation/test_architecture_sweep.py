"""Allocations and extractions of every architecture that transformers builds from a tiny config."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers

import lorank
from tests.support.architectures import MISFITS, architectures, tiny

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

RANK = 2


def adapted_ranks(model: Any) -> dict[str, int]:
    """Return the rank of every module and parameter that a PEFT model adapts."""
    found = {}
    for name, layer in model.base_model.model.named_modules():
        ranks = getattr(layer, "r", None)
        if not isinstance(ranks, dict) or "default" not in ranks:
            continue
        while name.endswith(".base_layer"):
            name = name.removesuffix(".base_layer")
        parameter = getattr(layer, "parameter_name", None)
        found[f"{name}.{parameter}" if parameter else name] = ranks["default"]
    return found


def all_linear_works(folder: Path, model_class: Any) -> bool:
    """Return True if PEFT's own "all-linear" adapts the model."""
    try:
        peft.get_peft_model(model_class.from_pretrained(folder), peft.LoraConfig(target_modules="all-linear"))
    except MISFITS:
        return False
    return True


def allocated(folder: Path, model_class: Any) -> str:
    """Return "right", or the difference between an allocation and the ranks in PEFT."""
    allocation = lorank.allocate(str(folder), "uniform", r_min=1, r_max=8, avg_rank=RANK, progress=False)
    if allocation.facts.are_guessed:
        return f"guessed: {allocation.facts.remark}"
    config = peft.LoraConfig(**allocation.lora_settings())
    model = peft.get_peft_model(model_class.from_pretrained(folder), config)
    wanted, found = dict(allocation.ranks), adapted_ranks(model)
    if wanted != found:
        missing, more = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        return f"not adapted: {missing[:2]}, adapted as well: {more[:2]}"
    parameters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    return "right" if parameters == allocation.num_parameters else "another number of parameters"


def sorted_out(name: str, folder: Path) -> str:
    """Return the outcome of one architecture."""
    model = tiny(name)
    if model is None:
        return "no tiny model"
    model_class = type(model)
    try:
        model.save_pretrained(folder)
        model_class.from_pretrained(folder)
    except MISFITS as error:
        return f"cannot be saved and loaded: {type(error).__name__}"
    try:
        outcome = allocated(folder, model_class)
    except ValueError as error:
        outcome = f"refused: {error}"
    except MISFITS as error:
        outcome = f"{type(error).__name__}: {error}".splitlines()[0]
    return (
        outcome if outcome == "right" or all_linear_works(folder, model_class) else f"PEFT cannot: {outcome}"
    )


def test_allocation_from_a_folder_adapts_its_modules(tmp_path: Path) -> None:
    transformers.utils.logging.set_verbosity_error()
    outcomes: dict[str, str] = {}
    for _, name in architectures():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcomes[name] = sorted_out(name, tmp_path / name)
    counts = Counter(outcome.partition(":")[0] for outcome in outcomes.values())
    lines = [f"{name}: {outcome}" for name, outcome in outcomes.items() if outcome != "right"]
    sys.stdout.write("\n".join([str(counts), *lines, ""]))
    tried = [o for o in outcomes.values() if not o.startswith(("PEFT cannot", "no tiny", "cannot be saved"))]
    assert len(tried) >= 200
    assert counts["right"] >= 0.95 * len(tried)
    silent = [n for n, o in outcomes.items() if o.startswith(("not adapted", "adapted", "another"))]
    assert not silent
