"""A model is compared with its base model and the updates of adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import lorank
from tests.baking.merged_models import baked_beside, merged, saved_pair
from tests.support import architectures, tiny_models
from tests.support.command_line import outcome
from tests.support.peft_cases import CASES, case

TARGET = "model.layers.0.self_attn.q_proj.weight"


def edited(baked: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Edit the tensors of a model's only file."""
    file = baked / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})
    return baked


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Return the folders of a base model, an adapter and the baked model."""
    folder = tmp_path_factory.mktemp("pair")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    base, adapter, _ = saved_pair(tiny_models.llama(), config, folder)
    baked_beside(base, adapter)
    return base, adapter, folder / "baked"


def copied(pair: tuple[Path, Path, Path], folder: Path) -> Path:
    return Path(shutil.copytree(pair[2], folder / "copy"))


def verified(pair: tuple[Path, Path, Path], baked: Path, status: int) -> dict[str, Any]:
    """Run the command, whose exit status must be `status`, and return its JSON values."""
    code, out, errors = outcome("verify", pair[0], pair[1], baked, "--json", "--quiet")
    assert code == status, errors
    assert "Traceback" not in errors
    return json.loads(out)  # type: ignore[no-any-return]


def test_baked_model_holds_all_updates(pair: tuple[Path, Path, Path]) -> None:
    found = verified(pair, pair[2], 0)
    assert found["status"] == "holds"
    assert len(found["tensors"]) == 4
    assert found["unchanged"] == len(load_file(pair[0] / "model.safetensors")) - 4
    for check in found["tensors"]:
        assert check["relative_error"] < 1e-5
        assert check["largest_error"] == 0
        assert abs(check["share"] - 1) < 1e-6


@pytest.mark.parametrize("name", [name for name in CASES if name != "lora_bias"])
def test_merged_model_of_peft_holds_all_updates(name: str, tmp_path: Path) -> None:
    model, config = case(name)
    base, adapter, adapted = saved_pair(model, config, tmp_path)
    merged(adapted).save_pretrained(tmp_path / "merged")
    found = lorank.verify(base, adapter, tmp_path / "merged", progress=False)
    assert found.status == "holds", [check for check in found.tensors if check.status != "holds"]
    assert found.tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_model_in_16_bits_holds_all_updates(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_models.llama().to(dtype)
    base, adapter, adapted = saved_pair(model, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    merged(adapted).save_pretrained(tmp_path / "merged")
    found = lorank.verify(base, adapter, tmp_path / "merged", progress=False)
    assert found.status == "holds"
    assert all(check.largest_error is not None and check.largest_error < 2 for check in found.tensors)


def test_model_in_another_type_holds_all_updates(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    lorank.bake(pair[0], pair[1], tmp_path / "half", dtype="float16", progress=False)
    assert lorank.verify(pair[0], pair[1], tmp_path / "half", progress=False).status == "holds"


def test_base_model_has_lost_all_updates(pair: tuple[Path, Path, Path]) -> None:
    found = verified(pair, pair[0], 1)
    assert {check["status"] for check in found["tensors"]} == {"lost"}


def test_lost_update_of_one_module_is_named(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    before = load_file(pair[0] / "model.safetensors")[TARGET]
    found = verified(pair, edited(copied(pair, tmp_path), lambda x: x.update({TARGET: before})), 1)
    assert [check["name"] for check in found["tensors"] if check["status"] == "lost"] == [TARGET]


def test_scaled_update_is_measured(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    before = load_file(pair[0] / "model.safetensors")[TARGET]
    edited(copied(pair, tmp_path), lambda x: x.update({TARGET: before + 2 * (x[TARGET] - before)}))
    found = verified(pair, tmp_path / "copy", 1)
    (check,) = [check for check in found["tensors"] if check["status"] != "holds"]
    assert (check["name"], check["status"]) == (TARGET, "differs")
    assert "2 times the update" in check["reason"]


def test_changed_other_tensor_is_named(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    edited(copied(pair, tmp_path), lambda x: x["model.norm.weight"].mul_(1.01))
    found = verified(pair, tmp_path / "copy", 1)
    assert [check["name"] for check in found["others"]] == ["model.norm.weight"]


def test_noise_instead_of_the_update_differs(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    edited(copied(pair, tmp_path), lambda x: x[TARGET].add_(torch.randn_like(x[TARGET])))
    found = verified(pair, tmp_path / "copy", 1)
    assert [check["status"] for check in found["tensors"] if check["name"] == TARGET] == ["differs"]


def test_nan_differs(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    edited(copied(pair, tmp_path), lambda x: x[TARGET].fill_(torch.nan))
    code, _, _ = outcome("verify", pair[0], pair[1], tmp_path / "copy", "--quiet")
    assert code == 1


def test_missing_tensor_is_undecided(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    edited(copied(pair, tmp_path), lambda x: x.pop(TARGET))
    found = verified(pair, tmp_path / "copy", 3)
    assert found["status"] == "unknown"


def test_other_shape_differs(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    edited(copied(pair, tmp_path), lambda x: x.update({TARGET: x[TARGET][:16].clone()}))
    verified(pair, tmp_path / "copy", 1)


def changed_rows(folder: Path, edit: Callable[[torch.Tensor], object]) -> Path:
    """Copy the merged model beside a base model, and edit one weight."""
    target = Path(shutil.copytree(folder / "merged", folder / "wrong"))
    return edited(target, lambda x: edit(x[TARGET]))


def merged_pair(
    folder: Path, dtype: torch.dtype, scale: float, **options: Any
) -> tuple[Path, Path, torch.Tensor]:
    """Save a base model, an adapter of a scale, and PEFT's merge; return the base weight, too."""
    config = LoraConfig(r=8, target_modules=["q_proj"], lora_alpha=8 * scale, **options)
    model: Any = tiny_models.llama().to(dtype)
    before = model.get_submodule(TARGET.removesuffix(".weight")).weight.detach().clone()
    base, adapter, adapted = saved_pair(model, config, folder)
    merged(adapted).save_pretrained(folder / "merged")
    return base, adapter, before


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [100.0, 1.0, 0.01])
@pytest.mark.parametrize("use_dora", [False, True])
def test_merge_of_any_size_holds_in_every_row(
    dtype: torch.dtype, scale: float, use_dora: bool, tmp_path: Path
) -> None:
    base, adapter, _ = merged_pair(tmp_path, dtype, scale, use_dora=use_dora)
    found = lorank.verify(base, adapter, tmp_path / "merged", progress=False)
    assert found.status == "holds", found.tensors
    assert [check.wrong_rows for check in found.tensors] == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [100.0, 1.0])
