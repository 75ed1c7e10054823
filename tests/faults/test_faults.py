"""Real faults: processes that are killed, stopped or starved, and then go on; benchmarks/faults.py plants them."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"
spec = importlib.util.spec_from_file_location("lowcal_faults", SCRIPT)
faults = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = faults  # dataclasses look their module up
spec.loader.exec_module(faults)

LATER = [point for point in faults.LONG if point not in faults.SHORT]


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    return faults.Trials(tmp_path_factory.mktemp("faults"), *faults.options())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return faults.image_files(tmp_path_factory.mktemp("images") / "folder")


def test_outcomes_tell_runs_apart(trials):
    changed = {**trials.whole, "log": [{**record, "train_loss": 0.0} for record in trials.whole["log"]]}
    assert not faults.same(trials.whole, changed)
    assert len(trials.whole["log"]) == faults.EPOCHS
    assert [record["boundary"] for record in trials.whole["log"]] == [0, 3, 3, 6]


@pytest.mark.parametrize("point", faults.SHORT, ids=str)
def test_a_killed_run_goes_on_bit_for_bit(trials, point):
    assert trials.kill(point)


@pytest.mark.slow
@pytest.mark.parametrize("point", LATER, ids=str)
def test_a_run_killed_at_any_point_goes_on_bit_for_bit(trials, point):
    assert trials.kill(point)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_that_loads_files_goes_on_bit_for_bit(tmp_path, images, workers):
    trials = faults.Trials(tmp_path, *faults.options(faults.WORKERS.format(workers)), *images)
    for point in faults.FILES:
        assert trials.kill(point), point


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(faults.Point("step", 6), id="training"),
        pytest.param(faults.Point("evaluation", 5), id="evaluation", marks=pytest.mark.slow),
        pytest.param(faults.Point("move", 3), id="move", marks=pytest.mark.slow),
    ],
)
def test_sigterm_ends_a_run_within_30_seconds_saved(trials, point):
    recovered, seconds = trials.terminate(point)
    assert recovered
    assert seconds < 30


@pytest.mark.slow
def test_a_full_disk_is_said_and_costs_nothing(trials):
    assert trials.fill_disk(faults.Point("half", 9))


@pytest.mark.slow
def test_damaged_hostile_and_strange_checkpoints_are_passed_over_or_refused(trials):
    for row in faults.damage(trials, truncations=50, flips=200):
        assert row.recovered == row.tried, row
