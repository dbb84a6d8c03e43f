"""Sources on disk: every format gives the same rows, and hostile files raise clear errors."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

import lorank

EXECUTABLE = Path(sys.executable).with_name("lorank")
RNG = np.random.default_rng(0)
WEIGHTS = {
    "model.embed_tokens.weight": RNG.standard_normal((30, 8)).astype(np.float32),
    **{
        f"model.layers.{i}.{name}.weight": RNG.standard_normal(shape).astype(np.float32)
        for i in (0, 1, 2, 10)
        for name, shape in {"q_proj": (8, 8), "up_proj": (20, 8), "down_proj": (8, 20)}.items()
    },
    "model.norm.weight": np.ones(8, dtype=np.float32),
    "model.position_ids": np.arange(6).reshape(2, 3),
}


def rows(source: Any) -> dict[str, tuple[Any, ...]]:
    report = lorank.analyze(source, progress=False)
    return {row.name: (row.kind, row.shape, row.alpha_hill, row.mp_spikes) for row in report}


def shards(folder: Path) -> Path:
    names = list(WEIGHTS)
    index: dict[str, str] = {}
    for k in range(3):
        file = f"model-0000{k + 1}-of-00003.safetensors"
        save_file({name: WEIGHTS[name] for name in names[k::3]}, folder / file)
        index |= dict.fromkeys(names[k::3], file)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return path


def single(folder: Path) -> Path:
    save_file(WEIGHTS, folder / "model.safetensors")
    return folder / "model.safetensors"


def pickled(folder: Path) -> Path:
    tensors = {name: torch.from_numpy(value) for name, value in WEIGHTS.items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def wrapped(folder: Path) -> Path:
    tensors = {name: torch.from_numpy(value) for name, value in WEIGHTS.items()}
    torch.save({"epoch": 3, "state_dict": tensors}, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def pickled_shards(folder: Path) -> Path:
    names = list(WEIGHTS)
    index = {}
    for k in range(2):
        file = f"pytorch_model-0000{k + 1}-of-00002.bin"
        torch.save({name: torch.from_numpy(WEIGHTS[name]) for name in names[k::2]}, folder / file)
        index |= dict.fromkeys(names[k::2], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def hub_cache(folder: Path, make: Callable[[Path], object] = shards) -> Path:
    """Return a hub cache, which links files into a folder of blobs."""
    repo = folder / "models--acme--tiny"
    snapshot, blobs = repo / "snapshots" / "abc123", repo / "blobs"
    for path in (snapshot, blobs, repo / "refs"):
        path.mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc123")
    make(snapshot)
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / f"{number:040x}")
        file.symlink_to(Path("..") / ".." / "blobs" / f"{number:040x}")
    return snapshot


@pytest.mark.parametrize(
    "make", [single, shards, pickled, wrapped, pickled_shards, hub_cache], ids=lambda make: make.__name__
)
def test_every_format_gives_the_same_rows(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    expected = rows(WEIGHTS)
    path = make(tmp_path)
    assert rows(path) == expected
    matrices = {name: w.shape for name, w in WEIGHTS.items() if w.ndim == 2 and w.dtype == np.float32}
    assert {f"{name}.weight": row[1] for name, row in expected.items()} == matrices
    assert len(expected) == 13
    assert expected["model.embed_tokens"][:2] == ("embedding", (30, 8))
    if make is not wrapped and path.is_file():
        assert rows(path.parent) == expected
    report = lorank.analyze(path)
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert set(reasons) == {"model.norm.weight", "model.position_ids"}
    assert reasons["model.norm.weight"] == "1-D tensor"
    assert reasons["model.position_ids"] in {"I64 values have no spectrum", "int64 values have no spectrum"}
    assert report.num_parameters == sum(w.size for w in WEIGHTS.values() if w.dtype == np.float32)


def test_blocks_are_sorted_by_number(tmp_path: Path) -> None:
    names = [row.name for row in lorank.analyze(shards(tmp_path))]
    assert [n for n in names if "q_proj" in n] == [f"model.layers.{i}.q_proj" for i in (0, 1, 2, 10)]


def offline(code: str, **where: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    environment |= {name: str(path) for name, path in where.items()} | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [str(EXECUTABLE), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def refused(result: subprocess.CompletedProcess[str], *parts: str, free_of: tuple[str, ...] = ()) -> None:
    """Check for status 1 and one line with the given parts of the error."""
    assert "Traceback" not in result.stderr
    assert "panicked" not in result.stderr
    assert result.returncode == 1
    (message,) = (line for line in result.stderr.splitlines() if line.startswith("lorank: "))
    assert result.stderr.splitlines()[-1] == message
    for part in parts:
        assert part in message
    for part in free_of:
        assert part not in message


@pytest.mark.parametrize("make", [shards, single, pickled], ids=lambda make: make.__name__)
def test_hub_id_is_found_in_the_cache(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    hub_cache(tmp_path, make)
    code = "import lorank; print(len(lorank.analyze({!r})))"
    for name in ("acme/tiny", "acme/tiny@main"):
        result = offline(code.format(name), HF_HUB_CACHE=tmp_path)
        assert result.stdout.strip() == "13", result.stderr
    result = offline(code.format("acme/other"), HF_HUB_CACHE=tmp_path)
    assert "FileNotFoundError: acme/other: no such file or folder, and the hub model" in result.stderr


def test_hub_id_is_found_under_hf_home(tmp_path: Path) -> None:
    hub_cache(tmp_path / "hub")
    result = offline("import lorank; print(len(lorank.analyze('acme/tiny')))", HF_HOME=tmp_path)
    assert result.stdout.strip() == "13", result.stderr


def test_hub_id_missing_from_the_cache_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(command("analyze", "acme/other"), "acme/other", "neither in the local cache nor")


class Malicious:
    """An object that creates a folder when an ordinary reader unpickles it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("save_as", ["zip", "legacy", "plain"])
