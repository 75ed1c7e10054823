"""The cells of each table, as the paper has them; nothing is trained here."""

import pytest
import torch
from torch import nn

from lowcal.errors import LowcalError
from lowcal.experiments.recipe import lr_at
from lowcal.experiments.recipe_text import differences, load_recipe
from lowcal.experiments.reproduce.paper import choose, make_table, paper, published, table_names
from lowcal.experiments.reproduce.results import Results
from lowcal.models import build_model

RESNET34, RESNET50, MOBILENET = "resnet34-imagenet", "resnet50-imagenet", "mobilenet_v2-imagenet"
CELLS = {"table1": 18, "table2": 26, "table3": 3, "table4": 6, "table5": 14, "table6": 16, "table7": 19, "table8": 4}
CELLS |= {"figure3": 2, "figure4": 4, "figure5": 14, "figure6": 13}


@pytest.fixture
def full(tmp_path):
    return Results(tmp_path, "full")


def names(table, recipe):
    return [cell.name for cell in table.cells if cell.recipe == recipe]


def test_every_table_and_figure_has_its_cells(full):
    tables = {name: full.table(name) for name in table_names()}
    assert {name: len(table.cells) for name, table in tables.items()} == CELLS
    common = ["sgd", "local", "stochastic-depth", "prune", "freeze", "refresh"]
    assert [names(tables["table1"], recipe) for recipe in (RESNET34, RESNET50, MOBILENET)] == [common] * 3
    assert names(tables["table2"], "vgg13-cifar10") == [
        "sgd",
        "local",
        "prune",
        "freeze",
        "refresh",
        "local-step-0.0003",
    ]
    assert names(tables["table3"], RESNET50) == ["sgd-batch-256", "local-batch-256", "local-batch-256-growing"]
    assert names(tables["table4"], MOBILENET) == ["sgd", "local-tuned", "local"]  # sgd has no row, but is needed
    assert names(tables["figure4"], RESNET50) == ["sgd", "local", "local-prose", "local-growing"]
    for recipe, epochs in ((RESNET50, (54, 63, 72, 81)), (MOBILENET, (90, 105, 120, 135))):
        assert names(tables["table6"], recipe)[:5] == ["sgd", *(f"sgd-compressed-{count}" for count in epochs)]
    # Local and freeze have the same settings at equal time.
    settings = {m: {c.variant for c in tables["table7"].cells if c.method == m} for m in ("local", "freeze")}
    assert settings["local"] - settings["freeze"] == {"step-0.0003"}
    assert len(settings["freeze"]) == 6
    # One cell stands for all tables' "local": what is trained for one is there for the others.
    shared = {cell for table in tables.values() for cell in table.cells if cell.name == "local"}
    assert shared == {cell for cell in tables["table5"].cells if cell.name == "local"}
    with pytest.raises(LowcalError, match=r"unknown table 'tabel1'; did you mean 'table1'\?"):
        full.table("tabel1")


def test_published_figures_stand_beside_the_rows(full):
    rows = {name: [(row.top1_error, row.speedup) for row in full.table(name).rows] for name in CELLS}
    assert rows["table3"] == [(24.06, 1.0), (24.48, 1.27), (24.51, 1.34)]
    assert rows["table4"] == [(26.93, 1.32), (27.04, 1.26), (28.82, 1.36), (29.94, 1.31)]
    assert rows["table8"] == [(24.51, 1.41), (28.9, 1.33)]
    assert [(row.cell.name, row.epochs) for row in full.table("table6").rows if row.epochs] == [
        *(("sgd", 76), ("local", 83)),
        *(("sgd", 138), ("local", 146)),
    ]
    # The sums of the paper's columns.
    sums = {
        name: [round(sum(filter(None, column)), 2) for column in zip(*own, strict=True)] for name, own in rows.items()
    }
    assert sums["table1"] == [352.04, 15.97]
    assert sums["table2"] == [237.05, 18.39]
    assert sums["table5"][0] == 298.96
    assert published(RESNET50, "prune") == (24.89, 1.32)
    assert published(RESNET34, "prune") == published("digits", "local") == (None, None)


def test_settings_of_the_cells(full):
    def differing(recipe, name):
        return sorted(differences(load_recipe(recipe), full.recipe(full.cell(recipe, name))))

    assert differing(RESNET50, "local") == []
    assert differing(RESNET50, "local-batch-256-growing") == [
        "batch (64 there, 256 here)",
        "batch.grow (false there, true here)",
        "optimizer.lr (0.025 there, 0.1 here)",
    ]
    assert differing(RESNET34, "local-unsupervised") == ["local.supervision (true there, false here)"]
    assert differing("vgg13-cifar10", "local-step-0.0003") == ["local.lr (0.01 there, 0.0003 here)"]
    assert differing(RESNET50, "local-most-0.3") == ["local.schedule.max_fraction (0.75 there, 0.3 here)"]
    assert differing(RESNET50, "local-shift-11") == ["local.schedule.shift (null there, 11 here)"]
    assert differing(RESNET50, "local-alpha-1.2") == ["local.schedule.alpha (0.95 there, 1.2 here)"]
    assert differing(RESNET50, "local-prose") == ["local.schedule.spacing (listing there, prose here)"]


def test_compressed_sgd_has_the_whole_schedule(full):
    recipe = full.recipe(full.cell("resnet18-cifar10", "sgd-compressed-72"))
    rate, whole = lr_at(recipe), lr_at(load_recipe("resnet18-cifar10"))
    assert recipe.epochs == 72
    assert [rate(epoch) for epoch in range(0, 72, 8)] == [whole(epoch) for epoch in range(0, 90, 10)]
    assert rate(7) == whole(8) != rate(8)


