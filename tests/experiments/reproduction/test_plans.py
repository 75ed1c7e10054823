"""The cells of each table, as the paper has them; nothing is trained here."""

import pytest
import torch

from lowcal.errors import LowcalError
from lowcal.experiments.describe import describe
from lowcal.experiments.recipe import lr_at
from lowcal.experiments.recipe_text import differences, load_recipe
from lowcal.experiments.reproduction.cells import Cell, choose
from lowcal.experiments.reproduction.paper import paper
from lowcal.experiments.reproduction.plans import LAYERS, make_plan, plan_names
from lowcal.experiments.reproduction.results import Results
from lowcal.experiments.reproduction.scales import SCALES
from lowcal.schedule import cap

IMAGENET = ("resnet34-imagenet", "resnet50-imagenet", "mobilenet_v2-imagenet")


def ids(name: str) -> list[str]:
    """The paper's."""
    cells = make_plan(name, load_recipe).cells
    return [cell.id for cell in cells if cell.method != "refresh" and cell.variant != "step-0.0003"]


def each(recipe: str, *names: str) -> list[str]:
    return [f"{recipe}/{name}" for name in names]


def test_there_is_every_table_and_figure():
    assert plan_names() == [*(f"table{n}" for n in range(1, 9)), *(f"figure{n}" for n in range(3, 7))]


def test_table1_has_the_papers_systems():
    assert ids("table1") == [
        *each("resnet34-imagenet", "sgd", "local", "stochastic-depth", "prune", "freeze"),
        *each("resnet50-imagenet", "sgd", "local", "stochastic-depth", "prune", "freeze"),
        *each("mobilenet_v2-imagenet", "sgd", "local", "stochastic-depth", "prune", "freeze"),
    ]


def test_table2_has_the_papers_systems_without_stochastic_depth_on_vgg():
    assert ids("table2") == [
        *each("resnet18-cifar10", "sgd", "local", "stochastic-depth", "prune", "freeze"),
        *each("vgg13-cifar10", "sgd", "local", "prune", "freeze"),
        *each("resnet18-cifar100", "sgd", "local", "stochastic-depth", "prune", "freeze"),
        *each("vgg13-cifar100", "sgd", "local", "prune", "freeze"),
    ]


@pytest.mark.parametrize("name", ["table2", "table7"])
def test_a_short_step_of_ours_stands_last_for_each_network(name, tmp_path):
    results = Results(tmp_path, SCALES["full"])
    lines = make_plan(name, results.base).lines
    for recipe in dict.fromkeys(line.recipe for line in lines):
        line = [line for line in lines if line.recipe == recipe][-1]
        assert (line.strategy, line.cell.id) == ("local, short step (ours)", f"{recipe}/local-step-0.0003")
        assert (line.paper.top1_error, line.paper.speedup) == (None, None)
        assert results.recipe(line.cell).local.lr == 0.0003
        assert results.folder(line.cell, 0) == tmp_path / f"{recipe}-full" / "local-step-0.0003-seed0"


def test_table3_has_four_times_the_batch_and_rate_and_a_growing_batch():
    plan = make_plan("table3", load_recipe)
    names = ("sgd-batch-256", "local-batch-256", "local-batch-256-growing")
    assert [cell.id for cell in plan.cells] == each("resnet50-imagenet", *names)
    assert all(cell.settings[:2] == ("batch=256", "optimizer.lr=0.1") for cell in plan.cells)
    assert [cell.settings[2:] for cell in plan.cells] == [(), (), ("batch.grow=true",)]
    assert [line.paper.speedup for line in plan.lines] == [1.0, 1.27, 1.34]


def test_table4_has_tuned_and_common_settings():
    plan = make_plan("table4", load_recipe)
    assert [cell.id for cell in plan.cells] == [
        *each("resnet34-imagenet", "sgd", "local-tuned", "local"),
        *each("mobilenet_v2-imagenet", "sgd", "local-tuned", "local"),
    ]
    tuned = [line for line in plan.lines if line.cell.searches]
    assert [line.paper.top1_error for line in tuned] == [26.93, 28.82]


def test_table5_turns_weak_supervision_off_on_all_seven_pairs():
    cells = make_plan("table5", load_recipe).cells
    assert len(cells) == 14
    assert sum(cell == Cell(cell.recipe, "local") for cell in cells) == 7
    assert {cell.settings for cell in cells} == {(), ("local.supervision=false",)}


