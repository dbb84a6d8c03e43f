"""Packed weights of live models, compared with the values of their own libraries, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import lorank
from lorank.report.spectral import SpectralReport
from lorank.sources import open_source

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")

nn = torch.nn
Array = np.ndarray
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def generator(seed: int = 0) -> Any:
    return torch.Generator().manual_seed(seed)


def weight(*shape: int) -> Any:
    """Return a weight whose blocks differ in size, so that misplaced scales change the spectrum."""
    sizes = torch.rand(*(-(-size // 16) for size in shape), generator=generator(1)) * 8 + 0.1
    for dimension, size in enumerate(shape):
        sizes = sizes.repeat_interleave(16, dim=dimension).narrow(dimension, 0, size)
    return torch.randn(shape, generator=generator()) * sizes


def float8(values: Any, *blocks: int) -> tuple[Any, Any, Array]:
    """Return codes and scales of blocks of rows and columns, and their values."""
    grid = [-(-size // block) for size, block in zip(values.shape[-2:], blocks, strict=True)]
    scales = torch.empty(*values.shape[:-2], *grid)
    codes = torch.empty(values.shape, dtype=torch.float8_e4m3fn)
    true = np.empty(values.shape)
    for i in range(grid[0]):
        for j in range(grid[1]):
            rows = slice(i * blocks[0], (i + 1) * blocks[0])
            cols = slice(j * blocks[1], (j + 1) * blocks[1])
            scale = values[..., rows, cols].abs().amax((-2, -1)) / 448
            scales[..., i, j] = scale
            codes[..., rows, cols] = (values[..., rows, cols] / scale[..., None, None]).to(codes.dtype)
            stored = codes[..., rows, cols].double().numpy()
            true[..., rows, cols] = stored * scale.double().numpy()[..., None, None]
    return codes, scales, true


def model_of(**modules: Any) -> Any:
    model = nn.Module()
    for name, module in modules.items():
        setattr(model, name, module)
    return model


def module_of(**tensors: Any) -> Any:
    """Return a module with these tensors: floats as parameters, integers as buffers."""
    module = nn.Module()
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:
            module.register_buffer(name, tensor)
    return module


def filled(module: Any, **tensors: Any) -> Any:
    for name, tensor in tensors.items():
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    return module


def analyzed(model: Any) -> SpectralReport:
    return lorank.analyze(model, keep_eigenvalues=True, progress=False)


def assert_values(report: SpectralReport, name: str, matrix: Array) -> None:
    row = report[name]
    assert (row.shape, row.dtype) == (matrix.shape, "float32")
    oracle = np.sort(np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)) ** 2
    np.testing.assert_allclose(row.eigenvalues, oracle, rtol=1e-5, atol=1e-9 * oracle[-1])


def parts_of(model: Any) -> set[str]:
    return {s.name for s in open_source(model).skipped if s.reason.startswith(("scale of ", "part of "))}


@pytest.mark.parametrize(
    ("shape", "blocks", "scale_format"),
    [
        ((128, 256), (128, 128), "float"),
        ((300, 200), (128, 128), "float"),  # The last blocks are cut off.
        ((192, 192), (64, 96), "float"),
        ((96, 256), (128, 128), "ue8m0"),
        ((96, 64), None, "float"),
    ],
)
def test_float8_linear_layers_are_dequantized(
    shape: tuple[int, int], blocks: tuple[int, int] | None, scale_format: str
) -> None:
    codes, scales, true = float8(weight(*shape), *(blocks or shape))
    layer = finegrained.FP8Linear(shape[1], shape[0], block_size=blocks, scale_fmt=scale_format)
    if scale_format == "ue8m0":
        rounded = scales.log2().ceil().exp2()
        spread = rounded.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
        true, scales = codes.double().numpy() * spread.double().numpy(), rounded.to(torch.float8_e8m0fnu)
    filled(layer, weight=codes, weight_scale_inv=scales.reshape(layer.weight_scale_inv.shape))
    model = model_of(q_proj=layer, other=nn.Linear(8, 8))
    report = analyzed(model)
    assert [(row.name, row.kind) for row in report] == [("q_proj", "linear"), ("other", "linear")]
    assert_values(report, "q_proj", true)
    assert report.num_parameters == math.prod(shape) + 72
    assert parts_of(model) == {"q_proj.weight_scale_inv"}


def test_values_equal_the_dequantization_of_the_library() -> None:
    codes, scales, _ = float8(weight(256, 128), 128, 128)
    layer = filled(
        finegrained.FP8Linear(128, 256, block_size=(128, 128)), weight=codes, weight_scale_inv=scales
    )
    own = finegrained.Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    assert_values(analyzed(model_of(q_proj=layer)), "q_proj", own.numpy())


def test_float8_embedding_is_dequantized() -> None:
    codes, scales, true = float8(weight(64, 32), 64, 32)
    layer = filled(finegrained.FP8Embedding(64, 32), weight=codes, weight_scale=scales.reshape(1))
    report = analyzed(model_of(table=layer))
    assert [(row.name, row.kind) for row in report] == [("table", "embedding")]
    assert_values(report, "table", true)


def experts(**options: Any) -> Any:
    config = transformers.MixtralConfig(hidden_size=64, intermediate_size=96, num_local_experts=3)
    return finegrained.FP8Experts(config, **options)


def assert_experts(module: Any, truth: dict[str, Any]) -> None:
    """Check the rows of a module's experts, and the number of its parameters."""
    report = analyzed(model_of(experts=module))
    assert len(report) == 6
    for name, true in truth.items():
        for index, matrix in enumerate(true):
            assert_values(report, f"experts.{name}[{index}]", matrix)
    assert report.num_parameters == 3 * 3 * 64 * 96


