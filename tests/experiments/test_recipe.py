import json
import math
from pathlib import Path

import pytest

from lowcal.errors import LowcalError
from lowcal.experiments.recipe import BatchSettings, Recipe, lr_at
from lowcal.experiments.recipe_text import (
    apply_settings,
    as_dict,
    differences,
    dump_recipe,
    load_recipe,
    parse_recipe,
    recipe_names,
    recipe_of,
    setting_types,
)


def rates(recipe: Recipe) -> list[float]:
    rate = lr_at(recipe)
    return [rate(epoch) for epoch in range(recipe.epochs)]


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_loads_under_its_own_name_and_survives_its_copy(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert parse_recipe(dump_recipe(recipe), "copy") == recipe


def test_the_cosine_starts_after_the_warm_up():
    recipe = apply_settings(
        load_recipe("digits"),
        ["epochs=10", "optimizer.lr=0.4", "lr_schedule.name=cosine", "lr_schedule.warmup_epochs=3"],
    )
    curve = rates(recipe)
    assert curve[:4] == [0.4] * 4
    assert curve[4] == pytest.approx(0.2 * (1 + math.cos(math.pi / 7)))
    assert lr_at(recipe)(10) == pytest.approx(0, abs=1e-15)


def test_step_decay_counts_from_the_first_epoch_also_with_a_warm_up():
    plan = "lr_schedule={name: step, factor: 0.5, every: 3, warmup_epochs: 1}"
    recipe = apply_settings(load_recipe("digits"), ["epochs=7", "optimizer.lr=1.0", plan])
    assert rates(recipe) == [1, 1, 1, 0.5, 0.5, 0.5, 0.25]


@pytest.mark.parametrize(
    ("text", "value"), [("3e-4", 3e-4), ("1E-3", 1e-3), ("5.e-1", 0.5), (".5", 0.5), ("1", 1.0), ("2e0", 2.0)]
)
def test_numbers_are_read_as_a_person_writes_them(text, value):
    recipe = apply_settings(load_recipe("digits"), [f"local.lr={text}"])
    assert recipe.local.lr == value


def test_settings_apply_in_order_and_sections_merge():
    recipe = apply_settings(
        load_recipe("digits"),
        [
            "epochs=5",
            "epochs=6",
            "local.schedule={name: fixed, epochs: {2: 1, 4: 3}}",
            "local.supervision=off",
        ],
    )
    assert recipe.epochs == 6
    assert recipe.local.schedule.epochs == {2: 1, 4: 3}
    assert recipe.local.schedule.alpha == load_recipe("digits").local.schedule.alpha
    assert recipe.local.supervision is False


@pytest.mark.parametrize(
    "settings",
    [
        ["batch=128", "batch.grow=true"],
        ["batch.grow=true", "batch=128"],
        ["batch={size: 128, grow: true}"],
        ["batch.size=128", "batch.grow=true"],
    ],
)
def test_the_batch_is_a_section_of_which_a_number_is_the_size(settings):
    recipe = apply_settings(load_recipe("digits"), settings)
    assert recipe.batch == BatchSettings(size=128, grow=True)
    assert parse_recipe(dump_recipe(recipe), "copy") == recipe


def test_a_batch_of_a_size_alone_is_written_as_a_number():
    recipe = apply_settings(load_recipe("digits"), ["batch.size=128"])
    assert "batch: 128\n" in dump_recipe(recipe)
    assert differences(load_recipe("digits"), recipe) == ["batch (32 there, 128 here)"]
    assert differences(recipe, apply_settings(recipe, ["batch.grow=on"])) == ["batch.grow (false there, true here)"]
    assert setting_types("batch") == {int}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4096", 4096), ("8GiB", 8 * 1024**3), ("1.5 KiB", 1536), ("2MB", 2_000_000), ("7B", 7), ("null", None)],
)
def test_memory_is_given_in_bytes_or_in_units(text, expected):
    recipe = apply_settings(load_recipe("digits"), [f"batch.memory_limit={text}"])
    assert recipe.batch.memory_limit == expected
    assert parse_recipe(dump_recipe(recipe), "copy") == recipe


