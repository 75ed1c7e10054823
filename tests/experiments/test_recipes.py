"""The packaged recipes of the paper's seven pairs: their settings, learning-rate curves, and two steps of each."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD

from lowcal import LowcalError
from lowcal.data import Dataset, Images, make_loader
from lowcal.experiments.recipe import DataSettings, Recipe, lr_at
from lowcal.experiments.recipe_text import apply_settings, differences, load_recipe, recipe_names
from lowcal.method_settings import LocalSettings, ScheduleSettings
from lowcal.methods import METHODS, Method, build_method, find_method
from lowcal.models import build_model
from lowcal.steps.modes import build_step
from lowcal.steps.step import Step, StepOptions

CPU = torch.device("cpu")
IMAGES = {"cifar10": (32, 10), "cifar100": (32, 100), "imagenet": (224, 1000)}  # side, classes

# Sec. 6.1: epochs, rate at the start, weight decay; and the rate in single epochs, worked out by hand.
PUBLISHED = {
    "resnet18-cifar10": (90, 0.05, 5e-4, {9: 0.05, 10: 0.005, 19: 0.005, 20: 5e-4, 45: 5e-6, 80: 5e-10, 89: 5e-10}),
    "vgg13-cifar10": (90, 0.05, 5e-4, {9: 0.05, 10: 0.005, 19: 0.005, 20: 5e-4, 45: 5e-6, 80: 5e-10, 89: 5e-10}),
    "resnet18-cifar100": (150, 0.025, 5e-4, {19: 0.025, 20: 0.0125, 99: 0.0015625, 149: 0.0001953125}),
    "vgg13-cifar100": (150, 0.025, 5e-4, {19: 0.025, 20: 0.0125, 99: 0.0015625, 149: 0.0001953125}),
    "resnet34-imagenet": (90, 0.025, 4e-5, {29: 0.025, 30: 0.0025, 59: 0.0025, 60: 0.00025, 89: 0.00025}),
    "resnet50-imagenet": (90, 0.025, 4e-5, {29: 0.025, 30: 0.0025, 59: 0.0025, 60: 0.00025, 89: 0.00025}),
    "mobilenet_v2-imagenet": (150, 0.0125, 4e-5, {50: 0.009375, 75: 0.00625, 100: 0.003125, 149: 1.3707e-6}),
}
MODERN = {"resnet18-cifar10-modern": "resnet18-cifar10", "vgg13-cifar10-modern": "vgg13-cifar10"}

MOVING = {name for name, method in METHODS.items() if method.section == "local"} - {"sgd"}

published = pytest.mark.parametrize("name", PUBLISHED)


def test_there_is_a_recipe_for_each_pair_a_twin_where_it_is_needed_and_the_demo():
    assert set(recipe_names()) == {*PUBLISHED, *MODERN, "digits", "finetune", "finetune-demo"}


@published
def test_settings_are_the_papers(name):
    recipe = load_recipe(name)
    epochs, lr, weight_decay, _ = PUBLISHED[name]
    network, _, data = name.partition("-")
    assert (recipe.model.name, recipe.model.width, recipe.data.name) == (network, None, data)
    assert (recipe.epochs, recipe.batch.size, recipe.precision) == (epochs, 64, "float32")
    assert recipe.data == DataSettings(name=data)
    sgd = recipe.optimizer
    assert (sgd.lr, sgd.momentum, sgd.weight_decay, sgd.nesterov) == (lr, 0.9, weight_decay, False)
    on_imagenet = data == "imagenet"
    assert recipe.local == LocalSettings(
        lr=0.01,
        decay=0.1 if on_imagenet else 0.5,
        decay_every=30,
        schedule=ScheduleSettings(alpha=0.95, max_fraction=0.75),
    )
    assert recipe.prune.every == (5 if on_imagenet else 10)


@published
def test_learning_rate_is_the_papers(name):
    recipe = load_recipe(name)
    epochs, lr, _, expected = PUBLISHED[name]
    rate = lr_at(recipe)
    assert rate(0) == lr
    assert {epoch: rate(epoch) for epoch in expected} == pytest.approx(expected, rel=1e-4)
    curve = [rate(epoch) for epoch in range(epochs)]
    assert curve == sorted(curve, reverse=True)
    assert len(set(curve)) == {"cifar10": 9, "cifar100": 8, "imagenet": 3 if epochs == 90 else 150}[recipe.data.name]


@pytest.mark.parametrize(
    ("name", "lr"), [("resnet34-imagenet", 0.1), ("resnet50-imagenet", 0.1), ("mobilenet_v2-imagenet", 0.05)]
)
def test_four_gpus_have_four_times_the_images_and_the_rate(name, lr):
    """Sec. 3.2; the settings are those of docs/distributed.md."""
    one = load_recipe(name)
    four = apply_settings(one, ["batch=256", f"optimizer.lr={lr}"])
    assert four.batch.size == 4 * one.batch.size
    assert {name.split(" ")[0] for name in differences(one, four)} == {"batch", "optimizer.lr"}
    for epoch in range(one.epochs):
        assert lr_at(four)(epoch) == pytest.approx(4 * lr_at(one)(epoch))


@pytest.mark.parametrize(("modern", "name"), MODERN.items())
def test_a_modern_twin_differs_in_the_learning_rate_alone_and_ends_at_zero(modern, name):
    twin = load_recipe(modern)
    changed = {text.split(" ")[0] for text in differences(load_recipe(name), twin)}
    assert changed == {"name", "lr_schedule.name", "lr_schedule.every"}
    rate = lr_at(twin)
    assert (rate(0), rate(30), rate(45), rate(60)) == pytest.approx((0.05, 0.0375, 0.025, 0.0125))
    assert rate(90) == pytest.approx(0, abs=1e-17)


def test_the_documentations_table_is_what_the_recipes_hold():
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if cells[0] in recipe_names():
            rows[cells[0]] = cells[1:]
    assert set(rows) == {*PUBLISHED, *MODERN}
    for name, cells in rows.items():
        recipe = load_recipe(name)
        sgd, plan = recipe.optimizer, recipe.lr_schedule
        decay = "cosine to 0" if plan.name == "cosine" else f"×{plan.factor:g} every {plan.every}"
        local = f"×{recipe.local.decay:g} every {recipe.local.decay_every}"
        expected = [recipe.epochs, recipe.batch.size, sgd.lr, decay, f"{sgd.weight_decay:g}", local, recipe.prune.every]
        assert cells == [str(value) for value in expected]


# Two steps of training


def images_for(recipe: Recipe) -> Dataset:
    """Four small images, labelled with the last of the recipe's classes."""
    classes = IMAGES[recipe.data.name][1]
    images = Images(torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), classes - 1 - torch.arange(4))
    return Dataset("synthetic", tuple(map(str, range(classes))), images, images, (0.5,) * 3, (0.3,) * 3, None)


