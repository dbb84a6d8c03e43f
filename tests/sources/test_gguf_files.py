"""Tests of GGUF files that are split, damaged, named otherwise, unknown, or adapters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import lorank
from lorank._core import FormatError
from lorank.sources import open_source

SIZE = 32


def write(
    path: Path,
    tensors: dict[str, tuple[int, ...]],
    architecture: str = "llama",
    settings: dict[str, Any] | None = None,
    **split: int,
) -> Path:
    """Write random float32 tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (settings or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    for key, value in split.items():
        writer.add_uint16(f"split.{key}", value)
    rng = np.random.default_rng(0)
    for name, shape in tensors.items():
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def block(number: int) -> dict[str, tuple[int, ...]]:
    return {f"blk.{number}.{part}.weight": (SIZE, SIZE) for part in ("attn_q", "attn_k", "attn_v", "ffn_up")}


def names(path: Path) -> list[str]:
    return [matrix.info.name for matrix in open_source(path).matrices]


def test_parts_of_a_model_are_one_source(tmp_path: Path) -> None:
    for part in (1, 2, 3):
        path = tmp_path / f"m-{part:05}-of-00003.gguf"
        write(path, block(part - 1), no=part - 1, count=3)
    first = names(tmp_path / "m-00001-of-00003.gguf")
    assert len(first) == 12
    assert "model.layers.2.self_attn.q_proj" in first
    assert names(tmp_path / "m-00003-of-00003.gguf") == names(tmp_path) == first


def test_incomplete_or_renamed_parts_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m-00001-of-00002.gguf", block(0), no=0, count=2)
    with pytest.raises(OSError, match=r"m-00002-of-00002\.gguf"):
        open_source(path)
    with pytest.raises(FormatError, match="is part 1 of 2 of a model"):
        open_source(path.rename(tmp_path / "m.gguf"))
    write(path, block(0), no=1, count=2)
    with pytest.raises(FormatError, match="part 2 of 2 by its settings, but part 1 of 2"):
        open_source(path)


def test_file_is_recognised_by_its_content(tmp_path: Path) -> None:
    path = write(tmp_path / "sha256-0123456789abcdef", block(0))
    assert len(names(path)) == 4


def test_folder_with_several_models_asks_for_one(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write(tmp_path / name, block(0))
    with pytest.raises(FormatError, match=r"several GGUF files: name one of them.*a\.gguf"):
        open_source(tmp_path)
    assert len(names(tmp_path / "b.gguf")) == 4


def test_adapter_is_refused(tmp_path: Path) -> None:
    tensors = {"blk.0.attn_q.weight.lora_a": (4, SIZE), "blk.0.attn_q.weight.lora_b": (SIZE, 4)}
    path = write(tmp_path / "a.gguf", tensors, settings={"general.type": "adapter"})
    with pytest.raises(FormatError, match="adapter") as error:
        lorank.analyze(path)
    assert "lorank info" in str(error.value)


def test_unknown_architecture_keeps_the_names_of_llama_cpp(tmp_path: Path) -> None:
    tensors = {
        "token_embd.weight": (64, SIZE),
        "output.weight": (64, SIZE),
        "blk.0.ffn_up_exps.weight": (4, SIZE, SIZE),
        **block(0),
    }
    source = open_source(write(tmp_path / "m.gguf", tensors, "unheard-of"))
    kinds = {matrix.info.name: matrix.info.kind for matrix in source.matrices}
    assert kinds.pop("token_embd") == "embedding"
    assert kinds.pop("output") == "linear"
    experts = {name for name, kind in kinds.items() if kind == "expert"}
    assert experts == {f"blk.0.ffn_up_exps[{i}]" for i in range(4)}
    assert kinds.keys() - experts == {name.removesuffix(".weight") for name in block(0)}
    assert source.num_parameters == 2 * 64 * SIZE + 8 * SIZE * SIZE


def test_names_are_those_of_transformers_without_transformers(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", block(0))
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'gguf'): sys.modules[name] = None\n"
        "import importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('torch', 'transformers') else found(name, *a)\n"
        "import lorank\n"
        f"print([row.name for row in lorank.analyze({str(path)!r})])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert "model.layers.0.self_attn.q_proj" in run.stdout


def test_damaged_files_are_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", block(0), settings={"general.name": "tiny"})
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    messages = []
    for _ in range(300):
        damaged = bytearray(content[: rng.integers(len(content))] if rng.random() < 0.3 else content)
        for _ in range(rng.integers(1, 4)):
            if damaged:
                damaged[rng.integers(min(len(damaged), 700))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            for matrix in open_source(path).matrices:
                matrix.load().to_array()
        except FormatError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all("m.gguf" in message and "\n" not in message for message in messages)


def test_odd_tensors_are_listed_or_read(tmp_path: Path) -> None:
    tensors = {
        **block(0),
        "token_embd.weight": (),
        "output_norm.weight": (),
        "blk.0.attn_q.bias": (),
        "blk.1.attn_q.weight": (2,),
        "blk.01.attn_v.weight": (SIZE, SIZE),
        "blk.1.attn_v.weight": (SIZE, SIZE),
        "blk.1.ffn_gate_exps.weight": (2, SIZE, SIZE),
        "model.layers.0.self_attn.q_proj.weight": (3, SIZE),
    }
    path = write(tmp_path / "m.gguf", tensors, settings={"llama.attention.head_count": 1 << 31})
    source = open_source(path)
    found = {matrix.info.name: matrix.load().shape for matrix in source.matrices}
    expected = {name.removesuffix(".weight"): shape for name, shape in tensors.items() if len(shape) == 2}
    assert sum(np.prod(shape) for shape in found.values()) == 2 * SIZE**2 + sum(
        np.prod(shape) for shape in expected.values()
    )
    for values in source.skipped_values.values():
        assert values().to_array().size


def test_config_of_another_model_is_not_used(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1}')
    settings = {
        "llama.block_count": 1,
        "llama.embedding_length": SIZE,
        "llama.feed_forward_length": SIZE,
        "llama.attention.head_count": 2,
    }
    tensors = {**block(0), "token_embd.weight": (64, SIZE)}
    source = open_source(write(tmp_path / "m.gguf", tensors, settings=settings))
    assert source.skeleton is not None
    assert source.skeleton.label == "LlamaForCausalLM"


def test_changed_file_has_another_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", block(0))
    first = open_source(path).fingerprint
    assert first == open_source(path).fingerprint
    assert first is not None
    write(path, {**block(0), "output.weight": (64, SIZE)})
    assert open_source(path).fingerprint != first


def test_types_without_a_formula_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    codes = np.zeros((SIZE, 292), dtype=np.uint8)
    writer.add_tensor("blk.0.attn_q.weight", codes, raw_dtype=gguf.GGMLQuantizationType.Q8_K)
    writer.add_tensor("blk.0.attn_v.weight", np.ones((SIZE, SIZE), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_source(path)
    assert [matrix.info.name for matrix in source.matrices] == ["model.layers.0.self_attn.v_proj"]
    assert [(s.name, s.reason) for s in source.skipped] == [
        ("model.layers.0.self_attn.q_proj.weight", "Q8_K values have no spectrum")
    ]
