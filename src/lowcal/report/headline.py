"""What runs and what came out, in words: titles, the headline of a report, and notes on its table."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from lowcal.report.comparison import Row, difference_interval, paired_p, rival_of
from lowcal.report.runs import RunData, by_method, differing
from lowcal.report.table import duration

FEW_IMAGES = 1000  # below it, the notes give the interval of an error
_DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "8x8 digits", "imagenet": "ImageNet"}
_CLASSES = {"ImageNet": 1000}  # those that need no word

Parts = dict[str, str]


def title(settings: Mapping[str, Any], images: Mapping[str, Any] | None = None) -> str:
    """Return a title such as 'ResNet18 of width 8 on CIFAR-10, 2 epochs, 300 of 50,000 images'.

    Args:
        settings: a recipe as a mapping.
        images: the counts in `run.images` of a run's `environment.json`; None if they are not known yet.
    """
    return _join(_parts(settings, images))


def common_title(runs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any] | None]]) -> str:
    """Return the common title of runs, given as `title` takes them, without the parts in which they differ."""
    first, *others = (_parts(settings, images) for settings, images in runs)
    return _join({name: part for name, part in first.items() if all(other[name] == part for other in others)})


def _join(parts: Parts) -> str:
    subject = " ".join(parts[name] for name in ("network", "width", "data") if parts.get(name))
    return ", ".join(filter(None, [subject, parts.get("epochs"), parts.get("images")]))


def _parts(settings: Mapping[str, Any], images: Mapping[str, Any] | None) -> Parts:
    """Return the title's parts by name; "" for a part that is left out."""
    model, data = _section(settings, "model"), _section(settings, "data")
    epochs = settings.get("epochs")
    return {
        "network": _network(str(model.get("name", ""))),
        "width": f"of width {model['width']}" if model.get("width") else "",
        "data": f"on {_data(data, images or {})}",
        "epochs": f"{epochs} epoch{'s' * (epochs != 1)}" if epochs else "",
        "images": _images(data, images or {}),
    }


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = settings.get(name)
    return section if isinstance(section, Mapping) else {}


def _network(name: str) -> str:
    """Return a network's name as its authors write it, if that is known."""
    if re.fullmatch(r"(resnet|vgg)\d+", name):
        return name.replace("resnet", "ResNet").replace("vgg", "VGG")
    return "MobileNetV2" if name == "mobilenet_v2" else name


def _data(data: Mapping[str, Any], images: Mapping[str, Any]) -> str:
    name = str(data.get("name", ""))
    word = _DATA.get(name, name)
    if name == "image-folder":
        word = f"the image folder '{images['folder']}'" if images.get("folder") else "an image folder"
    elif name == "synthetic":
        word = "synthetic images"
    details = []
    classes = images.get("classes") or data.get("classes")
    if classes and (name not in _DATA or classes != _CLASSES.get(word, classes)):
        details.append(f"{classes} classes")
    if data.get("image_size"):
        details.append(f"{data['image_size']}x{data['image_size']}")
    return f"{word} ({', '.join(details)})" if details else word


def _images(data: Mapping[str, Any], images: Mapping[str, Any]) -> str:
    """Return how many images are used, if they are not all of a known data set."""
    held_out = "tested on held-out training images" if data.get("evaluate") == "validation" else ""
    if not images:
        count = data.get("train_images")
        return ", ".join(filter(None, [f"{_number(count)} images" if count else "", held_out]))
    train = _of(images, "train") or (_number(images["train"]) if data.get("name") not in _DATA else "")
    test = "" if held_out else _of(images, "test")
    if train and test:
        count = f"{train} training and {test} test images"
    else:
        count = f"{train} images" if train else f"{test} test images" if test else ""
    return ", ".join(filter(None, [count, held_out]))


def _of(images: Mapping[str, Any], split: str) -> str:
    """Return '300 of 50,000' for the images of a split; "" for all of them."""
    there, whole = images[split], images[f"{split}_of"]
    return f"{_number(there)} of {_number(whole)}" if there < whole else ""


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def headline(rows: Sequence[Row]) -> str:
    """Return one sentence on the time and error of the finished methods, against sgd if there is an sgd run."""
    return _told(rows, whole=False)[0]


