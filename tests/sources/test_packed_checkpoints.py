"""Packed checkpoints: codes are decoded or skipped, and budgets in % refer to the true size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file as load_np
from safetensors.numpy import save_file
from safetensors.torch import load_file

import lorank
from lorank.sources import open_source
from lorank.sources.codes import SCALES, name_of
from lorank.sources.packing import Packing
from lorank.sources.quantization import Quantization
from lorank.sources.schemes import SCHEMES
from tests.support.packed_tensors import (
    CHECKPOINTS,
    DECODED,
    FULL,
    IN,
    OUT,
    STACK,
    Checkpoint,
    P,
    Tensor,
    decoded_rows,
    integers,
    write,
)

PLAIN: dict[str, Tensor] = {
    "model.embed_tokens.weight": ("F32", (40, 16)),
    "model.layers.0.self_attn.q_proj.weight": ("F32", (32, 32)),
    "model.layers.0.input_layernorm.weight": ("F32", (16,)),
}
PLAIN_ROWS = ["model.embed_tokens", "model.layers.0.self_attn.q_proj"]
PLAIN_PARAMETERS = 40 * 16 + 32 * 32 + 16

TORCH_TYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
}

every_checkpoint = pytest.mark.parametrize("name", CHECKPOINTS)


def folder_of(path: Path, checkpoint: Checkpoint, **more: Tensor) -> Path:
    """Write a model folder with plain tensors and a packed weight."""
    write(path / "model.safetensors", {**PLAIN, **checkpoint.tensors, **more})
    config = {"torch_dtype": "float32", **checkpoint.config}
    for name, content in {"config.json": config, **checkpoint.files}.items():
        (path / name).write_text(json.dumps(content))
    return path


def reasons(source: Any) -> dict[str, str]:
    return {entry.name: entry.reason for entry in open_source(source).skipped}


def is_about_a_part(reason: str) -> bool:
    return reason.startswith(("scale of ", "part of "))


@every_checkpoint
def test_codes_are_decoded_or_skipped_with_their_scheme(tmp_path: Path, name: str) -> None:
    checkpoint = CHECKPOINTS[name]
    folder = folder_of(tmp_path, checkpoint)
    report = lorank.analyze(folder, progress=False)
    rows = decoded_rows(name)
    assert [row.name for row in report] == sorted([*PLAIN_ROWS, *rows])
    found = reasons(folder)
    codes, *parts = checkpoint.tensors
    if rows:
        assert codes not in found
        assert all(checkpoint.scheme in report[row].dtype for row in rows)
        assert sum(int(np.prod(report[row].shape)) for row in rows) == checkpoint.parameters
    else:
        assert checkpoint.scheme in found[codes]
        assert found[codes].startswith("packed (") is bool(checkpoint.scheme)
    for part in parts:
        assert is_about_a_part(found[part]), (part, found[part])
        if part.startswith(P):
            assert P in found[part]
    assert not is_about_a_part(found["model.layers.0.input_layernorm.weight"])


@every_checkpoint
def test_parameters_equal_those_of_the_weight_or_are_unknown(tmp_path: Path, name: str) -> None:
    checkpoint = CHECKPOINTS[name]
    folder = folder_of(tmp_path, checkpoint)
    source = open_source(folder)
    targets = ["embed_tokens", "q_proj"]
    options: dict[str, Any] = {"r_min": 1, "r_max": 8, "targets": targets, "progress": False}
    if checkpoint.parameters is None:
        assert source.num_parameters is None
        codes = next(iter(checkpoint.tensors))
        for signal in (folder, lorank.analyze(folder, progress=False)):
            with pytest.raises(ValueError, match="give the budget as a number of parameters") as error:
                lorank.allocate(signal, budget="1%", **options)
            assert codes in str(error.value)
            assert checkpoint.scheme in str(error.value)
        allocation = lorank.allocate(folder, budget=300, **options)
        assert (allocation.base_parameters, allocation.num_parameters <= 300) == (None, True)
    else:
        total = PLAIN_PARAMETERS + checkpoint.parameters
        assert (source.num_parameters, source.unknown_parameters) == (total, "")
        share = 100 * 300 / total
        allocation = lorank.allocate(folder, budget=f"{share}%", **options)
        assert allocation.base_parameters == total
        assert 300 - 64 < allocation.num_parameters <= 300


@every_checkpoint
def test_pickle_equals_the_safetensors_file(tmp_path: Path, name: str) -> None:
    checkpoint = CHECKPOINTS[name]
    expected = open_source(folder_of(tmp_path, checkpoint))
    tensors = {}
    for key, (dtype, shape, *content) in (PLAIN | dict(checkpoint.tensors)).items():
        filled = torch.frombuffer(bytearray(content[0]), dtype=TORCH_TYPES[dtype]) if content else None
        empty = torch.zeros(shape, dtype=torch.float32).to(TORCH_TYPES[dtype])
        tensors[key] = empty if filled is None else filled.reshape(shape)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    found = open_source(tmp_path)
    assert found.num_parameters == expected.num_parameters
    rows = {m.info.name for m in expected.matrices}
    assert {m.info.name for m in found.matrices} == rows - {*decoded_rows(name)}
    if checkpoint.scheme:  # Without a scheme, the reason has the element type in the spelling of the format.
        skipped = {s.name: s.reason for s in found.skipped}
        codes = next(iter(checkpoint.tensors))
        if name in DECODED:
            assert skipped.pop(codes).startswith(f"packed ({checkpoint.scheme}")
        assert skipped == {s.name: s.reason for s in expected.skipped}


def test_reasons_suggest_the_live_model_only_if_it_is_readable(tmp_path: Path) -> None:
    promises = {}
    for number, (name, checkpoint) in enumerate(CHECKPOINTS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder_of(folder, checkpoint) / "model.safetensors"
        reason = reasons(load_file(path)).get(next(iter(checkpoint.tensors)), "")
        promises[name] = "load the model and analyse it live" in reason
    assert promises["fp8 blocks (DeepSeek-V3)"]
    assert promises["bitsandbytes nf4"]
    assert not promises["EXL2"]
    assert not promises["AQLM"]


def test_reason_of_a_scale_names_the_weight_and_the_scheme(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, CHECKPOINTS["fp8 blocks (DeepSeek-V3)"])
    assert f"{P}.weight" not in reasons(folder)
    found = reasons(load_file(folder / "model.safetensors"))
    assert found[f"{P}.weight"] == (
        "packed (fp8 with block scales): its values cannot be decoded from this source; "
        "load the model and analyse it live"
    )
    assert found[f"{P}.weight_scale_inv"] == f"scale of the packed weight {P}.weight (fp8 with block scales)"


def test_file_of_packed_weights_only_has_no_other_rows(tmp_path: Path) -> None:
    # If no name ends with `.weight`, 2-D scales could be mistaken for weights.
    path = write(tmp_path / "a.safetensors", CHECKPOINTS["int4 pack-quantized"].tensors)
    assert [row.name for row in lorank.analyze(path, progress=False)] == [P]
    assert open_source(path).num_parameters == FULL
    path = write(tmp_path / "b.safetensors", CHECKPOINTS["EXL2"].tensors)
    with pytest.raises(ValueError, match="holds no weight matrix"):
        lorank.analyze(path)
    assert open_source(path).num_parameters == FULL


def test_scales_in_another_file_than_codes_are_found(tmp_path: Path) -> None:
    settings = {"quantization_config": {"quant_method": "fp8"}}
    scales: dict[str, Tensor] = {
        f"{P}.weight_scale_inv": ("F32", (2, 1)),
        f"{STACK}_scale_inv": ("F32", (4, 2, 2)),
    }
    write(tmp_path / "part.safetensors", {**PLAIN, **scales})
    (tmp_path / "config.json").write_text(json.dumps(settings))
    report = lorank.analyze(tmp_path / "part.safetensors", progress=False)
    assert [row.name for row in report] == PLAIN_ROWS
    assert report.num_parameters == PLAIN_PARAMETERS
    found = reasons(tmp_path / "part.safetensors")
    assert {found[name] for name in scales} == {"scale of packed weights (fp8)"}


def test_packed_weight_at_the_root_is_decoded(tmp_path: Path) -> None:
    for scale in ("scale", "weight_scale_inv"):
        tensors: dict[str, Tensor] = {"weight": ("F8_E4M3", (8, 8)), scale: ("F32", (2, 2))}
        source = open_source(write(tmp_path / "a.safetensors", tensors))
        assert source.num_parameters == 64
        assert [m.info.shape for m in source.matrices] == [(8, 8)]
        assert {entry.reason.partition(" ")[0] for entry in source.skipped} == {"scale"}


def test_float8_without_scales_and_settings_is_analysed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {**PLAIN, f"{P}.weight": ("F8_E4M3", (OUT, IN))})
    report = lorank.analyze(path, progress=False)
    assert [row.name for row in report] == [PLAIN_ROWS[0], P, PLAIN_ROWS[1]]
    assert report.num_parameters == PLAIN_PARAMETERS + FULL


@pytest.mark.parametrize("settings", [{}, {"quantization_config": {"quant_method": "fp8"}}])
def test_plain_tensors_named_scale_are_not_skipped(tmp_path: Path, settings: dict[str, Any]) -> None:
    innocent: dict[str, Tensor] = {
        "model.scale.weight": ("F32", (8, 6)),
        "model.scales.weight": ("F32", (8, 6)),
        "model.layers.0.mlp.experts.scale": ("F32", (4, 8, 6)),
        "model.layers.0.ls1.gamma": ("F32", (16,)),
        "logit_scale": ("F32", ()),
        "model.layers.0.scale_shift_table": ("F32", (6, 16)),
        "model.relative_position_index": ("I64", (9, 9)),
    }
    write(tmp_path / "model.safetensors", {**PLAIN, **innocent})
    (tmp_path / "config.json").write_text(json.dumps(settings))
    report = lorank.analyze(tmp_path, progress=False)
    assert {"model.scale", "model.scales"} <= {row.name for row in report}
    assert {row.module for row in report if row.expert is not None} == {"model.layers.0.mlp.experts.scale"}
    assert not any(is_about_a_part(reason) for reason in reasons(tmp_path).values())
    floats = sum(int(np.prod(shape)) for dtype, shape, *_ in innocent.values() if dtype == "F32")
    assert report.num_parameters == PLAIN_PARAMETERS + floats


def test_scales_are_analysed_if_nothing_is_packed() -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((8, 6)) for name in ("scale", "scales", "x.weight_scale", "x.qzeros")}
    assert {row.name for row in lorank.analyze(arrays, progress=False)} == arrays.keys()


def test_torchao_checkpoints_are_recognised(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    from safetensors.torch import save_file

    for number, config in enumerate(
        (quantization.Int8WeightOnlyConfig(), quantization.Float8WeightOnlyConfig())
    ):
        model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 32))
        plain = sum(parameter.numel() for parameter in model.parameters())
        quantization.quantize_(model, config)
        state = {name: tensor.data for name, tensor in model.state_dict().items()}
        tensors, metadata = support.flatten_tensor_state_dict(state)
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path, metadata)
        source = open_source(path)
        assert source.num_parameters == plain
        assert not source.matrices
        found = reasons(path)
        assert found["0._weight_qdata"].startswith("packed (torchao)")
        assert is_about_a_part(found["1._weight_scale"])


def test_shapes_of_4_bit_torchao_weights_come_from_metadata(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {
        "proj._weight_qdata": ("I8", (OUT, IN // 2)),
        "proj._weight_scale": ("BF16", (IN // 32, OUT)),
        "proj._weight_zero_point": ("BF16", (IN // 32, OUT)),
    }
    state = {"_type": "Int4Tensor", "_data": {"block_size": [1, 32], "shape": [OUT, IN]}}
    path = write(tmp_path / "a.safetensors", tensors, {"proj.weight": json.dumps(state)})
    assert open_source(path).num_parameters == FULL
    path = write(tmp_path / "b.safetensors", tensors, {"proj.weight": '{"_type": "Int4Tensor", "_data": {}}'})
    assert open_source(path).num_parameters is None


def test_state_dict_of_torchao_tensors_is_dequantized() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 32))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    report = lorank.analyze(model.state_dict(), progress=False)
    assert report.num_parameters == 2 * 32 * 64 + 64 + 32
    for row, layer in zip(report, model, strict=True):
        weight = layer.weight.dequantize().double().numpy()
        assert row.frobenius_norm == pytest.approx(np.linalg.norm(weight), rel=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "8bit"])
def test_checkpoints_of_bitsandbytes_are_recognised(tmp_path: Path, kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes.nn")
    from safetensors.torch import save_file

    linear = torch.nn.Linear(64, 128, bias=False)
    small = (
        bnb.Linear8bitLt(64, 128, bias=False, has_fp16_weights=False)
        if kind == "8bit"
        else bnb.Linear4bit(64, 128, bias=False, quant_type=kind)
    )
    small.load_state_dict(linear.state_dict())
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(8, 8), "proj": small.to("cpu")})
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    for source, rows in ((tmp_path, ["head", "proj"]), (state, ["head"])):
        report = lorank.analyze(source, progress=False)
        assert [row.name for row in report] == rows
        assert report.num_parameters == 64 * 128 + 72
    assert reasons(state)["proj.weight"].startswith("packed (bitsandbytes")


def test_share_of_an_unknown_size_fails_the_command_line_with_one_line(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, CHECKPOINTS["GPTQ of unknown bits"])
    executable = str(Path(sys.executable).with_name("lorank"))
    command = [executable, "allocate", str(folder), "--budget", "1%"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (message,) = (line for line in done.stderr.splitlines() if line.startswith("lorank: "))
    assert f"{P}.qweight is packed (GPTQ)" in message
    assert "give the budget as a number of parameters" in message


@pytest.mark.parametrize("ending", [".json", ".parquet"])
def test_saved_report_keeps_the_reason_of_an_unknown_size(tmp_path: Path, ending: str) -> None:
    report = lorank.analyze(folder_of(tmp_path, CHECKPOINTS["SpQR"]), progress=False)
    assert "SpQR" in report.unknown_parameters
    path = tmp_path / f"report{ending}"
    report.save(path)
    loaded = lorank.SpectralReport.load(path)
    assert (loaded.num_parameters, loaded.unknown_parameters) == (None, report.unknown_parameters)
    with pytest.raises(ValueError, match="SpQR"):
        lorank.allocate(loaded, budget="1%")


def test_allocation_of_packed_layers_only_raises_with_their_names(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.mlp.up_proj.qweight": np.ones((8, 32), np.int32),
        "model.layers.0.mlp.up_proj.qzeros": np.ones((1, 4), np.int32),
        "model.layers.0.mlp.up_proj.scales": np.ones((1, 32), np.float16),
        "model.embed_tokens.weight": np.ones((40, 64), np.float32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"up_proj\.qweight: packed \(GPTQ\)"):
        lorank.allocate(load_np(tmp_path / "model.safetensors"), "uniform", avg_rank=4, progress=False)
    allocation = lorank.allocate(tmp_path / "model.safetensors", "uniform", avg_rank=4, progress=False)
    assert "model.layers.0.mlp.up_proj" in allocation.ranks


def test_extract_with_a_share_of_an_unknown_size_raises(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, CHECKPOINTS["SpQR"])
    with pytest.raises(ValueError, match=r"SpQR.*give the budget as a number"):
        lorank.extract(folder, folder, budget="1%")


def test_impossible_sizes_in_a_checkpoint_are_ignored(tmp_path: Path) -> None:
    for shape in (integers(OUT, 0), integers(OUT, -IN), integers(OUT, 33 * IN), integers(OUT)):
        tensors: dict[str, Tensor] = {
            f"{P}.weight_packed": ("I32", (OUT, IN // 8)),
            f"{P}.weight_scale": ("F32", (OUT, 4)),
            f"{P}.weight_shape": shape,
        }
        path = write(tmp_path / "model.safetensors", tensors)
        assert open_source(path).num_parameters is None


TEMPLATES = sorted(
    {template for scheme in SCHEMES for template in (scheme.codes, *scheme.marks, *scheme.parts)}
    | set(SCALES)
)
TYPES = ["F8_E4M3", "U8", "I8", "I32", "I16", "U32", "F16", "BF16", "F8_E8M0", "F4", "I64", "BOOL", "F7"]


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(["a.b.weight", "weight", "x.experts.up_proj"]),
    st.dictionaries(
        st.sampled_from(TEMPLATES),
        st.tuples(st.sampled_from(TYPES), st.lists(st.sampled_from([0, 1, 2, 3, 8, 64, 2**40]), max_size=4)),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(["", "gptq", "awq", "mxfp4", "fp8", "bitnet", "hqq"]),
    st.sampled_from([None, 0, 2, 3, 4, 8, -1, "4", True]),
    st.binary(max_size=16),
)
def test_any_tensors_are_read_as_packed_or_plain(
    weight: str, tensors: dict[str, Any], method: str, bits: object, content: bytes
) -> None:
    named = {name_of(template, weight): (t, tuple(shape)) for template, (t, shape) in tensors.items()}
    declared = {"quant_method": method, "bits": bits} if method else {}
    packing = Packing(named, Quantization(declared), lambda _: content, {weight: content.decode("latin-1")})
    for name in named:
        count = packing.parameters(name)
        assert count if isinstance(count, str) else count >= 0
        assert packing.reason(name) is None or name in packing.codes or name in packing.parts


def quantization_config(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    if kind == "torchao":
        config = pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()
        return transformers.TorchAoConfig(config)
    pytest.importorskip("bitsandbytes")
    options = {"load_in_8bit": True} if kind == "8bit" else {"load_in_4bit": True}
    if kind == "nf4 twice":
        options |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return transformers.BitsAndBytesConfig(**options)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["fp4", "nf4 twice", "8bit", "torchao"])
def test_quantized_models_saved_by_transformers_are_recognised(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    tiny_models = pytest.importorskip("tests.support.tiny_models")
    plain = tiny_models.llama()
    plain.save_pretrained(tmp_path / "plain")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=quantization_config(kind), device_map="cpu"
    )
    model.save_pretrained(tmp_path / "small")
    live, disk = lorank.analyze(model, progress=False), lorank.analyze(tmp_path / "small", progress=False)
    parameters = sum(parameter.numel() for parameter in plain.parameters())
    assert (live.num_parameters, disk.num_parameters) == (parameters, parameters)
    assert len(live) == 16
    packed = [entry.name for entry in disk.skipped if entry.reason.startswith("packed (")]
    if kind == "torchao":
        assert [row.name for row in disk] == ["lm_head", "model.embed_tokens"]
        assert len(packed) == 14
        return
    assert not packed
    assert {row.name for row in disk} == {row.name for row in live}
    # On CPUs, bitsandbytes dequantizes 4-bit blocks wrongly if they do not divide the columns.
    expected, tolerance = (live, 1e-5) if kind == "8bit" else (lorank.analyze(plain, progress=False), 0.1)
    for row in disk:
        assert row.stable_rank == pytest.approx(expected[row.name].stable_rank, rel=tolerance)
