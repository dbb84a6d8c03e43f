"""The description of one parameter of a model, from the class of the module that holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lorank.modules import naming
from lorank.modules.direct_reads import direct_read
from lorank.modules.peft_renames import renames_target

Kind = Literal["linear", "embedding", "conv", "expert"]

# PEFT 0.21 refuses these modules of these models, because the scan reads the weights directly, past adapters.
_MAMBA_MODELS = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_MAMBA_MODULES = {"out_proj", "conv1d"}

# Classes of linear layers whose own `forward` computes the same as torch's.
_PRODUCTS = {"FalconLinear"}

# Attributes that hold the number of matrices in a stack.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_codebooks", "num_linears")


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter of a model.

    Attributes
    ----------
    name
        The parameter's dotted name in the model.
    module
        The name by which PEFT adapts the parameter: the module's name, or the parameter's name for stacks of
        experts and for classes without a layer in PEFT.
    kind
        The operation that the module performs with the weight; None for parameters that are not the weight
        matrix of a module.
    shape
        The dequantized shape of the parameter in the model.
    transposed
        True if the matrices are stored as ``(in, out)``.
    refused
        The reason why PEFT cannot adapt the module; empty if it can.
    """

    name: str
    module: str
    kind: Kind | None
    shape: tuple[int, ...]
    transposed: bool = False
    refused: str = ""


def describe_weight(
    prefix: str, local: str, module: Any, shape: tuple[int, ...], parent: Any, model_type: str
) -> Weight:
    """Describe a parameter of a module.

    Parameters
    ----------
    prefix
        The dotted name of the module and a dot; empty for the outermost module.
    local
        The name of the parameter in the module.
    module
        The module that holds the parameter.
    shape
        The dequantized shape of the parameter.
    parent
        The module that holds the module; None for the outermost module.
    model_type
        The `model_type` of the model's configuration; empty if it has none.
    """
    name = prefix + local
    owner = prefix.removesuffix(".")
    if len(shape) == 3 and _is_stack(module, name, local, shape):
        # PEFT reads the orientation of a stack from this attribute alone.
        transposed = bool(getattr(module, "is_transposed", False))
        return Weight(name, name, "expert", shape, transposed, "" if owner else _AT_THE_TOP)
    if local != "weight" or len(shape) < 2:
        return Weight(name, name, None, shape)
    refused = _refused(owner, module, parent, model_type)
    kind, transposed = kind_of(module)
    if kind is not None:
        is_renamed = kind == "linear" and renames_target(owner, model_type)
        target = name if is_renamed or _has_own_forward(module) else owner
        return Weight(name, target, kind, shape, transposed, refused)
    if len(shape) != 2:
        return Weight(name, name, None, shape)
    # PEFT has no layer for the class (a router, for example), but adapts any parameter by its name.
    return Weight(name, name, "linear", shape, refused=refused)


def kind_of(module: Any) -> tuple[Kind | None, bool]:
    """Return the kind of a module by its class, and True if its weight is stored as ``(in, out)``."""
    classes = {base.__name__ for base in type(module).__mro__}
    if "Embedding" in classes:
        return "embedding", False
    if "_ConvNd" in classes:
        return "conv", False
    if "Conv1D" in classes:
        return "linear", True
    return ("linear", False) if "Linear" in classes else (None, False)


_AT_THE_TOP = "PEFT adapts no parameter of the outermost module"


def _is_stack(module: Any, name: str, local: str, shape: tuple[int, ...]) -> bool:
    """Return True for a tensor that stacks one matrix per expert, codebook or the like."""
    if any(base.__name__ == "_ConvNd" for base in type(module).__mro__):
        return False
    counted = any(getattr(module, attribute, None) == shape[0] for attribute in _COUNTS)
    return counted or naming.is_in_experts(name) or (local == "weight" and shape[0] > 1)


def _refused(owner: str, module: Any, parent: Any, model_type: str) -> str:
    """Return the reason why PEFT cannot adapt a module; empty if it can."""
    classes = {base.__name__ for base in type(module).__mro__}
    if not owner:
        return "PEFT adapts modules of a model, not the model itself"
    leaf = owner.rpartition(".")[2]
    if model_type in _MAMBA_MODELS and leaf in _MAMBA_MODULES:
        return f"PEFT refuses {leaf} of {model_type}, whose scan reads the weight itself"
    groups = getattr(module, "groups", 1)
    if "_ConvNd" in classes and groups > 1:
        return f"a convolution in {groups} groups, whose update is not a product of two matrices"
    if "_ConvTransposeNd" in classes:
        return "PEFT adapts no transposed convolution"
    if any(base.__name__ == "MultiheadAttention" for base in type(parent).__mro__) and leaf == "out_proj":
        return "nn.MultiheadAttention reads this weight itself: PEFT adapts the whole attention module"
    if "_ConvNd" in classes and not _is_plain_convolution(module):
        return f"{type(module).__name__} computes more than a convolution, unlike PEFT's layer"
    if kind_of(module)[0] is not None:
        holder: object = type(parent)
        read = direct_read(holder, leaf, despite_calls=model_type in _MAMBA_MODELS)
        if read:
            return f"{type(parent).__name__} reads the {read} of {leaf} itself, past PEFT's layer"
    if "Embedding" in classes and not _is_plain_lookup(module):
        return f"{type(module).__name__} computes more than a look-up of rows, unlike PEFT's layer"
    return ""


def _has_own_forward(module: Any) -> bool:
    """Return True for a linear layer of transformers whose own `forward` computes more than the product.

    An example is a router that returns logits and scores. PEFT's layer would add the update to the returned
    value. If the weight is adapted as a parameter, the update is added to the weight instead.
    """
    classes = type(module).__mro__
    if not any(base.__name__ == "Linear" for base in classes):
        return False
    found = next((base for base in classes if "forward" in vars(base)), None)
    in_model = found is not None and found.__module__.startswith("transformers.models.")
    return in_model and found is not None and found.__name__ not in _PRODUCTS


def _is_plain_convolution(module: Any) -> bool:
    """Return True for a convolution with the `forward` of torch."""
    return all(
        base.__module__.startswith("torch.nn") for base in type(module).__mro__ if "forward" in vars(base)
    )


def _is_plain_lookup(module: Any) -> bool:
    """Return True for an embedding that looks up rows and at most scales them, as PEFT's layer does."""
    for base in type(module).__mro__:
        if "forward" in vars(base):
            return base.__module__.startswith("torch.nn") or hasattr(module, "embed_scale")
    return True
