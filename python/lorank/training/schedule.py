"""The steps at which ranks change, and the steps whose gradients count."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class ChangeSchedule:
    """Steps of dynamic rank allocation; the first step of a training is 1.

    Attributes
    ----------
    interval, window, warmup, freeze_after
        As in `GardOptions`.

    Examples
    --------
    >>> schedule = ChangeSchedule(interval=10, window=2, warmup=10, freeze_after=None)
    >>> [step for step in range(1, 31) if schedule.is_change(step)]
    [20, 30]
    >>> [step for step in range(1, 31) if schedule.is_watched(step)]
    [19, 20, 29, 30]
    """

    interval: int
    window: int
    warmup: int
    freeze_after: int | None

    @property
    def first_change(self) -> int:
        """The first step after which ranks may change, whatever `freeze_after` is."""
        return (self.warmup // self.interval + 1) * self.interval

    def ending_after(self, step: int) -> ChangeSchedule:
        """Return the schedule without changes after `step`; an earlier `freeze_after` stays."""
        last = step if self.freeze_after is None else min(self.freeze_after, step)
        return replace(self, freeze_after=last)

    def is_change(self, step: int) -> bool:
        """Return True if ranks change after `step`."""
        return step % self.interval == 0 and step > self.warmup and not self._is_after_the_end(step)

    def is_watched(self, step: int) -> bool:
        """Return True if `step` is in the window of a change."""
        change = self._next_multiple(step)
        return self.is_change(change) and change - step < self.window

    def is_over(self, step: int) -> bool:
        """Return True if `freeze_after` excludes changes after `step` and after all later steps."""
        return self._is_after_the_end(self._next_multiple(step))

    def _next_multiple(self, step: int) -> int:
        return -(-step // self.interval) * self.interval

    def _is_after_the_end(self, step: int) -> bool:
        return self.freeze_after is not None and step > self.freeze_after
