"""Files written by `torch.save`: values equal those of torch, and files that claim too much are refused."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lorank
from lorank.sources import arrays, open_source, pickle_nesting, torch_files

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
OTHERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64)


def rewritten(path: Path, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    """Write an archive again, with other contents for the members of the given names."""
    with zipfile.ZipFile(path) as old:
        content = {member.filename: old.read(member) for member in old.infolist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in content.items():
            new.writestr(name, members.get(Path(name).stem, data))
    return path


def saved(folder: Path, content: Any, **options: Any) -> Path:
    path = folder / "model.bin"
    torch.save(content, path, **options)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integers(*values: int) -> bytes:
    return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"


def tensor(numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...], key: str = "0") -> bytes:
    """Return the opcodes of a float32 tensor of torch."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
    storage += b"\x8a\x08" + struct.pack("<q", numel) + b"tQ"
    rest = b"\x8a\x08" + struct.pack("<q", offset) + integers(*size) + integers(*stride)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"\x89ccollections\nOrderedDict\n)RtR"


def crafted(folder: Path, entries: dict[str, bytes]) -> Path:
    """Write an archive with a storage of 16 numbers and a pickle of the given opcodes by name."""
    path = saved(folder, {"a.weight": torch.arange(16.0).reshape(4, 4)})
    content = b"".join(text(name) + value for name, value in entries.items())
    return rewritten(path, data=b"\x80\x02}(" + content + b"u.") if entries else path


