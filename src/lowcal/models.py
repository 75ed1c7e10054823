"""Networks by name: our own for small images, torchvision's and timm's for the rest, or those of a person's file."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowcal.errors import LowcalError, nearest
from lowcal.user_files import call, is_in_file, takes

__all__ = ["MODELS", "VGG", "BasicBlock", "SmallResNet", "build_model", "check_input", "model_names", "usual_size"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes.

    He et al. 2015, "Deep residual learning for image recognition", Figure 5 left.
    Input (N, C_in, H, W), output (N, C_out, H/stride, W/stride).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(branch(x) + shortcut(x))."""
        branch = torch.relu(self.norm1(self.conv1(x)))
        branch = self.norm2(self.conv2(branch))
        return torch.relu(branch + self.shortcut(x))


class SmallResNet(nn.Module):
    """Residual network for small images: 3x3 stem without pooling, stages that halve the size, linear head.

    Stage i has `blocks[i]` basic blocks of `width * 2**i` channels; all but the first start with stride 2.
    Input (N, in_channels, H, W) of any size, output (N, classes).
    """

    def __init__(self, blocks: Sequence[int], *, classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stages = nn.Sequential()
        channels = width
        for stage, count in enumerate(blocks):
            out = width * 2**stage
            chain = nn.Sequential()
            for block in range(count):
                chain.append(BasicBlock(channels, out, stride=2 if stage > 0 and block == 0 else 1))
                channels = out
            self.stages.append(chain)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)
        _init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (N, classes)."""
        return self.head(self.pool(self.stages(self.stem(x))).flatten(1))


class VGG(nn.Module):
    """VGG13 with batch normalisation for 32x32 images: ten 3x3 convolutions, five poolings, one linear head.

    Simonyan and Zisserman 2015, configuration B, without the hidden linear layers for 224x224 images.
    Input (N, in_channels, H, W) with H and W at least 32, output (N, classes).
    """

    def __init__(self, *, classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential()
        channels = in_channels
        for out in (width, 2 * width, 4 * width, 8 * width, 8 * width):
            for _ in range(2):
                self.features.append(nn.Conv2d(channels, out, 3, padding=1, bias=False))
                self.features.append(nn.BatchNorm2d(out))
                self.features.append(nn.ReLU())
                channels = out
            self.features.append(nn.MaxPool2d(2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)
        _init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (N, classes)."""
        return self.head(self.pool(self.features(x)).flatten(1))


def _init_he(model: nn.Module) -> None:
    """He et al. 2015 (arXiv 1502.01852), fan-out form: gradients keep their variance through the layers."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _resnet18(classes: int, in_channels: int, width: int | None) -> nn.Module:
    return SmallResNet((2, 2, 2, 2), classes=classes, in_channels=in_channels, width=width or 64)


def _resnet8(classes: int, in_channels: int, width: int | None) -> nn.Module:
    return SmallResNet((1, 1, 1), classes=classes, in_channels=in_channels, width=width or 16)


def _vgg13(classes: int, in_channels: int, width: int | None) -> nn.Module:
    return VGG(classes=classes, in_channels=in_channels, width=width or 64)


MODELS: dict[str, Callable[[int, int, int | None], nn.Module]] = {
    "resnet18": _resnet18,
    "resnet8": _resnet8,
    "vgg13": _vgg13,
}
"""Our own networks, for small images: name -> builder(classes, in_channels, width or None)."""

NARROW = {"resnet34": 64, "resnet50": 64, "mobilenet_v2": 32}
"""torchvision's networks whose width can be set -> the channels of their first layer as published."""


def build_model(
    name: str, *, classes: int, in_channels: int = 3, width: int | None = None, image_size: int | None = None
) -> nn.Module:
    """Build a network with fresh weights; the global random state decides them.

    `width` is the channel count of the first stage (resnet18 and vgg13: 64, resnet8: 16), of torchvision's networks of
    the first layer, and settable for those of `NARROW`; torchvision's take images of 3 channels. "timm/NAME" is timm's
    network NAME, and "FILE.py:FUNCTION" what `FUNCTION(classes, channels)` returns, which may also take `image_size`
    and `width`. Raises LowcalError for an unknown name, or for a setting that the network does not have.
    """
    for what, value in (("classes", classes), ("in_channels", in_channels), ("width", width)):
        if value is not None and value < 1:
            raise LowcalError(f"model {name!r}: {what} is {value}, but must be at least 1")
    if is_in_file(name):
        return _own_model(name, width, classes=classes, channels=in_channels, image_size=image_size)
    if name in MODELS:
        return MODELS[name](classes, in_channels, width)
    if name.startswith("timm/"):
        return _timm_model(name, classes, in_channels, width)
    return _torchvision_model(name, classes, in_channels, width)