def test_one_wrong_row_differs(dtype: torch.dtype, scale: float, tmp_path: Path) -> None:
    base, adapter, before = merged_pair(tmp_path, dtype, scale)

    def lose(weight: torch.Tensor) -> None:
        weight[5] = before[5]

    def swap(weight: torch.Tensor) -> None:
        weight[[5, 6]] = weight[[6, 5]]

    def repeat(weight: torch.Tensor) -> None:
        weight[5] += weight[5] - before[5]

    for edit, rows in [(lose, 1), (swap, 2), (repeat, 1)]:
        wrong = changed_rows(tmp_path, edit)
        found = lorank.verify(base, adapter, wrong, progress=False)
        (check,) = [check for check in found.tensors if check.status != "holds"]
        assert (check.name, check.status) == (TARGET, "differs")
        assert check.wrong_rows == rows
        assert f"{rows} of 32 rows differ by more than rounding can, the first at 5" in check.reason
        shutil.rmtree(wrong)


def test_one_wrong_element_differs(tmp_path: Path) -> None:
    base, adapter, _ = merged_pair(tmp_path, torch.bfloat16, 1.0)

    def change(weight: torch.Tensor) -> None:
        weight[7, 3] += 0.1

    found = lorank.verify(base, adapter, changed_rows(tmp_path, change), progress=False)
    assert [(check.status, check.wrong_rows) for check in found.tensors] == [("differs", 1), ("holds", 0)]


