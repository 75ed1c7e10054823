"""The classes that a trained run predicts for image files, which are read as its test images were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowcal.data import Batches, Dataset, Images
from lowcal.data.folders import ENDINGS
from lowcal.data.images import decode_files, fit_cropped, fit_evaluated
from lowcal.errors import LowcalError
from lowcal.experiments.assemble import EVALUATION_BATCH, build_parts
from lowcal.experiments.backends import cpu_threads, kernels_of, puts_channels_last
from lowcal.experiments.folders import recipe_in, refuse_changed_files
from lowcal.experiments.recipe import Recipe
from lowcal.files import first_line
from lowcal.steps.step import autocast
from lowcal.training.checkpoint import load_checkpoint
from lowcal.training.run_folder import RunFolder

BEST = "model-best.safetensors"  # the state_dict of the best epoch
LUMA = (19595, 38470, 7471)  # of red, green and blue, in 65536ths, as Pillow weights them


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths`, and the image files below the folders among them, in order of their names.

    Raises:
        LowcalError: a path does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.name.lower().endswith(ENDINGS) and p.is_file())
            if not below:
                raise LowcalError(f"{path} holds no image file (.jpg, .png, ...); give another folder")
            found += below
        elif path.is_file():
            found.append(path)
        else:
            raise LowcalError(f"{path} does not exist; give image files or folders of them")
    return found


def predict(
    folder: Path, files: Sequence[Path], *, best: bool, device: torch.device, watch: Callable[[int], None]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Predict the class of each file.

    Args:
        folder: of the run, finished or not.
        best: takes the weights of the epoch with the lowest error on the test images instead of the last ones.
        watch: called with the number of finished files.

    Returns:
        For each readable file a row of `file`, `class`, `label` (its number) and `probability`; and for each other file
        its name and what is wrong with it.

    Raises:
        LowcalError: there is no such run, no such weights, or it did not record how its images are read.
    """
    run, recipe = RunFolder.open(folder), recipe_in(folder)
    inputs = run.read_environment().get("inputs")
    if inputs is None:
        raise LowcalError(f"{folder} was made by an earlier lowcal, which did not record its classes; train it again")
    refuse_changed_files(folder, recipe)
    rows, failures, done = [], [], 0
    with cpu_threads(recipe.threads), kernels_of(recipe):
        model = _network(run, recipe, inputs, device, best=best)
        for start in range(0, len(files), EVALUATION_BATCH):
            names = [str(file) for file in files[start : start + EVALUATION_BATCH]]
            pixels, unreadable = decode_files(names, *_reading(recipe, inputs), on_error="skip")
            failures += [f"{names[position]}: {reason}" for position, reason in unreadable.items()]
            read = [position for position in range(len(names)) if position not in unreadable]
            if read:
                images = _prepared(pixels[read], recipe, inputs)
                scores = torch.cat(list(_scores(model, images, recipe, inputs, device)))
                best_scores, labels = scores.softmax(dim=1).max(dim=1)
                rows += [
                    {"file": names[position], "class": inputs["classes"][label], "label": label, "probability": value}
                    for position, label, value in zip(read, labels.tolist(), best_scores.tolist(), strict=True)
                ]
            done += len(names)
            watch(done)
    return rows, failures


def _network(run: RunFolder, recipe: Recipe, inputs: dict[str, Any], device: torch.device, *, best: bool) -> nn.Module:
    """The network of a run with the weights of its newest checkpoint, or its best ones, in evaluation mode."""
    checkpoint = load_checkpoint(run.path)
    if checkpoint is None:
        raise LowcalError(f"{run.path} has saved no weights yet; wait for its first epoch")
    state = checkpoint.state
    images = _prepared(torch.zeros(1, 3, *inputs["shape"][1:], dtype=torch.uint8), recipe, inputs)
    data = Dataset("", tuple(inputs["classes"]), images, images, (), (), None)
    plain = replace(recipe, model=replace(recipe.model, weights=None))  # those of the run follow
    model, _, method, _, _ = build_parts(plain, run.read_identity()["method"], data, device)
    method.load_state_dict(state["method"])  # it may change the network's shape
    # With a mean of the weights, the mean is what the run evaluates.
    model.load_state_dict(state["model"] | state.get("mean", {"tensors": {}})["tensors"])
    method.detach()
    if best:
        _load_best(model, run.path / BEST)
    return model.eval()


def _load_best(model: nn.Module, file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise LowcalError(f"{file} does not exist; leave --weights best out")
    try:
        model.load_state_dict(load_file(file))
    except (RuntimeError, SafetensorError) as error:  # damaged, or channels have been removed since
        raise LowcalError(f"{file} does not fit the network ({first_line(error)}); leave --weights best out") from None


def _reading(recipe: Recipe, inputs: dict[str, Any]) -> tuple[int, Any]:
    """The size at which files are read, and the function that brings them to it."""
    channels, height, width = inputs["shape"]
    if height != width or channels not in (1, 3):
        raise LowcalError(f"the run's images are {channels}x{height}x{width}; predict reads square ones, grey or RGB")
    return height, fit_evaluated if recipe.data.name == "imagenet" else fit_cropped


def _prepared(pixels: Tensor, recipe: Recipe, inputs: dict[str, Any]) -> Images:
    """Pixels (N, 3, H, W) as the network takes them, but for the normalisation."""
    if inputs["shape"][0] == 1:
        grey = (pixels.int() * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
        pixels = ((grey + 0x8000) >> 16).to(torch.uint8)
    images = Images(pixels, torch.zeros(len(pixels), dtype=torch.int64))
    return images.enlarged(recipe.data.image_size, recipe.data.channels)


def _scores(
    model: nn.Module, images: Images, recipe: Recipe, inputs: dict[str, Any], device: torch.device
) -> Iterator[Tensor]:
    batches = Batches(
        images,
        batch=len(images),
        mean=inputs["mean"],
        std=inputs["std"],
        device=device,
        channels_last=puts_channels_last(recipe.channels_last, device, recipe.precision),
    )
    for x, _ in batches:
        with torch.no_grad(), autocast(device, recipe.precision):
            yield model(x).float()
