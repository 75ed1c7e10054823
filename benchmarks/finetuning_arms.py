"""What benchmarks/finetuning.py compares: networks with given weights, how much of each is trained, and which rates."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lowcal.models import build_model
from lowcal.pretrained import load_weights

WEIGHTS = "vit-even-classes.pt"


class Rate(NamedTuple):
    """An optimizer, the learning rate of all layers but the head, and how many times higher the head's is."""

    optimizer: str
    lr: float
    head: float = 1.0


@dataclass(frozen=True)
class Family:
    """How much is trained: what is behind the first `frozen` layers, or adapters of rank `lora` and the head.

    Attributes:
        lengths: epochs of the runs.
        rates: those that are tried; `like` names a family whose best rates are taken instead.
        running: whether normalisation uses running statistics in all layers, not only in frozen ones.
        timed: whether `run` has it.
    """

    lengths: tuple[int, ...]
    rates: tuple[Rate, ...] = ()
    frozen: int = 0
    cached: bool = False
    lora: int = 0
    like: str | None = None
    running: bool = False
    timed: bool = True


@dataclass(frozen=True)
class Task:
    """A network, its images and the families.

    Attributes:
        size: the images' side.
        images: for training; `tests` for testing, or for choosing a rate.
        head: the name of the classifier.
        odd: whether the images are those of the odd classes only.
    """

    build: Callable[[Path], nn.Module]
    size: int
    images: int
    tests: int
    head: str
    odd: bool = False
    batch: int = 32
    families: dict[str, Family] = field(default_factory=dict)


def efficientnet(work: Path) -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights and a new classifier."""
    name = "timm/tf_efficientnet_lite0"
    model = build_model(name, classes=10)
    load_weights(model, name, "imagenet")
    return model.to(memory_format=torch.channels_last)


def vit() -> nn.Module:
    """A vision transformer of 6 blocks for 32x32 images of 5 classes."""
    return VisionTransformer(img_size=32, patch_size=4, embed_dim=96, depth=6, num_heads=3, num_classes=5)


def pretrained_vit(work: Path) -> nn.Module:
    """The same with the weights of `pretrain` and a new classifier."""
    model = vit()
    load_weights(model, "the ViT", str(work / WEIGHTS))
    return model


def sgd(*rates: float) -> tuple[Rate, ...]:
    """SGD with momentum at these rates."""
    return tuple(Rate("sgd", rate) for rate in rates)


def adamw(*rates: float, head: float = 1.0) -> tuple[Rate, ...]:
    """AdamW at these rates."""
    return tuple(Rate("adamw", rate, head) for rate in rates)


TASKS = {
    "efficientnet": Task(
        efficientnet, size=96, images=800, tests=1000, head="classifier",
        families={
            "all layers": Family((2, 4, 8), (*sgd(0.01, 0.03), *adamw(0.001, 0.003, 0.01), Rate("adamw", 0.001, 10))),
            "all layers, running statistics": Family(
                (2,), (Rate("sgd", 1e-4, 300), Rate("adamw", 1e-5, 300), Rate("adamw", 1e-4, 30)),
                running=True, timed=False,
            ),
            "3/4 frozen": Family((4,), frozen=37, like="3/4 frozen, cached"),
            "3/4 frozen, cached": Family((2, 4, 8), (*sgd(0.01, 0.03), *adamw(0.001, 0.003, 0.01)), 37, cached=True),
            "last block, cached": Family((8,), (*sgd(0.003, 0.01, 0.03), *adamw(0.001, 0.003, 0.01)), 46, cached=True),
            "linear probe, cached": Family((32,), (*sgd(0.03, 0.1), *adamw(0.003, 0.01)), 49, cached=True),
            "half frozen, cached": Family((4,), frozen=25, cached=True, like="3/4 frozen, cached"),
        },
    ),
    "vit": Task(
        pretrained_vit, size=32, images=500, tests=2000, head="head", odd=True,
        families={
            "all layers": Family((4, 8), adamw(0.0003, 0.001, 0.003)),
            "LoRA, rank 8": Family((8,), adamw(0.001, 0.003, 0.01), lora=8),
            "half frozen": Family((8,), frozen=13, like="half frozen, cached"),
            "half frozen, cached": Family((8,), adamw(0.0003, 0.001, 0.003), 13, cached=True),
            "last block, cached": Family((16,), adamw(0.001, 0.003, 0.01), 21, cached=True),
            "linear probe, cached": Family((32,), adamw(0.003, 0.01, 0.03), 25, cached=True),
        },
    ),
}  # fmt: skip