WRONG = {
    "epochs=0": "epochs=0: must be a whole number, at least 1",
    "epochs=2.5": "epochs=2.5: must be a whole number, at least 1",
    "epochs=true": "epochs=true: must be a whole number, at least 1",
    "epochs=many": "epochs=many: must be a whole number, at least 1",
    "epochs=": "epochs=null: must be a whole number, at least 1",
    "batch=-4": "batch=-4: must be a whole number, at least 1",
    "batch=true": "batch=true: must be a whole number, at least 1",
    "batch={size: 0}": "batch=0: must be a whole number, at least 1",
    "batch.grow=2": "batch.grow=2: must be true or false",
    "batch.gow=true": "unknown setting 'batch.gow'; did you mean 'batch.grow'?",
    "batch.memory_limit=8G": "batch.memory_limit=8G: must be a number of bytes, or one with its unit, as in 8GiB",
    "batch.memory_limit=0": "batch.memory_limit=0: must be a whole number, at least 1",
    "optimizer.lr=-0.1": "optimizer.lr=-0.1: must be a number, above 0",
    "optimizer.lr=.inf": "optimizer.lr=.inf: must be a number, above 0",
    "optimizer.lr=.nan": "optimizer.lr=.nan: must be a number, above 0",
    "optimizer.momentum=1": "optimizer.momentum=1: must be a number, at least 0 and below 1",
    "local.lr=-1": "local.lr=-1: must be a number, above 0",
    "local.schedule.alpha=-1": "local.schedule.alpha=-1: must be a number, at least 0",
    "local.schedule.max_fraction=2": "local.schedule.max_fraction=2: must be a number, above 0 and at most 1",
    "local.schedule.shift=0": "local.schedule.shift=0: must be a whole number, at least 1",
    "local.norm_stats=none": "local.norm_stats=none: must be 'batch' or 'running'",
    "local.decay_from=epoch": "local.decay_from=epoch: must be 'start' or 'switch'",
    "local.sign=plus": "local.sign=plus: must be 'recomputed' or 'kept'",
    "local.schedule.spacing=letter": "local.schedule.spacing=letter: must be 'listing' or 'prose'",
    "local.schedule.measure=batch": "local.schedule.measure=batch: must be 'epoch' or 'step'",
    "local.schedule.average=all": "local.schedule.average=all: must be 'layer' or 'run'",
    "local.schedule.align=true": "local.schedule.align=true: must be 'layer' or 'block'",
    "prune.ratio=1": "prune.ratio=1: must be a number, above 0 and below 1",
    "stochastic_depth.survival=.nan": "stochastic_depth.survival=.nan: must be a number, above 0 and at most 1",
    "local.refresh_every=1": "local.refresh_every=1: must be a whole number, at least 2",
    "local.schedule={name: fixed, epochs: {2: 3, 4: 1}}": "Fixed: 1 layers at epoch 4 after 3 before",
    "precision=fp8": "precision=fp8: must be 'float32', 'bf16' or 'fp16'",
    "step=graph": "step=graph: must be 'auto', 'eager'",
    "model.name=5": "model.name=5: must be text",
    "local.supervision=maybe": "local.supervision=maybe: must be true or false",
    "local.schedule.epochs=[1]": "local.schedule.epochs=[1]: must be a mapping",
    "data.name=cifar": "data.name=cifar: must be 'digits', 'cifar10', 'cifar100', ",
    "local=5": "local=5: is a section; set one of local.lr, ",
    "alpha=1": "unknown setting 'alpha'; did you mean 'local.schedule.alpha'?",
    "epoch=3": "unknown setting 'epoch'; did you mean 'epochs'?",
    "local.scedule.alpha=1": "unknown setting 'local.scedule.alpha'; did you mean 'local.schedule.alpha'?",
    "optimizer.rl=1": "unknown setting 'optimizer.rl'; did you mean 'optimizer.lr'?",
    "local.schedule={alfa: 1}": "unknown setting 'local.schedule.alfa'; did you mean 'local.schedule.alpha'?",
    "epochs.extra=3": "unknown setting 'epochs.extra'; did you mean 'epochs'?",
    "zzz=1": "unknown setting 'zzz'; choose from ",
    "epochs": "--set epochs: must read key=value",
    "=5": "--set =5: must read key=value",
    "epochs=[1": "--set epochs=[1: the value is not valid YAML",
    "local.schedule.c1=4": "local.schedule.c1 belongs to the schedule 'quadratic', not to 'norm-trend'",
    "local.schedule.name=quadratic": "local.schedule.c1 is missing: the schedule 'quadratic' needs it",
    "lr_schedule.warmup_epochs=1000": "lr_schedule.warmup_epochs=1000: must be below epochs",
    "optimizer={momentum: 0, nesterov: true}": "optimizer.nesterov=true needs a momentum",
}


@pytest.mark.parametrize(("setting", "message"), WRONG.items(), ids=list(WRONG))
def test_a_wrong_setting_is_named_with_what_is_allowed(setting, message):
    with pytest.raises(LowcalError) as caught:
        apply_settings(load_recipe("digits"), [setting])
    text = str(caught.value)
    assert text.startswith(message)
    assert "\n" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no settings"),
        ("- 1", "holds no settings"),
        ("a: [1", "is not valid YAML (line 1)"),
        ("epochs: 3", "the setting 'name' is missing: must be text"),
        ("{name: a, label: b, epochs: 3}", "the setting 'batch' is missing: must be a whole number, at least 1"),
        ("epochz: 3", "unknown setting 'epochz'; did you mean 'epochs'?"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
        (b"\xff\xfe\x00", "cannot be read (it is not a text file)"),
    ],
)
def test_a_wrong_recipe_file_is_named(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LowcalError) as caught:
        load_recipe(str(path))
    assert message in str(caught.value)
    assert "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_recipes_that_are_not_there(tmp_path):
    with pytest.raises(LowcalError, match=r"unknown recipe 'digit'; did you mean 'digits'\?"):
        load_recipe("digit")
    with pytest.raises(LowcalError, match="does not exist"):
        load_recipe(str(tmp_path / "none.yaml"))
    with pytest.raises(LowcalError, match="cannot be read"):
        load_recipe(str(tmp_path) + "/.")


