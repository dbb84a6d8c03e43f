"""Sketches of a real model's gradients on real data."""

from __future__ import annotations

import sys

import lorank
from tests.support import reviews


def test_sketched_effective_ranks_equal_those_of_full_gradients() -> None:
    model = reviews.base_model()
    # A quarter of each batch, as backward passes dominate the time.
    batches = [{k: v[:8] for k, v in batch.items()} for batch in reviews.batches(0, 16 * reviews.BATCH)]
    assert len(batches) == 16
    exact = lorank.profile_gradients(model, batches, sketch=None)
    sketched = lorank.profile_gradients(model, batches)
    assert sketched.sketch == 128
    assert [row.name for row in exact] == [row.name for row in sketched]
    assert len(exact) == 37
    pairs = zip(exact, sketched, strict=True)
    apart = [abs(one.effective_rank - other.effective_rank) for one, other in pairs]
    share = sum(distance <= 1 for distance in apart) / len(apart)
    sys.stdout.write(f"effective ranks within one of the exact ones: {share:.1%} of {len(apart)} modules\n")
    assert share >= 0.95, apart
    assert len({row.effective_rank for row in exact}) > 2
