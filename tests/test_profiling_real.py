"""Sketches of a real model's gradients on real data."""

from __future__ import annotations

import lorank
import reviews


def test_sketched_effective_ranks_are_those_of_whole_gradients() -> None:
    model, batches = reviews.base_model(), reviews.batches(0, 16 * reviews.BATCH)
    exact = lorank.profile_gradients(model, batches, sketch=None)
    sketched = lorank.profile_gradients(model, batches)
    assert len(exact) == len(sketched) == 37
    pairs = zip(exact, sketched, strict=True)
    close = sum(abs(one.effective_rank - other.effective_rank) <= 1 for one, other in pairs)
    assert close >= 0.95 * len(exact), close
    assert len({row.effective_rank for row in exact}) > 2
