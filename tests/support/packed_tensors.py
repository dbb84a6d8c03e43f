"""Packed checkpoints of every scheme, with random codes in the layout of their libraries."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# Bytes of safetensors' element types.
_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_RNG = np.random.default_rng(0)

Tensor = tuple[str, tuple[int, ...]] | tuple[str, tuple[int, ...], bytes]
"""Element type and shape, and the bytes where they are not random."""

P = "model.layers.0.mlp.down_proj"
STACK = "model.layers.0.mlp.experts.gate_up_proj"
OUT, IN = 256, 128


@dataclass(frozen=True)
class Checkpoint:
    """One packed weight and the tensors beside it.

    Attributes
    ----------
    scheme
        The scheme that the reason of the codes must name.
    tensors
        The codes first.
    parameters
        Values of the weight; None where nothing in the checkpoint states them.
    config
        The model's `config.json`, if the scheme needs one.
    files
        Further JSON files of the folder.
    """

    scheme: str
    tensors: Mapping[str, Tensor]
    parameters: int | None
    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)


def integers(*numbers: int) -> Tensor:
    """Return a vector of integers of 64 bits."""
    return "I64", (len(numbers),), np.array(numbers, dtype="<i8").tobytes()


def text(content: object) -> Tensor:
    """Return JSON as a vector of bytes, as bitsandbytes keeps its state."""
    encoded = json.dumps(content).encode()
    return "U8", (len(encoded),), encoded


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file; element types that NumPy lacks are written by name."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    contents, offset = [], 0
    for name, (dtype, shape, *given) in tensors.items():
        size = _SIZES.get(dtype, 1) * int(np.prod(shape))
        content = given[0] if given else _content(dtype, shape, size)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        contents.append(content)
        offset += size
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"".join(contents))
    return path


def _content(dtype: str, shape: tuple[int, ...], size: int) -> bytes:
    if dtype in ("F32", "F64", "F16"):
        return _RNG.standard_normal(shape).astype(f"<f{_SIZES[dtype]}").tobytes()
    return _RNG.integers(0, 120, size, dtype=np.uint8).tobytes()


def _nf4(shape: object, weight: str = f"{P}.weight") -> dict[str, Tensor]:
    return {
        weight: ("U8", (OUT * IN // 2, 1)),
        f"{weight}.absmax": ("U8", (512,)),
        f"{weight}.nested_absmax": ("F32", (2,)),
        f"{weight}.nested_quant_map": ("F32", (256,)),
        f"{weight}.quant_map": ("F32", (16,)),
        f"{weight}.quant_state.bitsandbytes__nf4": text(
            {"blocksize": 64, "nested_blocksize": 256, "nested_offset": 0.1, "shape": shape}
        ),
    }


def _gptq(bits: int, **more: Tensor) -> dict[str, Tensor]:
    return {
        f"{P}.qweight": ("I32", (IN * bits // 32, OUT)),
        f"{P}.scales": ("F16", (2, OUT)),
        **{f"{P}.{name}": tensor for name, tensor in more.items()},
    }


def _fp8(scale: str, *tensor: Any) -> dict[str, Tensor]:
    return {f"{P}.weight": ("F8_E4M3", (OUT, IN)), f"{P}.{scale}": tensor}


FULL = OUT * IN

CHECKPOINTS: dict[str, Checkpoint] = {
    "fp8 blocks (DeepSeek-V3)": Checkpoint(
        "fp8 with block scales", _fp8("weight_scale_inv", "F32", (2, 2)), FULL
    ),
    "fp8 blocks (DeepSeek-V4)": Checkpoint("fp8 with block scales", _fp8("scale", "F8_E8M0", (2, 1)), FULL),
    "fp8 rows (compressed-tensors)": Checkpoint(
        "fp8 with row scales", _fp8("weight_scale", "BF16", (OUT, 1)), FULL
    ),
    "fp8 rows (FBGEMM)": Checkpoint("fp8 with row scales", _fp8("weight_scale", "F32", (OUT, 1)), FULL),
    "fp8 tensor (ComfyUI)": Checkpoint(
        "fp8 with one scale",
        {**_fp8("scale_weight", "F32", ()), f"{P}.scale_input": ("F32", ()), "scaled_fp8": ("F8_E4M3", (2,))},
        FULL,
    ),
    "fp8 tensor (Mistral)": Checkpoint(
        "fp8 with one scale",
        {**_fp8("qscale_weight", "F32", ()), f"{P}.qscale_act": ("F32", ())},
        FULL,
    ),
    "fp8 tensor (ModelOpt)": Checkpoint(
        "fp8 with one scale",
        {
            **_fp8("weight_scale", "F32", ()),
            f"{P}.input_scale": ("F32", ()),
            "model.layers.0.self_attn.k_scale": ("F32", (1,)),
        },
        FULL,
        files={"hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}}},
    ),
    "fp8, scales called otherwise": Checkpoint("fp8", _fp8("weight_my_scales_v2", "F32", (2, 1)), FULL),
    "fp8 stack": Checkpoint(
        "fp8 with block scales",
        {STACK: ("F8_E4M3", (4, 256, 128)), f"{STACK}_scale_inv": ("F32", (4, 2, 2))},
        4 * 256 * 128,
    ),
    "fp8 by configuration": Checkpoint(
        "fp8",
        {f"{P}.weight": ("F8_E4M3", (OUT, IN))},
        FULL,
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    ),
    "fp8 by configuration of a part": Checkpoint(
        "fp8",
        {f"{P}.weight": ("F8_E4M3", (OUT, IN))},
        FULL,
        {
            "text_config": {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8}}},
                }
            }
        },
    ),
    "MXFP8": Checkpoint("MXFP8", _fp8("weight_scale", "U8", (OUT, IN // 32)), FULL),
    "fp4 experts (DeepSeek-V4)": Checkpoint(
        "MXFP4",
        {f"{P}.weight": ("I8", (OUT, IN // 2)), f"{P}.scale": ("F8_E8M0", (OUT, IN // 32))},
        FULL,
    ),
    "MXFP4 (gpt-oss)": Checkpoint(
        "MXFP4",
        {f"{STACK}_blocks": ("U8", (4, 256, 4, 16)), f"{STACK}_scales": ("U8", (4, 256, 4))},
        4 * 256 * 128,
    ),
    "MXFP4 (compressed-tensors)": Checkpoint(
        "MXFP4",
        {f"{P}.weight_packed": ("U8", (OUT, IN // 2)), f"{P}.weight_scale": ("U8", (OUT, IN // 32))},
        FULL,
    ),
    "MXFP4 (Quark)": Checkpoint(
        "MXFP4",
        {f"{P}.weight": ("U8", (OUT, IN // 2)), f"{P}.weight_scale": ("U8", (OUT, IN // 32))},
        FULL,
    ),
    "NVFP4 (compressed-tensors)": Checkpoint(
        "NVFP4",
        {
            f"{P}.weight_packed": ("U8", (OUT, IN // 2)),
            f"{P}.weight_scale": ("F8_E4M3", (OUT, IN // 16)),
            f"{P}.weight_global_scale": ("F32", (1,)),
            f"{P}.input_global_scale": ("F32", (1,)),
        },
        FULL,
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}},
    ),
    "NVFP4 (ModelOpt)": Checkpoint(
        "NVFP4",
        {
            f"{P}.weight": ("U8", (OUT, IN // 2)),
            f"{P}.weight_scale": ("F8_E4M3", (OUT, IN // 16)),
            f"{P}.weight_scale_2": ("F32", ()),
            f"{P}.input_scale": ("F32", ()),
        },
        FULL,
        files={
            "hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
        },
    ),
    "NVFP4 stack (ModelOpt)": Checkpoint(
        "NVFP4",
        {
            STACK: ("U8", (4, 64, 32)),
            f"{STACK}_weight_scale": ("F8_E4M3", (4, 64, 4)),
            f"{STACK}_weight_scale_2": ("F32", (4,)),
            f"{STACK}_input_scale": ("F32", (1,)),
        },
        4 * 64 * 64,
    ),
    "int4 pack-quantized": Checkpoint(
        "pack-quantized integers",
        {
            f"{P}.weight_packed": ("I32", (OUT, IN // 8)),
            f"{P}.weight_scale": ("F32", (OUT, IN // 32)),
            f"{P}.weight_zero_point": ("I32", (OUT // 8, IN // 32)),
            f"{P}.weight_shape": integers(OUT, IN),
            f"{P}.weight_g_idx": ("I32", (IN,), np.repeat(np.arange(4, dtype="<i4"), 32).tobytes()),
        },
        FULL,
    ),
    "int3 pack-quantized": Checkpoint(
        "pack-quantized integers",
        {
            f"{P}.weight_packed": ("I32", (OUT, 12)),
            f"{P}.weight_scale": ("F32", (OUT, 1)),
            f"{P}.weight_shape": integers(OUT, IN),
        },
        FULL,
    ),
    "int4 pack-quantized without its shape": Checkpoint(
        "pack-quantized integers",
        {f"{P}.weight_packed": ("I32", (OUT, IN // 8)), f"{P}.weight_scale": ("F32", (OUT, IN // 32))},
        FULL,
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {
                        "weights": {"type": "int", "num_bits": 4},
                        "input_activations": {"type": "int", "num_bits": 8},
                    }
                },
            }
        },
    ),
    "int pack-quantized of unknown bits": Checkpoint(
        "pack-quantized integers",
        {f"{P}.weight_packed": ("I32", (OUT, 16)), f"{P}.weight_scale": ("F32", (OUT, 4))},
        None,
    ),
    "pack-quantized with a shape that lies": Checkpoint(
        "pack-quantized integers",
        {
            f"{P}.weight_packed": ("I32", (OUT, 16)),
            f"{P}.weight_scale": ("F32", (OUT, 4)),
            f"{P}.weight_shape": integers(10**15, 10**15),
        },
        None,
    ),
    "int8 (compressed-tensors)": Checkpoint(
        "int8 with scales", {f"{P}.weight": ("I8", (OUT, IN)), f"{P}.weight_scale": ("F32", (OUT, 1))}, FULL
    ),
    "GPTQ by its zero points": Checkpoint("GPTQ", _gptq(4, qzeros=("I32", (2, OUT // 8))), FULL),
    "GPTQ by its order of columns": Checkpoint("GPTQ", _gptq(8, g_idx=("I32", (IN,))), FULL),
    "GPTQ of 3 bits": Checkpoint(
        "GPTQ",
        _gptq(3, qzeros=("I32", (2, OUT * 3 // 32))),
        FULL,
        {"quantization_config": {"quant_method": "gptq", "bits": 3}},
    ),
    "GPTQ of 2 bits by a file of its own": Checkpoint(
        "GPTQ", _gptq(2), FULL, files={"quantize_config.json": {"bits": 2, "group_size": 64}}
    ),
    "GPTQ of unknown bits": Checkpoint("GPTQ", _gptq(4), None),
    "AWQ": Checkpoint(
        "AWQ",
        {
            f"{P}.qweight": ("I32", (IN, OUT // 8)),
            f"{P}.qzeros": ("I32", (2, OUT // 8)),
            f"{P}.scales": ("F16", (2, OUT)),
        },
        FULL,
    ),
    "FP-Quant": Checkpoint(
        "FP-Quant", {f"{P}.qweight": ("U8", (OUT, IN // 2)), f"{P}.scales": ("U8", (OUT, IN // 32))}, FULL
    ),
    "SVDQuant": Checkpoint(
        "SVDQuant",
        {
            f"{P}.qweight": ("I8", (OUT, IN // 2)),
            f"{P}.wscales": ("BF16", (IN // 64, OUT)),
            f"{P}.proj_down": ("BF16", (IN, 32)),
            f"{P}.proj_up": ("BF16", (OUT, 32)),
            f"{P}.smooth_factor": ("BF16", (IN,)),
        },
        FULL,
    ),
    "bitsandbytes nf4": Checkpoint("bitsandbytes nf4", _nf4([OUT, IN]), FULL),
    "bitsandbytes nf4 of a state that lies": Checkpoint("bitsandbytes nf4", _nf4([10**9, IN]), FULL),
    "bitsandbytes nf4 of a stack": Checkpoint("bitsandbytes nf4", _nf4([4, 64, 128], STACK), FULL),
    "bitsandbytes nf4 kept as BF16": Checkpoint(
        "bitsandbytes nf4", {**_nf4([OUT, IN]), f"{P}.weight": ("BF16", (FULL // 4, 1))}, FULL
    ),
    "bitsandbytes fp4": Checkpoint(
        "bitsandbytes fp4",
        {
            f"{P}.weight": ("U8", (FULL // 2, 1)),
            f"{P}.weight.absmax": ("F32", (512,)),
            f"{P}.weight.quant_map": ("F32", (16,)),
            f"{P}.weight.quant_state.bitsandbytes__fp4": text({"blocksize": 64, "shape": [OUT, IN]}),
        },
        FULL,
    ),
    "bitsandbytes int8": Checkpoint(
        "bitsandbytes int8",
        {
            f"{P}.weight": ("I8", (OUT, IN)),
            f"{P}.SCB": ("F32", (OUT,)),
            f"{P}.weight_format": ("U8", ()),
        },
        FULL,
    ),
    "bitsandbytes by configuration": Checkpoint(
        "bitsandbytes 4-bit",
        {f"{P}.weight": ("U8", (FULL // 2, 1))},
        FULL,
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    ),
    "HQQ": Checkpoint(
        "HQQ",
        {
            f"{P}.W_q": ("U8", (OUT, IN // 2)),
            f"{P}.scale": ("F16", (FULL // 64, 1)),
            f"{P}.zero": ("F16", (FULL // 64, 1)),
            f"{P}.nbits": integers(4),
        },
        FULL,
    ),
    "HQQ viewed as floats": Checkpoint(
        "HQQ",
        {
            f"{P}.W_q": ("BF16", (OUT, IN // 4)),
            f"{P}.scale": ("F16", (FULL // 64, 1)),
            f"{P}.zero": ("F16", (FULL // 64, 1)),
            f"{P}.shape": integers(OUT, IN),
        },
        FULL,
    ),
    "quanto int8": Checkpoint(
        "quanto",
        {
            f"{P}.weight._data": ("I8", (OUT, IN)),
            f"{P}.weight._scale": ("F32", (OUT, 1)),
            f"{P}.input_scale": ("F32", (1,)),
        },
        FULL,
    ),
    "quanto int4": Checkpoint(
        "quanto",
        {
            f"{P}.weight._data._data": ("U8", (OUT // 2, IN)),
            f"{P}.weight._scale": ("F32", (OUT, 1)),
            f"{P}.weight._shift": ("F32", (OUT, 1)),
        },
        FULL,
        {"quantization_config": {"quant_method": "quanto", "weights": "int4"}},
    ),
    "EETQ": Checkpoint(
        "EETQ", {f"{P}.weight": ("I8", (IN, OUT)), f"{P}.weight_scales": ("F16", (OUT,))}, FULL
    ),
    "BitNet": Checkpoint(
        "BitNet", {f"{P}.weight": ("U8", (OUT // 4, IN)), f"{P}.weight_scale": ("BF16", (1,))}, FULL
    ),
    "int4 (ModelOpt)": Checkpoint(
        "int4 in bytes",
        {
            f"{P}.weight": ("U8", (OUT // 2, IN)),
            f"{P}.weight_scale": ("F32", (OUT, 2)),
            f"{P}.pre_quant_scale": ("F32", (IN,)),
        },
        FULL,
    ),
    "AQLM": Checkpoint(
        "AQLM",
        {
            f"{P}.codes": ("I16", (OUT, IN // 8, 2)),
            f"{P}.codebooks": ("F16", (2, 256, 1, 8)),
            f"{P}.scales": ("F16", (OUT, 1, 1, 1)),
        },
        FULL,
    ),
    "VPTQ": Checkpoint(
        "VPTQ",
        {
            f"{P}.indices": ("I32", (1, 128, 50)),
            f"{P}.centroids.weight": ("F16", (1, 4096)),
            f"{P}.res_centroids.weight": ("F16", (1, 4096)),
            f"{P}.weight_scale": ("F16", (IN,)),
            f"{P}.weight_bias": ("F16", (IN,)),
        },
        FULL,
        {
            "quantization_config": {
                "quant_method": "vptq",
                "config_for_layers": {P: {"in_features": IN, "out_features": OUT}},
            }
        },
    ),
    "VPTQ of unknown size": Checkpoint(
        "VPTQ",
        {f"{P}.indices": ("I32", (1, 128, 50)), f"{P}.centroids.weight": ("F16", (1, 4096))},
        None,
    ),
    "HIGGS": Checkpoint(
        "HIGGS",
        {
            f"{P}.weight": ("I16", (OUT * 4 // 16, IN)),
            f"{P}.scales": ("F16", (OUT, 1)),
            f"{P}.tables": ("F16", (16,)),
            f"{P}.tables2": ("F16", (16, 16, 2)),
        },
        FULL,
    ),
    "SpQR": Checkpoint(
        "SpQR",
        {
            f"{P}.dense_weights": ("I64", (64, 8)),
            f"{P}.row_offsets": ("I32", (OUT + 1,)),
            f"{P}.col_vals": ("I32", (40,)),
        },
        None,
    ),
    "QuIP#": Checkpoint(
        "QuIP#",
        {
            f"{P}.Qidxs": ("I16", (OUT, IN // 8)),
            f"{P}.SU": ("F16", (IN,)),
            f"{P}.SV": ("F16", (OUT,)),
        },
        FULL,
    ),
    "EXL2": Checkpoint(
        "EXL2",
        {
            f"{P}.q_weight": ("I32", (20, OUT)),
            f"{P}.q_scale": ("I32", (4, OUT // 8)),
            f"{P}.q_groups": ("I16", (8,)),
            f"{P}.q_perm": ("I16", (IN,)),
        },
        FULL,
    ),
    "EXL3": Checkpoint(
        "EXL3",
        {
            f"{P}.trellis": ("I16", (IN // 16, OUT // 16, 64)),
            f"{P}.suh": ("F16", (IN,)),
            f"{P}.svh": ("F16", (OUT,)),
        },
        FULL,
    ),
    "MLX": Checkpoint(
        "MLX",
        {
            f"{P}.weight": ("U32", (OUT, IN // 8)),
            f"{P}.scales": ("F16", (OUT, IN // 64)),
            f"{P}.biases": ("F16", (OUT, IN // 64)),
        },
        FULL,
        {"quantization": {"bits": 4, "group_size": 64}},
    ),
    "MLX with bits of its own": Checkpoint(
        "MLX",
        {f"{P}.weight": ("U32", (OUT, IN // 4)), f"{P}.scales": ("F16", (OUT, IN // 64))},
        FULL,
        {"quantization": {"bits": 4, "group_size": 64, P: {"bits": 8, "group_size": 64}}},
    ),
    "MLX of unknown bits": Checkpoint(
        "MLX", {f"{P}.weight": ("U32", (OUT, IN // 4)), f"{P}.scales": ("F16", (OUT, IN // 64))}, None
    ),
    "integers of an unknown scheme": Checkpoint("", {f"{P}.weight": ("U8", (OUT, 50))}, None),
}
"""Every scheme by name."""

DECODED = frozenset(
    {
        *(name for name in CHECKPOINTS if name.startswith(("fp8 ", "MXFP", "NVFP4", "int4 pack-quantized"))),
        "fp4 experts (DeepSeek-V4)",
        "int3 pack-quantized",
        "int8 (compressed-tensors)",
        "GPTQ by its zero points",
        "GPTQ of 3 bits",
        "AWQ",
        "bitsandbytes nf4",
        "bitsandbytes nf4 of a stack",
        "bitsandbytes nf4 kept as BF16",
        "bitsandbytes fp4",
        "bitsandbytes int8",
    }
    - {"fp8 by configuration", "fp8 by configuration of a part"}
)
"""Names of the checkpoints whose packed weight is decoded from safetensors files."""


def decoded_rows(name: str) -> list[str]:
    """Return the names of the matrices that are decoded from a checkpoint's packed weight."""
    if name not in DECODED:
        return []
    tensors = CHECKPOINTS[name].tensors
    return [f"{STACK}[{i}]" for i in range(4)] if next(iter(tensors)).startswith(STACK) else [P]
