"""LoRA ranks from spectra: before, during and after fine-tuning."""

from typing import TYPE_CHECKING

from lorank._core import FormatError, LorankError, NumericalError, __version__
from lorank._internal.lazy import lazy_names
from lorank._internal.printable import printable as _printable

if TYPE_CHECKING:
    from lorank import training
    from lorank.adapter import LoraAdapter
    from lorank.allocation.allocate import allocate
    from lorank.allocation.budget import fit_ranks
    from lorank.allocation.rank_allocation import RankAllocation
    from lorank.analysis.comparison import compare
    from lorank.analysis.matrices import analyze
    from lorank.baking.bake import bake
    from lorank.baking.verify import verify
    from lorank.compression.fisher import fisher_scores
    from lorank.compression.product import product_svd
    from lorank.operations import compress, convert, elastic, extract, family, merge
    from lorank.profiling import profile_gradients, profile_tasks
    from lorank.report import ModuleSpectrum, SpectralReport
    from lorank.report.comparison import ComparisonReport, ModuleComparison
    from lorank.report.gradients import GradientReport
    from lorank.report.tasks import TaskReport
    from lorank.runtimes import check
    from lorank.statistics.hill import alpha_hill
    from lorank.statistics.marchenko_pastur import MarchenkoPastur, marchenko_pastur
    from lorank.statistics.spectrum import spectrum
    from lorank.task_spectra import TaskSpectrum, task_spectrum

# The messages of these errors name tensors and files of others, and a traceback shows them as they are.
LorankError.__str__ = lambda error: _printable(Exception.__str__(error))  # type: ignore[method-assign]  # The class is the core's.

# Imported at their first use, so that no command waits for the imports of others, and that the command line
# is ready for Ctrl-C before they begin.
_LAZY = {
    "ComparisonReport": "report.comparison",
    "GradientReport": "report.gradients",
    "LoraAdapter": "adapter",
    "MarchenkoPastur": "statistics.marchenko_pastur",
    "ModuleComparison": "report.comparison",
    "ModuleSpectrum": "report",
    "RankAllocation": "allocation.rank_allocation",
    "SpectralReport": "report",
    "TaskReport": "report.tasks",
    "TaskSpectrum": "task_spectra",
    "allocate": "allocation.allocate",
    "alpha_hill": "statistics.hill",
    "analyze": "analysis.matrices",
    "bake": "baking.bake",
    "check": "runtimes",
    "compare": "analysis.comparison",
    "compress": "operations",
    "convert": "operations",
    "elastic": "operations",
    "extract": "operations",
    "family": "operations",
    "fisher_scores": "compression.fisher",
    "fit_ranks": "allocation.budget",
    "marchenko_pastur": "statistics.marchenko_pastur",
    "merge": "operations",
    "product_svd": "compression.product",
    "profile_gradients": "profiling",
    "profile_tasks": "profiling",
    "spectrum": "statistics.spectrum",
    "task_spectrum": "task_spectra",
    "verify": "baking.verify",
}

__all__ = [
    "ComparisonReport",
    "FormatError",
    "GradientReport",
    "LoraAdapter",
    "LorankError",
    "MarchenkoPastur",
    "ModuleComparison",
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
    "bake",
    "check",
    "compare",
    "compress",
    "convert",
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
    "verify",
]

# `import lorank` makes these packages attributes, as it did when it imported them.
_PACKAGES = ["analysis", "modules", "report", "sources", "statistics", "training"]

__getattr__, __dir__ = lazy_names(__name__, _LAZY, packages=_PACKAGES)
