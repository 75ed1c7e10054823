"""Tables 6 and 7 from run folders that are made up, so that what they must say can be worked out by hand."""

import json

import pytest

from lowcal.experiments.recipe_files import dump_recipe
from lowcal.experiments.reproduce import make_table, write
from lowcal.experiments.reproduction.plans import make_plan
from lowcal.experiments.reproduction.results import Results
from lowcal.experiments.reproduction.rivals import equal_accuracy_rows, equal_time_rows
from lowcal.experiments.reproduction.rows import boundary_rows, memory_rows, result_rows
from lowcal.experiments.reproduction.scales import SCALES
from lowcal.training.record import RunFolder

MACHINE = {"device": "cpu", "device_name": "a processor", "threads": 1, "torch": "2.15"}


def make_run(results, cell, errors, seconds, *, seed=0, boundaries=None, memory=None, batches=None, machine=MACHINE):
    """A finished run whose epochs have these errors and each take `seconds` (one number)."""
    recipe = results.recipe(cell).model_copy(update={"seed": seed})
    identity = {
        "method": cell.method,
        "recipe": recipe.name,
        "seed": seed,
        "epochs": len(errors),
        "model": recipe.model.name,
        "dataset": recipe.data.name,
        "label": recipe.label,
    }
    run = RunFolder.create(
        results.folder(cell, seed), recipe=dump_recipe(recipe), environment=machine, identity=identity
    )
    costs = {"layers": 20, "flops": 100, "step_ms": 1.0, "train_loss": 1.0, "test_loss": 1.0, "seconds": seconds}
    for epoch, error in enumerate(errors):
        boundary = boundaries[epoch] if boundaries else 0
        own = {"epoch": epoch, "top1_error": error, "total_seconds": (epoch + 1) * seconds, "boundary": boundary}
        peak, batch = memory[epoch] if memory else 1000, batches[epoch] if batches else recipe.batch.size
        run.append(costs | own | {"peak_memory_bytes": peak, "batch": batch})
    last = {"seconds": len(errors) * seconds, "boundary": boundaries[-1] if boundaries else 0}
    run.write_summary(identity | costs | last | {"top1_error": errors[-1], "peak_memory_bytes": 1000})


@pytest.fixture
def results(tmp_path):
    found = Results(tmp_path / "out", SCALES["tiny"])
    found.begin()
    return found


def cells_of(name, results, recipe=None):
    return {cell.name: cell for cell in make_plan(name, results.base).cells if recipe in (None, cell.recipe)}


def test_table1_shows_error_deviation_and_speedup(results):
    cells = cells_of("table1", results, "resnet34-imagenet")
    for seed, error in enumerate((30.0, 32.0)):
        make_run(results, cells["sgd"], [50.0, error], 12.0, seed=seed)
        make_run(results, cells["local"], [50.0, error + 1], 8.0 + 4 * seed, seed=seed, boundaries=[0, 6])
    rows = {row["cell"]: row for row in result_rows(make_plan("table1", results.base), results, 2)}
    local = rows["resnet34-imagenet/local"]
    assert (local["paper_top1_error"], local["paper_speedup"]) == (27.04, 1.26)
    assert (local["top1_error"], local["top1_error_std"]) == pytest.approx((32.0, 2**0.5))
    assert (local["speedup"], local["speedup_std"]) == pytest.approx((1.25, 0.5 / 2**0.5))
    assert (local["loss"], local["boundary"], local["seeds"]) == (1.0, 6, 2)
    assert rows["resnet34-imagenet/sgd"]["speedup"] == 1
    assert rows["resnet50-imagenet/prune"]["state"] == "not run"


def test_runs_of_other_machines_and_other_turns_are_told_apart(results):
    cells = cells_of("table1", results, "resnet34-imagenet")
    make_run(results, cells["sgd"], [50.0], 12.0)
    make_run(results, cells["local"], [50.0], 6.0)
    make_run(results, cells["freeze"], [50.0], 4.0, machine=MACHINE | {"device_name": "another"})
    plan = make_plan("table1", results.base)
    rows = {row["strategy"]: row for row in result_rows(plan, results, 1) if row["network"] == "resnet34-imagenet"}
    assert (rows["local"]["speedup"], rows["freeze"]["speedup"]) == (2.0, None)
    notes = "\n".join(make_table(plan, results, 1).notes)
    assert "Not trained in turn with sgd" in notes
    assert "resnet34-imagenet, local" in notes
    assert "times of different machines are not compared" in notes
    results.note_turns("resnet34-imagenet", ["sgd-seed0", "local-seed0"])
    assert "Not trained in turn" not in "\n".join(make_table(plan, results, 1).notes)


