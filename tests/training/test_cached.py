"""Runs whose frozen layers are computed once for each image: the same, but for the work that is saved."""

import pytest
import torch

from lowcal import LowcalError
from lowcal.activations import FILE
from lowcal.data import FileBatches, Files
from lowcal.steps import graphed
from lowcal.training.cached import CachedBatches, CacheOptions
from lowcal.training.cost import dry_cost

from ..steps.software_graphs import SoftwareGraphs
from ..support import same
from .runs import make_run, network, outcome, run_on, settings

MOVES = {1: 1, 3: 2}  # both before the dropout
COSTS = ("flops", "peak_memory_bytes")


def cached_run(path, cache="memory", views=None, **options):
    options = {"augment": False, "local": settings(MOVES, norm_stats="running"), **options}
    cache = None if cache is None else CacheOptions(cache == "disk", views=views)
    return make_run(path, "freeze", cache=cache, **options)


def results(run):
    """The outcome of a run without the costs."""
    found = outcome(run)
    return {**found, "log": [{k: v for k, v in record.items() if k not in COSTS} for record in found["log"]]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return results(run_on(cached_run(tmp_path_factory.mktemp("plain") / "run", None, fused=True)))


@pytest.mark.parametrize("step", ["eager", "graphed"])
@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_run_is_bitwise_the_one_without_the_cache(tmp_path, monkeypatch, plain, cache, step):
    """Two moves, dropout, smaller last batches; warmed up as in the command."""
    monkeypatch.setattr(graphed, "GRAPHS", SoftwareGraphs)
    run = cached_run(tmp_path / "run", cache, step=step, fused=True)
    run.warm_up()
    assert same(results(run_on(run)), plain)
    assert (run.folder.path / FILE).exists() == (cache == "disk")
    run.finish()
    assert not (run.folder.path / FILE).exists()


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_resumed_run_is_too(tmp_path, plain, cache):
    run_on(cached_run(tmp_path / "run", cache, fused=True), 2)
    torch.manual_seed(99)
    run = cached_run(tmp_path / "run", cache, fused=True)
    assert run.resume() == ()
    run.warm_up()
    assert same(results(run_on(run)), plain)


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_run_killed_inside_an_epoch_goes_on(tmp_path, plain, cache):
    """After two steps behind the boundary."""
    run = run_on(cached_run(tmp_path / "run", cache, fused=True, checkpoint_minutes=1e-9), 1)
    step, taken = run._steps.step, []

    def ends(*batch):
        if len(taken) == 2:
            raise KeyboardInterrupt
        taken.append(batch)
        return step(*batch)

    ends.skipped = None
    run._steps.step = ends
    with pytest.raises(KeyboardInterrupt):
        run.run_epoch()
    run = cached_run(tmp_path / "run", cache, fused=True)
    assert run.resume() == ()
    assert (run.finished, run.finished_steps) == (1, 2)
    assert same(results(run_on(run)), plain)


@pytest.fixture(scope="module")
def augmented(tmp_path_factory):
    """Runs without a cache: one as usual, and one whose epoch 5 has the crops and flips of epoch 3."""
    runs = {}
    for name, source in (("plain", 5), ("again", 3)):
        run = cached_run(tmp_path_factory.mktemp(name) / "run", None, augment=True, fused=True)
        rows = run.train.rows_in(source)
        run_on(run, 5)
        draw = run.train._draw

        def drawn(draw=draw, rows=rows):
            (found,) = draw()
            return [torch.cat((found[:, :1], rows[found[:, 0], 1:]), dim=1)]

        run.train._draw = drawn
        runs[name] = results(run_on(run))
    return runs


@pytest.mark.parametrize(("views", "same_as"), [(3, "plain"), (2, "again")])
@pytest.mark.parametrize("cache", ["memory", "disk"])
@pytest.mark.parametrize("killed_after", [None, 2, 5])
def test_views_are_those_of_the_first_epochs_at_a_boundary(tmp_path, augmented, cache, views, same_as, killed_after):
    """Moves to epochs 1 and 3 of 6: with two views epoch 5 is the first without images of its own."""
    options = {"views": views, "augment": True, "fused": True}
    run = cached_run(tmp_path / "run", cache, **options)
    if killed_after is not None:
        run_on(run, killed_after)
        torch.manual_seed(99)
        run = cached_run(tmp_path / "run", cache, **options)
        assert run.resume() == ()
    run.warm_up()
    assert same(results(run_on(run)), augmented[same_as])


def test_views_that_are_all_the_same_are_refused(tmp_path):
    with pytest.raises(LowcalError, match=r"cache.views=2: without augmentation all views are the same"):
        cached_run(tmp_path / "run", views=2)


def test_the_work_that_is_saved_is_counted(tmp_path):
    """Full steps at boundary 0; behind it the rest of the network, and in the first epoch the prefix once."""
    runs = [run_on(cached_run(tmp_path / str(cache), cache)) for cache in (None, "memory")]
    plain, cached = ([record["flops"] for record in run.folder.read_epochs()] for run in runs)
    cost = {size: dry_cost(runs[1].method, (size, 2, 6, 6), cached=True) for size in (5, 2)}
    prefix, suffix = (4 * getattr(cost[5], name) + getattr(cost[2], name) for name in ("cached_flops", "flops"))
    convolution = 2 * 22 * 36 * 9 * 4  # FLOPs per input channel of the first two layers, for 22 images
    assert prefix == convolution * (2 + 4)
    assert cached[0] == plain[0]
    assert cached[4:] == [suffix, suffix]
    assert cached[3] == prefix + suffix == plain[3]
    assert cached[1] > cached[2]
    views = run_on(cached_run(tmp_path / "views", views=2, augment=True)).folder.read_epochs()
    assert [record["flops"] for record in views[3:]] == [2 * prefix + suffix, suffix, suffix]


def test_random_images_are_refused(tmp_path):
    with pytest.raises(LowcalError, match=r"--set cache.views=4, or data.augment=false"):
        cached_run(tmp_path / "run", augment=True)


def test_files_that_are_decoded_in_each_epoch_are_refused(tmp_path):
    files = Files(("one.png",), torch.zeros(1, dtype=torch.int64), None, (0.5,), (0.5,))
    loader = FileBatches(files, batch=1, mean=files.mean, std=files.std)
    with pytest.raises(LowcalError, match="decoded for each mini-batch"):
        CachedBatches.of_run(cached_run(tmp_path / "run").method, loader, CacheOptions(), tmp_path)


@pytest.mark.parametrize("method", ["sgd", "local", "refresh"])
def test_other_methods_ignore_it(tmp_path, method):
    run_on(make_run(tmp_path / "run", method, cache=CacheOptions(), model=network()), 2)