def test_tables_6_and_7_have_sgd_compressed():
    assert ids("table6")[:7] == each(
        *("resnet50-imagenet", "sgd", "sgd-compressed-54", "sgd-compressed-63", "sgd-compressed-72"),
        *("sgd-compressed-81", "local", "freeze"),
    )
    table7 = ids("table7")
    assert all(name.startswith("resnet18-cifar10/") for name in table7)
    settings = [name.partition("/local")[2] for name in table7 if "/local" in name]
    assert settings == [name.partition("/freeze")[2] for name in table7 if "/freeze" in name]
    assert settings == ["", "-most-0.25", "-most-0.5", "-most-0.9", "-alpha-0.8", "-alpha-1.1"]


def test_compressed_sgd_has_the_whole_schedule(tmp_path):
    results = Results(tmp_path, SCALES["full"])
    plan = make_plan("table7", results.base)
    cell = next(cell for cell in plan.cells if cell.variant == "compressed-72")
    recipe = results.recipe(cell)
    rate, whole = lr_at(recipe), lr_at(load_recipe("resnet18-cifar10"))
    assert recipe.epochs == 72
    assert [rate(epoch) for epoch in range(0, 72, 8)] == [whole(epoch) for epoch in range(0, 90, 10)]
    assert rate(7) == whole(8) != rate(8)


@pytest.mark.parametrize(("recipe", "layers"), LAYERS.items())
def test_static_schedules_rise_to_three_quarters_of_the_layers(recipe, layers, tmp_path):
    chosen = load_recipe(recipe)
    found = describe(chosen.model.name, classes=10, channels=3, image_size=32, width=8, epochs=1)
    assert len(found.layers) == layers
    results = Results(tmp_path, SCALES["full"])
    cell = next(c for c in make_plan("table8", results.base).cells if c.recipe == recipe and c.variant == "static")
    schedule = results.recipe(cell).local.schedule
    assert schedule.name == "quadratic"
    assert schedule.c1 == cap(layers, 0.75)
    assert schedule.c1 - schedule.c2 * chosen.epochs**2 == pytest.approx(0, abs=1e-3)


def test_static_constants_can_be_given(tmp_path):
    results = Results(tmp_path, SCALES["full"], settings=["local.schedule.c1=30", "local.schedule.c2=0.004"])
    cells = {cell.name: cell for cell in make_plan("table8", results.base).cells if cell.recipe == IMAGENET[1]}
    schedule = results.recipe(cells["local-static"]).local.schedule
    assert (schedule.c1, schedule.c2) == (30, 0.004)
    assert results.folder(cells["sgd"], 0) == Results(tmp_path, SCALES["full"]).folder(cells["sgd"], 0)


def test_figures_need_these_cells():
    assert ids("figure3") == ["resnet34-imagenet/local", "resnet50-imagenet/local"]
    assert ids("figure4") == each("resnet50-imagenet", "sgd", "local", "local-prose", "local-growing")
    alphas = (
        "sgd",
        "local-alpha-0.6",
        "local-alpha-0.8",
        "local-alpha-0.9",
        "local",
        "local-alpha-1",
        "local-alpha-1.2",
    )
    assert ids("figure5") == [*each("resnet50-imagenet", *alphas), *each("mobilenet_v2-imagenet", *alphas)]
    shifts = ("local-shift-1", "local-shift-2", "local", "local-shift-4", "local-shift-6", "local-shift-8")
    mosts = ("local-most-0.3", "local-most-0.45", "local-most-0.6", "local-most-0.9", "local-most-1")
    assert ids("figure6") == each("resnet50-imagenet", "sgd", *shifts, "local-shift-11", *mosts)


def test_tables_share_their_cells():
    """Table 5's 'with' is table 1's and 2's local, which is also that of tables 4 and 6 and of figures 3 to 6."""
    local = {
        cell for name in ("table1", "table2") for cell in make_plan(name, load_recipe).cells if cell.name == "local"
    }
    assert {cell for cell in make_plan("table5", load_recipe).cells if not cell.variant} == local
    for name in ("table4", "table6", "table7", "figure3", "figure4", "figure5", "figure6"):
        shared = {cell for cell in make_plan(name, load_recipe).cells if cell.name == "local"}
        assert shared
        assert shared <= local


