"""The setting `cache`: which runs use it, and what is refused before anything is written."""

import pytest
import torch

from lowcal import LowcalError
from lowcal.experiments.assemble import build_run, check, load_data
from lowcal.experiments.recipe_text import apply_settings, load_recipe

CPU = torch.device("cpu")
SMALL = [
    "model.width=4", "data.train_images=40", "data.test_images=20", "batch=16", "epochs=2", "step=eager",
    "data.augment=false", "local.norm_stats=running", "model.frozen=3", "local.schedule={name: fixed, epochs: {}}",
]  # fmt: skip


def recipe(*settings):
    return apply_settings(load_recipe("digits"), [*SMALL, *settings])


@pytest.fixture(scope="module")
def data():
    return load_data(recipe(), None)


def records(path, data, *settings, method="freeze"):
    run = build_run(recipe(*settings), method=method, folder=path, data=data, device=CPU)
    return [run.run_epoch() for _ in range(2)]


@pytest.mark.parametrize("cache", ["memory", "{where: disk, limit: 1MB}"])
def test_a_run_of_a_recipe_uses_it(tmp_path, data, cache):
    plain, cached = (records(tmp_path / str(n), data, *more) for n, more in enumerate([[], [f"cache={cache}"]]))
    assert [record["train_loss"] for record in plain] == [record["train_loss"] for record in cached]
    assert plain[0]["flops"] == cached[0]["flops"] > 1.2 * cached[1]["flops"]
    assert plain[1]["flops"] == plain[0]["flops"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.augment=true"], "--set cache.views=4, or data.augment=false"),
        (["data.augment=true", "cache.views=2", "cache.limit=60KiB"], "needs 100 KiB for 40 images in 2 views, but"),
        (["local.norm_stats=batch"], "set norm_stats to 'running'"),
        (["step=compiled"], "step=compiled: does not go with a cache"),
        (["cache.limit=20KiB"], "needs 50.0 KiB for 40 images, but 20.0 KiB are allowed"),
        (["model.frozen=null", "local.schedule={name: fixed, epochs: {1: 4}}", "cache.limit=20KiB"], "at boundary 4"),
    ],
)
def test_what_cannot_be_cached_is_refused_before_the_run(tmp_path, data, settings, message):
    chosen = recipe("cache=memory", *settings)
    images = load_data(chosen, None) if "data.augment=true" in settings else data
    with pytest.raises(LowcalError) as error:
        check(chosen, ["sgd", "freeze"], images, CPU, tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    assert check(chosen, ["sgd", "refresh"], images, CPU) is None  # which have no cache


def test_wrong_settings_are_refused():
    with pytest.raises(LowcalError, match="cache=ram: must be 'none', 'memory' or 'disk'"):
        recipe("cache=ram")
    with pytest.raises(LowcalError, match=r"cache\.limit=many: must be a number of bytes"):
        recipe("cache.limit=many")
    with pytest.raises(LowcalError, match=r"cache\.views=0: must be a whole number, at least 1"):
        recipe("cache=memory", "cache.views=0")
    with pytest.raises(LowcalError, match=r"cache\.views=2: there is no cache; --set cache=memory"):
        recipe("cache.views=2")
