"""Tables from run folders that are made up, so that what they must say can be computed by hand."""

import json
from dataclasses import replace

import pytest

from lowcal.experiments.recipe_text import dump_recipe
from lowcal.experiments.reproduce.results import Results
from lowcal.experiments.reproduce.rivals import Point, line_at, line_within, stopped_at
from lowcal.experiments.reproduce.rows import Measured
from lowcal.experiments.reproduce.write import KINDS, fill, write
from lowcal.training.run_folder import RunFolder

RESNET34, RESNET50, RESNET18 = "resnet34-imagenet", "resnet50-imagenet", "resnet18-cifar10"
MACHINE = {"device": "cpu", "device_name": "a processor", "threads": 1, "torch": "2.15"}
FALLING = [Point(10, 1, 50.0), Point(20, 2, 30.0), Point(30, 3, 20.0), Point(40, 4, 20.0)]


@pytest.fixture
def results(tmp_path):
    found = Results(tmp_path / "out", "tiny")
    found.begin()
    return found


def make_run(results, cell, errors, seconds, *, seed=0, boundaries=None, memory=None, batches=None, machine=MACHINE):
    """A finished run whose epochs have these errors and each take `seconds` (one number); `cell` is (recipe, name)."""
    cell = results.cell(*cell)
    recipe = replace(results.recipe(cell), seed=seed)
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


def rows_of(name, results, key="strategy", *, seeds=1, recipe=None):
    table = results.table(name)
    rows = KINDS[table.kind][1](table, Measured(results, table.cells, seeds))
    return {row[key]: row for row in rows if recipe in (None, row["network"])}


def notes_of(name, results):
    table = results.table(name)
    return "\n".join(fill(table, results, Measured(results, table.cells, 1)).notes)


def test_error_deviation_and_speedup(results):
    for seed, error in enumerate((30.0, 32.0)):
        make_run(results, (RESNET34, "sgd"), [50.0, error], 12.0, seed=seed)
        make_run(results, (RESNET34, "local"), [50.0, error + 1], 8.0 + 4 * seed, seed=seed, boundaries=[0, 6])
    rows = rows_of("table1", results, "cell", seeds=2)
    local = rows["resnet34-imagenet/local"]
    assert (local["paper_top1_error"], local["paper_speedup"]) == (27.04, 1.26)
    assert (local["top1_error"], local["top1_error_std"]) == pytest.approx((32.0, 2**0.5))
    assert (local["speedup"], local["speedup_std"]) == pytest.approx((1.25, 0.5 / 2**0.5))
    assert (local["loss"], local["boundary"], local["seeds"]) == (1.0, 6, 2)
    assert rows["resnet34-imagenet/sgd"]["speedup"] == 1
    assert rows["resnet50-imagenet/prune"]["state"] == "not run"


def test_runs_of_other_machines_and_other_turns_are_told_apart(results):
    make_run(results, (RESNET34, "sgd"), [50.0], 12.0)
    make_run(results, (RESNET34, "local"), [50.0], 6.0)
    make_run(results, (RESNET34, "freeze"), [50.0], 4.0, machine=MACHINE | {"device_name": "another"})
    rows = rows_of("table1", results, recipe=RESNET34)
    assert (rows["local"]["speedup"], rows["freeze"]["speedup"]) == (2.0, None)
    assert (rows["local"]["state"], rows["freeze"]["state"]) == ("not in turn", "")
    notes = notes_of("table1", results)
    assert "drift of the machine may show: resnet34-imagenet, local." in notes
    assert "times of different machines are not compared" in notes
    results.note_turns(RESNET34, ["sgd-seed0", "local-seed0"])
    assert "Not trained in turn" not in notes_of("table1", results)


def test_equal_accuracy_by_hand(results):
    """SGD reaches local's lowest error, 30, after 3 epochs of 10 s; local after 4 of 6 s: 30 / 24."""
    make_run(results, (RESNET50, "sgd"), [60.0, 40.0, 29.0, 25.0], 10.0)
    make_run(results, (RESNET50, "local"), [70.0, 50.0, 31.0, 30.0], 6.0, boundaries=[0, 0, 3, 3])
    make_run(results, (RESNET50, "freeze"), [70.0, 60.0, 50.0, 40.0], 5.0)
    make_run(results, (RESNET50, "sgd-compressed-2"), [50.0, 35.0], 10.0)
    rows = rows_of("table6", results, recipe=RESNET50)
    assert (rows["sgd, stopped early"]["epochs"], rows["local"]["epochs"]) == (3, 4)
    assert (rows["local"]["paper_epochs"], rows["local"]["paper_speedup"]) == (83, 1.26)
    assert rows["local"]["speedup"] == pytest.approx(30 / 24)
    # From 35 after 20 s to 25 after 40 s: 30 in the middle.
    assert rows["sgd, compressed"]["epochs"] == pytest.approx(3)
    assert rows["sgd, compressed"]["speedup"] == pytest.approx(1.0)
    assert (rows["freeze"]["state"], rows["refresh (ours)"]["state"]) == ("never as good", "not run")
    assert [rows[name]["state"] for name in ("sgd, compressed", "local")] == ["not in turn"] * 2
    assert rows["sgd, stopped early"]["state"] == ""
    results.note_turns(RESNET50, ["sgd-seed0", "local-seed0"])
    rows = rows_of("table6", results, recipe=RESNET50)
    assert [rows[name]["state"] for name in ("sgd, compressed", "local")] == ["not in turn", ""]