@pytest.mark.parametrize("blocks", [(32, 32), (128, 128)])
def test_float8_experts_are_dequantized(blocks: tuple[int, int]) -> None:
    module, truth = experts(block_size=blocks), {}
    for name in ("gate_up_proj", "down_proj"):
        shape = tuple(getattr(module, name).shape)
        rows = min(blocks[0], shape[1])
        codes, scales, truth[name] = float8(weight(*shape), rows, min(blocks[1], shape[2]))
        assert scales.shape == getattr(module, f"{name}_scale_inv").shape
        filled(module, **{name: codes, f"{name}_scale_inv": scales})
    assert_experts(module, truth)


def test_experts_of_four_bit_floats_are_dequantized() -> None:
    module, truth = experts(expert_dtype="fp4"), {}
    for name in ("gate_up_proj", "down_proj"):
        shape = tuple(getattr(module, name).shape)
        codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator()).view(torch.int8)
        scales = torch.rand(getattr(module, f"{name}_scale_inv").shape, generator=generator()) + 0.1
        filled(module, **{name: codes, f"{name}_scale_inv": scales})
        truth[name] = finegrained.Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32).numpy()
    assert_experts(module, truth)


def test_row_scales_of_fbgemm_and_compressed_tensors_are_applied() -> None:
    fbgemm = pytest.importorskip("transformers.integrations.fbgemm_fp8")
    compressed = pytest.importorskip("transformers.integrations.compressed_tensors")
    codes, scales, true = float8(
        weight(64, 64), 1, 64
    )  # For square weights, shapes do not determine the side of the scales.
    one = filled(fbgemm.FbgemmFp8Linear(64, 64, bias=False), weight=codes, weight_scale=scales)
    other = filled(compressed.CompressedTensorsFP8Linear(64, 64), weight=codes, weight_scale=scales.T.clone())
    report = analyzed(model_of(one=one, other=other))
    assert_values(report, "one", true)
    assert_values(report, "other", true)
    assert report.num_parameters == 2 * 64 * 64


def test_experts_of_fbgemm_have_a_scale_per_output() -> None:
    fbgemm = pytest.importorskip("transformers.integrations.fbgemm_fp8")
    config = transformers.Llama4TextConfig(hidden_size=64, intermediate_size=64, num_local_experts=2)
    module, truth = fbgemm.FbgemmFp8Llama4TextExperts(config), {}
    for name in ("gate_up_proj", "down_proj"):
        stored = getattr(module, name)
        codes, scales, truth[name] = float8(weight(*stored.shape), stored.shape[1], 1)
        filled(
            module, **{name: codes, f"{name}_scale": scales.reshape(getattr(module, f"{name}_scale").shape)}
        )
    report = analyzed(model_of(experts=module))
    for name, true in truth.items():
        for index, matrix in enumerate(true):
            assert_values(report, f"experts.{name}[{index}]", matrix)


