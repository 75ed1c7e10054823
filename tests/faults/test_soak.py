"""Long runs: the number of epochs and moves does not change what a process holds."""

import gc
import os
import resource
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowcal.training.cost as cost
from lowcal.experiments.assemble import build_run, load_data
from lowcal.experiments.recipe_text import apply_settings, load_recipe

from .runs import WORKERS, image_files

GROWTH = 8 * 2**20  # bytes that the allocator may keep back; tensors are so small here that they are counted besides
OBJECTS = 6  # Python objects that a move may add: two are a hook and its handle

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts what Linux shows of a process"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # Python 3.12 on
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # on a single processor
]


@dataclass(frozen=True)
class Held:
    """What this process holds: counts, and its resident memory in bytes."""

    tensors: int
    objects: int
    hooks: int
    files: int
    threads: int
    graphs: int
    memory: int

    @classmethod
    def now(cls, model: nn.Module) -> "Held":
        gc.collect()
        everything = gc.get_objects()
        return cls(
            tensors=sum(issubclass(type(thing), Tensor) for thing in everything),
            objects=len(everything),
            hooks=sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
            files=len(os.listdir("/proc/self/fd")),
            threads=threading.active_count() + len(os.listdir("/proc/self/task")),
            graphs=sum(torch._dynamo.utils.counters["stats"].values()),
            memory=int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(),
        )


def soak(folder, method, settings, data_dir=None, *, look_at):
    """What a run holds at the ends of the epochs `look_at`, counted from 0."""
    recipe = apply_settings(load_recipe("digits"), settings)
    data, device = load_data(recipe, data_dir), torch.device("cpu")
    run = build_run(recipe, method=method, folder=folder, data=data, device=device)
    held = {}
    while not run.done:
        run.run_epoch()
        if run.finished - 1 in look_at:
            held[run.finished - 1] = Held.now(run.model)
    run.finish()
    return run, [held[epoch] for epoch in look_at]


def check(folder, method, *, model, count, every, epochs):
    """A boundary that moves `count` times, by a layer every so many epochs."""
    moves = {every * (move + 1): move + 1 for move in range(count)}
    data = "data={name: synthetic, train_images: 8, test_images: 4, image_size: 4, classes: 2}"
    schedule = f"local.schedule={{name: fixed, epochs: {moves}}}"
    settings = [f"model={{name: {model}, width: 2}}", data, schedule, f"epochs={epochs}", "batch=4"]
    just_before = [epoch - 2 for epoch in moves]  # the end of the next one is a move
    run, held = soak(folder, method, settings, look_at=[*just_before, epochs - 1])
    assert run.method.boundary == count
    tensors = [one.tensors for one in held]
    assert tensors == sorted(tensors, reverse=True)  # a layer that learns by SGD no more needs no momentum
    assert {one.files for one in held} == {held[0].files}
    assert {one.threads for one in held} == {held[0].threads}
    assert {one.graphs for one in held} == {held[0].graphs}
    start, end = held[1], held[-1]  # after the first move
    assert end.hooks - start.hooks <= count - 1
    assert end.objects - start.objects <= OBJECTS * (count - 1)
    assert end.memory - start.memory <= GROWTH


@pytest.fixture(autouse=True)
def _costs_are_not_remembered(monkeypatch):
    monkeypatch.setattr(cost, "dry_cost", cost.dry_cost.__wrapped__)


def test_a_run_of_six_moves_holds_no_more_at_its_end(tmp_path):
    check(tmp_path / "run", "local", model="resnet8", count=6, every=2, epochs=16)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", ["local", "freeze", "refresh"])
def test_a_run_of_300_epochs_holds_no_more_at_its_end(tmp_path, method):
    check(tmp_path / "run", method, model="resnet18", count=12, every=24, epochs=300)


def test_processes_that_load_files_are_those_of_the_first_epoch(tmp_path):
    _, data_dir = image_files(tmp_path / "images")
    settings = ["model={name: resnet8, width: 2}", WORKERS.format(2), "epochs=8", "batch=16"]
    _, (start, end) = soak(tmp_path / "run", "sgd", settings, Path(data_dir), look_at=[1, 7])
    assert (start.tensors, start.files, start.threads) == (end.tensors, end.files, end.threads)
