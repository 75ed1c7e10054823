"""What came out, in words: the sentence at the top of the page."""

from collections.abc import Sequence
from itertools import pairwise

from .runs import RunData
from .tables import Row, duration

__all__ = ["batch_changes", "headline"]


def headline(rows: Sequence[Row]) -> str:
    """Return one sentence on what the finished methods cost and reach, against sgd where it is among them."""
    finished = {row.method: row for row in rows if row.finished}
    baseline = finished.pop("sgd", None)
    compared = [(row, row.speedup) for row in finished.values()]
    against = [(row, speedup) for row, speedup in compared if speedup is not None]
    if baseline is not None and against:
        parts = [_against(row, speedup, baseline, full=index == 0) for index, (row, speedup) in enumerate(against)]
        return f"{'; '.join(parts)}.{_on_seeds(rows)}"
    known = [row for row in (baseline, *finished.values()) if row is not None and row.top1_error is not None]
    if not known:
        return "No run is finished yet; the figures show the epochs so far."
    return f"{'; '.join(_alone(row) for row in known)}.{'' if baseline else ' No sgd run to compare with.'}"


def batch_changes(run: RunData) -> str | None:
    """How the batch of a run changed, as '64, from epoch 34 on 128'; None if it did not."""
    batches = [record.get("batch") for record in run.records]
    parts = [str(batches[0])]
    parts += [f"from epoch {e} on {new}" for e, (old, new) in enumerate(pairwise(batches), 2) if new != old]
    refused = [record.get("refused_batch") for record in run.records]
    if refused[-1] is not None:
        parts.append(f"no memory for {refused[-1]} in epoch {refused.index(refused[-1]) + 1}")
    return ", ".join(parts) if len(parts) > 1 else None


def _on_seeds(rows: Sequence[Row]) -> str:
    if min(row.seeds for row in rows) > 1:
        return ""
    return " With one seed, small differences may be chance."


def _alone(row: Row) -> str:
    return f"{row.method} reached {row.top1_error:.2f} % top-1 error in {duration(row.seconds)} of training"


def _against(row: Row, speedup: float, baseline: Row, *, full: bool) -> str:
    if 0.995 < speedup < 1.005:
        time = f"{row.method} took as long as SGD"
    elif full:
        time = f"{row.method} trained {_times(speedup)} than SGD"
    else:
        time = f"{row.method} {_times(speedup)}"
    return f"{time} {_points(row, baseline, full=full)}"


def _times(speedup: float) -> str:
    return f"{speedup:.2f}× faster" if speedup > 1 else f"{1 / speedup:.2f}× slower"


def _points(row: Row, baseline: Row, *, full: bool) -> str:
    """The difference of error, and whether the seeds' spread would hide it."""
    if row.top1_error is None or baseline.top1_error is None:
        return "with no top-1 error recorded"
    difference = row.top1_error - baseline.top1_error
    digits = 1 if abs(difference) >= 0.095 else 2
    sign = "−" if difference < 0 else "+"
    text = f"at {sign}{abs(difference):.{digits}f} points{' of top-1 error' if full else ''}"
    if row.top1_error_std is None or baseline.top1_error_std is None:
        return text
    spread = (row.top1_error_std**2 + baseline.top1_error_std**2) ** 0.5
    return f"{text} (within the seeds' spread)" if abs(difference) <= spread else text
