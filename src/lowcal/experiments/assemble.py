"""Builds a run from a recipe: data, network, optimizer, method and batches."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lowcal.budget import Budget
from lowcal.data import Dataset, Loader, Shard, available_workers, load, make_loader
from lowcal.discovery import trace
from lowcal.errors import LowcalError, nearest
from lowcal.experiments.arms import Watcher
from lowcal.experiments.backends import puts_channels_last
from lowcal.experiments.recipe import BatchSettings, CacheSettings, OptimizerSettings, Recipe, lr_at
from lowcal.experiments.recipe_text import as_dict, dump_recipe
from lowcal.methods import Method, build_method, find_method
from lowcal.methods.boundary import Freeze, Local
from lowcal.models import build_model, check_input
from lowcal.norms import synchronise
from lowcal.pretrained import load_weights
from lowcal.steps.modes import find_step
from lowcal.steps.step import StepOptions, autocast
from lowcal.strided import slice_inputs
from lowcal.training.batch_growth import BatchGrowth
from lowcal.training.cached import CachedBatches, CacheOptions
from lowcal.training.cost import dry_cost
from lowcal.training.distributed import TrainingGroup
from lowcal.training.environment import gather_environment, training_command
from lowcal.training.process import ALONE, Launch
from lowcal.training.run import Run, RunOptions
from lowcal.training.run_folder import RunFolder
from lowcal.user_files import digests

EVALUATION_BATCH = 256  # at least; evaluation keeps no activations, so it fits where training does


def find_device(name: str, launch: Launch = ALONE) -> torch.device:
    """The device called `name`: auto (CUDA if there is a GPU), cpu, cuda or cuda:N.

    Every process on a machine has its own GPU.

    Raises:
        LowcalError: it is none of these, the machine does not have it, or it has fewer GPUs than processes.
    """
    if launch.world > 1:
        if ":" in name:
            raise LowcalError(f"device '{name}' is one for several processes; give --device cuda: each takes its own")
        present = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if name == "cuda" or (name == "auto" and present):
            if present < launch.local_world:
                raise LowcalError(
                    f"{launch.local_world} processes on this machine, but torch finds {present} CUDA device(s); "
                    f"start as many (torchrun --nproc-per-node {max(present, 1)}) or use --device cpu"
                )
            return torch.device("cuda", launch.local_rank)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if name != "cpu" and (kind != "cuda" or not (number.isdigit() or name == "cuda")):
        raise LowcalError(f"unknown device '{name}'; choose from auto, cpu, cuda, cuda:0, cuda:1 ...")
    if kind == "cuda":
        present = torch.cuda.device_count()
        if not torch.cuda.is_available() or int(number or 0) >= present:
            found = f"{present} CUDA device(s)" if present else "no CUDA device"
            raise LowcalError(f"device '{name}' was not found: torch finds {found}; use --device cpu or auto")
    return torch.device(name)


def load_data(recipe: Recipe, data_dir: Path | None, launch: Launch = ALONE, watcher: Watcher | None = None) -> Dataset:
    """The recipe's images; processes on one machine divide its processors among their workers.

    The watcher is told how far the decoding of many files is.
    """
    settings = as_dict(recipe.data)
    needs_workers = recipe.data.name == "imagenet" or recipe.data.augments_in_workers
    if launch.local_world > 1 and needs_workers and recipe.data.workers is None:
        settings["workers"] = max(1, available_workers() // launch.local_world)
    return load(data_dir=data_dir, watcher=watcher, **settings)


def check(recipe: Recipe, methods: list[str], data: Dataset, device: torch.device, out: Path = Path()) -> str | None:
    """Builds each method once, so that a mistake is found before anything is written.

    Args:
        out: the folder of the runs, on whose disk a cache may be.

    Returns:
        Which weights the network begins with; None for new ones.

    Raises:
        LowcalError: the network does not take the images, the batch is larger than the data, a method is unknown or
            does not apply, the schedule does not fit the network, the step does not fit the method or the device, or
            what is frozen cannot be cached.
    """
    if recipe.batch.size > len(data.train):
        raise LowcalError(
            f"batch={recipe.batch.size}: is larger than the data ({len(data.train)} training images); "
            f"--set batch={len(data.train)} or less"
        )
    cpu = torch.device("cpu")
    for method in methods:
        with torch.random.fork_rng([]):
            model, optimizer, attached, _, loaded = build_parts(recipe, method, data, cpu)
        if recipe.ema.decay and attached.reshapes:
            remedy = f"--set ema=0, or leave {method} out"
            raise LowcalError(f"ema={recipe.ema.decay:g}: {method} removes channels whose mean is not zero; {remedy}")
        if recipe.step != "auto":
            find_step(recipe.step).check(model, (optimizer,), attached, StepOptions(device, recipe.precision))
        if (cache := _cache(recipe.cache)) is not None and isinstance(attached, Freeze) and attached.caches:
            _check_cache(recipe, cache, attached, data, device, out)
        attached.detach()
    return loaded


def _check_cache(
    recipe: Recipe, cache: CacheOptions, method: Freeze, data: Dataset, device: torch.device, out: Path
) -> None:
    """Checks that each boundary of the run can be cached; moves the boundary of `method`, which is on the CPU."""
    if "compiled" in recipe.step:
        raise LowcalError(f"step={recipe.step}: does not go with a cache; --set step=eager, or cache=none")
    cpu = torch.device("cpu")
    batches = CachedBatches.of_run(method, _loader(recipe, data, cpu, Shard(), training=True), cache, out)
    with torch.random.fork_rng([]), autocast(cpu, recipe.precision):
        for boundary in method.boundaries():
            method.move_to(boundary)
            batches.network.check(device)


def images_of(data: Dataset) -> dict[str, Any]:
    """The numbers of a run's images and classes."""
    train, test = len(data.train), len(data.test)
    train_of, test_of = data.whole or (train, test)
    return {
        "train": train,
        "train_of": train_of,
        "test": test,
        "test_of": test_of,
        "classes": len(data.classes),
        "folder": data.folder,
    }


