"""What a live model's forward and backward passes tell of its modules."""

from lorank.profiling.gradients import profile_gradients
from lorank.profiling.tasks import profile_tasks

__all__ = ["profile_gradients", "profile_tasks"]
