"""Two processes that torchrun looks after, one killed or told to end; benchmarks/fault_trials plants the faults."""

import pytest

from fault_trials.points import Point
from fault_trials.ranks import KILLED, TERMINATED, RankTrials
from fault_trials.runs import options


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    return RankTrials(tmp_path_factory.mktemp("ranks"), *options())


def ids(trial):
    point, rank = trial
    return f"{point.place}-{point.number}-of-{rank}"


def test_sigterm_to_one_process_ends_both_saved(trials):
    recovered, seconds = trials.terminate(Point("step", 6), rank=1)
    assert recovered
    assert seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize("trial", TERMINATED, ids=ids)
def test_sigterm_to_one_process_at_any_point_ends_both_saved(trials, trial):
    recovered, seconds = trials.terminate(*trial)
    assert recovered
    assert seconds < 30


def test_torchrun_goes_on_with_a_run_that_lost_a_process(trials):
    assert trials.kill(Point("step", 7), rank=1)


@pytest.mark.slow
@pytest.mark.parametrize("trial", KILLED, ids=ids)
def test_torchrun_goes_on_with_a_run_that_lost_a_process_at_any_point(trials, trial):
    assert trials.kill(*trial)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_without_restarts_the_other_process_says_how_to_go_on(trials, rank):
    assert trials.lose(Point("step", 7), rank)