def unpacked(codes: Any) -> Array:
    bytes_ = codes.numpy()
    return E2M1[np.stack([bytes_ & 15, bytes_ >> 4], axis=-1)].reshape(*bytes_.shape[:-1], -1)


def random_bytes(*shape: int) -> Any:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator())


def test_mxfp4_experts_of_gpt_oss_are_dequantized() -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = random_bytes(3, 96, 2, 16), random_bytes(3, 96, 2) // 32 + 120
    model = model_of(experts=module_of(gate_up_proj_blocks=blocks, gate_up_proj_scales=scales))
    report = analyzed(model)
    own = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert len(report) == 3
    for index, matrix in enumerate(own.transpose(1, 2).double().numpy()):
        assert_values(report, f"experts.gate_up_proj[{index}]", matrix)
    assert report.num_parameters == 3 * 96 * 64


def test_nvfp4_divides_or_multiplies_by_the_overall_scale() -> None:
    codes = random_bytes(32, 32)
    scales = (torch.rand(32, 4, generator=generator()) * 8 + 1).to(torch.float8_e4m3fn)
    overall = torch.tensor(7.0)
    inner = unpacked(codes) * np.repeat(scales.double().numpy(), 16, axis=1)
    divided = module_of(
        weight_packed=codes.clone(), weight_scale=scales, weight_global_scale=overall.reshape(1)
    )
    multiplied = module_of(weight=codes, weight_scale=scales, weight_scale_2=overall)
    report = analyzed(model_of(divided=divided, multiplied=multiplied))
    assert_values(report, "divided", inner / 7)
    assert_values(report, "multiplied", inner * 7)
    assert report.num_parameters == 2 * 32 * 64


def packed_words(codes: Array, bits: int) -> Any:
    """Pack unsigned integers along the last dimension in words of 32 bits, the lowest bits first."""
    count = 32 // bits
    parts = codes.reshape(*codes.shape[:-1], -1, count).astype(np.uint32)
    words = (parts << (np.arange(count, dtype=np.uint32) * bits)).sum(axis=-1, dtype=np.uint32)
    return torch.from_numpy(words.view(np.int32))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("is_ordered", [True, False])
def test_integers_packed_in_32_bits_are_dequantized(bits: int, is_symmetric: bool, is_ordered: bool) -> None:
    rng, half = np.random.default_rng(0), 2 ** (bits - 1)
    codes, zeros = rng.integers(0, 2 * half, (24, 64)), rng.integers(0, 2 * half, (24, 2))
    scales = rng.random((24, 2)).astype(np.float32) + 0.1
    groups = rng.integers(0, 2, 64) if is_ordered else np.arange(64) // 32
    module = module_of(
        weight_packed=packed_words(codes, bits),
        weight_scale=torch.from_numpy(scales),
        weight_shape=torch.tensor([24, 64]),
    )
    true = (codes - half) * scales[:, groups].astype(np.float64)
    if not is_symmetric:
        module.register_buffer("weight_zero_point", packed_words(zeros.T, bits).T.contiguous())
        true = (codes - zeros[:, groups]) * scales[:, groups].astype(np.float64)
    if is_ordered:
        module.register_buffer("weight_g_idx", torch.from_numpy(groups.astype(np.int32)))
    report = analyzed(model_of(proj=module))
    assert_values(report, "proj", true)
    assert report.num_parameters == 24 * 64