def test_equal_time_by_hand(results):
    for name, errors, seconds in (
        ("sgd", [40.0, 30.0, 21.0, 20.0], 10.0),
        ("local", [40.0, 30.0, 20.5, 20.2], 8.0),  # 32 s, 0.2 above
        ("local-most-0.9", [40.0, 30.0, 21.0, 20.8], 6.0),  # 24 s, 0.8 above
        ("freeze", [40.0, 30.0, 21.0, 20.1], 7.0),  # 28 s
        ("freeze-most-0.9", [40.0, 30.0, 21.0, 21.5], 5.0),  # 20 s
        ("local-step-0.0003", [40.0, 30.0, 21.0, 20.0], 6.0),  # 24 s: ours, not one of local's
        ("sgd-compressed-2", [30.0, 22.0], 10.0),  # 20 s
    ):
        make_run(results, (RESNET18, name), errors, seconds)
    results.note_turns(RESNET18, ["sgd-seed0", "local-seed0"])
    rows = rows_of("table7", results, "max_loss")
    assert (rows[0.05]["setting"], rows[0.05]["state"]) == ("local", "none within")
    assert (rows[0.25]["setting"], rows[0.25]["state"], rows[0.25]["speedup"]) == ("local", "", 1.25)
    fast = rows[1.0]
    assert (fast["setting"], fast["paper_local_loss"], fast["refresh_loss"]) == ("local-most-0.9", 0.85, None)
    losses = (fast["local_loss"], fast["freeze_loss"], fast["stopped_loss"], fast["compressed_loss"])
    assert losses == pytest.approx((0.8, 1.5, 10.0, 1.6))  # compressed: 22 at 20 s, 20 at 40 s, 21.6 at 24 s
    assert rows[0.25]["freeze_loss"] == pytest.approx(0.1)
    assert (rows[0.05]["short_step_loss"], fast["short_step_loss"]) == (0.0, 0.0)
    assert fast["state"] == "not in turn"
    notes = notes_of("table7", results)
    assert "resnet18-cifar10, local-most-0.9" in notes
    assert "resnet18-cifar10, local;" not in notes


def test_lines_between_the_ends_of_runs():
    assert stopped_at(FALLING, 9.9) is None
    assert stopped_at(FALLING, 29.9) == FALLING[1]
    assert stopped_at(FALLING, 1000) == FALLING[3]
    assert (line_at(FALLING, 5), line_at([], 1)) == (None, None)
    assert line_at(FALLING, 10) == FALLING[0]
    assert line_at(FALLING, 15) == Point(15, 1.5, 40.0)
    assert line_at(FALLING, 99) == FALLING[3]
    assert line_within(FALLING, 60) == FALLING[0]
    assert line_within(FALLING, 25) == Point(25, 2.5, 25.0)
    assert line_within(FALLING, 30) == FALLING[1]
    assert line_within(FALLING, 10) is None
    # A line that rises first is crossed where it is first low enough.
    assert line_within([Point(10, 1, 50.0), Point(20, 2, 60.0), Point(30, 3, 20.0)], 40) == Point(25, 2.5, 40.0)


def test_the_path_of_the_boundary_and_of_memory(results):
    make_run(results, (RESNET50, "local"), [9.0] * 4, 1.0, boundaries=[0, 0, 3, 6], memory=[100, 100, 60, 50])
    row = rows_of("figure3", results, "network")[RESNET50]
    assert [row[f"boundary_{part}"] for part in (25, 50, 75, 100)] == [0, 0, 3, 6]
    assert (row["first_move"], row["layers"]) == (3, 20)
    make_run(results, (RESNET50, "local-prose"), [9.0] * 4, 1.0, boundaries=[0, 3, 6, 9], memory=[100, 60, 50, 40])
    rows = rows_of("figure4", results)
    assert [rows["local"][key] for key in ("first_bytes", "last_bytes", "half_epoch")] == [100, 50, 4]
    assert (rows["local, prose"]["half_epoch"], rows["local, prose"]["paper_half_epoch"]) == (3, 33)
    assert (rows["sgd"]["paper_half_epoch"], rows["sgd"]["state"]) == (None, "not run")


def test_the_batch_from_epoch_to_epoch(results):
    make_run(results, (RESNET50, "local"), [9.0] * 3, 1.0)
    make_run(results, (RESNET50, "local-growing"), [9.0] * 3, 1.0, batches=[16, 16, 32])
    keys = ("first_batch", "last_batch", "growth_epoch")
    found = {name: tuple(row[key] for key in keys) for name, row in rows_of("figure4", results).items()}
    assert found["local, growing batch"] == (16, 32, 3)
    assert found["local"] == (16, 16, None)
    assert found["sgd"] == (None, None, None)
    assert not {"first_batch", "growth_epoch"} & rows_of("figure3", results)["local"].keys()


@pytest.mark.usefixtures("drawn")
def test_files_say_the_scale_and_what_is_missing(results):
    make_run(results, (RESNET18, "sgd"), [40.0, 30.0], 10.0)
    _, files = write(results.table("table7"), results, 1)
    assert [file.name for file in files] == [
        *("table7-tiny.md", "table7-tiny.csv", "table7-tiny.json"),
        *(f"table7-tiny-frontier-resnet18-cifar10.{kind}" for kind in ("svg", "png")),
    ]
    assert all(file.stat().st_size for file in files)
    value = json.loads(files[2].read_text())
    assert "scale tiny, synthetic images: not the paper's experiment" in value["title"]
    assert value["title"] in files[0].read_text()
    assert any("Not finished: resnet18-cifar10/sgd-compressed" in note for note in value["notes"])
    assert "scale tiny" in files[3].read_text()
