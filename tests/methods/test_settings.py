from dataclasses import dataclass

import pytest

from lowcal import Fixed, LowcalError, NormTrend, Quadratic
from lowcal.experiments.recipe import ScheduleSettings
from lowcal.methods.settings import build_schedule


@dataclass(frozen=True)
class Loose:
    """Settings that no recipe has checked."""

    name: str
    alpha: float = 0.95
    shift: int | None = None
    interval: int | None = None
    max_fraction: float = 0.75
    c1: float | None = None
    c2: float | None = None
    epochs: dict[int, int] | None = None


def test_each_schedule_takes_its_settings():
    trend = ScheduleSettings(alpha=0.9, shift=2, max_fraction=0.5, interval=4)
    assert build_schedule(trend) == NormTrend(alpha=0.9, shift=2, max_fraction=0.5, interval=4)
    quadratic = ScheduleSettings(name="quadratic", c1=9.0, c2=0.5, max_fraction=0.6)
    assert build_schedule(quadratic) == Quadratic(c1=9.0, c2=0.5, max_fraction=0.6)
    assert build_schedule(ScheduleSettings(name="fixed", epochs={3: 2})) == Fixed({3: 2})
    assert build_schedule(ScheduleSettings()) == NormTrend()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Loose("quadratic", c1=1.0), "needs c1 and c2"),
        (Loose("fixed"), "needs its moves"),
        (Loose("quadratik"), "did you mean 'quadratic'"),
    ],
)
def test_a_schedule_that_cannot_be_built_says_why(settings, message):
    with pytest.raises(LowcalError, match=message):
        build_schedule(settings)