def test_8_bit_integers_with_scales_and_zero_points_are_dequantized() -> None:
    rng = np.random.default_rng(0)
    codes, zeros = rng.integers(-128, 128, (24, 32)), rng.integers(-9, 9, (24, 1))
    scales = rng.random((24, 1)).astype(np.float32) + 0.1
    plain = module_of(weight=torch.from_numpy(codes).to(torch.int8), weight_scale=torch.from_numpy(scales))
    shifted = module_of(
        weight=torch.from_numpy(codes).to(torch.int8),
        weight_scale=torch.from_numpy(scales),
        weight_zero_point=torch.from_numpy(zeros).to(torch.int8),
    )
    report = analyzed(model_of(plain=plain, shifted=shifted))
    assert_values(report, "plain", codes * scales.astype(np.float64))
    assert_values(report, "shifted", (codes - zeros) * scales.astype(np.float64))


def test_ternary_layers_of_bitnet_are_dequantized() -> None:
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    codes = torch.randint(-1, 2, (32, 24), generator=generator()).float()
    layer = bitnet.BitLinear(24, 32, bias=False, dtype=torch.float32)
    layer.weight, layer.weight_scale = bitnet.pack_weights(codes.clone()), torch.tensor([4.0])
    report = analyzed(model_of(proj=layer))
    assert_values(report, "proj", codes.double().numpy() / 4)
    assert report.num_parameters == 32 * 24


def test_integer_layers_of_gemma_are_dequantized() -> None:
    gemma = pytest.importorskip("transformers.integrations.gemma_quant")
    layers = {f"bits{bits}": gemma.QuantizedLinear(32, 16, num_bits=bits) for bits in (2, 4, 8)}
    for layer in layers.values():
        layer.weight.data = random_bytes(*layer.weight.shape).to(layer.weight.dtype)
        layer.weight_scale.data = torch.rand(16, 1, generator=generator()) + 0.1
    report = analyzed(model_of(**layers))
    for name, layer in layers.items():
        assert_values(report, name, layer._dequantize_weights(torch.float32).detach().double().numpy())
    assert report.num_parameters == 3 * 16 * 32