def findings(rows: Sequence[Row]) -> list[str]:
    """Return what `headline` says as sentences, one for each method."""
    return _told(rows, whole=True)


def _told(rows: Sequence[Row], *, whole: bool) -> list[str]:
    """Return sentences for each method if `whole`, else one text."""
    finished = {row.method: row for row in rows if row.finished}
    baseline = finished.pop("sgd", None)
    others = [row for row in finished.values() if not row.is_rival]
    compared = [row for row in others if row.speedup is not None and not row.never_moved]
    still = [row for row in others if row.speedup is not None and row.never_moved]
    if baseline is not None and (compared or still):
        parts = [_against(row, baseline, full=whole or index == 0) for index, row in enumerate(compared)]
        rivals = [_against_rival(row, rows) for row in compared]
        rest = [_never_moved(still, capital=whole)] if still else []
        rest += [_alone(row) for row in others if row.speedup is None and row.top1_error is not None]
        chance = _on_seeds(rows) if compared else ""
        if whole:
            told = [f"{part}.{rival}" for part, rival in zip(parts, rivals, strict=True)]
            return [*told, *(f"{part}." for part in rest), *([chance.strip()] if chance else [])]
        return [f"{'; '.join([*parts, *rest])}.{''.join(rivals)}{chance}"]
    known = [row for row in (baseline, *others) if row is not None and row.top1_error is not None]
    if not known:
        return ["No run is finished yet; the figures show the epochs so far."]
    parts = [_alone(row) for row in known]
    missing = "" if baseline else "No sgd run to compare with."
    if whole:
        return [*(f"{part}." for part in parts), *([missing] if missing else [])]
    return [f"{'; '.join(parts)}.{missing and f' {missing}'}"]


def comparison_notes(runs: Sequence[RunData], rows: Sequence[Row]) -> list[str]:
    """Return notes on the table: runs that differ in more than the method, and figures within the noise."""
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
    finished = {row.method: row.epochs for row in rows if row.finished and not row.is_rival}
    if len(set(finished.values())) > 1:
        notes.append(f"Trained for different epochs: {', '.join(f'{m} {n}' for m, n in finished.items())}.")
    return notes


def batch_changes(run: RunData) -> str | None:
    """Return how the batch of a run changed, as '64, from epoch 34 on 128'; None if it did not."""
    batches = [record.get("batch") for record in run.records]
    parts = [str(batches[0])]
    parts += [f"from epoch {e} on {new}" for e, (old, new) in enumerate(pairwise(batches), 2) if new != old]
    refused = [record.get("refused_batch") for record in run.records]
    if refused[-1] is not None:
        parts.append(f"no memory for {refused[-1]} in epoch {refused.index(refused[-1]) + 1}")
    return ", ".join(parts) if len(parts) > 1 else None


def _values(run: RunData, keys: Sequence[str]) -> str:
    return ", ".join(f"{key}={run.subject.get(key)}" for key in keys)


def _against_rival(row: Row, rows: Sequence[Row]) -> str:
    """Return a sentence on SGD in the time of `row`; "" if it was not trained."""
    rival = rival_of(row, rows)
    if rival is None or row.top1_error is None or rival.top1_error is None:
        return ""
    points = row.top1_error - rival.top1_error
    verdict = f"{abs(points):.1f} points {'better' if points < 0 else 'worse'} than"
    p = paired_p(row, rival)
    tested = "" if p is None else f" ({row.seeds} seeds, p = {p:.2g})"
    time = f"SGD given the same time ({rival.epochs} epochs, {duration(rival.seconds)})"
    return f" {row.method} is {verdict if abs(points) >= 0.05 else 'as good as'} {time}{tested}."


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
        time = f"{row.method} took the same time as SGD"
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
    """Return the difference of error, and whether it is within the spread of the seeds or the noise of few images."""
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