def inputs_of(data: Dataset) -> dict[str, Any]:
    """What must be known to give other images to the network of a run."""
    return {"shape": data.read_shape, "mean": data.mean, "std": data.std, "classes": data.classes}


def build_run(
    recipe: Recipe,
    *,
    method: str,
    folder: Path,
    data: Dataset,
    device: torch.device,
    variant: str = "",
    reopen: bool = False,
    group: TrainingGroup | None = None,
) -> Run:
    """A run of `method` under `recipe`, whose seed decides the initial weights and the batches.

    Args:
        variant: names the settings that differ from other runs of the method.
        folder: its run folder, which is made; with `reopen` it must be there, and `Run.resume` goes on with it.
        group: the processes that share each mini-batch.
    """
    group = group or TrainingGroup()
    torch.manual_seed(recipe.seed)
    model, optimizer, attached, sliced, loaded = build_parts(recipe, method, data, device, group.world)
    if recipe.sync_batch_norm and group.world > 1:
        synchronise(model)
    if reopen or not group.is_main:
        files = RunFolder(folder)
    else:
        files = RunFolder.create(
            folder,
            recipe=dump_recipe(recipe),
            environment={
                **gather_environment(str(device)),
                "command": training_command(),
                "ranks": group.world,
                "sliced_layers": sliced,
                "weights": loaded,
                "files": digests(recipe.model.name, recipe.data.name),
                "inputs": inputs_of(data),
            },
            identity={
                "method": method,
                **({"variant": variant} if variant else {}),
                "recipe": recipe.name,
                "seed": recipe.seed,
                "epochs": recipe.epochs,
                "model": recipe.model.name,
                "dataset": data.name,
                "label": recipe.label,
                "images": images_of(data),
            },
        )
    return Run(
        model,
        optimizer,
        attached,
        _loader(recipe, data, device, group.shard, training=True),
        _loader(recipe, data, device, group.shard, training=False),
        files,
        RunOptions(
            epochs=recipe.epochs,
            lr_at=lr_at(recipe),
            device=device,
            precision=recipe.precision,
            seed=recipe.seed,
            warmup_epochs=recipe.lr_schedule.warmup_epochs,
            step=recipe.step,
            max_skips=recipe.guard.max_skips,
            max_norm=recipe.optimizer.max_norm,
            label_smoothing=recipe.label_smoothing,
            ema_decay=recipe.ema.decay,
            cache=_cache(recipe.cache),
            checkpoint_minutes=recipe.checkpoint.minutes,
        ),
        growth=_growth(recipe.batch, len(data.train)),
        group=group,
    )


_held: dict[Hashable, tuple[int, int, int]] = {}  # in this process, for all runs of an experiment