def test_equal_accuracy_by_hand(results):
    """SGD reaches local's lowest error, 30, after 3 epochs of 10 s; local after 4 of 6 s: 30 / 24."""
    cells = cells_of("table6", results, "resnet50-imagenet")
    make_run(results, cells["sgd"], [60.0, 40.0, 29.0, 25.0], 10.0)
    make_run(results, cells["local"], [70.0, 50.0, 31.0, 30.0], 6.0, boundaries=[0, 0, 3, 3])
    make_run(results, cells["freeze"], [70.0, 60.0, 50.0, 40.0], 5.0)
    shorter = [cell for name, cell in cells.items() if name.startswith("sgd-compressed")]
    make_run(results, shorter[0], [50.0, 35.0], 10.0)
    rows = {row["strategy"]: row for row in equal_accuracy_rows(make_plan("table6", results.base), results, 1)[:5]}
    assert (rows["sgd, stopped early"]["epochs"], rows["local"]["epochs"]) == (3, 4)
    assert (rows["local"]["paper_epochs"], rows["local"]["paper_speedup"]) == (83, 1.26)
    assert rows["local"]["speedup"] == pytest.approx(30 / 24)
    # From 35 after 20 s to 25 after 40 s: 30 in the middle.
    assert rows["sgd, compressed"]["epochs"] == pytest.approx(3)
    assert rows["sgd, compressed"]["speedup"] == pytest.approx(1.0)
    assert (rows["freeze"]["state"], rows["refresh (ours)"]["state"]) == ("never as good", "not run")
    assert [rows[name]["state"] for name in ("sgd, compressed", "local")] == ["not in turn"] * 2
    assert rows["sgd, stopped early"]["state"] == ""
    results.note_turns("resnet50-imagenet", ["sgd-seed0", "local-seed0"])
    rows = {row["strategy"]: row for row in equal_accuracy_rows(make_plan("table6", results.base), results, 1)[:5]}
    assert [rows[name]["state"] for name in ("sgd, compressed", "local")] == ["not in turn", ""]


def test_equal_time_by_hand(results):
    cells = cells_of("table7", results)
    make_run(results, cells["sgd"], [40.0, 30.0, 21.0, 20.0], 10.0)
    make_run(results, cells["local"], [40.0, 30.0, 20.5, 20.2], 8.0)  # 32 s, 0.2 above
    make_run(results, cells["local-most-0.9"], [40.0, 30.0, 21.0, 20.8], 6.0)  # 24 s, 0.8 above
    make_run(results, cells["freeze"], [40.0, 30.0, 21.0, 20.1], 7.0)  # 28 s
    make_run(results, cells["freeze-most-0.9"], [40.0, 30.0, 21.0, 21.5], 5.0)  # 20 s
    make_run(results, cells["local-step-0.0003"], [40.0, 30.0, 21.0, 20.0], 6.0)  # 24 s: ours, not one of local's
    shorter = [cell for name, cell in cells.items() if name.startswith("sgd-compressed")]
    make_run(results, shorter[0], [30.0, 22.0], 10.0)  # 20 s
    results.note_turns("resnet18-cifar10", ["sgd-seed0", "local-seed0"])
    rows = {row["max_loss"]: row for row in equal_time_rows(make_plan("table7", results.base), results, 1)}
    assert (rows[0.05]["setting"], rows[0.05]["state"]) == ("local", "none within")
    assert (rows[0.25]["setting"], rows[0.25]["state"], rows[0.25]["speedup"]) == ("local", "", 1.25)
    fast = rows[1.0]
    assert (fast["setting"], fast["paper_local_loss"], fast["refresh_loss"]) == ("local-most-0.9", 0.85, None)
    losses = (fast["local_loss"], fast["freeze_loss"], fast["stopped_loss"], fast["compressed_loss"])
    assert losses == pytest.approx((0.8, 1.5, 10.0, 1.6))  # compressed: 22 at 20 s, 20 at 40 s, 21.6 at 24 s
    assert rows[0.25]["freeze_loss"] == pytest.approx(0.1)
    assert (rows[0.05]["short_step_loss"], fast["short_step_loss"]) == (0.0, 0.0)
    assert fast["state"] == "not in turn"
    notes = "\n".join(make_table(make_plan("table7", results.base), results, 1).notes)
    assert "Not trained in turn with sgd" in notes
    assert "resnet18-cifar10, local-most-0.9" in notes
    assert "resnet18-cifar10, local;" not in notes