def model_names() -> list[str]:
    """Return the names that `build_model` takes here: ours, and torchvision's where it is installed."""
    try:
        from torchvision import models
    except ImportError:
        return sorted(MODELS)
    return sorted({*MODELS, *models.list_models(module=models)})


def usual_size(name: str) -> int:
    """Return the height and width of images that the network called `name` is usually given."""
    return 32 if name in MODELS or is_in_file(name) else 224


def check_input(model: nn.Module, name: str, size: Sequence[int], classes: int) -> None:
    """Raise LowcalError if the network cannot take images of `size` (C, H, W), or does not return class scores.

    The forward pass of a copy without memory (meta device) is tried, so nothing is computed.
    """
    shape = "x".join(str(n) for n in size)
    try:
        trial = copy.deepcopy(model).to("meta").eval()
        with torch.no_grad():
            scores = trial(torch.empty(2, *size, device="meta"))
    except Exception as error:  # a person's own network raises what it likes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".!")
        raise LowcalError(
            f"model {name!r} does not take images of {shape} (channels x height x width): {reason}; "
            "choose another model or image size"
        ) from error
    if not isinstance(scores, Tensor) or scores.shape != (2, classes):
        found = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise LowcalError(
            f"model {name!r} returns {found} for 2 images of {shape}: it must return the scores of the classes, "
            f"a tensor of shape (2, {classes})"
        )


def _own_model(name: str, width: int | None, **given: int | None) -> nn.Module:
    """Build the network of a function in a person's file."""
    for argument in ("classes", "channels"):
        if not takes(name, argument):
            raise LowcalError(f"{name} takes no argument {argument!r}; write it as def build(classes, channels)")
    if width is not None and not takes(name, "width"):
        raise LowcalError(f"model {name!r} has no settable width (found {width}): leave model.width out")
    model = call(name, **given, **({} if width is None else {"width": width}))
    if not isinstance(model, nn.Module):
        raise LowcalError(f"{name} returned a {type(model).__name__}; it must return the network, an nn.Module")
    return model


def _torchvision_model(name: str, classes: int, in_channels: int, width: int | None) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as error:
        raise LowcalError(
            f"unknown model {name!r}{nearest(name, MODELS)} (torchvision's need: pip install 'lowcal[cli]')"
        ) from error
    if name not in models.list_models(module=models):
        raise LowcalError(f"unknown model {name!r}{nearest(name, model_names())}")
    if width is not None and name not in NARROW:
        raise LowcalError(f"model {name!r} has no settable width (found {width}): leave model.width out")
    if in_channels != 3:
        raise LowcalError(
            f"model {name!r} takes images of 3 channels, not {in_channels}: choose from {', '.join(sorted(MODELS))}"
        )
    if width is not None and width != NARROW[name]:
        return _build_narrow(name, classes=classes, width=width)
    # One output in training as in evaluation; init_weights is stated as torchvision warns of its default.
    options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, num_classes=classes, **options)


def _timm_model(name: str, classes: int, in_channels: int, width: int | None) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise LowcalError(f"model {name!r} needs timm, which is not installed; pip install 'lowcal[timm]'") from error
    own = name.removeprefix("timm/")
    if own not in timm.list_models():
        raise LowcalError(f"unknown model {name!r}{nearest(name, [f'timm/{known}' for known in timm.list_models()])}")
    if width is not None:
        raise LowcalError(f"model {name!r} has no settable width (found {width}): leave model.width out")
    model: nn.Module = timm.create_model(own, num_classes=classes, in_chans=in_channels)
    return model


def _build_narrow(name: str, *, classes: int, width: int) -> nn.Module:
    """Build torchvision's network `name`, one of `NARROW`, with `width` channels in its first layer.

    Every other layer's channels are in the same proportion to the published ones; MobileNetV2 rounds them to multiples
    of 8, and its last convolution keeps its 1280 if it would have fewer.
    """
    from torchvision import models

    if name == "mobilenet_v2":
        return models.get_model(name, weights=None, num_classes=classes, width_mult=width / NARROW[name])
    with torch.device("meta"):
        model = models.get_model(name, weights=None, num_classes=classes)
    return _rebuild(model, classes, width)


def _rebuild(model: Any, classes: int, width: int) -> nn.Module:
    """Replace a torchvision ResNet's layers by ones of other widths; those replaced are on the meta device."""
    block, counts = type(model.layer1[0]), [len(getattr(model, f"layer{number}")) for number in (1, 2, 3, 4)]
    model.inplanes = width
    model.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
    model.bn1 = nn.BatchNorm2d(width)
    for index, count in enumerate(counts):
        stage = model._make_layer(block, width * 2**index, count, stride=1 if index == 0 else 2)
        setattr(model, f"layer{index + 1}", stage)
    model.fc = nn.Linear(8 * width * block.expansion, classes)
    for module in model.modules():  # as torchvision does
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