@pytest.mark.parametrize("name", [RESNET50, MOBILENET])
def test_static_schedules_rise_to_three_quarters_of_the_layers(name, full):
    recipe = load_recipe(name)
    with torch.device("meta"):
        modules = build_model(recipe.model.name, classes=10).modules()
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in modules)
    assert paper()["layers"][name] == layers
    schedule = full.recipe(full.cell(name, "local-static")).local.schedule
    assert (schedule.name, schedule.c1) == ("quadratic", int(0.75 * layers))
    assert schedule.c1 - schedule.c2 * recipe.epochs**2 == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("scale", ["full", "tiny"])
def test_every_cell_has_a_recipe_and_a_folder_of_its_own_at_every_scale(scale, tmp_path):
    results = Results(tmp_path, scale)
    cells = {cell for name in CELLS for cell in results.table(name).cells}
    assert len({results.folder(cell, seed) for cell in cells for seed in (0, 1)}) == 2 * len(cells)
    recipes = {name: load_recipe(name) for name in {cell.recipe for cell in cells}}
    for cell in cells:
        recipe, whole = results.recipe(cell), recipes[cell.recipe]
        assert recipe.epochs <= whole.epochs
        assert (recipe.label == whole.label) == (not differences(whole, recipe))
    assert list(tmp_path.iterdir()) == []


def test_a_smaller_scale_keeps_the_shape_of_the_schedules(tmp_path):
    recipe, whole = Results(tmp_path, "small").base(RESNET34), load_recipe(RESNET34)
    assert (recipe.epochs, recipe.local.decay_every, recipe.prune.every) == (18, 6, 1)
    rate, full = lr_at(recipe), lr_at(whole)
    assert [rate(epoch) for epoch in range(18)] == [full(5 * epoch) for epoch in range(18)]
    recipe = Results(tmp_path, "tiny").base("mobilenet_v2-imagenet")
    assert (recipe.epochs, recipe.batch.size, recipe.model.width, recipe.data.image_size) == (7, 16, 8, 32)
    assert (recipe.data.name, recipe.data.classes, recipe.data.train_images) == ("synthetic", 8, 64)
    with pytest.raises(LowcalError, match="unknown scale 'tinny'; did you mean 'tiny'"):
        Results(tmp_path, "tinny")


def test_folders_are_stable(tmp_path):
    """Results of an earlier day are found again only while these names stay."""
    tiny = Results(tmp_path, "tiny")
    folder = tiny.folder(tiny.cell("resnet18-cifar10", "local-alpha-0.8"), 2)
    assert folder == tmp_path / "resnet18-cifar10-tiny-synthetic" / "local-alpha-0.8-seed2"
    full = Results(tmp_path, "full", settings=["optimizer.lr=0.1"])
    folder = full.folder(full.cell("resnet18-cifar10", "local-alpha-0.8"), 0)
    assert folder == tmp_path / "resnet18-cifar10-full" / "local-alpha-0.8-set-d08f6488-seed0"
    assert full.file_name("table2") == "table2-full-set-d08f6488"
    swapped = [Results(tmp_path, "full", settings=s) for s in (["epochs=2", "seed = 1"], ["seed=1", "epochs=2"])]
    assert swapped[0].file_name("table2") == swapped[1].file_name("table2")


def test_settings_of_a_method_leave_the_others_alone(tmp_path):
    plain, changed = Results(tmp_path, "tiny"), Results(tmp_path, "tiny", settings=["local.lr=0.001"])
    for method, is_same in [("sgd", True), ("stochastic-depth", True), ("local", False), ("freeze", False)]:
        cells = [results.cell("resnet18-cifar10", method) for results in (plain, changed)]
        assert (cells[0] == cells[1]) is is_same
        assert (plain.folder(cells[0], 0) == changed.folder(cells[1], 0)) is is_same
        assert (plain.recipe(cells[0]) == changed.recipe(cells[1])) is is_same


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ([], ["local.schedule.c1=13:54", "local.schedule.c2=0.00247:0.079:log"]),
        (["local.schedule.c1=30"], ["local.schedule.c2=0.00247:0.079:log"]),
        (["local.schedule.c1=30", " local.schedule.c2 = 0.004"], []),
    ],
)
def test_settings_that_are_given_are_not_searched(given, left, tmp_path):
    results = Results(tmp_path, "full", settings=given)
    cell = results.cell(RESNET50, "local-static")
    assert list(cell.searches) == left
    schedule = results.recipe(cell).local.schedule
    assert (schedule.c1, schedule.c2) == [(40, 0.00493827), (30, 0.00493827), (30, 0.004)][len(given)]
    assert results.cell(RESNET50, "sgd") == Results(tmp_path, "full").cell(RESNET50, "sgd")


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        (None, 18),
        (RESNET50, 6),
        ("local", 3),
        ("resnet50-imagenet/prune", 1),
        ("*/freeze,resnet34*", 8),
        ("sgd, local", 6),
    ],
)
def test_cells_are_chosen_by_pattern(pattern, count):
    assert len(choose(make_table("table1", load_recipe).cells, pattern)) == count


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("resnet5-imagenet", "did you mean 'resnet50-imagenet'"), ("", "choose from mobilenet"), ("zzz", "--dry-run")],
)
def test_a_pattern_that_matches_nothing_is_refused(pattern, hint):
    with pytest.raises(LowcalError, match=hint):
        choose(make_table("table1", load_recipe).cells, pattern)
