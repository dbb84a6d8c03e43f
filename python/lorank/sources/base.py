"""What every source hands over: a list of matrices, and a list of what is no matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from lorank._core import Matrix
from lorank.modules import naming
from lorank.modules.facts import ModelFacts
from lorank.modules.skeleton import Skeleton
from lorank.modules.weight import Kind


@dataclass(frozen=True, slots=True)
class MatrixInfo:
    """One matrix of a model.

    Attributes
    ----------
    name
        The module's dotted name; an expert's is its parameter's name with its number in brackets.
    module
        The module, or for experts the stacked parameter, that an adapter would name.
    kind
        What the module does with its weight.
    shape
        `(out, in)`; kernels of convolutions are flattened to `(out, in * kh * kw)`.
    dtype
        The stored element type.
    expert
        The expert's number in its stack, else None.
    """

    name: str
    module: str
    kind: Kind
    shape: tuple[int, int]
    dtype: str
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """A tensor without a row in the report, and why.

    Attributes
    ----------
    name, shape, reason
        What was found.
    load
        Returns its values as one row, where it holds floating-point numbers that can be read.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    load: Callable[[], Matrix] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class SourceMatrix:
    """A matrix and the way to its values.

    Attributes
    ----------
    info
        What it is.
    load
        Returns the matrix for the core; cheap unless the source is `lazy`.
    lazy
        Whether `load` materialises the values (dequantizes, copies from a device): such matrices
        are loaded a few at a time.
    transposed
        Whether `load` returns ``(in, out)``: how Conv1D layers and some experts are stored.
    kernel
        ``(in, kh, kw)`` of a convolution, whose matrix is flattened.
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
        What to call it in tables and reports.
    matrices
        In the source's own order.
    skipped
        Everything else.
    num_parameters
        Parameters of the whole model, tied ones once; None where that is unknown.
    fingerprint
        Identifies the content of files, so that an interrupted run can be resumed; None for what
        lives in memory.
    unknown_parameters
        The reason why `num_parameters` is None.
    facts
        Facts about the model beside its matrices.
    skeleton
        The model's own description, by which its matrices are named; None if names were guessed.
    """

    label: str
    matrices: tuple[SourceMatrix, ...]
    skipped: tuple[Skipped, ...]
    num_parameters: int | None
    fingerprint: str | None = None
    unknown_parameters: str = ""
    facts: ModelFacts = field(default_factory=ModelFacts)
    skeleton: Skeleton | None = field(default=None, repr=False)

    def select(self, include: naming.Targets = None, exclude: naming.Targets = None) -> Source:
        """The same source with the matrices whose module is included and not excluded."""
        if include is None and exclude is None:
            return self
        # The name of its module, too, selects a parameter that PEFT adapts by its own name.
        spellings = {m.info.module: set(naming.spellings(m.info.module)) for m in self.matrices}
        names = set().union(*spellings.values())
        included = set(naming.filtered(names, include, None))
        excluded = names - set(naming.filtered(names, None, exclude))
        matrices = [
            matrix
            for matrix in self.matrices
            if (spelled := spellings[matrix.info.module]) & included and not spelled & excluded
        ]
        return replace(self, matrices=tuple(matrices))