@pytest.mark.parametrize("is_legacy", [False, True], ids=["archive", "legacy"])
@pytest.mark.parametrize("dtype", [*FLOATS, *OTHERS], ids=str)
def test_values_equal_those_of_torch(tmp_path: Path, dtype: torch.dtype, is_legacy: bool) -> None:
    if is_legacy and "float8" in str(dtype):
        pytest.skip("torch writes files of this type that it cannot read")
    base = (torch.randn(12, 20, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    tensors = {"a": base, "b": base.T, "c": base[2:7, 3:], "d": base[::3, ::2], "e": base.reshape(-1)[5:]}
    path = saved(tmp_path, tensors, _use_new_zipfile_serialization=not is_legacy)
    found = torch_files.read_tensors(path)
    expected = torch.load(path, weights_only=True)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].stride() == value.stride()
        assert arrays.content(found[name]) == arrays.content(value)
        if dtype in FLOATS and value.ndim == 2:
            values = arrays.matrix(found[name]).to_array()
            np.testing.assert_array_equal(values, value.to(torch.from_numpy(values).dtype).numpy())


def test_quantized_values_equal_those_of_torch(tmp_path: Path) -> None:
    weight = torch.randn(6, 8)
    whole = torch.quantize_per_tensor(weight, 0.1, 3, torch.qint8)
    rows = torch.quantize_per_channel(weight, torch.rand(6) + 0.1, torch.zeros(6), 0, torch.qint8)
    path = saved(tmp_path, {"a.weight": whole, "b.weight": rows})
    source = open_source(path)
    for matrix, value in zip(source.matrices, (whole, rows), strict=True):
        np.testing.assert_array_equal(matrix.load().to_array(), value.dequantize().numpy())


@pytest.mark.parametrize("kind", ["meta", "sparse", "nested", "list", "number"])
def test_other_values_are_skipped_or_refused(tmp_path: Path, kind: str) -> None:
    values = {
        "meta": lambda: torch.ones(4, 4, device="meta"),
        "sparse": lambda: torch.eye(4).to_sparse(),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "list": lambda: [[1] * 9] * 9,
        "number": lambda: 10**4000,
    }
    path = saved(tmp_path, {"a.weight": torch.eye(3), "b.weight": values[kind]()})
    if kind in ("number", "nested"):
        with pytest.raises(lorank.FormatError, match=r"model\.bin: is not a state dict"):
            open_source(path)
        return
    source = open_source(path)
    assert [matrix.info.name for matrix in source.matrices] == ["a"]
    assert [skipped.name for skipped in source.skipped] == ["b.weight"]
    assert len(lorank.analyze(source, progress=False)) == 1


OVERCLAIMS = {
    "one number": lambda: torch.ones(1).as_strided((10**6, 10**6), (0, 0)),
    "one row": lambda: torch.ones(1, 1000).expand(1000, 1000),
    "one column": lambda: torch.ones(1000, 1).expand(1000, 10**9),
    "overlapping rows": lambda: torch.ones(2000).as_strided((1000, 1000), (1, 1)),
    "repeated experts": lambda: torch.ones(1, 4, 4).expand(10**9, 4, 4),
}


@pytest.mark.parametrize(
    "options", [{}, {"_use_new_zipfile_serialization": False}], ids=["archive", "legacy"]
)
@pytest.mark.parametrize("make", OVERCLAIMS.values(), ids=OVERCLAIMS)
def test_tensors_that_repeat_numbers_are_refused(tmp_path: Path, make: Any, options: dict[str, Any]) -> None:
    path = saved(tmp_path, {"a.weight": torch.eye(3), "mlp.experts.w": make()}, **options)
    with pytest.raises(lorank.FormatError, match=r"model\.bin: tensor 'mlp\.experts\.w' repeats"):
        open_source(path)
    with pytest.raises(lorank.FormatError, match="repeats"):
        torch_files.read_tensors(path)


def test_buffers_that_repeat_numbers_are_skipped(tmp_path: Path) -> None:
    mask = torch.ones(1, 1, dtype=torch.bool).expand(10**6, 10**6)
    path = saved(tmp_path, {"a.weight": torch.eye(3), "mask": mask, "bias": torch.ones(1).expand(10**9)})
    source = open_source(path)
    assert [matrix.info.name for matrix in source.matrices] == ["a"]
    assert {skipped.name: "repeats one number" in skipped.reason for skipped in source.skipped} == {
        "mask": True,
        "bias": True,
    }


def test_state_dicts_beside_the_weights_are_skipped(tmp_path: Path) -> None:
    state = {"a.weight": torch.eye(3), "step": 7}
    content = {"epoch": 3, "state_dict": state, "state_dict_ema": {"a.weight": torch.ones(3, 3)}}
    source = open_source(saved(tmp_path, content))
    assert [matrix.info.name for matrix in source.matrices] == ["a"]
    skipped = {skipped.name: (skipped.shape, skipped.reason) for skipped in source.skipped}
    assert skipped["state_dict_ema.a.weight"] == (
        (3, 3),
        "in 'state_dict_ema', beside the weights in 'state_dict'",
    )


def test_tied_and_sliced_tensors_are_read(tmp_path: Path) -> None:
    fused = torch.randn(90, 40)
    parts = {f"p{i}.weight": fused[30 * i : 30 * i + 30] for i in range(3)}
    path = saved(tmp_path, {"f.weight": fused, "t.weight": fused.T, "tied.weight": fused, **parts})
    names = [matrix.info.name for matrix in open_source(path).matrices]
    assert names == ["f", "t", "p0", "p1", "p2"]


REFUSED = {
    "many views": {f"v{i}": tensor(16, i % 4, (3, 4), (4 - i // 4, 1)) for i in range(16)}
    | {f"w{i}": tensor(16, 0, (4, 4 - i % 4), (i // 4, 4)) for i in range(16)},
    "more than the record": {"a.weight": tensor(24, 0, (4, 6), (6, 1))},
    "beyond the record": {"a.weight": tensor(16, 1, (4, 4), (4, 1))},
    "negative offset": {"a.weight": tensor(16, -1, (4, 4), (4, 1))},
    "huge offset": {"a.weight": tensor(16, 2**62, (4, 4), (4, 1))},
    "negative stride": {"a.weight": tensor(16, 0, (4, 4), (-4, 1))},
    "negative size": {"a.weight": tensor(16, 0, (-4, 4), (4, 1))},
    "overflow": {"a.weight": tensor(16, 0, (2**33, 2**33), (0, 0))},
    "huge strides": {"a.weight": tensor(16, 0, (4, 4), (2**62, 2**62))},
    "negative storage": {"a.weight": tensor(-16, 0, (4, 4), (4, 1))},
    "missing storage": {"a.weight": tensor(16, 0, (4, 4), (4, 1), key="7")},
    "foreign member": {"a.weight": tensor(16, 0, (4, 4), (4, 1), key="../data.pkl")},
    "nested key": {"a.weight": b"}" + b")" + b"\x85" * 10**6 + b"K\x01s"},
    "nested value": {"a.weight": b")" + b"\x85" * 10**6},
    "nested through the memo": {"a.weight": b")q\x00" + b"\x85q\x00h\x00\x86q\x00h\x00" * 10**5},
}


OPEN = """
import json, lorank, sys
for path in sys.argv[1:]:
    try:
        lorank.sources.open_source(path)
        print(json.dumps([path, ""]), flush=True)
    except lorank.FormatError as error:
        print(json.dumps([path, str(error)]), flush=True)
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Open all crafted files in a process of its own; return the path and the message for each."""
    paths = {}
    for number, (kind, entries) in enumerate(REFUSED.items()):
        folder = tmp_path_factory.mktemp(f"refused{number}")
        paths[kind] = crafted(folder, entries)
    command = [sys.executable, "-c", OPEN, *map(str, paths.values())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, f"{done.stdout[-300:]}\n{done.stderr}"
    messages = dict(map(json.loads, done.stdout.splitlines()))
    return {kind: (path, messages[str(path)]) for kind, path in paths.items()}


@pytest.mark.parametrize("kind", REFUSED)
def test_claims_beyond_the_file_are_refused(kind: str, refusals: dict[str, tuple[Path, str]]) -> None:
    path, message = refusals[kind]
    assert message.startswith(f"{path}: "), message


def test_crafted_archives_without_a_fault_are_read(tmp_path: Path) -> None:
    path = crafted(tmp_path, {"a.weight": tensor(16, 0, (4, 4), (4, 1))})
    (matrix,) = open_source(path).matrices
    np.testing.assert_array_equal(matrix.load().to_array(), np.arange(16.0).reshape(4, 4))


@pytest.mark.parametrize(
    ("compression", "members", "reason"),
    [
        (zipfile.ZIP_DEFLATED, {}, "is compressed"),
        (zipfile.ZIP_STORED, {"byteorder": b"big"}, "byte order"),
        (zipfile.ZIP_STORED, {"byteorder": b""}, "byte order"),
    ],
)
def test_archives_of_other_kinds_are_refused(
    tmp_path: Path, compression: int, members: dict[str, bytes], reason: str
) -> None:
    path = rewritten(saved(tmp_path, {"a.weight": torch.eye(4)}), compression, **members)
    with pytest.raises(lorank.FormatError, match=reason):
        open_source(path)


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.bin")
    with pytest.raises((lorank.FormatError, OSError)):
        torch_files.read_tensors(tmp_path / "model.bin")


@pytest.mark.parametrize("depth", [1, 10, 500, 1001, 20_000])
def test_depth_of_nested_containers_is_found(depth: int) -> None:
    content: Any = ()
    for _ in range(depth):
        content = (content,)
    opcodes = b"\x80\x02)" + b"\x85" * depth + b"."
    assert pickle_nesting.depth(opcodes) == depth + 1
    assert pickle_nesting.is_too_deep(opcodes) == (depth > 10_000)


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
        max_leaves=30,
    )
)
def test_depth_is_at_least_that_of_the_object(content: Any) -> None:
    def levels(value: Any) -> int:
        inner = (
            value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        )
        return 1 + max(map(levels, inner), default=0)

    for protocol in range(2, 6):
        assert pickle_nesting.depth(pickle.dumps(content, protocol)) >= levels(content)


VERSIONS = {
    "2.10.0": True,
    "2.10": True,
    "2.10.0+cu130": True,
    "2.10.1a0+git12": True,
    "2.11.0.dev20260101": True,
    "2.11.0a0": True,
    "3.0.0": True,
    "10.1": True,
    "2.10.0a0+git1234": False,
    "2.10.0rc1": False,
    "2.10.0.dev20251201+cpu": False,
    "2.9.1": False,
    "2.9.1+cu128": False,
    "2.2.0": False,
    "1.13.1": False,
    "2.1.0": False,
    "": False,
    "git": False,
}


@pytest.mark.parametrize(("version", "allowed"), VERSIONS.items())
def test_old_versions_of_torch_read_no_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, allowed: bool
) -> None:
    path = saved(tmp_path, {"a.weight": torch.eye(4)})
    monkeypatch.setattr(torch, "__version__", version)
    if allowed:
        assert len(open_source(path).matrices) == 1
        return
    for read in (open_source, torch_files.read_tensors):
        with pytest.raises(ImportError, match=r"model\.bin: torch .* may run code .* 2\.10 or later"):
            read(path)


def test_old_versions_of_torch_read_no_pickled_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"base_model.model.a.lora_A.weight": torch.ones(2, 4)}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["a"]}')
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(ImportError, match=r"adapter_model\.bin: torch 2\.9\.1 may run code"):
        lorank.LoraAdapter.load(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_archives_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = saved(tmp_path, {"a.weight": torch.arange(16.0).reshape(4, 4), "b.weight": torch.eye(3)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    with contextlib.suppress(lorank.FormatError, ValueError):
        lorank.analyze(path, progress=False)
