"""Gradient and task spectra of a live model's modules, from forward and backward passes."""

from typing import TYPE_CHECKING

from lorank._internal.lazy import lazy_names

if TYPE_CHECKING:
    from lorank.profiling.gradients import profile_gradients
    from lorank.profiling.tasks import profile_tasks

_LAZY = {"profile_gradients": "gradients", "profile_tasks": "tasks"}

__all__ = ["profile_gradients", "profile_tasks"]

__getattr__, __dir__ = lazy_names(__name__, _LAZY, needs_torch_for="to profile a live model")