def memory_budget(recipe: Recipe, method: Local, data: Dataset, world: int = 1) -> tuple[int, int, int]:
    """The boundary that keeps to the recipe's budget of memory, and the bytes of a step at it and at boundary 0.

    Raises:
        LowcalError: the budget is out of reach.
    """
    shape = (-(-recipe.batch.size // world), *data.image_shape)
    key = (method.name, dump_recipe(replace(recipe, seed=0)), len(data.classes), *shape)
    if key not in _held:
        cached = recipe.cache.where != "none" and method.caches

        def bytes_of(boundary: int) -> int:
            return dry_cost(method, shape, precision=recipe.precision, cached=cached, boundary=boundary).peak_bytes

        boundary = cast(Budget, recipe.local.schedule.build()).held(len(method.layers), bytes_of)
        _held[key] = boundary, bytes_of(boundary), bytes_of(0)
    return _held[key]


def build_parts(
    recipe: Recipe, method: str, data: Dataset, device: torch.device, world: int = 1
) -> tuple[nn.Module, Optimizer, Method, list[str], str | None]:
    """The network, its optimizer, the method, the layers that `slice_inputs` changed, and which weights were loaded."""
    shape, settings = data.image_shape, recipe.model
    classes = len(data.classes)
    model = build_model(
        settings.name, classes=classes, in_channels=shape[0], width=settings.width, image_size=shape[-1]
    )
    check_input(model, settings.name, shape, classes)
    loaded = load_weights(model, settings.name, settings.weights) if settings.weights else None
    model = model.to(device)
    if puts_channels_last(recipe.channels_last, device, recipe.precision):
        model = model.to(memory_format=torch.channels_last)
    sliced = slice_inputs(model)
    example = torch.zeros(1, *shape, device=device)
    optimizer = _optimizer(recipe.optimizer, model, example)
    attached = build_method(
        method,
        model,
        optimizer,
        getattr(recipe, find_method(method).section),
        epochs=recipe.epochs,
        example_inputs=example,
        seed=recipe.seed,
    )
    if recipe.local.schedule.memory is not None and isinstance(attached, Local):
        attached.move_to(memory_budget(recipe, attached, data, world)[0])
    if settings.frozen is not None and isinstance(attached, Local):
        attached.move_to(max(attached.boundary, _first_boundary(settings.frozen, attached.layers)))
    return model, optimizer, attached, sliced, loaded


def _optimizer(settings: OptimizerSettings, model: nn.Module, example: Tensor) -> Optimizer:
    """The optimizer; fused, which is the fastest, and the only one that skips steps without waiting for a GPU."""
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if settings.head_lr != 1.0:
        head = set(model.get_submodule(trace(model, example).layers[-1]).parameters())
        others = [parameter for parameter in model.parameters() if parameter not in head]
        groups = [{"params": others}, {"params": list(head), "lr_factor": settings.head_lr}]
    if settings.name == "adamw":
        return AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    return SGD(
        groups,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
        fused=True,
    )


def _first_boundary(frozen: int | float | str, layers: Sequence[str]) -> int:
    """The number of leading layers that `model.frozen` names."""
    if isinstance(frozen, str):
        found = [n for n, layer in enumerate(layers, 1) if layer == frozen or layer.startswith(f"{frozen}.")]
        if not found:
            raise LowcalError(f"model.frozen={frozen}: no layer has this name{nearest(frozen, layers)}")
        return found[-1]
    return frozen if isinstance(frozen, int) else int(frozen * len(layers) + 1e-9)


def _cache(settings: CacheSettings) -> CacheOptions | None:
    if settings.where == "none":
        return None
    return CacheOptions(settings.where == "disk", settings.limit, settings.half, settings.views)


def _growth(batch: BatchSettings, images: int) -> BatchGrowth:
    most = images if batch.grow else batch.size
    return BatchGrowth(batch.size, most=most, limit=batch.memory_limit, scale_lr=batch.scale_lr)


def _loader(recipe: Recipe, data: Dataset, device: torch.device, shard: Shard, *, training: bool) -> Loader:
    batch = recipe.batch.size if training else min(len(data.test), max(recipe.batch.size, EVALUATION_BATCH))
    return make_loader(
        data,
        training=training,
        batch=batch,
        device=device,
        seed=recipe.seed,
        channels_last=puts_channels_last(recipe.channels_last, device, recipe.precision),
        shard=shard,
    )
