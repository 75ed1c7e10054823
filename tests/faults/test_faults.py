"""Real faults: processes that are killed, stopped or starved, and then go on; benchmarks/fault_trials plants them."""

import signal

import pytest

from fault_trials import disks
from fault_trials.checkpoints import damage
from fault_trials.points import FILES, FILES_SHORT, LONG, SHORT, Point, kill
from fault_trials.runs import EPOCHS, WORKERS, errors_of, image_files, options, same, train
from fault_trials.trials import Trials


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    return Trials(tmp_path_factory.mktemp("faults"), *options())


@pytest.fixture(scope="module", params=[0, 2])
def file_trials(tmp_path_factory, request):
    """Of runs whose images are decoded in so many processes while they train."""
    images = image_files(tmp_path_factory.mktemp("images") / "folder")
    return Trials(tmp_path_factory.mktemp("files"), *options(WORKERS.format(request.param)), *images)


def test_outcomes_tell_runs_apart(trials):
    changed = {**trials.whole, "log": [{**record, "train_loss": 0.0} for record in trials.whole["log"]]}
    assert not same(trials.whole, changed)
    assert len(trials.whole["log"]) == EPOCHS
    assert [record["boundary"] for record in trials.whole["log"]] == [0, 3, 3, 6]


@pytest.mark.parametrize("point", SHORT, ids=str)
def test_a_killed_run_goes_on_bit_for_bit(trials, point):
    assert trials.kill(point)


@pytest.mark.slow
@pytest.mark.parametrize("point", [point for point in LONG if point not in SHORT], ids=str)
def test_a_run_killed_at_any_point_goes_on_bit_for_bit(trials, point):
    assert trials.kill(point)


@pytest.mark.parametrize("point", FILES_SHORT, ids=str)
def test_a_killed_run_that_loads_files_goes_on_bit_for_bit(file_trials, point):
    assert file_trials.kill(point)


@pytest.mark.slow
@pytest.mark.parametrize("point", [point for point in FILES if point not in FILES_SHORT], ids=str)
def test_a_run_that_loads_files_killed_at_any_point_goes_on_bit_for_bit(file_trials, point):
    assert file_trials.kill(point)


def test_a_folder_half_made_is_named_when_it_is_to_be_resumed(trials):
    run = trials.broken(Point("creation", 3), kill, -signal.SIGKILL)
    assert train(run, "--resume") == 2
    assert "start the run again, without --resume" in errors_of(run).read_text()
    assert trials.goes_on(run)


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(Point("step", 6), id="training"),
        pytest.param(Point("evaluation", 5), id="evaluation", marks=pytest.mark.slow),
        pytest.param(Point("move", 3), id="move", marks=pytest.mark.slow),
    ],
)
def test_sigterm_ends_a_run_within_30_seconds_saved(trials, point):
    recovered, seconds = trials.terminate(point)
    assert recovered
    assert seconds < 30


@pytest.fixture(scope="module")
def impatient_trials(tmp_path_factory):
    """Of runs that have a second to heed a signal."""
    return Trials(tmp_path_factory.mktemp("hung"), *options("checkpoint.grace=1"))


@pytest.mark.parametrize("with_the_gil", [False, True])
@pytest.mark.parametrize(
    "point", [Point("step", 6), pytest.param(Point("evaluation", 5), marks=pytest.mark.slow)], ids=str
)
def test_a_step_that_hangs_in_native_code_is_ended_and_loses_nothing(impatient_trials, point, with_the_gil):
    assert impatient_trials.hang(point, with_the_gil=with_the_gil)


def some(points, *always):
    """All of the points, those but `always` under the slow mark."""
    return [pytest.param(point, id=str(point), marks=() if point in always else pytest.mark.slow) for point in points]


@pytest.mark.parametrize("point", some(disks.LIMITED, Point("log", 4)))
def test_a_file_that_cannot_grow_is_said_and_costs_nothing(trials, point):
    assert disks.limited(trials, point)


@pytest.mark.parametrize("point", some(disks.FILLED, Point("half", 20)))
def test_a_full_disk_is_said_and_costs_nothing(trials, tmp_path, point):
    try:
        with disks.small_disk(tmp_path / "disk") as disk:
            assert disks.full(trials, point, disk)
    except disks.CannotTryError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("point", some(disks.ELSEWHERE, Point("half", 9)))
def test_temporary_files_on_another_file_system_cost_nothing(trials, point):
    try:
        assert disks.elsewhere(trials, point)
    except disks.CannotTryError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_damaged_hostile_and_strange_checkpoints_are_passed_over_or_refused(trials):
    for row in damage(trials, truncations=50, flips=200):
        assert row.recovered == row.tried, row
