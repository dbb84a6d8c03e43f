"""Training with ranks that differ by depth and role: the setting in which their paper saw NaN."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer

import lorank
from tests.support import reviews


@pytest.fixture(scope="module")
def data() -> list[Any]:
    return reviews.batches(0, 200)


@pytest.mark.parametrize("method", ["attention-heavy", "empirical"])
def test_training_is_stable_under_the_default_scale_rule(method: str, data: list[Any]) -> None:
    model = reviews.base_model()
    allocation = lorank.allocate(model, method, r_min=4, r_max=32, r_base=16)
    assert len(set(allocation.ranks.values())) > 1
    torch.manual_seed(0)
    config = allocation.to_lora_config(model, lora_alpha=32, task_type="SEQ_CLS")
    peft_model = get_peft_model(model, config).train()
    scalings = {m.scaling["default"] for m in peft_model.modules() if isinstance(m, LoraLayer)}
    assert scalings == {32 / config.r}
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=3e-4)
    losses, norms = [], []
    for batch in [*data, *data]:
        loss = peft_model(**batch).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(peft_model.parameters(), math.inf)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    first, last = np.array(losses).reshape(2, -1)
    assert np.isfinite([losses, norms]).all()
    assert last.mean() < first.mean() - 0.01
    # Losses and gradients stay bounded.
    assert max(losses) < 1.5 * first.mean()
    assert max(norms) < 10 * np.median(norms)
