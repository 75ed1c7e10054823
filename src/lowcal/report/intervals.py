"""How far a figure can be trusted: intervals of errors that are measured on few images, and spreads over few seeds."""

from collections.abc import Iterable
from math import sqrt

__all__ = ["ABSENT", "difference_interval", "of_two", "spread_notes", "wilson", "with_spread"]

_Z = 1.959964  # of a 95 % interval
ABSENT = "–"


def wilson(error: float, images: int) -> tuple[float, float]:
    """Return the 95 % interval of an error (percent) that was measured on so many images (Wilson 1927)."""
    share, width = error / 100, _Z**2 / images
    middle = (share + width / 2) / (1 + width)
    reach = sqrt(width * share * (1 - share) + width**2 / 4) / (1 + width)
    return 100 * max(0.0, middle - reach), 100 * min(1.0, middle + reach)


def difference_interval(error: float, baseline: float, images: int) -> tuple[float, float]:
    """Return the 95 % interval of `error` - `baseline` in points, both on so many images (Newcombe 1998, method 10).

    It takes the two for independent, so that on the same images it is rather too wide.
    """
    low, high = wilson(error, images)
    base_low, base_high = wilson(baseline, images)
    difference = error - baseline
    return (
        difference - sqrt((error - low) ** 2 + (base_high - baseline) ** 2),
        difference + sqrt((high - error) ** 2 + (baseline - base_low) ** 2),
    )


def with_spread(value: float | None, deviation: float | None, seeds: int | None, digits: int, unit: str = "") -> str:
    """Return a mean over seeds for reading: '9.50', of two '9.50 (9.00 to 10.00)', of more '9.50 ± 0.30'.

    Args:
        deviation: the sample deviation; None for one seed.
        seeds: how many; None counts as many.
    """
    if value is None:
        return ABSENT
    text = f"{value:.{digits}f}"
    if deviation is None:
        return f"{text}{unit}"
    if seeds == 2:
        low, high = of_two(value, deviation)
        return f"{text}{unit} ({low:.{digits}f} to {high:.{digits}f})"
    return f"{text} ± {deviation:.{digits}f}{unit}"


def of_two(mean: float, deviation: float) -> tuple[float, float]:
    """Return the two values that have this mean and sample deviation, which is their distance over the root of 2."""
    return mean - deviation / sqrt(2), mean + deviation / sqrt(2)


def spread_notes(seeds: Iterable[int]) -> list[str]:
    """Return what a reader must know of the spreads in a table whose rows are of so many seeds each."""
    counts = set(seeds)
    notes = ["a to b: the lower and the higher of two seeds."] if 2 in counts else []
    return [*notes, "± is the sample deviation over seeds."] if max(counts, default=0) > 2 else notes
