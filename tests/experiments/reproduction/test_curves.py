import pytest

from lowcal.experiments.reproduction.curves import (
    Point,
    first_within,
    frontier,
    line_at,
    line_within,
    lowest,
    stopped_at,
)

FALLING = [Point(1, 10, 50.0), Point(2, 20, 30.0), Point(3, 30, 20.0), Point(4, 40, 20.0)]


def test_the_first_point_that_is_good_enough():
    assert lowest(FALLING) == FALLING[2]
    assert first_within(FALLING, 30.0) == FALLING[1]
    assert first_within(FALLING, 29.9) == FALLING[2]
    assert first_within(FALLING, 19.9) is None


def test_a_run_broken_off():
    assert stopped_at(FALLING, 9.9) is None
    assert stopped_at(FALLING, 29.9) == FALLING[1]
    assert stopped_at(FALLING, 1000) == FALLING[3]


def test_the_line_between_ends_of_runs():
    line = frontier(reversed(FALLING[:3]))
    assert line == FALLING[:3]
    assert line_at(line, 5) is None
    assert line_at(line, 10) == FALLING[0]
    assert line_at(line, 15) == Point(1.5, 15, 40.0)
    assert line_at(line, 99) == FALLING[2]
    assert line_at([], 1) is None
    assert line_within(line, 60) == FALLING[0]
    assert line_within(line, 25) == Point(2.5, 25, 25.0)
    assert line_within(line, 30) == FALLING[1]
    assert line_within(line, 10) is None


def test_a_line_that_rises_on_the_way_is_crossed_where_it_first_is_low_enough():
    line = [Point(1, 10, 50.0), Point(2, 20, 60.0), Point(3, 30, 20.0)]
    found = line_within(line, 40)
    assert found is not None
    assert found.seconds == pytest.approx(25)
