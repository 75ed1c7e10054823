"""Real faults: processes that are killed, stopped or starved, and then go on."""

import signal

import pytest

from . import storage
from .points import FILES, LONG, Point, kill
from .ranks import KILLED, TERMINATED, RankTrials
from .runs import EPOCHS, WORKERS, Trials, errors_of, image_files, options, same

QUICK = (Point("step", 7), Point("half", 12))
FILES_QUICK = (Point("step", 7),)


def points(all_points, *quick):
    """The points as parameters, those not in `quick` marked slow."""
    marked = [pytest.param(point, id=str(point), marks=pytest.mark.slow) for point in all_points if point not in quick]
    return [*(pytest.param(point, id=str(point)) for point in quick), *marked]


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    return Trials(tmp_path_factory.mktemp("faults"), *options())


def test_outcomes_tell_runs_apart(trials):
    changed = {**trials.whole, "log": [{**record, "train_loss": 0.0} for record in trials.whole["log"]]}
    assert not same(trials.whole, changed)
    assert len(trials.whole["log"]) == EPOCHS
    assert [record["boundary"] for record in trials.whole["log"]] == [0, 3, 3, 6]


@pytest.mark.parametrize("point", points(LONG, *QUICK))
def test_a_killed_run_goes_on_bit_for_bit(trials, point):
    assert trials.kill(point)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return image_files(tmp_path_factory.mktemp("images") / "folder")


@pytest.fixture(scope="module")
def file_trials(tmp_path_factory, images):
    """Of runs whose images are decoded in two processes while they train."""
    return Trials(tmp_path_factory.mktemp("files"), *options(WORKERS.format(2)), *images)


@pytest.mark.parametrize("point", points(FILES, *FILES_QUICK))
def test_a_killed_run_that_loads_files_goes_on_bit_for_bit(file_trials, point):
    assert file_trials.kill(point)


def test_a_folder_half_made_is_named_when_it_is_to_be_resumed(trials):
    run = trials.broken(Point("creation", 3), kill, -signal.SIGKILL)
    assert trials.start(run, "--resume") == 2
    assert "start the run again, without --resume" in errors_of(run).read_text()
    assert trials.goes_on(run)


@pytest.mark.parametrize("point", points((Point("evaluation", 5), Point("move", 3)), Point("step", 6)))
def test_sigterm_ends_a_run_within_30_seconds_saved(trials, point):
    recovered, seconds = trials.terminate(point)
    assert recovered
    assert seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize("point", [Point("step", 6), Point("evaluation", 5)], ids=str)
def test_a_step_that_hangs_in_native_code_is_ended_and_loses_nothing(tmp_path, point):
    trials = Trials(tmp_path, *options("checkpoint.grace=1"))
    assert trials.hang(point, with_the_gil=False)
    assert trials.hang(point, with_the_gil=True)


@pytest.mark.parametrize("point", points(storage.LIMITED, Point("log", 4)))
def test_a_file_that_cannot_grow_is_said_and_costs_nothing(trials, point):
    assert storage.limited(trials, point)


@pytest.mark.slow
@pytest.mark.parametrize("point", storage.FILLED, ids=str)
def test_a_full_disk_is_said_and_costs_nothing(trials, tmp_path, point):
    try:
        with storage.small_disk(tmp_path / "disk") as disk:
            assert storage.full(trials, point, disk)
    except storage.CannotTryError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("point", storage.ELSEWHERE, ids=str)
def test_temporary_files_on_another_file_system_cost_nothing(trials, point):
    try:
        assert storage.elsewhere(trials, point)
    except storage.CannotTryError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_damaged_hostile_and_strange_checkpoints_are_passed_over_or_refused(trials):
    for row in storage.damage(trials, truncations=50, flips=200):
        assert row.recovered == row.tried, row


# Two processes that torchrun looks after


@pytest.fixture(scope="module")
def rank_trials(tmp_path_factory):
    return RankTrials(tmp_path_factory.mktemp("ranks"), *options())


@pytest.mark.parametrize("trial", points(KILLED, (Point("step", 7), 1)))
def test_torchrun_goes_on_with_a_run_that_lost_a_process(rank_trials, trial):
    assert rank_trials.kill(*trial)


@pytest.mark.slow
@pytest.mark.parametrize("trial", TERMINATED, ids=str)
def test_sigterm_to_one_process_ends_both_saved(rank_trials, trial):
    recovered, seconds = rank_trials.terminate(*trial)
    assert recovered
    assert seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_without_restarts_the_other_process_says_how_to_go_on(rank_trials, rank):
    assert rank_trials.lose(Point("step", 7), rank)