def test_differences_name_the_keys_and_both_values():
    old = load_recipe("digits")
    new = apply_settings(old, ["epochs=5", "local.lr=0.5"])
    assert differences(old, old) == []
    assert differences(old, new)[0] == f"epochs ({old.epochs} there, 5 here)"
    assert differences(old, new)[1].startswith("local.lr (")


def test_the_digits_step_is_the_one_that_the_validation_split_chose():
    path = Path(__file__).parents[2] / "results" / "digits-local-step.json"
    measured = json.loads(path.read_text())
    recipe = load_recipe("digits")
    assert recipe.local.lr == measured["chosen"]
    assert measured["recipe"]["data"]["evaluate"] == "validation"
    # All else was then as it is now, so that the choice is one for this recipe; what was not yet a setting is unset.
    now = as_dict(apply_settings(recipe, ["data.evaluate=validation"]))
    then = as_dict(recipe_of(measured["recipe"]))
    for key in ("epochs", "batch", "model", "data", "optimizer", "lr_schedule"):
        assert now[key] == then[key]
    assert now["local"] | {"lr": 0} == then["local"] | {"lr": 0}


@pytest.mark.parametrize("name", ["resnet18-cifar10", "resnet50-imagenet", "mobilenet_v2-imagenet"])
def test_a_shorter_run_has_the_schedule_compressed_or_its_beginning(name):
    recipe = load_recipe(name)
    whole = lr_at(recipe)
    epochs = recipe.epochs * 4 // 5
    shorter = [f"epochs={epochs}", f"lr_schedule.epochs={recipe.epochs}"]
    compressed = lr_at(apply_settings(recipe, shorter))
    stopped = lr_at(apply_settings(recipe, [*shorter, "lr_schedule.fit=stopped"]))
    assert [stopped(epoch) for epoch in range(epochs)] == [whole(epoch) for epoch in range(epochs)]
    assert [compressed(epoch) for epoch in range(0, epochs, 4)] == pytest.approx(
        [whole(epoch) for epoch in range(0, recipe.epochs, 5)], abs=1e-15
    )


def test_a_schedule_shorter_than_the_run_is_refused():
    with pytest.raises(LowcalError, match=r"lr_schedule\.epochs=20: must be at least epochs, which is 30"):
        apply_settings(load_recipe("digits"), ["lr_schedule.epochs=20"])


OWN = (
    "{name: mine, epochs: 3, batch: 4, model: {name: vgg13, width: 8}, data: {name: cifar10, train_images: 300}, "
    "optimizer: {lr: 0.1}, lr_schedule: {name: cosine}}"
)


def test_a_recipe_without_a_label_gets_one_made_from_what_it_is():
    recipe = parse_recipe(OWN, "mine.yaml")
    assert recipe.label == "VGG13 of width 8 on CIFAR-10, 3 epochs, 300 images"
    assert parse_recipe(dump_recipe(recipe), "again") == recipe


def test_a_label_says_what_was_changed_and_nothing_else():
    recipe = load_recipe("resnet18-cifar10")
    settings = ["data.name=image-folder", "data.image_size=64", "model.width=8", "epochs=1"]
    changed = apply_settings(recipe, settings)
    assert changed.label == (
        "resnet18-cifar10 with epochs=1, model.width=8, data.name=image-folder, data.image_size=64"
    )
    assert apply_settings(changed, settings).label == changed.label  # the same again, as --resume may say it
    back = ["data.name=cifar10", "data.image_size=null", "model.width=null", "epochs=90"]
    assert apply_settings(changed, back).label == recipe.label
    assert apply_settings(recipe, ["seed=3", "epochs=90"]).label == recipe.label
    assert apply_settings(recipe, ["label=my own", "epochs=1"]).label == "my own"
    fixed = apply_settings(recipe, ["local.schedule={name: fixed, epochs: {2: 3}}"])
    assert fixed.label == "resnet18-cifar10 with local.schedule.name=fixed, local.schedule.epochs={2: 3}"


def test_the_label_of_ones_own_recipe_names_all_changes_too():
    once = apply_settings(parse_recipe(OWN, "mine.yaml"), ["epochs=4"])
    assert once.label == "mine with epochs=4"
    assert apply_settings(once, ["optimizer.lr=0.2"]).label == "mine with epochs=4, optimizer.lr=0.2"


def test_a_label_of_many_changes_says_how_many_more():
    keys = ["epochs=9", "batch=8", "threads=1", "model.width=8", "optimizer.lr=1.0", "local.lr=1.0", "local.decay=1.0"]
    assert apply_settings(load_recipe("vgg13-cifar10"), keys).label.endswith("local.lr=1.0, and 1 more")
