"""Sources in GGUF files of llama.cpp, under the names, shapes and row orders of the model in transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lorank._core import Checkpoint, FormatError, Matrix
from lorank.modules import naming
from lorank.modules.building import Unknown
from lorank.modules.description import Description, describe_model
from lorank.modules.gguf_architectures import Architecture, architecture
from lorank.modules.gguf_config import Settings, config_of
from lorank.modules.model_config import ModelConfig
from lorank.sources import arrays, recognise
from lorank.sources.assembly import assemble
from lorank.sources.base import Source
from lorank.sources.decodings import GGUF_TYPES
from lorank.sources.fingerprint import fingerprint
from lorank.sources.packing import Packing
from lorank.sources.quantization import Quantization
from lorank.sources.stored_tensors import Entries, StoredTensors

_MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Return True if a file begins as a GGUF file does, whatever its name is."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def open_gguf(path: Path, label: str) -> Source:
    """Open a GGUF file, or all parts of a model given the path of one part.

    Raises
    ------
    FormatError
        If the file is damaged, or holds an adapter.
    """
    checkpoint = Checkpoint(path)
    tensors = checkpoint.tensors()
    settings = Settings(checkpoint.metadata())
    if settings.is_adapter:
        raise FormatError(recognise.refusal(label, "an adapter of llama.cpp (LoRA)"))
    naming.check_sizes(label, [name for name, _, _ in tensors])
    shapes = {name: tuple(shape) for name, _, shape in tensors}
    known = architecture(settings.architecture, settings.number("expert_count"))
    configs = [ModelConfig.read(path)]
    if known is not None and (content := config_of(settings, known, shapes)):
        configs.append(ModelConfig(content, path.parent, f"the header of {path.name}"))
    expected = "" if known is None else known.model_type
    fitting = [config for config in configs if expected in ("", config.model_type, config.text_model_type)]
    config = fitting[0] if fitting else configs[-1]
    stored = GgufTensors(checkpoint, known, settings)
    source = assemble(label, stored, config.without_quantization(), partial(_describe, configs))
    return replace(source, fingerprint=fingerprint(checkpoint.files(), tensors))


def _describe(configs: Sequence[ModelConfig], shapes: Mapping[str, tuple[int, ...]]) -> Description | Unknown:
    """Describe the model by the first configuration that the tensors fit, else by the last.

    The `config.json` beside the file may describe another model.
    """
    found: Description | Unknown = Unknown("there is no config.json beside the weights")
    for config in configs:
        if config.is_empty:
            continue
        found = describe_model(config, shapes)
        if isinstance(found, Description) and not found.placement.misfit(shapes, found.skeleton):
            break
    return found


@dataclass(slots=True)
class _Parameter:
    """A parameter of the model, and the tensors that hold it.

    Attributes
    ----------
    positions
        The positions of the tensors in the file.
    shape
        The shape of the parameter.
    arrangement
        The order of rows: `stacked`, `interleaved`, `heads`, `fused`, or empty for the order of the file.
    heads
        The number of heads, for the orders of heads.
    transposed
        True if the file stores the transposes of the matrices.
    offset
        The number that the file adds to every value.
    """

    positions: list[int]
    shape: tuple[int, ...]
    arrangement: str = ""
    heads: int = 0
    transposed: bool = False
    offset: float = 0.0

    @property
    def unit(self) -> tuple[int, int]:
        """Shape of one matrix."""
        return (self.shape[-2], self.shape[-1]) if len(self.shape) > 1 else (1, self.shape[0])


class GgufTensors:
    """The tensors of a GGUF file as parameters of the model; values stay on disk.

    Tensors without a parameter keep llama.cpp's names.

    Parameters
    ----------
    checkpoint
        The file.
    known
        The architecture; None if it is unknown.
    settings
        The settings of the file.
    """

    is_unordered = True

    def __init__(self, checkpoint: Checkpoint, known: Architecture | None, settings: Settings) -> None:
        self._checkpoint = checkpoint
        self._tensors = checkpoint.tensors()
        self._heads = settings.number("attention.head_count")
        self._key_heads = settings.number("attention.head_count_kv") or self._heads
        self._parameters: dict[str, _Parameter] = {}
        self._entries: dict[str, tuple[str, tuple[int, ...]]] = {}
        for position, (name, _, _) in enumerate(self._tensors):
            parameter = None if known is None else known.parameter(name)
            if (found := self._parameters.get(parameter or name)) is not None:
                found.positions.append(position)
            elif known is None or parameter is None:
                self._add(name, _Parameter([position], self._shape(position)))
            else:
                self._add(parameter, self._described(known, position))
        for name in [name for name, found in self._parameters.items() if len(found.positions) > 1]:
            self._merge(name, known)

    def _shape(self, position: int) -> tuple[int, ...]:
        return tuple(self._tensors[position][2])

    def _add(self, name: str, parameter: _Parameter) -> None:
        self._parameters[name] = parameter
        self._entries[name] = (self._tensors[parameter.positions[0]][1], parameter.shape)

    def _described(self, known: Architecture, position: int) -> _Parameter:
        """Return the parameter that a single tensor is."""
        tensor, shape = self._tensors[position][0], self._shape(position)
        found = _Parameter([position], shape)
        if not shape:
            return found
        part, _, suffix = tensor.rpartition(".")
        part = part.rpartition(".")[2]
        if known.norm_offset and part.endswith("norm") and suffix == "weight":
            found.offset = known.norm_offset
        if part in ("attn_q", "attn_k") and known.has_rotary_order:
            found.arrangement, found.heads = "heads", self._heads if part == "attn_q" else self._key_heads
        if part == "attn_qkv" and known.fused_heads and self._heads and self._heads % self._key_heads == 0:
            found.arrangement, found.heads = "fused", self._key_heads
        is_stack = len(shape) == 3 and known.is_interleaved and part.endswith("_exps")
        if suffix == "weight" and (part in known.transposed or is_stack) and len(shape) > 1:
            found.shape, found.transposed = (*shape[:-2], shape[-1], shape[-2]), True
        if part == "ffn_gate_inp_shexp" and len(shape) == 1:
            found.shape = (1, *shape)
        return found

    def _merge(self, name: str, known: Architecture | None) -> None:
        """Make one parameter of gate and up projections; keep tensors apart that do not fit each other."""
        found = self._parameters[name]
        by_name = {
            self._tensors[k][0].split(".")[2]: k for k in found.positions if "_exps" in self._tensors[k][0]
        }
        positions = [by_name[part] for part in ("ffn_gate_exps", "ffn_up_exps") if part in by_name]
        shapes = {self._shape(position) for position in positions}
        is_pair = len(positions) == len(found.positions) == 2 and len(shapes) == 1
        if known is None or not is_pair or len(found.shape) != 3:
            del self._parameters[name], self._entries[name]
            for position in found.positions:
                self._add(self._tensors[position][0], _Parameter([position], self._shape(position)))
            return
        experts, rows, cols = self._shape(positions[0])
        shape = (experts, cols, 2 * rows) if found.transposed else (experts, 2 * rows, cols)
        arrangement = "interleaved" if known.is_interleaved else "stacked"
        self._add(name, replace(found, positions=positions, shape=shape, arrangement=arrangement))

    def entries(self) -> Entries:
        """Return the element type and shape of every parameter by its name, in the order of the file."""
        return self._entries

    def is_lazy(self, name: str) -> bool:
        """Return False: a view of a file copies no values."""
        del name
        return False

    def matrix(self, name: str, rows: int, cols: int, index: int = 0) -> Matrix:
        """Return the `index`-th matrix of a parameter."""
        found = self._parameters[name]
        if found.offset:
            values = self._read(found.positions[0], rows, cols, index).to_array()
            return arrays.matrix(values - values.dtype.type(found.offset))
        if not found.arrangement and not found.transposed:
            return self._read(found.positions[0], rows, cols, index)
        if (rows, cols) == found.unit and len(found.shape) > 1:
            return self._arranged(found, index)
        # A row with all values, for tensors that are no matrices.
        if len(found.shape) == 1:
            column = replace(found, shape=(found.shape[0], 1))
            return self._arranged(column, 0).transposed()
        count = found.shape[0] if len(found.shape) == 3 else 1
        parts = [self._arranged(found, i) for i in range(count)]
        whole = Matrix.arranged(parts, "stacked").to_array()
        return arrays.matrix(whole.reshape(-1, rows, cols)[index])

    def _arranged(self, found: _Parameter, index: int) -> Matrix:
        """Return a matrix of a parameter whose rows have another order in the file."""
        rows, cols = found.unit[::-1] if found.transposed else found.unit
        first = found.positions[0]
        if found.arrangement in ("stacked", "interleaved"):
            count = len(found.positions)
            parts = [self._read(position, rows // count, cols, index) for position in found.positions]
            matrix = Matrix.arranged(parts, found.arrangement)
        elif found.arrangement == "heads" and found.heads and rows % (2 * found.heads) == 0:
            matrix = Matrix.arranged([self._read(first, rows, cols, index)], "heads", found.heads)
        elif found.arrangement == "fused" and rows % (self._heads + 2 * found.heads) == 0:
            matrix = Matrix.arranged(self._fused(found, first, rows, cols), "stacked")
        else:
            matrix = self._read(first, rows, cols, index)
        return matrix.transposed() if found.transposed else matrix

    def _fused(self, found: _Parameter, position: int, rows: int, cols: int) -> list[Matrix]:
        """Return the queries, the key and the value of each head of keys."""
        size = rows // (self._heads + 2 * found.heads)
        group = self._heads // found.heads
        parts = []
        for head in range(found.heads):
            parts.append(self._read(position, group * size, cols, head))
            parts.append(self._read(position, size, cols, self._heads + head))
            parts.append(self._read(position, size, cols, self._heads + found.heads + head))
        return parts

    def _read(self, position: int, rows: int, cols: int, index: int) -> Matrix:
        """Return the `index`-th matrix of a tensor."""
        if self._tensors[position][1] in GGUF_TYPES:
            return self._checkpoint.dequantized("gguf", {"codes": position}, {}, (rows, cols), index)
        return self._checkpoint.matrix(position, rows, cols, index)

    def shared_with(self, name: str) -> str | None:
        """Return None: files hold each tensor once."""
        del name
        return None

    def are_equal(self, a: str, b: str) -> bool:
        """Return True if two parameters hold the same bytes in the same order."""
        one, other = self._parameters[a], self._parameters[b]
        if replace(one, positions=[]) != replace(other, positions=[]) or self._types(one) != self._types(
            other
        ):
            return False
        pairs = zip(one.positions, other.positions, strict=True)
        return all(self._bytes(i) == self._bytes(j) for i, j in pairs)

    def _types(self, parameter: _Parameter) -> list[str]:
        return [self._tensors[position][1] for position in parameter.positions]

    def _bytes(self, position: int) -> bytes:
        return self._checkpoint.stored_bytes(position)

    def content(self, name: str) -> bytes | None:
        """Return the bytes of a parameter; None if the file stores other bytes than the model."""
        found = self._parameters[name]
        is_stored = not (found.arrangement or found.transposed or found.offset)
        return self._bytes(found.positions[0]) if is_stored else None

    def decoded(self, packing: Packing, quantization: Quantization) -> StoredTensors:
        """Return the tensors themselves: they are decoded."""
        del packing, quantization
        return self

    @property
    def metadata(self) -> Mapping[str, str]:
        """Return an empty mapping: the settings describe no packed weights."""
        return {}