def test_pickles_never_execute_code(tmp_path: Path, save_as: str) -> None:
    path, marker = tmp_path / "model.bin", tmp_path / "marker"
    content = {"a.weight": torch.eye(3), "b": Malicious(marker)}
    if save_as == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=save_as == "zip")
    with pytest.raises(lorank.FormatError, match=r"model\.bin: is not a state dict that can be read safely"):
        lorank.analyze(path)
    assert not marker.exists()


def test_malicious_shard_fails_the_command_line(tmp_path: Path) -> None:
    folder, marker = pickled_shards(tmp_path), tmp_path / "marker"
    torch.save({"a.weight": Malicious(marker)}, folder / "pytorch_model-00002-of-00002.bin")
    refused(
        command("analyze", folder),
        "pytorch_model-00002-of-00002.bin",
        "is not a state dict that can be read safely",
        "it refers to posix.mkdir",
        free_of=("weights_only=", "trusted source", "\x1b"),
    )
    assert not marker.exists()


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_truncated_pickles_raise(tmp_path: Path, keep: float) -> None:
    path = pickled(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(lorank.FormatError, match=r"pytorch_model\.bin: is not a state dict"):
        lorank.analyze(path)


@pytest.mark.parametrize("layout", ["sparse", "compressed"])
def test_sparse_tensor_is_skipped(tmp_path: Path, layout: str) -> None:
    path, weight = tmp_path / "model.pt", torch.eye(3)
    tensor = weight.to_sparse() if layout == "sparse" else weight.to_sparse_csr()
    torch.save({"a.weight": tensor, "b.weight": torch.ones(2, 2)}, path)
    report = lorank.analyze(path)
    assert [row.name for row in report] == ["b"]
    assert [(entry.name, entry.reason.partition(":")[0]) for entry in report.skipped] == [
        ("a.weight", "a sparse tensor")
    ]
    assert "Traceback" not in command("analyze", path).stderr


@pytest.mark.parametrize("content", [b"", b"junk", [1, 2], {"a": {"b": 1}, "c": 2}, {1: torch.eye(2)}])
def test_other_pickles_raise(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises((lorank.FormatError, ValueError), match=r"model\.pt"):
        lorank.analyze(path)


@pytest.mark.parametrize(
    "dtype",
    [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2],
)
def test_small_float_types_are_converted_exactly(tmp_path: Path, dtype: Any) -> None:
    weight = RNG.standard_normal((12, 20)).astype(dtype)
    path = tmp_path / "a.safetensors"
    names = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
    name = names.get(np.dtype(dtype).name, f"F{8 * weight.itemsize}")
    raw(path, {"a.weight": (name, [12, 20])}, weight.tobytes())
    (row,) = lorank.analyze(path, keep_eigenvalues=True)
    expected = np.linalg.svd(weight.astype(np.float64), compute_uv=False)[::-1] ** 2
    np.testing.assert_allclose(row.eigenvalues, expected, rtol=1e-10, atol=1e-12 * expected[-1])


def test_conv1d_convolutions_and_experts_have_their_kinds(tmp_path: Path) -> None:
    weights = {
        "h.0.attn.c_attn.weight": RNG.standard_normal((8, 24)),
        "conv.weight": RNG.standard_normal((6, 3, 2, 2)),
        "layers.0.mlp.experts.gate_up_proj": RNG.standard_normal((4, 8, 16)),
    }
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    report = lorank.analyze(tmp_path, keep_eigenvalues=True)
    assert report["h.0.attn.c_attn"].shape == (24, 8)
    assert (report["conv"].kind, report["conv"].shape) == ("conv", (6, 12))
    experts = [row for row in report if row.kind == "expert"]
    assert [row.expert for row in experts] == [0, 1, 2, 3]
    assert {row.module for row in experts} == {"layers.0.mlp.experts.gate_up_proj"}
    for row in experts:
        values = np.linalg.svd(weights[row.module][row.expert], compute_uv=False)[::-1] ** 2
        np.testing.assert_allclose(row.eigenvalues, values, rtol=1e-10)


@pytest.mark.parametrize(
    ("config", "stored", "shape"),
    [
        ({"model_type": "gpt2"}, (8, 24), (24, 8)),
        ({"model_type": "llama"}, (8, 24), (8, 24)),
        (None, (8, 24), (24, 8)),  # three times as many columns as rows: the shape of Conv1D
        (None, (24, 8), (24, 8)),
    ],
)
def test_conv1d_and_linear_layers_are_distinguished(
    tmp_path: Path, config: dict[str, str] | None, stored: tuple[int, int], shape: tuple[int, int]
) -> None:
    weights = {
        "h.0.attn.c_attn.weight": RNG.standard_normal(stored),
        "wte.weight": RNG.standard_normal((30, 8)),
    }
    save_file(weights, tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    report = lorank.analyze(tmp_path)
    assert (report["c_attn"].kind, report["c_attn"].shape) == ("linear", shape)
    assert (report["wte"].kind, report["wte"].shape) == ("embedding", (30, 8))


@pytest.mark.parametrize(
    "config",
    ["[1]", "junk", "\0", '{"model_type": ["gpt2"]}', '{"text_config": {"model_type": {}}}', "[" * 100_000],
    ids=["list", "junk", "nul", "type is a list", "nested type is an object", "deep"],
)
def test_damaged_configuration_is_ignored(tmp_path: Path, config: str) -> None:
    single(tmp_path)
    (tmp_path / "config.json").write_text(config)
    assert rows(tmp_path) == rows(WEIGHTS)


def test_tied_tensors_count_once(tmp_path: Path) -> None:
    weight = torch.randn(5, 4)
    tensors = {"a.weight": weight, "b.weight": weight.view(5, 4), "c.weight": weight.clone()}
    torch.save(tensors, tmp_path / "model.bin")
    for source in (tensors, tmp_path / "model.bin"):
        report = lorank.analyze(source)
        assert [row.name for row in report] == ["a", "c"]
        assert [(entry.name, entry.reason) for entry in report.skipped] == [("b.weight", "tied to a.weight")]
        assert report.num_parameters == 40


def test_tied_arrays_count_once() -> None:
    weight = RNG.standard_normal((5, 4))
    report = lorank.analyze({"a.weight": weight, "b.weight": weight, "c.weight": weight.copy()})
    assert [row.name for row in report] == ["a", "c"]
    assert [(entry.name, entry.reason) for entry in report.skipped] == [("b.weight", "tied to a.weight")]
    assert report.num_parameters == 40


def raw(path: Path, tensors: dict[str, Any], data: bytes = b"\0" * 256, header: bytes | None = None) -> Path:
    """Write a file with any header; a tensor has a type, a shape, and offsets if they are not consecutive."""
    entries, offset = {}, 0
    for name, (dtype, shape, *offsets) in tensors.items():
        size = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(dtype, 1) * int(np.prod(shape))
        begin, end = offsets[0] if offsets else (offset, offset + size)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        offset = end
    text = json.dumps(entries).encode() if header is None else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty file": (lambda p: p.write_bytes(b""), "only 0 bytes"),
    "truncated length": (lambda p: p.write_bytes(b"\1\2\3"), "only 3 bytes"),
    "absurd length": (
        lambda p: p.write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        "header of 1152921504606846976",
    ),
    "truncated header": (lambda p: p.write_bytes(save(WEIGHTS)[:100]), "truncated"),
    "truncated data": (lambda p: p.write_bytes(save(WEIGHTS)[:-10]), "truncated"),
    "no json": (lambda p: raw(p, {}, header=b"hello"), "malformed header"),
    "a list": (lambda p: raw(p, {}, header=b"[1]"), "malformed header"),
    "negative shape": (
        lambda p: raw(p, {}, header=b'{"a":{"dtype":"F32","shape":[-1,2],"data_offsets":[0,8]}}'),
        "tensor `a`",
    ),
    "overlap": (
        lambda p: raw(p, {"a": ("F32", [2, 2], (0, 16)), "b": ("F32", [2, 2], (8, 24))}),
        "tensor `b`: its bytes overlap those of `a`",
    ),
    "out of range": (
        lambda p: raw(p, {"a": ("F32", [2, 2], (4000, 4016))}),
        "tensor `a`: offsets 4000 to 4016",
    ),
    "backwards": (lambda p: raw(p, {"a": ("F32", [2, 2], (16, 0))}), "tensor `a`: offsets 16 to 0"),
    "wrong size": (lambda p: raw(p, {"a": ("F32", [2, 2], (0, 12))}), "tensor `a`: F32 of shape"),
    "type and size": (lambda p: raw(p, {"a": ("F64", [2, 2], (0, 16))}), "tensor `a`: F64 of shape"),
    "no type": (
        lambda p: raw(p, {}, header=b'{"a":{"shape":[1,2],"data_offsets":[0,8]}}'),
        "tensor `a`: missing field `dtype`",
    ),
    "no utf-8": (lambda p: raw(p, {}, header=b'{"a\xff":1}'), "malformed header"),
    "deep": (lambda p: raw(p, {}, header=b"[" * 100_000), "malformed header"),
    "overflow": (lambda p: raw(p, {"a": ("F32", [2**40, 2**40], (0, 16))}), "tensor `a`: shape"),
    "twice": (
        lambda p: raw(
            p,
            {},
            header=b'{"a":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1,1],"data_offsets":[4,8]}}',
        ),
        "tensor `a`: appears twice",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_raise(tmp_path: Path, case: str) -> None:
    write, reason = HOSTILE[case]
    path = tmp_path / "bad.safetensors"
    write(path)
    with pytest.raises(lorank.FormatError) as error:
        lorank.analyze(path)
    assert "bad.safetensors" in str(error.value)
    assert reason in str(error.value)


def test_tensor_of_an_unknown_type_is_skipped(tmp_path: Path) -> None:
    path = raw(tmp_path / "a.safetensors", {"a.weight": ("F7", [2, 2]), "b.weight": ("F32", [2, 2])})
    report = lorank.analyze(path)
    assert [row.name for row in report] == ["b"]
    assert [(entry.name, entry.reason) for entry in report.skipped] == [
        ("a.weight", "F7 values have no spectrum")
    ]


def test_unused_bytes_are_ignored(tmp_path: Path) -> None:
    # The format's own library refuses such files; this reader takes them (rust/lorank/tests/files).
    a, b = (RNG.standard_normal((2, 3)) for _ in range(2))
    tensors = {"a.weight": ("F64", [2, 3], (8, 56)), "b.weight": ("F64", [2, 3], (64, 112))}
    data = b"\xff" * 8 + a.tobytes() + b"\xff" * 8 + b.tobytes() + b"\xff" * 40
    path = raw(tmp_path / "a.safetensors", tensors, data)
    assert rows(path) == rows({"a.weight": a, "b.weight": b})


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("", "is no shard index"),
        ("{}", "is no shard index"),
        ("[" * 100_000, "is no shard index"),
        ("not json", "is no shard index"),
        ("[]", "is no shard index"),
        ('{"weight_map": {"a": 3}}', "is no shard index"),
        ('{"weight_map": {"a": "../outside.safetensors"}}', "tensor `a`: lies in `../outside.safetensors`"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "not a plain file name"),
        ('{"weight_map": {"a": ""}}', "not a plain file name"),
        ('{"weight_map": {"a": "missing.safetensors"}}', "missing.safetensors"),
        ('{"weight_map": {"a": "model.safetensors"}}', "tensor `a`: the index says it lies in"),
    ],
)
def test_hostile_indices_raise(tmp_path: Path, index: str, reason: str) -> None:
    single(tmp_path)
    single(tmp_path.parent).rename(tmp_path.parent / "outside.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(index)
    with pytest.raises((lorank.FormatError, FileNotFoundError)) as error:
        lorank.analyze(path)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("", "is not a shard index"),
        ("not json", "is not a shard index"),
        ("[]", "is not a shard index"),
        ("{}", "is not a shard index"),
        ("[" * 100_000, "is not a shard index"),
        ('{"weight_map": {"a": 3}}', "not a plain file name"),
        ('{"weight_map": {"a": "../outside.bin"}}', "not a plain file name"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "not a plain file name"),
        ('{"weight_map": {"a": "missing.bin"}}', "missing.bin"),
        ('{"weight_map": {"absent.weight": "pytorch_model.bin"}}', "absent.weight"),
    ],
    ids=["empty", "junk", "list", "text", "deep", "number", "outside", "absolute", "no shard", "no tensor"],
)
def test_hostile_indices_of_pickles_raise(tmp_path: Path, index: str, reason: str) -> None:
    pickled(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    with pytest.raises((lorank.FormatError, FileNotFoundError)) as error:
        lorank.analyze(tmp_path)
    assert reason in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_paths_without_weights_raise(tmp_path: Path) -> None:
    with pytest.raises(lorank.FormatError, match=r"holds no \.safetensors or \.bin file"):
        lorank.analyze(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(lorank.FormatError, match=r"notes\.txt: expected"):
        lorank.analyze(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        lorank.analyze(tmp_path / "none")
    with pytest.raises(TypeError, match="cannot read weights from a int"):
        lorank.analyze(3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_values_flag_their_row(tmp_path: Path, bad: float) -> None:
    broken = WEIGHTS["model.layers.1.q_proj.weight"].copy()
    broken[3, 4] = bad
    save_file({**WEIGHTS, "model.layers.1.q_proj.weight": broken}, tmp_path / "model.safetensors")
    report = lorank.analyze(tmp_path)
    row = report["model.layers.1.q_proj"]
    assert "NaN or infinite" in row.flags[0]
    assert not row.has_spectrum
    expected = rows(WEIGHTS)
    for other in report:
        if other is not row:
            assert (other.kind, other.shape, other.alpha_hill, other.mp_spikes) == expected[other.name]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinite_values_fail_the_command_line(tmp_path: Path, bad: float) -> None:
    broken = np.full((3, 4), bad, dtype=np.float32)
    save_file({**WEIGHTS, "model.layers.1.q_proj.weight": broken}, tmp_path / "model.safetensors")
    result = command("analyze", tmp_path)
    refused(result, "1 of 13 matrices have no spectrum", "model.layers.1.q_proj", "NaN or infinite values")
    assert "model.layers.10.q_proj" in result.stdout


def test_empty_tensor_is_skipped(tmp_path: Path) -> None:
    weight = RNG.standard_normal((2, 2))
    tensors = {"a.weight": ("F64", [0, 4]), "b.weight": ("F64", [2, 2])}
    path = raw(tmp_path / "a.safetensors", tensors, weight.tobytes())
    for source in (path, {"a.weight": np.empty((0, 4)), "b.weight": weight}):
        assert rows(source) == rows({"b.weight": weight})
        (skipped,) = lorank.analyze(source).skipped
        assert (skipped.name, skipped.shape, skipped.reason) == ("a.weight", (0, 4), "empty tensor")
    alone = raw(tmp_path / "alone.safetensors", {"a.weight": ("F64", [0, 4])}, b"")
    with pytest.raises(ValueError, match=r"alone\.safetensors: holds no weight matrix"):
        lorank.analyze(alone)


@pytest.mark.parametrize(
    "case", ["empty file", "absurd length", "truncated header", "truncated data", "no json", "overlap"]
)
def test_hostile_files_fail_the_command_line_with_one_line(tmp_path: Path, case: str) -> None:
    write, reason = HOSTILE[case]
    write(tmp_path / "bad.safetensors")
    refused(command("analyze", tmp_path / "bad.safetensors"), "bad.safetensors", reason)


@pytest.mark.parametrize("name", ["", "missing", "missing.safetensors", "missing.bin"])
def test_paths_without_weights_fail_the_command_line(tmp_path: Path, name: str) -> None:
    refused(command("analyze", tmp_path / name), str(tmp_path / name))


VALID = save({name: WEIGHTS[name] for name in list(WEIGHTS)[:3]})


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 400) | st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4
    ),
    st.one_of(st.none(), st.integers(0, len(VALID))),
)
def test_damaged_files_never_crash(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]], cut: int | None
) -> None:
    content = bytearray(VALID)
    for position, value in flips:
        content[position] = value
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(bytes(content[:cut]))
    with suppress(lorank.LorankError, ValueError, OSError):
        lorank.analyze(path, progress=False)