def test_the_boundarys_path_and_the_memory(results):
    cell = cells_of("figure3", results, "resnet50-imagenet")["local"]
    make_run(results, cell, [9.0] * 4, 1.0, boundaries=[0, 0, 3, 6], memory=[100, 100, 60, 50])
    rows = boundary_rows(make_plan("figure3", results.base), results, 1)
    row = next(row for row in rows if row["network"] == "resnet50-imagenet")
    assert [row[f"boundary_{part}"] for part in (25, 50, 75, 100)] == [0, 0, 3, 6]
    assert row["first_move"] == 3
    memory = memory_rows(make_plan("figure4", results.base), results, 1, paper_half_epoch=33)
    local = next(row for row in memory if row["strategy"] == "local")
    assert (local["first_bytes"], local["last_bytes"], local["half_epoch"]) == (100, 50, 4)
    assert (local["paper_half_epoch"], memory[-1]["state"]) == (33, "not run")
    prose = cells_of("figure4", results)["local-prose"]
    assert results.recipe(prose).local.schedule.spacing == "prose"
    make_run(results, prose, [9.0] * 4, 1.0, boundaries=[0, 3, 6, 9], memory=[100, 60, 50, 40])
    memory = {
        row["strategy"]: row for row in memory_rows(make_plan("figure4", results.base), results, 1, paper_half_epoch=33)
    }
    read = memory["local, prose"]
    assert (read["half_epoch"], read["paper_half_epoch"]) == (3, 33)
    assert memory["local"]["half_epoch"] == 4


def test_the_batch_from_epoch_to_epoch(results):
    cells = cells_of("figure4", results)
    make_run(results, cells["local"], [9.0] * 3, 1.0, boundaries=[0, 3, 6])
    make_run(results, cells["local-growing"], [9.0] * 3, 1.0, boundaries=[0, 3, 6], batches=[16, 16, 32])
    plan = make_plan("figure4", results.base)
    rows = {row["strategy"]: row for row in memory_rows(plan, results, 1, paper_half_epoch=33)}
    found = {name: (row["first_batch"], row["last_batch"], row["growth_epoch"]) for name, row in rows.items()}
    assert found == {
        "sgd": (None, None, None),
        "local": (16, 16, None),
        "local, prose": (None, None, None),
        "local, growing batch": (16, 32, 3),
    }
    text = make_table(plan, results, 1).text()
    assert "grown from epoch" in text
    assert "batch" not in make_table(make_plan("figure3", results.base), results, 1).markdown().splitlines()[2]


def test_files_say_the_scale_and_what_is_not_there(results):
    make_run(results, cells_of("table7", results)["sgd"], [40.0, 30.0], 10.0)
    found = write(make_plan("table7", results.base), results, 1)
    names = [file.name for file in found.files]
    assert names[:3] == ["table7-tiny.md", "table7-tiny.csv", "table7-tiny.json"]
    assert "table7-tiny-frontier-resnet18-cifar10.svg" in names
    assert all(file.stat().st_size for file in found.files)
    value = json.loads(found.files[2].read_text())
    assert "scale tiny, synthetic images: not the paper's experiment" in value["title"]
    assert value["title"] in found.files[0].read_text()
    assert any("Not finished: resnet18-cifar10/sgd-compressed" in note for note in value["notes"])
    assert "scale tiny" in found.files[3].read_text()