def attach(recipe: Recipe, name: str, model: nn.Module) -> tuple[SGD, Method]:
    """The recipe's optimizer and method; the boundary moves by four layers after the first epoch."""
    sgd, example = recipe.optimizer, next(model.parameters()).new_zeros(1, 3, *[IMAGES[recipe.data.name][0]] * 2)
    optimizer = SGD(model.parameters(), lr=sgd.lr, momentum=sgd.momentum, weight_decay=sgd.weight_decay)
    schedule = ScheduleSettings(name="fixed", epochs={1: 4})
    recipe = replace(recipe, local=replace(recipe.local, schedule=schedule))
    settings = getattr(recipe, find_method(name).section)
    return optimizer, build_method(name, model, optimizer, settings, epochs=recipe.epochs, example_inputs=example)


def eager(recipe: Recipe, model: nn.Module, optimizer: SGD, method: Method) -> Step:
    return build_step("eager", model, (optimizer,), method, StepOptions(CPU, recipe.precision))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "local") for name in PUBLISHED),
        *((name, method) for name in ("resnet18-cifar10", "vgg13-cifar100") for method in METHODS if method != "local"),
    ],
)
def test_two_steps_of_a_narrow_network(name, method):
    recipe = load_recipe(name)
    torch.manual_seed(0)
    model = build_model(recipe.model.name, classes=IMAGES[recipe.data.name][1], width=8)
    if method == "stochastic-depth" and recipe.model.name == "vgg13":
        with pytest.raises(LowcalError, match="residual blocks, and VGG has none"):
            attach(recipe, method, model)
        return
    optimizer, attached = attach(recipe, method, model)
    before = model.get_parameter(f"{attached.layers[-1]}.weight").clone()
    for images, labels in make_loader(images_for(recipe), training=True, batch=2, device="cpu"):
        loss = eager(recipe, model, optimizer, attached)(images, labels)
        assert loss.isfinite()
        attached.end_epoch(float(loss))
    assert attached.boundary == (4 if method in MOVING else 0)
    assert all(value.isfinite().all() for value in model.parameters())
    assert not torch.equal(model.get_parameter(f"{attached.layers[-1]}.weight"), before)


@pytest.mark.parametrize(
    "method", ["local", *(pytest.param(name, marks=pytest.mark.slow) for name in ("stochastic-depth", "prune"))]
)
@pytest.mark.parametrize(
    "name", [pytest.param("resnet50-imagenet", marks=pytest.mark.slow), "resnet34-imagenet", "mobilenet_v2-imagenet"]
)
def test_two_steps_without_values(name, method):
    """At the real sizes the steps run on the meta device, the second with a boundary where the method has one."""
    recipe = load_recipe(name)
    with torch.device("meta"):
        model = build_model(recipe.model.name, classes=1000)
    optimizer, attached = attach(recipe, method, model)
    images, labels = torch.empty(2, 3, 224, 224, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    model.train()
    for boundary in (0, 4 if method in MOVING else 0):
        attached.move_to(boundary)
        assert eager(recipe, model, optimizer, attached)(images, labels).shape == ()
        first = model.get_parameter(f"{attached.layers[0]}.weight")
        assert (first.grad is None) == (boundary > 0)
        assert model.get_parameter(f"{attached.layers[-1]}.weight").grad is not None
