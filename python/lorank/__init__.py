"""LoRA ranks from spectra: before, during and after fine-tuning."""

from typing import TYPE_CHECKING

from lorank._core import FormatError, LorankError, NumericalError, __version__
from lorank._internal.lazy import lazy_names
from lorank.analysis.matrices import analyze
from lorank.report import ModuleSpectrum, SpectralReport
from lorank.statistics.hill import alpha_hill
from lorank.statistics.marchenko_pastur import MarchenkoPastur, marchenko_pastur
from lorank.statistics.spectrum import spectrum

if TYPE_CHECKING:
    from lorank import training
    from lorank.adapter import LoraAdapter
    from lorank.allocation.allocate import allocate
    from lorank.allocation.budget import fit_ranks
    from lorank.allocation.rank_allocation import RankAllocation
    from lorank.compression.fisher import fisher_scores
    from lorank.compression.product import product_svd
    from lorank.operations import compress, elastic, extract, family, merge
    from lorank.profiling import profile_gradients, profile_tasks
    from lorank.report.gradients import GradientReport
    from lorank.report.tasks import TaskReport
    from lorank.runtimes import check
    from lorank.task_spectra import TaskSpectrum, task_spectrum

# Imported at their first use, so that an analysis does not wait for the imports of allocation and adapters.
_LAZY = {
    "GradientReport": "report.gradients",
    "LoraAdapter": "adapter",
    "RankAllocation": "allocation.rank_allocation",
    "TaskReport": "report.tasks",
    "TaskSpectrum": "task_spectra",
    "allocate": "allocation.allocate",
    "check": "runtimes",
    "compress": "operations",
    "elastic": "operations",
    "extract": "operations",
    "family": "operations",
    "fisher_scores": "compression.fisher",
    "fit_ranks": "allocation.budget",
    "merge": "operations",
    "product_svd": "compression.product",
    "profile_gradients": "profiling",
    "profile_tasks": "profiling",
    "task_spectrum": "task_spectra",
}

__all__ = [
    "FormatError",
    "GradientReport",
    "LoraAdapter",
    "LorankError",
    "MarchenkoPastur",
    "ModuleSpectrum",
    "NumericalError",
    "RankAllocation",
    "SpectralReport",
    "TaskReport",
    "TaskSpectrum",
    "__version__",
    "allocate",
    "alpha_hill",
    "analyze",
    "check",
    "compress",
    "elastic",
    "extract",
    "family",
    "fisher_scores",
    "fit_ranks",
    "marchenko_pastur",
    "merge",
    "product_svd",
    "profile_gradients",
    "profile_tasks",
    "spectrum",
    "task_spectrum",
    "training",
]

__getattr__, __dir__ = lazy_names(__name__, _LAZY, packages=["training"])
