"""The parameter budget on a trained adapter of a model with grouped-query attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import lorank

TEXT = (
    "A parameter budget counts what a rank costs: the key and value projections of grouped-query attention "
    "are narrow, so that a rank of theirs is cheap. ",
    "The largest singular values alone do not know of that, and spend as much on wide matrices. ",
)


@pytest.fixture(scope="module")
def adapter(smollm2: Path) -> lorank.LoraAdapter:
    """Return an adapter of SmolLM2 (9 query heads, 3 key-value heads) of rank 8 after a few steps."""
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    torch.manual_seed(0)
    peft_model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(4):
        # Bytes serve as tokens, as the learned content is irrelevant.
        ids = torch.tensor([list(TEXT[step % 2].encode())])
        peft_model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return lorank.LoraAdapter.from_model(peft_model)


@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.125])
def test_budget_retains_more_energy_than_a_ratio_of_its_cost(
    adapter: lorank.LoraAdapter, ratio: float
) -> None:
    widths = {module.shape[0] for module in adapter.modules.values() if "self_attn" in module.name}
    assert len(widths) == 2, "queries and keys differ"
    largest = lorank.compress(adapter, rank_ratio=ratio, progress=False)
    budget = lorank.compress(adapter, budget=largest.num_parameters, progress=False)
    assert budget.num_parameters <= largest.num_parameters
    assert largest.certificate is not None
    assert budget.certificate is not None
    # Compare the certificates and the factors.
    assert budget.certificate.error < 0.995 * largest.certificate.error
    energies = [
        sum(np.linalg.norm(module.B.astype(float) @ module.A) ** 2 for module in small.adapted)
        for small in (budget, largest)
    ]
    assert energies[0] > 1.002 * energies[1]
