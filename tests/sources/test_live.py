"""Live models: rows and skipped parameters against NumPy, saved files and the outputs of layers.

Transformers renames modules and splits stacks of experts on saving, as in checkpoints of the hub:
`RENAMED` and `GATE_UP` hold the rules. Quantized weights are checked against the outputs for unit
vectors.
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import lorank
from lorank.report.spectral import METRICS, ModuleSpectrum, SpectralReport
from lorank.sources import open_source
from tests.support.bitsandbytes_layers import LAYERS
from tests.support.spectrum_oracle import assert_spectrum

torch = pytest.importorskip("torch")
pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
transformers = pytest.importorskip("transformers")
tiny_models = pytest.importorskip("tests.support.tiny_models")

nn = torch.nn
Conv1D = transformers.pytorch_utils.Conv1D
Array = np.ndarray
Build = Callable[[], Any]

NAMES = ["bert", "bert_classifier", "llama", "llama_tied", "gpt2", "mixtral", "gpt_oss", "t5", "vit"]
DTYPES = [torch.float64, torch.float16, torch.bfloat16]
every_model = pytest.mark.parametrize("build", [getattr(tiny_models, name) for name in NAMES], ids=NAMES)

RENAMED = {
    r"\.mlp\.gate$": r".block_sparse_moe.gate",
    r"\.mlp\.experts\.down_proj\[(\d+)\]$": r".block_sparse_moe.experts.\1.w2",
    r"^vit\.layers\.(\d+)\.": r"vit.encoder.layer.\1.",
    r"\.attention\.q_proj$": ".attention.attention.query",
    r"\.attention\.k_proj$": ".attention.attention.key",
    r"\.attention\.v_proj$": ".attention.attention.value",
    r"\.attention\.o_proj$": ".attention.output.dense",
    r"\.mlp\.fc1$": ".intermediate.dense",
    r"\.mlp\.fc2$": ".output.dense",
}
GATE_UP = re.compile(r"(.*)\.mlp\.experts\.gate_up_proj\[(\d+)\]")


def analyze(model: Any) -> SpectralReport:
    return lorank.analyze(model, keep_eigenvalues=True, progress=False)


def expected_rows(model: Any) -> dict[str, tuple[str, str, Array]]:
    """Return kind, module and (out, in) matrix of every row from PyTorch; tied weights once."""
    rows: dict[str, tuple[str, str, Array]] = {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for local, parameter in module.named_parameters(recurse=False):
            values = parameter.detach().double().numpy()
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if ".experts" in module_name and values.ndim == 3:
                stack = f"{module_name}.{local}"
                rows |= {f"{stack}[{i}]": ("expert", stack, expert) for i, expert in enumerate(values)}
            elif local == "weight" and isinstance(module, nn.Embedding):
                rows[module_name] = ("embedding", module_name, values)
            elif local == "weight" and isinstance(module, nn.Conv2d):
                rows[module_name] = ("conv", module_name, values.reshape(len(values), -1))
            elif local == "weight" and isinstance(module, nn.Linear):
                rows[module_name] = ("linear", module_name, values)
            elif local == "weight" and "Router" in type(module).__name__:
                # PEFT has no layer for this class and adapts the parameter by its name.
                rows[module_name] = ("linear", f"{module_name}.weight", values)
            elif local == "weight" and isinstance(module, Conv1D):
                rows[module_name] = ("linear", module_name, values.T)
    return rows


def assert_same_numbers(row: ModuleSpectrum, other: ModuleSpectrum) -> None:
    assert (row.shape, row.dtype, row.flags) == (other.shape, other.dtype, other.flags), row.name
    for metric in METRICS:
        mine, others = getattr(row, metric), getattr(other, metric)
        np.testing.assert_allclose(mine, others, rtol=1e-12, err_msg=f"{row.name}: {metric}")
    np.testing.assert_allclose(row.eigenvalues, other.eigenvalues, rtol=1e-12, atol=1e-18)


def assert_skipped(model: Any, module: str, word: str) -> None:
    """Check that the module or its parameters are skipped with a reason that contains a word."""
    reasons = [s.reason for s in open_source(model).skipped if f"{s.name}.".startswith(f"{module}.")]
    assert reasons, f"{module} has neither a row nor a reason why not"
    assert any(word in reason for reason in reasons), reasons


def effect(layer: Any) -> Array:
    """Return the weight that a linear layer applies, from its outputs for unit vectors."""
    with torch.no_grad():
        outputs = layer(torch.eye(layer.in_features))
        return (outputs - (0 if layer.bias is None else layer.bias)).T.double().numpy()


@every_model
def test_every_parameter_has_an_exact_row_or_a_reason(build: Build) -> None:
    model = build()
    assert sum(p.numel() * p.element_size() for p in model.parameters()) < 2**20
    report, expected = analyze(model), expected_rows(model)
    assert [row.name for row in report] == list(expected)
    for row in report:
        kind, module, matrix = expected[row.name]
        assert (row.kind, row.module, row.dtype) == (kind, module, "float32"), row.name
        assert (row.expert is not None) == (kind == "expert"), row.name
        assert_spectrum(row, matrix)
    modules = {row.module.removesuffix(".weight"): row.kind for row in report}
    rows = {name if kind == "expert" else f"{name}.weight" for name, kind in modules.items()}
    skipped = {s.name: s.reason for s in report.skipped}
    assert all(skipped.values())
    assert not rows & skipped.keys()
    assert rows | skipped.keys() == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert report.num_parameters == sum(p.numel() for p in model.parameters())


@every_model
def test_saved_model_has_the_same_rows(build: Build, tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    live, disk = analyze(model), {row.name: row for row in analyze(tmp_path)}
    tensors = load_file(tmp_path / "model.safetensors")
    met: set[str] = set()
    for row in live:
        split = GATE_UP.fullmatch(row.name)
        if split and row.name not in disk:  # one matrix live, two on disk
            parts = [f"{split[1]}.block_sparse_moe.experts.{split[2]}.{part}" for part in ("w1", "w3")]
            assert_spectrum(row, np.vstack([tensors[f"{part}.weight"] for part in parts]))
            assert all(disk[part].shape == (row.shape[0] // 2, row.shape[1]) for part in parts)
            met |= set(parts)
            continue
        name = row.name
        for pattern, replacement in RENAMED.items() if name not in disk else ():
            name = re.sub(pattern, replacement, name)
        assert_same_numbers(row, disk[name])
        # On disk, a separate expert is an ordinary linear layer.
        assert disk[name].kind == ("linear" if row.kind == "expert" and name != row.name else row.kind)
        met.add(name)
    assert met == set(disk)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("build", [tiny_models.llama, tiny_models.gpt2, tiny_models.gpt_oss])
def test_rows_follow_element_types(build: Build, dtype: Any, tmp_path: Path) -> None:
    model = build().to(dtype)
    report, expected = analyze(model), expected_rows(model)
    assert [row.name for row in report] == list(expected)
    assert {row.dtype for row in report} == {str(dtype).removeprefix("torch.")}
    for row in report:
        assert_spectrum(row, expected[row.name][2])
    model.save_pretrained(tmp_path)
    disk = analyze(tmp_path)
    for row in report:
        assert_same_numbers(row, disk[row.name])


TIED = [
    ("llama_tied", "model.embed_tokens", ["lm_head"]),
    ("gpt2", "transformer.wte", ["lm_head"]),
    ("t5", "shared", ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]),
]


@pytest.mark.parametrize(("name", "owner", "tied"), TIED)
def test_tied_weights_count_once(name: str, owner: str, tied: list[str]) -> None:
    report = analyze(getattr(tiny_models, name)())
    found = {s.name: s.reason for s in report.skipped if s.reason.startswith("tied")}
    assert found == {f"{name}.weight": f"tied to {owner}.weight" for name in tied}
    assert report[owner].kind == "embedding"


def test_shared_module_counts_once() -> None:
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert ([row.name for row in analyze(model)], analyze(model).num_parameters) == (["0"], 72)
    assert_skipped(model, "2", "tied to 0.weight")


def test_weights_on_the_meta_device_are_skipped() -> None:
    model, name = tiny_models.llama(), "model.layers.0.mlp.up_proj"
    rest = [row for row in expected_rows(model) if row != name]
    model.get_submodule(name).to("meta")
    assert [row.name for row in analyze(model)] == rest
    assert_skipped(model, name, "meta device")
    assert all(s.reason for s in open_source(model.to("meta")).skipped)
    assert_skipped(model, "lm_head", "meta device")
    with pytest.raises(ValueError, match="no weight matrix"):
        analyze(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_weights_are_flagged(value: float) -> None:
    model, names = tiny_models.gpt_oss(), {"lm_head", "model.layers.1.mlp.experts.down_proj[2]"}
    with torch.no_grad():
        model.lm_head.weight[3, 5] = value
        model.model.layers[1].mlp.experts.down_proj[2, 1, 1] = value
    report = analyze(model)
    assert len(report) == len(expected_rows(model))
    assert {row.name for row in report if row.flags or not row.has_spectrum} == names
    for name in names:
        assert "NaN or infinite values" in report[name].flags[0]
        assert np.isnan(report[name].alpha_hill)


@pytest.mark.parametrize("training", [True, False])
@every_model
def test_model_stays_unchanged(build: Build, training: bool) -> None:
    model = build().train(training)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    before = model.state_dict(keep_vars=True)
    bits = {name: (p.data_ptr(), p.detach().clone().view(torch.uint8)) for name, p in before.items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    analyze(model)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (address, values) in bits.items():
        assert after[name] is before[name]
        assert after[name].data_ptr() == address
        assert torch.equal(after[name].detach().view(torch.uint8), values), name
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("state", ["built", "quantized", "used"])
@pytest.mark.parametrize(("layer", "options"), LAYERS.values(), ids=LAYERS)
def test_bitsandbytes_layers_are_dequantized(layer: str, options: dict[str, Any], state: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), getattr(bitsandbytes.nn, layer)(64, 128, **options))
    original = model[1].weight.detach().double().numpy().copy()
    if state != "built":  # quantized on the way to a device
        model.to("cpu")
        assert model[1].weight.dtype in (torch.int8, torch.uint8)
    if state == "used":
        model(torch.randn(3, 64))
    report = analyze(model)
    assert [(row.name, row.kind) for row in report] == [("0", "linear"), ("1", "linear")]
    assert_spectrum(report["1"], original if state == "built" else effect(model[1]), rtol=1e-4)
    assert report["1"].frobenius_norm == pytest.approx(np.linalg.norm(original), rel=0.05)
    assert report.num_parameters == 64 * 64 + 64 + 128 * 64 + 128


def test_torchao_int8_weights_are_dequantized() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_models.llama()
    names, originals = list(expected_rows(model)), expected_rows(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    report = analyze(model)
    assert [row.name for row in report] == names
    assert report.num_parameters == sum(p.numel() for p in tiny_models.llama().parameters())
    for row in report:
        if row.kind == "linear":
            assert type(model.get_submodule(row.name).weight) is not nn.Parameter
            assert_spectrum(row, effect(model.get_submodule(row.name)), rtol=1e-4)
            assert row.frobenius_norm == pytest.approx(np.linalg.norm(originals[row.name][2]), rel=0.01)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamically_quantized_layers_are_skipped_with_a_reason() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Embedding(16, 8))
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert callable(model[0].weight)
    assert [row.name for row in analyze(model)] == ["1"]
    assert_skipped(model, "0", "quantized")


def test_weights_in_buffers_are_skipped_with_a_reason() -> None:
    layer = nn.Module()  # as auto-gptq, gptqmodel and AWQ store a layer of 64 inputs
    layer.register_buffer("qweight", torch.zeros(8, 32, dtype=torch.int32))
    layer.register_buffer("qzeros", torch.zeros(1, 4, dtype=torch.int32))
    layer.register_buffer("scales", torch.ones(1, 32, dtype=torch.float16))
    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"proj": layer}))
    assert [row.name for row in analyze(model)] == ["0"]
    assert_skipped(model, "1.proj", "quantized")


Q, STACKS = ["q_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PEFT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("llama", "LoraConfig", {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}),
    "dora": ("llama", "LoraConfig", {"target_modules": Q, "use_dora": True}),
    "lora-mixtral": ("mixtral", "LoraConfig", {"target_modules": Q, "target_parameters": STACKS}),
    "lora-gpt_oss": ("gpt_oss", "LoraConfig", {"target_modules": Q, "target_parameters": STACKS}),
    "modules_to_save": ("llama", "LoraConfig", {"target_modules": Q, "modules_to_save": ["lm_head"]}),
    "tokens": ("llama", "LoraConfig", {"target_modules": Q, "trainable_token_indices": [1, 2]}),
    "loha": ("llama", "LoHaConfig", {"target_modules": Q}),
    "oft": ("llama", "OFTConfig", {"target_modules": Q, "oft_block_size": 4}),
    "prompt": ("llama", "PromptTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("name", "config", "options"), PEFT.values(), ids=PEFT)
def test_peft_models_are_reported_as_their_base_models(
    name: str, config: str, options: dict[str, Any]
) -> None:
    peft = pytest.importorskip("peft")
    base = analyze(getattr(tiny_models, name)())
    report = analyze(peft.get_peft_model(getattr(tiny_models, name)(), getattr(peft, config)(**options)))
    expected = {row.name: row for row in base}
    assert sorted(row.name for row in report) == sorted(expected)
    assert report.num_parameters == base.num_parameters
    for row in report:
        assert (row.module, row.kind) == (expected[row.name].module, expected[row.name].kind)
        assert_same_numbers(row, expected[row.name])


def test_wrappers_of_torch_do_not_change_names() -> None:
    checkpoint_wrapper = torch.distributed.algorithms._checkpoint.checkpoint_wrapper.checkpoint_wrapper
    model = tiny_models.llama()
    plain = lorank.analyze(model, progress=False)
    wrapped = copy.deepcopy(model)
    wrapped.model.layers[0] = checkpoint_wrapper(wrapped.model.layers[0])
    for one in (torch.compile(model), torch.nn.DataParallel(model), wrapped):
        assert list(lorank.analyze(one, progress=False)) == list(plain)


def test_training_is_available_after_import_lorank() -> None:
    code = """
import sys, lorank
assert "torch" not in sys.modules
assert "training" in dir(lorank)
print(lorank.training.GardCallback.__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "GardCallback\n"
