"""What came out, in words: the sentence at the top of the page, and what it takes to read the table."""

from collections.abc import Sequence
from itertools import pairwise

from lowcal.report.comparison import Row, difference_interval
from lowcal.report.runs import RunData, by_method, differing
from lowcal.report.table import duration

__all__ = ["batch_changes", "comparison_notes", "headline"]

FEW_IMAGES = 1000  # below it, the interval of an error is wide enough to be said


def headline(rows: Sequence[Row]) -> str:
    """Return one sentence on what the finished methods cost and reach, against sgd where it is among them."""
    finished = {row.method: row for row in rows if row.finished}
    baseline = finished.pop("sgd", None)
    others = list(finished.values())
    compared = [row for row in others if row.speedup is not None and not row.never_moved]
    still = [row for row in others if row.speedup is not None and row.never_moved]
    if baseline is not None and (compared or still):
        parts = [_against(row, baseline, full=index == 0) for index, row in enumerate(compared)]
        parts += [_never_moved(still)] if still else []
        parts += [_alone(row) for row in others if row.speedup is None and row.top1_error is not None]
        return f"{'; '.join(parts)}.{_on_seeds(rows) if compared else ''}"
    known = [row for row in (baseline, *others) if row is not None and row.top1_error is not None]
    if not known:
        return "No run is finished yet; the figures show the epochs so far."
    return f"{'; '.join(_alone(row) for row in known)}.{'' if baseline else ' No sgd run to compare with.'}"


def comparison_notes(runs: Sequence[RunData], rows: Sequence[Row]) -> list[str]:
    """Return what the table's figures cannot say: of what else runs are, and how little some of them tell."""
    notes = []
    if still := [row for row in rows if row.never_moved]:
        notes.append(f"{_never_moved(still, capital=True)}: differences from sgd are chance.")
    if hidden := [row.method for row in rows if row.is_speedup_in_spread and not row.never_moved]:
        notes.append(f"Speed-up within the spread of its seeds: {', '.join(hidden)}.")
    if few := [row for row in rows if row.test_images and row.test_images < FEW_IMAGES and row.top1_error is not None]:
        intervals = [f"{row.method} {row.top1_error_low:.1f} to {row.top1_error_high:.1f}" for row in few]
        images = " and ".join(str(count) for count in sorted({row.test_images for row in few if row.test_images}))
        notes.append(f"Errors are of {images} test images, 95 % intervals: {', '.join(intervals)}.")
    first, *others = (group[0] for group in by_method(runs).values())
    if keys := list(dict.fromkeys(key for other in others for key in differing(first, other))):
        told = [f"{run.method} {_values(run, keys)}" for run in (first, *others)]
        notes.append(f"Not the same network and images, so errors and times are not compared: {'; '.join(told)}.")
    finished = {row.method: row.epochs for row in rows if row.finished}
    if len(set(finished.values())) > 1:
        notes.append(f"Trained for different epochs: {', '.join(f'{m} {n}' for m, n in finished.items())}.")
    return notes


def batch_changes(run: RunData) -> str | None:
    """How the batch of a run changed, as '64, from epoch 34 on 128'; None if it did not."""
    batches = [record.get("batch") for record in run.records]
    parts = [str(batches[0])]
    parts += [f"from epoch {e} on {new}" for e, (old, new) in enumerate(pairwise(batches), 2) if new != old]
    refused = [record.get("refused_batch") for record in run.records]
    if refused[-1] is not None:
        parts.append(f"no memory for {refused[-1]} in epoch {refused.index(refused[-1]) + 1}")
    return ", ".join(parts) if len(parts) > 1 else None


def _values(run: RunData, keys: Sequence[str]) -> str:
    return ", ".join(f"{key}={run.subject.get(key)}" for key in keys)


def _on_seeds(rows: Sequence[Row]) -> str:
    if min(row.seeds for row in rows) > 1:
        return ""
    return " With one seed, small differences may be chance."


def _never_moved(rows: Sequence[Row], *, capital: bool = False) -> str:
    names = [row.method for row in rows]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    trained = "it" if len(names) == 1 else "they"
    return f"{'The' if capital else 'the'} boundary of {listed} never moved, so that {trained} trained as SGD does"


def _alone(row: Row) -> str:
    return f"{row.method} reached {row.top1_error:.2f} % top-1 error in {duration(row.seconds)} of training"


def _against(row: Row, baseline: Row, *, full: bool) -> str:
    assert row.speedup is not None
    if 0.995 < row.speedup < 1.005:
        time = f"{row.method} took as long as SGD"
    elif full:
        time = f"{row.method} trained {_times(row.speedup)} than SGD"
    else:
        time = f"{row.method} {_times(row.speedup)}"
    if row.is_speedup_in_spread:
        time += " (within the seeds' spread)"
    if row.epochs != baseline.epochs:
        time += f" in {row.epochs} epochs instead of {baseline.epochs}"
    return f"{time} {_points(row, baseline, full=full)}"


def _times(speedup: float) -> str:
    return f"{speedup:.2f}× faster" if speedup > 1 else f"{1 / speedup:.2f}× slower"


def _points(row: Row, baseline: Row, *, full: bool) -> str:
    """The difference of error, and whether the seeds' spread or the number of test images hides it."""
    if row.top1_error is None or baseline.top1_error is None:
        return "with no top-1 error recorded"
    difference = row.top1_error - baseline.top1_error
    digits = 1 if abs(difference) >= 0.095 else 2
    sign = "−" if difference < 0 else "+"
    text = f"at {sign}{abs(difference):.{digits}f} points{' of top-1 error' if full else ''}"
    if row.top1_error_std is not None and baseline.top1_error_std is not None:
        spread = (row.top1_error_std**2 + baseline.top1_error_std**2) ** 0.5
        if abs(difference) <= spread:
            return f"{text} (within the seeds' spread)"
    if row.test_images:
        low, high = difference_interval(row.top1_error, baseline.top1_error, row.test_images)
        if low <= 0 <= high:
            return f"{text} (too little for {row.test_images:,} test images to tell)"
    return text
