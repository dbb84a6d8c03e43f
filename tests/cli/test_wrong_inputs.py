"""Commands on models refuse adapters, and commands on adapters refuse models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.numpy import save_file
from typer.testing import CliRunner

import lorank
from lorank.cli import app
from tests.support import tiny_models
from tests.support.adapter_files import saved, trained

RNG = np.random.default_rng(0)
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def numbers(*shape: int) -> Any:
    return RNG.standard_normal(shape, dtype=np.float32)


def peft_folder(path: Path) -> Path:
    return saved(trained(tiny_models.llama(), LORA), path)


def peft_file(path: Path) -> Path:
    return peft_folder(path) / "adapter_model.safetensors"


def renamed_file(path: Path) -> Path:
    """Save a PEFT adapter's tensors under another name, without settings."""
    return (peft_folder(path) / "adapter_model.safetensors").rename(path.parent / "tensors.safetensors")


def pickled_adapter(path: Path) -> Path:
    trained(tiny_models.llama(), LORA).save_pretrained(path, safe_serialization=False)
    torch.save({"base_model.model.a.lora_A.weight": torch.ones(2, 4)}, path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink(missing_ok=True)
    return path


def trainer_checkpoint(path: Path) -> Path:
    """Save the checkpoint that Trainer writes of a PEFT model."""
    peft_folder(path)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"step": 1}, path / name)
    (path / "tokenizer.json").write_text("{}")
    return path


def other_method(config: Any) -> Callable[[Path], Path]:
    def made(path: Path) -> Path:
        get_peft_model(tiny_models.llama(), config).save_pretrained(path)
        return path

    return made


def one_file(tensors: dict[str, tuple[int, ...]]) -> Callable[[Path], Path]:
    def made(path: Path) -> Path:
        path.mkdir()
        save_file({name: numbers(*shape) for name, shape in tensors.items()}, path / "a.safetensors")
        return path / "a.safetensors"

    return made


