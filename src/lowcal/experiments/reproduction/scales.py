"""How large the runs are: as published, or smaller in width, images and epochs, which every table then says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from lowcal.data import CLASSES
from lowcal.errors import LowcalError, nearest
from lowcal.experiments.recipe import Recipe
from lowcal.experiments.recipe_text import apply_settings

EACH_CLASS = 5  # training images at least, so that a search can hold out a fifth of them


@dataclass(frozen=True)
class Scale:
    """A size of the runs.

    Attributes:
        epochs: part of the published epochs; every schedule is compressed into them.
        batch: part of the published mini-batch.
        widths: channels of the first stage, by network; None: the network's own.
        train_images: of each data set; None: all.
        test_images: of each data set; None: all.
        image_size: of ImageNet's images; None: 224.
        stand_in: data sets for which synthetic images stand in where their own are not at hand.
        classes: of synthetic images, at most.
        trials: of a search for settings.
    """

    name: str
    epochs: Fraction = Fraction(1)
    batch: Fraction = Fraction(1)
    widths: Mapping[str, int] = field(default_factory=dict, hash=False)
    train_images: int | None = None
    test_images: int | None = None
    image_size: int | None = None
    stand_in: frozenset[str] = frozenset()
    classes: int = 1000
    trials: int = 20

    def epochs_of(self, recipe: Recipe) -> int:
        """The epochs of `recipe`'s whole training at this scale."""
        return max(1, round(recipe.epochs * self.epochs))


_WIDTHS = {"resnet18": 16, "vgg13": 16, "resnet34": 16, "resnet50": 16, "mobilenet_v2": 16}

SCALES = {
    scale.name: scale
    for scale in (
        Scale("full"),
        Scale(
            "small",
            epochs=Fraction(1, 5),
            widths=_WIDTHS,
            train_images=10_000,
            test_images=5_000,
            image_size=64,
            stand_in=frozenset({"imagenet"}),
            classes=100,
            trials=8,
        ),
        Scale(
            "tiny",
            epochs=Fraction(4, 90),
            batch=Fraction(1, 4),
            widths=dict.fromkeys(_WIDTHS, 8),
            train_images=64,
            test_images=64,
            image_size=32,
            stand_in=frozenset(CLASSES),
            classes=8,
            trials=2,
        ),
    )
}


def find_scale(name: str) -> Scale:
    """The scale called `name`.

    Raises:
        LowcalError: there is none.
    """
    if name not in SCALES:
        raise LowcalError(f"unknown scale '{name}'{nearest(name, SCALES)}")
    return SCALES[name]


def image_folder(dataset: str, data_dir: Path | None) -> Path | None:
    """Where in `data_dir` the images of `dataset` are: its folder of that name, else all of it; None: not there.

    A folder that holds other data sets under their names holds no others.
    """
    if data_dir is None or not data_dir.is_dir():
        return data_dir
    if (data_dir / dataset).is_dir():
        return data_dir / dataset
    return None if any((data_dir / other).is_dir() for other in CLASSES) else data_dir


def is_stand_in(recipe: Recipe, scale: Scale, data_dir: Path | None) -> bool:
    """Whether synthetic images take the place of the recipe's own."""
    return recipe.data.name in scale.stand_in and image_folder(recipe.data.name, data_dir) is None


def scaled(recipe: Recipe, scale: Scale, *, synthetic: bool) -> Recipe:
    """`recipe` at `scale`; with `synthetic` also with synthetic images of its data's shape.

    The learning rate's schedule is compressed into the epochs, and the epochs between decays of the local step and
    between removals of channels shrink with them, to one at least.
    """
    if scale.name == "full":
        return recipe
    settings = {
        "epochs": scale.epochs_of(recipe),
        "lr_schedule.epochs": recipe.epochs,
        "batch": max(2, round(recipe.batch.size * scale.batch)),
        "local.decay_every": max(1, round(recipe.local.decay_every * scale.epochs)),
        "prune.every": max(1, round(recipe.prune.every * scale.epochs)),
        "model.width": scale.widths.get(recipe.model.name, "null"),
        "data.train_images": _enough(scale.train_images, recipe, EACH_CLASS, synthetic=synthetic),
        "data.test_images": _enough(scale.test_images, recipe, 1, synthetic=synthetic),
        "label": f"'{recipe.label}, scale {scale.name}'",
    }
    if synthetic:
        settings["data.name"] = "synthetic"
        settings["data.classes"] = min(CLASSES[recipe.data.name], scale.classes)
        settings["label"] = f"'{recipe.label}, scale {scale.name}, synthetic images'"
    if recipe.data.name == "imagenet":
        settings["data.image_size"] = scale.image_size or "null"
    return apply_settings(recipe, [f"{key}={value}" for key, value in settings.items() if value is not None])


def _enough(images: int | None, recipe: Recipe, each: int, *, synthetic: bool) -> int | None:
    """`images`, but of real ones at least `each` of each class."""
    return images if synthetic or images is None else max(images, each * CLASSES[recipe.data.name])
