"""What runs, in one line: made from settings and images, so that it cannot say what does not run."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["common_title", "title"]

_DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "8x8 digits", "imagenet": "ImageNet"}
_CLASSES = {"ImageNet": 1000}  # those that need no word

Parts = dict[str, str]


def title(settings: Mapping[str, Any], images: Mapping[str, Any] | None = None) -> str:
    """Return a title such as 'ResNet18 of width 8 on CIFAR-10, 2 epochs, 300 of 50,000 images'.

    Args:
        settings: a recipe as a mapping.
        images: what was read, as a run's `environment.json` has it in `run.images`; None if that is not known yet.
    """
    return _join(_parts(settings, images))


def common_title(runs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any] | None]]) -> str:
    """Return the title of runs side by side, given as `title` takes them: what they do not share is left out."""
    first, *others = (_parts(settings, images) for settings, images in runs)
    return _join({name: part for name, part in first.items() if all(other[name] == part for other in others)})


def _join(parts: Parts) -> str:
    subject = " ".join(parts[name] for name in ("network", "width", "data") if parts.get(name))
    return ", ".join(filter(None, [subject, parts.get("epochs"), parts.get("images")]))


def _parts(settings: Mapping[str, Any], images: Mapping[str, Any] | None) -> Parts:
    """The title's parts by name; "" where there is nothing to say."""
    model, data = _section(settings, "model"), _section(settings, "data")
    epochs = settings.get("epochs")
    return {
        "network": _network(str(model.get("name", ""))),
        "width": f"of width {model['width']}" if model.get("width") else "",
        "data": f"on {_data(data, images or {})}",
        "epochs": f"{epochs} epoch{'s' * (epochs != 1)}" if epochs else "",
        "images": _images(data, images or {}),
    }


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = settings.get(name)
    return section if isinstance(section, Mapping) else {}


def _network(name: str) -> str:
    """A network's name as its authors write it, where that is known."""
    if re.fullmatch(r"(resnet|vgg)\d+", name):
        return name.replace("resnet", "ResNet").replace("vgg", "VGG")
    return "MobileNetV2" if name == "mobilenet_v2" else name


def _data(data: Mapping[str, Any], images: Mapping[str, Any]) -> str:
    name = str(data.get("name", ""))
    word = _DATA.get(name, name)
    if name == "image-folder":
        word = f"the image folder '{images['folder']}'" if images.get("folder") else "an image folder"
    elif name == "synthetic":
        word = "synthetic images"
    details = []
    classes = images.get("classes") or data.get("classes")
    if classes and (name not in _DATA or classes != _CLASSES.get(word, classes)):
        details.append(f"{classes} classes")
    if data.get("image_size"):
        details.append(f"{data['image_size']}x{data['image_size']}")
    return f"{word} ({', '.join(details)})" if details else word


def _images(data: Mapping[str, Any], images: Mapping[str, Any]) -> str:
    """How many images are drawn, where those are not all of a set whose number is known."""
    held_out = "tested on held-out training images" if data.get("evaluate") == "validation" else ""
    if not images:
        count = data.get("train_images")
        return ", ".join(filter(None, [f"{_number(count)} images" if count else "", held_out]))
    train = _of(images, "train") or (_number(images["train"]) if data.get("name") not in _DATA else "")
    test = "" if held_out else _of(images, "test")
    if train and test:
        count = f"{train} training and {test} test images"
    else:
        count = f"{train} images" if train else f"{test} test images" if test else ""
    return ", ".join(filter(None, [count, held_out]))


def _of(images: Mapping[str, Any], split: str) -> str:
    """'300 of 50,000' images of a split; "" for all of them."""
    there, whole = images[split], images[f"{split}_of"]
    return f"{_number(there)} of {_number(whole)}" if there < whole else ""


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