def test_published_figures_are_beside_each_line():
    for name in plan_names():
        lines = make_plan(name, load_recipe).lines
        if name in ("table1", "table2"):
            without = [line for line in lines if not line.paper.speedup]
            assert {line.cell.name for line in without} <= {"prune", "refresh", "local-step-0.0003"}
            assert len(lines) - len(without) == sum(map(len, paper()[name].values()))
    by_id = {line.cell.id: line.paper for line in make_plan("table1", load_recipe).lines}
    assert (by_id["resnet50-imagenet/prune"].top1_error, by_id["resnet50-imagenet/prune"].speedup) == (24.89, 1.32)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", plan_names())
def test_every_cell_has_a_recipe_and_a_folder_of_its_own_at_every_scale(name, scale, tmp_path):
    results = Results(tmp_path, SCALES[scale])
    cells = make_plan(name, results.base).cells
    assert len({results.folder(cell, seed) for cell in cells for seed in (0, 1)}) == 2 * len(cells)
    for cell in cells:
        recipe = results.recipe(cell)
        published = load_recipe(cell.recipe)
        assert recipe.epochs <= published.epochs
        assert (recipe.label == published.label) == (not differences(published, recipe))


def test_the_full_scale_changes_nothing(tmp_path):
    results = Results(tmp_path, SCALES["full"])
    for name in IMAGENET:
        assert results.recipe(Cell(name, "local")) == load_recipe(name)


def test_a_smaller_scale_keeps_the_shape_of_the_schedules(tmp_path):
    results = Results(tmp_path, SCALES["small"])
    recipe, whole = results.base("resnet34-imagenet"), load_recipe("resnet34-imagenet")
    assert (recipe.epochs, recipe.local.decay_every, recipe.prune.every) == (18, 6, 1)
    rate, full = lr_at(recipe), lr_at(whole)
    assert [rate(epoch) for epoch in range(18)] == [full(5 * epoch) for epoch in range(18)]


def test_folders_are_stable(tmp_path):
    """Results of an earlier day are found again only while these names stay."""
    tiny = Results(tmp_path, SCALES["tiny"])
    cell = Cell("resnet18-cifar10", "local", "alpha-0.8", ("local.schedule.alpha=0.8",))
    assert tiny.folder(cell, 2) == tmp_path / "resnet18-cifar10-tiny-synthetic" / "local-alpha-0.8-seed2"
    full = Results(tmp_path, SCALES["full"], settings=["optimizer.lr=0.1"])
    assert full.folder(cell, 0) == tmp_path / "resnet18-cifar10-full" / "local-alpha-0.8-set-d08f6488-seed0"
    swapped = [
        Results(tmp_path, SCALES["full"], settings=s) for s in (["epochs=2", "seed = 1"], ["seed=1", "epochs=2"])
    ]
    assert swapped[0].folder(cell, 0) == swapped[1].folder(cell, 0)


def test_settings_of_a_method_leave_the_others_alone(tmp_path):
    plain, changed = Results(tmp_path, SCALES["tiny"]), Results(tmp_path, SCALES["tiny"], settings=["local.lr=0.001"])
    for method, is_same in [("sgd", True), ("stochastic-depth", True), ("local", False), ("freeze", False)]:
        cell = Cell("resnet18-cifar10", method)
        assert (plain.folder(cell, 0) == changed.folder(cell, 0)) is is_same
        assert (plain.recipe(cell) == changed.recipe(cell)) is is_same


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        (None, 15),
        ("resnet50-imagenet", 5),
        ("local", 3),
        ("resnet50-imagenet/prune", 1),
        ("*/freeze,resnet34*", 7),
        ("sgd, local", 6),
    ],
)
def test_cells_are_chosen_by_pattern(pattern, count):
    cells = [cell for cell in make_plan("table1", load_recipe).cells if cell.method != "refresh"]
    assert len(choose(cells, pattern)) == count


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("resnet5-imagenet", "did you mean 'resnet50-imagenet'"), ("", "choose from mobilenet"), ("zzz", "--dry-run")],
)
def test_a_pattern_that_fits_nothing_is_refused(pattern, hint):
    with pytest.raises(LowcalError, match=hint):
        choose(make_plan("table1", load_recipe).cells, pattern)


def test_an_unknown_table_is_refused():
    with pytest.raises(LowcalError, match=r"unknown table 'tabel1'; did you mean 'table1'\?"):
        make_plan("tabel1", load_recipe)


def test_torch_random_state_is_left_alone(tmp_path):
    before = torch.get_rng_state()
    make_plan("table6", Results(tmp_path, SCALES["tiny"]).base)
    assert torch.equal(before, torch.get_rng_state())
    assert list(tmp_path.iterdir()) == []
