"""How long training would take, from the time of a few steps."""

from __future__ import annotations

import statistics

import torch
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from lowcal.data import CLASSES, IMAGES
from lowcal.experiments.backends import cpu_threads
from lowcal.experiments.recipe import Recipe
from lowcal.models import build_model
from lowcal.training.step import now

SMALL_BATCH = 8  # on a CPU, where a step's time goes with its images
PATIENCE = 5.0  # seconds after which the steps so far must do
SIZES = {"imagenet": 224}  # of images, in pixels, unless the recipe says otherwise; the others have 32


def training_images(recipe: Recipe) -> int:
    """Images in an epoch."""
    return recipe.data.train_images or IMAGES[recipe.data.name][0]


def epoch_seconds(recipe: Recipe, device: torch.device, *, steps: int = 3) -> float:
    """The time of an epoch of SGD without evaluation, from at most `steps` steps on images of its size.

    The images are random and already on the device, so that neither the data need be there nor their decoding counts.
    """
    data = recipe.data
    batch = recipe.batch.size if device.type == "cuda" else min(recipe.batch.size, SMALL_BATCH)
    pixels = data.image_size or SIZES.get(data.name, 32)
    classes = data.classes or CLASSES.get(data.name, 10)
    with cpu_threads(recipe.threads), torch.random.fork_rng([device] if device.type == "cuda" else []):
        model = build_model(recipe.model.name, classes=classes, width=recipe.model.width).to(device).train()
        optimizer = SGD(model.parameters(), lr=1e-3, momentum=recipe.optimizer.momentum, fused=True)
        images = torch.randn(batch, 3, pixels, pixels, device=device)
        labels = torch.arange(batch, device=device) % classes
        times: list[float] = []
        while len(times) < 2 or (len(times) <= steps and sum(times) < PATIENCE):
            start = now(device)
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            times.append(now(device) - start)
    return statistics.median(times[1:]) * training_images(recipe) / batch
