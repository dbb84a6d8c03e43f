"""Memory that DynamicRanks takes, counted in numbers of live tensors."""

from __future__ import annotations

import math
from typing import Any

from lorank.training import DynamicRanks
from tests.support.dynamic_training import INTERVAL, OPTIONS, WINDOW, batch, llama, size_of
from tests.support.live_tensors import live_numbers, only_new_tensors
from tests.support.lora_layers import layers
from tests.support.optimizers import adamw


def expected_numbers(model: Any, sketch: int) -> tuple[int, int]:
    """Return the numbers in one step's sketches and in all projections (none for small sides)."""
    shapes = [layer.get_base_layer().weight.shape for layer in layers(model).values()]
    sketches = sum(math.prod(min(side, sketch) for side in shape) for shape in shapes)
    return sketches, sum(sketch * side for shape in shapes for side in shape if side > sketch)


class Loop:
    """A training that counts live numbers within and after its steps."""

    def __init__(self) -> None:
        self.model = llama()
        self.optimizer = adamw(self.model)

    def step(self, dynamic: Any = None) -> tuple[int, int]:
        """Return the live numbers between forward and backward pass, and after the step."""
        loss = self.model(**batch(0)).loss
        within = live_numbers()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if dynamic is not None:
            dynamic.step()
        del loss
        return within, live_numbers()

    @property
    def state(self) -> int:
        """Numbers in the factors and their two moments."""
        return 3 * size_of(self.model)


@only_new_tensors()
def test_memory_holds_sketches_of_the_open_window_only() -> None:
    loop = Loop()
    sketches, projections = expected_numbers(loop.model, 16)
    # One batch adds the projected inputs of all modules, and the outputs of the first ones (queries, keys,
    # values), whose inputs require no gradient in a plain pass.
    one_batch = 20 * (14 * 16 + 32 + 16 + 16)
    dynamic = DynamicRanks(loop.model, loop.optimizer, **OPTIONS | {"freeze_after": 2 * INTERVAL})
    loop.step()
    within, after = loop.step()
    plain = after - loop.state
    with dynamic:
        for step in range(1, 3 * INTERVAL):
            in_pass, after = loop.step(dynamic)
            kept = max(step % INTERVAL - (INTERVAL - WINDOW), 0) if step < 2 * INTERVAL else 0
            drawn = projections if INTERVAL - WINDOW < step < 2 * INTERVAL else 0
            assert after - loop.state - plain == kept * sketches + drawn, step
            if step < INTERVAL:
                assert in_pass - within <= max(kept - 1, 0) * sketches + drawn + one_batch + 100, step


@only_new_tensors()
def test_interrupted_training_keeps_only_the_sketches_of_its_window() -> None:
    loop = Loop()
    sketches, _ = expected_numbers(loop.model, 16)
    loop.step()
    _, plain = loop.step()
    with DynamicRanks(loop.model, loop.optimizer, **OPTIONS) as dynamic:
        for _ in range(INTERVAL - 1):
            loop.step(dynamic)
        loop.model(**batch(0)).loss.backward()
        loop.optimizer.zero_grad()
    # Sketches of an open window are part of the state; projections are drawn again.
    assert live_numbers() - plain == (WINDOW - 1) * sketches
