import pytest

from lowcal.errors import LowcalError
from lowcal.experiments.recipe_text import load_recipe
from lowcal.experiments.search_space import Search, base_recipe, grid, own_point, parse_search, refuse_unused


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("local.schedule.alpha=0.8:1.0", Search("local.schedule.alpha", (0.8, 1.0), "range")),
        ("local.lr=1e-4:1e-2:log", Search("local.lr", (1e-4, 1e-2), "log")),
        ("local.lr = 0 : 1", Search("local.lr", (0.0, 1.0), "range")),
        ("local.schedule.shift=1:8", Search("local.schedule.shift", (1, 8), "range")),
        ("batch=16:256:log", Search("batch", (16, 256), "log")),
        ("local.schedule.shift=1,2,null", Search("local.schedule.shift", (1, 2, None))),
        ("local.supervision=true,false", Search("local.supervision", (True, False))),
        ("model.name=resnet8, vgg13", Search("model.name", ("resnet8", "vgg13"))),
        ("local.schedule.epochs={1: 2},{1: 3, 2: 4}", Search("local.schedule.epochs", ({1: 2}, {1: 3, 2: 4}))),
        ("optimizer.lr=1e-3,5e-2", Search("optimizer.lr", (1e-3, 5e-2))),
    ],
)
def test_a_search_is_read_and_written_alike(text, expected):
    found = parse_search(text)
    assert found == expected
    assert list(map(type, found.points)) == list(map(type, expected.points))
    assert parse_search(str(found)) == expected


WRONG = {
    "unknown": ("local.schedule.alpa=0:1", "did you mean 'local.schedule.alpha'"),
    "section": ("local.schedule=1,2", "is a section"),
    "nothing": ("local.lr=", "low:high"),
    "no equals": ("local.lr", "low:high"),
    "no key": ("=1,2", "low:high"),
    "empty range": ("local.lr=0.1:0.1", "empty"),
    "log of zero": ("local.lr=0:1:log", "above 0"),
    "no number": ("local.lr=a:b", "'a' is no number"),
    "infinite": ("local.lr=0:.inf", "'.inf' is no number"),
    "open": ("local.lr=0.1:", "'' is no number"),
    "bool": ("local.lr=0:true", "'true' is no number"),
    "third part": ("local.lr=0:1:lin", "no range"),
    "four parts": ("local.lr=0:1:2:log", "no range"),
    "fractions of whole": ("local.schedule.shift=0.5:2", "whole"),
    "range of names": ("model.name=a:b", "no number"),
    "one value": ("local.lr=0.1", "--set"),
    "twice": ("local.lr=0.1,0.2,0.1", "twice"),
    "not YAML": ("local.lr=[1,2", "not valid YAML"),
    "seed": ("seed=1,2", "--seeds"),
}


@pytest.mark.parametrize(("text", "expected"), WRONG.values(), ids=list(WRONG))
def test_a_wrong_search_is_refused_in_one_line(text, expected):
    with pytest.raises(LowcalError, match=r"^[^\n]+$") as error:
        parse_search(text)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["local.schedule.alpha=-1:1"], "local.schedule.alpha=-1.0: must be a number, at least 0"),
        (["local.schedule.max_fraction=0.5:1.5"], "at most 1"),
        (["local.schedule.shift=1,0"], "local.schedule.shift=0"),
        (["data.name=synthetic,cifar"], "data.name=cifar"),
        (["local.schedule.c1=1:2"], "belongs to the schedule 'quadratic'"),
        (["local.lr=0.1,0.2", "local.lr=0.3,0.4"], "searched twice"),
        (["epochs=2,3"], "both set and searched"),
    ],
)
def test_what_the_recipe_refuses_at_any_point_is_found_at_once(texts, expected):
    with pytest.raises(LowcalError, match=r"^[^\n]+$") as error:
        base_recipe(load_recipe("digits"), ["epochs=1"], [parse_search(text) for text in texts])
    assert expected in str(error.value)


def test_settings_that_need_one_another_can_be_searched_together():
    searches = [parse_search("local.schedule.c1=4:8"), parse_search("local.schedule.c2=0.01:0.1:log")]
    base = base_recipe(load_recipe("digits"), ["local.schedule.name=quadratic"], searches)
    assert (base.local.schedule.c1, base.local.schedule.c2) == (4.0, 0.01)


def test_a_grid_is_of_lists():
    with pytest.raises(LowcalError, match="a grid needs a list"):
        grid([parse_search("local.lr=0:1")])


@pytest.mark.parametrize(
    ("searches", "expected"),
    [
        (["local.lr=1e-4:1e-2:log"], {"local.lr": 0.01}),
        (["local.schedule.shift=null,2", "local.supervision=true,false"], (None, True)),
        (["local.schedule.shift=1,2"], None),
        (["local.lr=1e-4:1e-2:log", "local.lr=0.02:0.1"], None),
        (["local.schedule.shift=1:4"], None),
        (["batch=16:128", "local.every=2,1"], {"batch": 64, "local.every": 1}),
    ],
)
def test_a_recipes_own_point_is_one_only_where_all_of_it_is_searched(searches, expected):
    found = own_point(load_recipe("resnet18-cifar10"), [parse_search(text) for text in searches])
    assert (tuple(found.values()) if isinstance(expected, tuple) else found) == expected


def test_a_search_that_changes_nothing_for_the_method_is_refused():
    for method, text in (("sgd", "local.lr=1,2"), ("prune", "local.lr=1,2"), ("local", "prune.every=1,2")):
        with pytest.raises(LowcalError, match=f"changes nothing for '{method}'"):
            refuse_unused([parse_search(text)], method)
    for method, text in (("sgd", "optimizer.lr=1,2"), ("prune", "prune.every=1,2"), ("freeze", "local.every=1,2")):
        refuse_unused([parse_search(text)], method)


def test_optuna_gets_plain_values_and_the_recipe_the_searched_ones():
    class Trial:
        def suggest_categorical(self, key, choices):
            assert choices == ["{1: 2}", "{1: 3}"]
            return choices[1]

    assert parse_search("local.schedule.epochs={1: 2},{1: 3}").suggest(Trial()) == {1: 3}