def mlx(path: Path) -> Path:
    path.mkdir()
    tensors = {"model.layers.0.q_proj.lora_a": numbers(8, 2), "model.layers.0.q_proj.lora_b": numbers(2, 8)}
    save_file(tensors, path / "adapters.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"rank": 2, "scale": 20.0}))
    return path


KOHYA = {
    "lora_unet_a.lora_up.weight": (8, 2),
    "lora_unet_a.lora_down.weight": (2, 8),
    "lora_unet_a.alpha": (1,),
}
DIFFUSERS = {"transformer.a.lora_A.weight": (2, 8), "transformer.a.lora_B.weight": (8, 2)}
LOHA = {f"lora_unet_a.hada_{w}": (2, 8) for w in ("w1_a", "w1_b", "w2_a", "w2_b")}
LOKR = {"lora_unet_a.lokr_w1": (2, 2), "lora_unet_a.lokr_w2": (4, 4)}

READABLE_ADAPTERS = {
    "peft folder": peft_folder,
    "peft file": peft_file,
    "renamed file": renamed_file,
    "pickled": pickled_adapter,
    "checkpoint": trainer_checkpoint,
    "kohya": one_file(KOHYA),
    "diffusers": one_file(DIFFUSERS),
    "loha": other_method(LoHaConfig(r=2, target_modules=["q_proj"])),
    "lokr": other_method(LoKrConfig(r=2, target_modules=["q_proj"])),
    "loha file": one_file(LOHA),
    "lokr file": one_file(LOKR),
    "mlx": mlx,
}
OTHER_ADAPTERS = {
    "ia3": other_method(IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
}


def refused(*arguments: Any) -> str:
    """Return the message of a command that fails."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code != 0
    return str(result.exception)


@pytest.mark.parametrize("kind", [*READABLE_ADAPTERS, *OTHER_ADAPTERS])
def test_commands_on_models_refuse_adapters(kind: str, tmp_path: Path) -> None:
    path = (READABLE_ADAPTERS | OTHER_ADAPTERS)[kind](tmp_path / "given")
    model = tmp_path / "model"
    tiny_models.llama().save_pretrained(model)
    for call in (
        lambda: lorank.analyze(path, progress=False),
        lambda: lorank.allocate(path, "uniform", r_base=2),
        lambda: lorank.extract(path, model, avg_rank=1, progress=False),
        lambda: lorank.extract(model, path, avg_rank=1, progress=False),
        lambda: lorank.compare(path, model, progress=False),
        lambda: lorank.compare(model, path, progress=False),
    ):
        with pytest.raises(lorank.FormatError, match="not a model") as error:
            call()
        assert str(path) in str(error.value)
        assert ("lorank compress" in str(error.value)) == (kind in READABLE_ADAPTERS)
    assert "not a model" in refused("analyze", path)
    assert "not a model" in refused("allocate", path, "--budget", "50%", "--r-min", "1")


def test_error_names_the_base_model_of_an_adapter(tmp_path: Path) -> None:
    peft_folder(tmp_path / "a")
    settings = json.loads((tmp_path / "a/adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "acme/base"
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(lorank.FormatError, match="its base model is acme/base"):
        lorank.analyze(tmp_path / "a")


def model_folder(path: Path) -> Path:
    tiny_models.llama().save_pretrained(path)
    return path


def sharded(path: Path) -> Path:
    tiny_models.llama().save_pretrained(path, max_shard_size="30KB")
    assert (path / "model.safetensors.index.json").exists()
    return path


def linked(path: Path) -> Path:
    """Link the files of a folder as in the hub's cache."""
    folder = model_folder(path.parent / "blobs")
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).symlink_to(file)
    return path


def pickled_model(path: Path) -> Path:
    path.mkdir()
    torch.save(tiny_models.llama().state_dict(), path / "pytorch_model.bin")
    (path / "config.json").write_text("{}")
    return path


def beside_settings(path: Path) -> Path:
    model_folder(path)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    return path


def with_adapter_inside(path: Path) -> Path:
    """Save the state dict of a whole PEFT model."""
    path.mkdir()
    state = trained(tiny_models.llama(), LORA).state_dict()
    save_file({name: value.numpy() for name, value in state.items()}, path / "model.safetensors")
    return path / "model.safetensors"


MODELS = [
    model_folder,
    lambda path: model_folder(path) / "model.safetensors",
    sharded,
    linked,
    pickled_model,
    beside_settings,
    with_adapter_inside,
]
NAMES = ["folder", "file", "shards", "links", "pickle", "beside settings", "adapter inside"]


@pytest.mark.parametrize("make", MODELS, ids=NAMES)
def test_commands_on_adapters_refuse_models(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path / "given")
    for call in (
        lambda: lorank.compress(path, avg_rank=1, progress=False),
        lambda: lorank.family(path, [1], progress=False),
        lambda: lorank.merge([path, path], avg_rank=1, progress=False),
        lambda: lorank.check(path),
        lambda: lorank.LoraAdapter.load(path),
    ):
        with pytest.raises(lorank.FormatError, match="not an adapter: `lorank analyze` reads models"):
            call()
    for command in (
        ["info", path],
        ["check", path],
        ["compress", path, "-o", tmp_path / "o", "--avg-rank", 1],
    ):
        assert "not an adapter" in refused(*command)
    assert lorank.analyze(path, progress=False).modules


def test_model_beside_an_adapter_is_analysed(tmp_path: Path) -> None:
    plain = lorank.analyze(model_folder(tmp_path / "plain"), progress=False)
    both = peft_folder(model_folder(tmp_path / "both"))
    assert lorank.analyze(both, progress=False).modules == plain.modules
    assert len(lorank.LoraAdapter.load(both).modules) == 4
    (both / "model.safetensors").rename(both / "weights.safetensors")
    assert lorank.analyze(both, progress=False).modules == plain.modules


@pytest.mark.parametrize("of", ["file", "mapping", "pickle"])
def test_base_weights_of_a_saved_peft_model_are_analysed(of: str, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    model = trained(tiny_models.llama(), config)
    plain = lorank.analyze(tiny_models.llama(), progress=False)
    source: Any = model.state_dict()
    if of == "file":
        source = tmp_path / "model.safetensors"
        # Every tensor is copied, as safetensors requires.
        save_file({name: value.numpy().copy() for name, value in model.state_dict().items()}, source)
    if of == "pickle":
        source = tmp_path / "model.bin"
        torch.save(model.state_dict(), source)
    found = lorank.analyze(source, progress=False)
    assert {row.name: row.alpha_hill for row in found} == {row.name: row.alpha_hill for row in plain}
    assert found.num_parameters == plain.num_parameters
    reasons = {skipped.name: skipped.reason for skipped in found.skipped}
    factors = [name for name in model.state_dict() if "lora_" in name]
    assert {reasons[name] for name in factors} == {"a factor of an adapter"}
    saved_copy = "base_model.model.lm_head.modules_to_save.default.weight"
    assert reasons[saved_copy] == "a copy of a base weight that PEFT trained"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([], "the folder is empty"),
        (["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"], "a tokenizer"),
        (["optimizer.pt", "scheduler.pt"], "the state of a training"),
        (["config.json"], "a model's settings"),
    ],
)
def test_folders_without_weights_are_refused(files: list[str], reason: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    for call, lacks in ((lorank.analyze, "no .safetensors or .bin"), (lorank.LoraAdapter.load, "neither")):
        with pytest.raises(lorank.FormatError, match=reason) as error:
            call(tmp_path)
        assert lacks in str(error.value)


def test_optimizer_state_is_refused(tmp_path: Path) -> None:
    model = tiny_models.llama()
    optimizer = torch.optim.AdamW(model.parameters())
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(lorank.FormatError, match=r"optimizer\.pt: is the state of an optimizer"):
        lorank.analyze(tmp_path / "optimizer.pt")