class HQQLinear(nn.Module):
    """An HQQ layer as its library builds it: codes as a parameter, the rest in a dictionary."""

    def __init__(self, true: Any) -> None:
        super().__init__()
        self.true = {"weight": true}
        self.W_q = nn.Parameter(torch.zeros(len(true) // 2, true.shape[1], dtype=torch.uint8), False)
        self.bias = nn.Parameter(torch.zeros(len(true)))
        self.meta = {"shape": true.shape, "nbits": 4}

    def dequantize(self) -> Any:
        return self.true["weight"]


def test_hqq_layers_are_dequantized() -> None:
    true = weight(32, 24)
    report = analyzed(model_of(proj=HQQLinear(true), other=nn.Linear(4, 4)))
    assert [row.name for row in report] == ["proj", "other"]
    assert_values(report, "proj", true.double().numpy())
    assert report.num_parameters == 32 * 24 + 32 + 20


class TorchQuantLinear(nn.Module):
    """A GPTQ layer with the dequantizing method of gptqmodel's layers."""

    def __init__(self, true: Any, offers: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = true.shape
        self.register_buffer("qweight", torch.zeros(true.shape[1] // 8, true.shape[0], dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(1, true.shape[0] // 8, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, true.shape[0], dtype=torch.float16))
        if offers:
            self.true = {"weight": true}
            self.dequantize_weight = self._dequantize

    def _dequantize(self) -> Any:
        return self.true["weight"].T


def test_gptq_layers_need_a_dequantizing_method() -> None:
    true = weight(32, 24)
    model = model_of(one=TorchQuantLinear(true, True), other=TorchQuantLinear(true, False))
    report = analyzed(model)
    assert [row.name for row in report] == ["one"]
    assert_values(report, "one", true.double().numpy())
    assert report.num_parameters == 2 * 32 * 24
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert "GPTQ in TorchQuantLinear" in reasons["other.qweight"]
    assert not any("analyse it live" in reason for reason in reasons.values())


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": torch.zeros(32, 24, dtype=torch.float8_e4m3fn), "weight_my_scales": torch.ones(3, 5)},
        {"weight": torch.zeros(32, 24, dtype=torch.float8_e4m3fn), "weight_scale": torch.ones(7, 5)},
        {"weight": torch.zeros(8, 24, dtype=torch.uint8), "weight_scale": torch.ones(1)},
        {"weight": torch.zeros(32, 24, dtype=torch.int8), "weight_scales": torch.ones(24)},
    ],
    ids=["unknown scales", "unfitting scales", "ternary of another library", "EETQ"],
)
def test_codes_that_cannot_be_dequantized_are_skipped_and_counted(tensors: dict[str, Any]) -> None:
    model = model_of(proj=module_of(**tensors), other=nn.Linear(4, 4))
    report = analyzed(model)
    assert [row.name for row in report] == ["other"]
    assert report.num_parameters == 32 * 24 + 20
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert reasons["proj.weight"].startswith("quantized (")
    assert not any("analyse it live" in reason for reason in reasons.values())


def test_share_of_a_base_of_unknown_size_raises() -> None:
    words = torch.zeros(32, 24, dtype=torch.int32)
    model = model_of(
        proj=module_of(weight_packed=words, weight_scale=torch.ones(32, 2)), other=nn.Linear(4, 4)
    )
    with pytest.raises(ValueError, match=r"proj\.weight_packed.*give the budget as a number"):
        lorank.allocate(model, budget="10%", progress=False)
    assert lorank.allocate(model, budget=16, r_min=1, progress=False).base_parameters is None


def test_float8_weights_on_the_meta_device_are_skipped_and_counted() -> None:
    layer = finegrained.FP8Linear(64, 64, block_size=(32, 32)).to("meta")
    report = analyzed(model_of(proj=layer, other=nn.Linear(4, 4)))
    assert [row.name for row in report] == ["other"]
    assert report.num_parameters == 64 * 64 + 20
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert "meta device" in reasons["proj.weight"]


def test_ranks_are_chosen_for_a_float8_model() -> None:
    codes, scales, _ = float8(weight(128, 64), 32, 32)
    layer = filled(finegrained.FP8Linear(64, 128, block_size=(32, 32)), weight=codes, weight_scale_inv=scales)
    allocation = lorank.allocate(
        model_of(q_proj=layer, other=nn.Linear(64, 64)), budget="20%", r_min=1, r_max=16, progress=False
    )
    assert set(allocation.ranks) == {"q_proj", "other"}
    assert allocation.base_parameters == 128 * 64 + 64 * 64 + 64


def test_ranks_of_a_plain_checkpoint_fit_its_packed_model() -> None:
    true = weight(64, 32)
    allocation = lorank.allocate({"proj.weight": true.numpy()}, method="uniform", r_max=4)
    model = model_of(proj=TorchQuantLinear(true, False))
    assert allocation.lora_settings(model)["target_modules"]
    other = model_of(proj=TorchQuantLinear(weight(64, 40), False))
    with pytest.raises(ValueError, match=r"shape \(64, 32\) in the source"):
        allocation.lora_settings(other)


def test_experts_in_kernel_order_are_skipped_and_counted() -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    config = transformers.GptOssConfig(hidden_size=64, intermediate_size=32, num_local_experts=3)
    module = mxfp4.Mxfp4GptOssExperts(config)
    biases = module.gate_up_proj_bias.numel() + module.down_proj_bias.numel()
    unloaded = open_source(model_of(experts=module))
    assert unloaded.num_parameters is None
    assert "experts.gate_up_proj" in unloaded.unknown_parameters
    for name in ("gate_up_proj", "down_proj"):
        del module._parameters[name]
        setattr(module, name, object())  # A tensor in the layout of a kernel.
    report = analyzed(model_of(experts=module, other=nn.Linear(4, 4)))
    assert [row.name for row in report] == ["other"]
    assert report.num_parameters == 3 * 3 * 64 * 32 + biases + 20
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert "no known formula to dequantize" in reasons["experts.gate_up_proj"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_weights_behind_methods_are_counted() -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Embedding(16, 8))
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert open_source(model).num_parameters == 2 * 16 * 8


def test_parametrized_weights_are_not_mistaken_for_quantized_ones() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3))
    source = open_source(model_of(conv=layer, other=nn.Linear(4, 4)))
    assert source.num_parameters == sum(parameter.numel() for parameter in layer.parameters()) + 20
    assert not any("quantized" in entry.reason for entry in source.skipped)
