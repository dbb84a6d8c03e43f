"""Task spectra [KSTAR]: the rank of a task, estimated from samples before training."""

from lorank.task_spectra.decay import PiecewiseDecay
from lorank.task_spectra.estimate import Space, TaskEstimate
from lorank.task_spectra.moments import InputMoments
from lorank.task_spectra.stream import TaskSpectrum, task_spectrum

__all__ = ["InputMoments", "PiecewiseDecay", "Space", "TaskEstimate", "TaskSpectrum", "task_spectrum"]
