"""A real task: MiniLM with a LoRA adapter learns to classify film reviews as fresh or rotten."""

from __future__ import annotations

import bz2
import csv
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.support import material

LENGTH = 48
BATCH = 32


def base_model() -> Any:
    """Return MiniLM with a seeded, untrained classification head."""
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(material.minilm(), num_labels=2)


def batches(first: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Return batches of tokenised reviews from a shuffled list."""
    with bz2.open(material.reviews(), "rt", encoding="utf-8", errors="replace") as file:
        rows = [row for row in csv.DictReader(file) if row["category"] in ("fresh", "rotten")]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [rows[i] for i in order[first : first + count]]
    tokenizer = AutoTokenizer.from_pretrained(material.minilm())
    encoded = tokenizer(
        [row["text"] for row in chosen],
        truncation=True,
        max_length=LENGTH,
        padding="max_length",
        return_tensors="pt",
    )
    labels = torch.tensor([int(row["category"] == "fresh") for row in chosen])
    return [
        {
            "input_ids": encoded["input_ids"][i : i + BATCH],
            "attention_mask": encoded["attention_mask"][i : i + BATCH],
            "labels": labels[i : i + BATCH],
        }
        for i in range(0, count, BATCH)
    ]


def train(count: int, epochs: int, lr: float = 1e-3) -> Any:
    """Train a PEFT model of rank 16 on all linear layers together with its head."""
    model = base_model()
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
    torch.manual_seed(1)
    peft_model = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=lr)
    data = batches(0, count)
    steps = epochs * len(data)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    for step in range(steps):
        peft_model(**data[step % len(data)]).loss.backward()
        torch.nn.utils.clip_grad_norm_(peft_model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return peft_model.eval()


def trained_adapter(count: int = 2000, epochs: int = 3) -> Path:
    """Return the folder of an adapter, training it if the folder is missing."""
    target = material.cache() / f"reviews-adapter-{count}-{epochs}"
    if not target.exists():
        temporary = target.with_name(target.name + ".part")
        train(count, epochs).save_pretrained(temporary)
        temporary.rename(target)
    return target


@torch.no_grad()
def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def accuracy(model: Any, data: list[dict[str, torch.Tensor]]) -> float:
    """Return the share of reviews that a model labels correctly."""
    right = total = 0
    for batch in data:
        right += int((logits(model, batch).argmax(-1) == batch["labels"]).sum())
        total += len(batch["labels"])
    return right / total
