"""One set of checks over every schedule."""

import dataclasses
import itertools

import pytest

from lowcal import Budget, Fixed, NormTrend, Quadratic
from lowcal.schedule import Progress, Schedule

from . import properties

SCHEDULES = [
    NormTrend(),
    NormTrend(alpha=1.5, shift=1, max_fraction=0.5, interval=1),
    NormTrend(alpha=1.5, shift=1, interval=2, spacing="prose", average="run", align="block"),
    NormTrend(alpha=1.5, shift=1, interval=1, measure="step"),
    Quadratic(3, 0.1),
    Quadratic(c1=2.5, c2=0.0, max_fraction=1.0),
    Fixed({2: 1, 4: 3}),
    Fixed({}),
    Budget(memory=0.9),
]
NORMS = [(1.0,), (1.0, 0.5), (0.5, 1.0), (1.0, 0.9, 0.8, 0.0), (0.0,) * 9]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_is_a_frozen_value(schedule):
    properties.is_a_frozen_dataclass(schedule)
    properties.is_a_value(schedule)


def test_different_settings_are_different_schedules():
    assert len(set(SCHEDULES)) == len(SCHEDULES)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_is_pure_and_stays_between_the_present_boundary_and_the_last_layer(schedule):
    for epoch, boundary, changes in itertools.product((1, 4, 9), (0, 2, 4), NORMS):
        progress = Progress(epoch=epoch, epochs=10, layers=5, block=1, boundary=boundary, changes=changes,
                            ends=(1, 3, 5), earlier=((0, 0.5),) * (epoch - len(changes)))  # fmt: skip
        following = properties.is_pure(schedule, progress)
        assert type(following) is int
        assert boundary <= following <= 4


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_check_passes_a_network_that_fits(schedule):
    assert schedule.check(layers=5, epochs=10) is None


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_works_in_training(schedule):
    boundaries, _, state = properties.trains_alike_twice(schedule=schedule)
    assert boundaries == sorted(boundaries)
    assert state["boundary"] == boundaries[-1]


def test_fixed_does_not_share_the_dict_it_was_given():
    given = {2: 1, 4: 3}
    schedule = Fixed(given)
    given[3] = 2
    assert schedule == Fixed({2: 1, 4: 3})


def test_the_order_in_a_fixed_schedule_does_not_matter():
    assert Fixed({4: 3, 2: 1}) == Fixed({2: 1, 4: 3})
    assert repr(Fixed({4: 3, 2: 1})) == repr(Fixed({2: 1, 4: 3}))


def test_a_schedule_of_ones_own():
    @dataclasses.dataclass(frozen=True)
    class EachEpoch(Schedule):
        def __call__(self, progress):
            return min(progress.boundary + 1, progress.layers - 1)

    assert properties.trains(schedule=EachEpoch())[0] == [1, 2, 3, 3, 3, 3]
