"""The types that all sources share: sources, their matrices, and skipped tensors."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lorank._core import FormatError, Matrix
from lorank.modules import naming
from lorank.modules.facts import ModelFacts
from lorank.modules.skeleton import Skeleton
from lorank.modules.weight import Kind
from lorank.sources.matrix_sequences import Mapped


@dataclass(frozen=True, slots=True)
class MatrixInfo:
    """The identity of one matrix of a model.

    Attributes
    ----------
    name
        The dotted name of the module; for an expert, the name of the stacked parameter and the index of the
        expert in brackets.
    module
        The name by which an adapter targets the module; for an expert, the name of the stacked parameter.
    kind
        The operation that the module performs with its weight.
    shape
        Shape ``(out, in)``; kernels of convolutions are flattened to ``(out, in * kh * kw)``.
    dtype
        The stored element type.
    expert
        The index of the expert in its stack; None for other matrices.
    """

    name: str
    module: str
    kind: Kind
    shape: tuple[int, int]
    dtype: str
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """A tensor without a row in the report.

    Attributes
    ----------
    name
        Name of the tensor.
    shape
        Shape of the tensor; empty if it has none.
    reason
        The reason why the tensor has no row.
    """

    name: str
    shape: tuple[int, ...]
    reason: str

    @property
    def is_tied(self) -> bool:
        """True if the tensor shares its values with another tensor."""
        return self.reason.startswith("tied to ")


@dataclass(frozen=True, slots=True)
class SourceMatrix:
    """A matrix of a source, whose values are read on demand.

    Attributes
    ----------
    info
        The identity of the matrix.
    load
        A function that returns the matrix for the core. It allocates no memory unless `lazy` is True.
    lazy
        True if `load` dequantizes values or copies them from a device; such matrices are loaded a few at a
        time.
    transposed
        True if `load` returns ``(in, out)``, as Conv1D layers and some experts are stored.
    kernel
        Shape ``(in, kh, kw)`` of the kernel of a convolution, whose matrix is flattened; empty for other
        matrices.
    """

    info: MatrixInfo
    load: Callable[[], Matrix]
    lazy: bool = False
    transposed: bool = False
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Source:
    """An opened source.

    Attributes
    ----------
    label
        The name of the source in tables and reports.
    matrices
        The matrices that can be analysed, in the order of the source.
    skipped
        The tensors without matrices, with the reasons.
    num_parameters
        Number of parameters of the model, counting tied parameters once; None if unknown.
    fingerprint
        Digest of the files, by which an interrupted run can be resumed; None for sources in memory.
    unknown_parameters
        The reason why `num_parameters` is None.
    facts
        Facts about the model other than its matrices.
    skeleton
        The skeleton of the model, by which its matrices are named; None if names were guessed.
    skipped_values
        Functions that read skipped floating-point tensors as matrices of one row, by the tensor's name.
    """

    label: str
    matrices: Sequence[SourceMatrix]
    skipped: tuple[Skipped, ...]
    num_parameters: int | None
    fingerprint: str | None = None
    unknown_parameters: str = ""
    facts: ModelFacts = field(default_factory=ModelFacts)
    skeleton: Skeleton | None = field(default=None, repr=False)
    skipped_values: Mapping[str, Callable[[], Matrix]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        """Refuse two matrices of one name, because reports would show one of them."""
        seen: set[str] = set()
        for matrix in self.matrices:
            if matrix.info.name in seen:
                raise FormatError(
                    f"{self.label}: two tensors define the matrix {matrix.info.name!r}: rename one of them"
                )
            seen.add(matrix.info.name)

    def select(self, include: naming.Targets = None, exclude: naming.Targets = None) -> Source:
        """Return the source with only the matrices whose module is included and not excluded."""
        if include is None and exclude is None:
            return self
        # A parameter that PEFT adapts by its name is also selected by the name of its module.
        modules = {matrix.info.module for matrix in self.matrices}
        spellings = {module: set(naming.spellings(module)) for module in modules}
        names = set().union(*spellings.values())
        included = set(naming.filtered(names, include, None))
        excluded = names - set(naming.filtered(names, None, exclude))
        chosen = {
            module for module, spelled in spellings.items() if spelled & included and not spelled & excluded
        }
        indices = array("Q", (i for i, m in enumerate(self.matrices) if m.info.module in chosen))
        return replace(self, matrices=Mapped(self.matrices.__getitem__, indices))