def test_row_without_an_update_below_rounding_differs(tmp_path: Path) -> None:
    """Most elements keep their bits here: only missing changes show that a row was lost."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4096, 64, bias=False)).to(torch.bfloat16)
    weight: Any = model[0].weight
    weight.data = (0.02 * torch.randn(64, 4096, generator=generator)).bfloat16()
    (tmp_path / "base").mkdir()
    save_file({"0.weight": weight.data}, tmp_path / "base" / "model.safetensors")
    adapted: Any = peft.get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules=["0"]))
    factor = adapted.base_model.model[0].lora_B["default"].weight
    factor.data = (1e-3 * torch.randn(64, 8, generator=generator)).to(factor.dtype)
    adapted.save_pretrained(tmp_path / "adapter")
    before = weight.data.clone()
    after = adapted.merge_and_unload()[0].weight.data
    assert (after == before).double().mean() > 0.5
    for wrong, status in [([], "holds"), ([9], "differs"), ([0, 63], "differs")]:
        rows = after.clone()
        rows[wrong] = before[wrong]
        file = tmp_path / f"{len(wrong)}.safetensors"
        save_file({"0.weight": rows}, file)
        found = lorank.verify(tmp_path / "base", tmp_path / "adapter", file, progress=False)
        assert (found.status, found.tensors[0].wrong_rows) == (status, len(wrong))


def test_float32_file_of_a_merge_in_bfloat16_holds(tmp_path: Path) -> None:
    model = tiny_models.llama()
    base, adapter, _ = saved_pair(model, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    half = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    live = peft.PeftModel.from_pretrained(half, adapter)
    merged(live).float().save_pretrained(tmp_path / "merged")
    found = lorank.verify(base, adapter, tmp_path / "merged", progress=False)
    assert {check.status for check in found.tensors} == {"holds"}


def test_update_below_rounding_is_undecided(tmp_path: Path) -> None:
    model = tiny_models.llama().to(torch.bfloat16)
    base, adapter, _ = saved_pair(model, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    lorank.bake(base, adapter, tmp_path / "baked", [1e-9], progress=False)
    found = lorank.verify(base, adapter, tmp_path / "baked", [1e-9], progress=False)
    assert found.status == "unknown"
    assert "rounding to the stored type leaves nothing" in found.tensors[0].reason
    assert lorank.verify(base, adapter, tmp_path / "baked", progress=False).status == "lost"


def test_renamed_tensors_are_found_by_their_parameters(tmp_path: Path) -> None:
    model = tiny_models.bert_classifier()
    base, adapter, adapted = saved_pair(model, LoraConfig(r=4, target_modules=["query"]), tmp_path)
    merged(adapted).save_pretrained(tmp_path / "merged")
    changes: list[Callable[[str], str]] = [
        lambda name: name.removeprefix("bert."),
        lambda name: f"module.{name}",
    ]
    for number, change in enumerate(changes):

        def rename(tensors: dict[str, torch.Tensor], change: Callable[[str], str] = change) -> None:
            renamed = {change(name): value for name, value in tensors.items()}
            tensors.clear()
            tensors.update(renamed)

        folder = Path(shutil.copytree(tmp_path / "merged", tmp_path / f"renamed{number}"))
        assert lorank.verify(base, adapter, edited(folder, rename), progress=False).status == "holds"


def test_experts_of_a_model_saved_again_hold_all_updates(tmp_path: Path) -> None:
    model: Any = architectures.tiny("Qwen2MoeForCausalLM")
    parameters = [name for name, value in model.named_parameters() if "experts" in name and value.ndim == 3]
    config = LoraConfig(r=2, target_parameters=parameters, target_modules=[])
    base, adapter, adapted = saved_pair(model, config, tmp_path)
    merged(adapted).save_pretrained(tmp_path / "merged")
    found = lorank.verify(base, adapter, tmp_path / "merged", progress=False)
    assert found.status == "holds"
    assert len(found.tensors) > 4


def test_result_is_saved_as_json(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    code, out, errors = outcome("verify", pair[0], pair[1], pair[2], "-o", file, "--all", "--quiet")
    assert code == 0, errors
    assert json.loads(file.read_text())["status"] == "holds"
    assert "q_proj" in out
    code, _, _ = outcome("verify", pair[0], pair[1], pair[2], "-o", file, "--quiet")
    assert code == 2


def test_model_without_adapter_is_a_usage_error(pair: tuple[Path, Path, Path]) -> None:
    assert outcome("verify", pair[0], pair[2])[0] == 2
