"""Describes the model of a checkpoint and the parameters that its tensors become, in a separate process.

Building a model imports torch and its libraries, which costs seconds and a gigabyte of memory. If the
libraries are already loaded, this process builds the model. Otherwise, a child process builds it and returns
the description as JSON, so that this process stays small. A hostile configuration costs at most the time
limit of the child.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorank.modules.building import Unknown, build, library_of, model_of
from lorank.modules.loading import Conversion, Placement, place
from lorank.modules.model_config import ModelConfig
from lorank.modules.skeleton import Skeleton
from lorank.modules.weight import Weight

Shapes = Mapping[str, tuple[int, ...]]

# The child uses the search path of the parent, and never adds its working folder.
_CHILD = """
import json, sys
question = json.load(sys.stdin)
sys.path[:] = question["path"]
import importlib
importlib.import_module(question["module"]).answer(question)
"""
_TIME_LIMIT = 600.0  # seconds


@dataclass(frozen=True, slots=True)
class Description:
    """The model of a checkpoint.

    Attributes
    ----------
    skeleton
        The model's parameters.
    placement
        The parameters that the checkpoint's tensors are loaded into.
    """

    skeleton: Skeleton
    placement: Placement


def describe_model(config: ModelConfig, shapes: Shapes) -> Description | Unknown:
    """Describe the model of a checkpoint.

    Parameters
    ----------
    config
        The model's configuration.
    shapes
        The shape of every tensor of the checkpoint that is not packed, by name.
    """
    library = library_of(config, len(shapes))
    if isinstance(library, Unknown):
        return library
    if library in sys.modules or not sys.executable:
        return _described(config, shapes)
    content = ask_child(__name__, config, shapes)
    return content if isinstance(content, Unknown) else _from_json(content, config, shapes)


def ask_child(module: str, config: ModelConfig, shapes: Shapes, **question: Any) -> Any:
    """Return the JSON values that a module's function `answer` prints in a child process, or why it fails.

    Parameters
    ----------
    module
        The dotted name of the module, whose function takes one mapping.
    config, shapes
        The configuration, and the shapes of tensors, as in `describe_model`.
    **question
        Further JSON values for the function.
    """
    asked = {
        **question,
        "module": module,
        "path": [*map(str, sys.path)],
        "folder": str(config.folder),
        "config": config.content,
        "origin": config.origin,
        "shapes": shapes,
    }
    try:
        child = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=_TIME_LIMIT,
            check=False,
        )
        return json.loads(child.stdout)
    except subprocess.TimeoutExpired:
        return Unknown(f"{config.library} did not build the model within {_TIME_LIMIT:.0f} s", True)
    except ValueError:
        lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        return Unknown(f"{config.library} could not describe the model: {lines[-1][:200]}", True)


def answer(question: Mapping[str, Any]) -> None:
    """Print the description of a model as JSON. The child process runs this function."""
    out, sys.stdout = sys.stdout, sys.stderr  # messages of the libraries must not mix with the answer
    shapes = {name: tuple(shape) for name, shape in question["shapes"].items()}
    config = ModelConfig(question["config"], Path(question["folder"]), question["origin"])
    found = _described(config, shapes)
    json.dump(_to_json(found), out)
    out.flush()


def _described(config: ModelConfig, shapes: Shapes) -> Description | Unknown:
    """Describe the model in this process."""
    model = build(config, shapes.keys())
    return model if isinstance(model, Unknown) else Description(model, place(shapes, model))


def _to_json(found: Description | Unknown) -> dict[str, Any]:
    """Return a description as JSON values."""
    if isinstance(found, Unknown):
        return {"reason": found.reason, "is_foreign": found.is_foreign}
    skeleton, placement = found.skeleton, found.placement
    return {
        "label": skeleton.label,
        "weights": [
            [w.name, w.module, w.kind, w.shape, w.transposed, w.refused] for w in skeleton.weights.values()
        ],
        "owners": skeleton.owners,
        "modules": skeleton.modules,
        "model_type": skeleton.model_type,
        "renamed": placement.renamed,
        "strangers": placement.strangers,
        "conversions": [[c.target, c.sources, c.targets, c.by_expert] for c in placement.conversions],
    }


def _from_json(content: Mapping[str, Any], config: ModelConfig, shapes: Shapes) -> Description | Unknown:
    """Return the description from the values that `_to_json` returns."""
    if "reason" in content:
        return Unknown(content["reason"], content["is_foreign"])
    weights = [
        Weight(name, module, kind, tuple(shape), transposed, refused)
        for name, module, kind, shape, transposed, refused in content["weights"]
    ]
    skeleton = Skeleton(
        content["label"],
        {weight.name: weight for weight in weights},
        content["owners"],
        partial(model_of, config, list(shapes)),
        tuple(content["modules"]),
        content["model_type"],
    )
    conversions = [
        Conversion(target, sources, skeleton, tuple(targets), by_expert)
        for target, sources, targets, by_expert in content["conversions"]
    ]
    return Description(skeleton, Placement(content["renamed"], conversions, content["strangers"]))
