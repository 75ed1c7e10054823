"""Image files decoded while the device trains, in worker processes that are kept from one pass to the next."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lowcal.errors import LowcalError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Decoded", "Decoders", "Task", "available_workers"]

MOST_WORKERS = 16
STRIP = 4  # times as long as it is wide an image has parts that evaluation never sees
RESIZED = 256 / 224  # of evaluation: the shorter side before the middle is cut out, over the side cut out


class Task(NamedTuple):
    """A file to decode; the `seed` decides its crop and its mirroring, None is for the middle as evaluation sees it."""

    path: str
    label: int
    seed: int | None


class Decoded(NamedTuple):
    """A batch: `pixels` uint8 (n, 3, size, size), `labels` int64 (n,); files not read, with reasons, have zeros."""

    pixels: Tensor
    labels: Tensor
    failures: list[tuple[str, str]]


class Decoders:
    """Worker processes that decode batches of files ahead of their use, in order.

    What a task gives depends on the task alone, not on the worker or the number of workers, so all loaders of a
    program can share them. A pass that starts while another is under way gets workers of its own; those of a finished
    pass serve the next. With CUDA the batches come in pinned memory.

    Args:
        size: side of the images, pixels.
        workers: processes per pass; 0: decode in this one. None: as many as this process has processors, 16 at most.
    """

    def __init__(self, size: int, workers: int | None = None) -> None:
        self.size = size
        self.workers = available_workers() if workers is None else workers
        self._idle: dict[bool, list[tuple[_Queue, DataLoader[Decoded]]]] = {True: [], False: []}

    def decode(self, tasks: Sequence[Task]) -> Decoded:
        """Decode one batch here and now."""
        return _Decoding(self.size)[tasks]

    def run(self, batches: Iterable[Sequence[Task]], *, pin: bool) -> Iterator[Decoded]:
        """Decode batch after batch; `pin` puts them into pinned memory.

        Raises LowcalError if a worker process dies.
        """
        queue, loader = self._idle[pin].pop() if self._idle[pin] else self._start(pin)
        queue.batches = batches
        is_well = True
        try:
            yield from loader
        except RuntimeError as error:  # a worker was killed, or shared memory is full
            is_well = False
            reason = str(error).partition("\n")[0]
            raise LowcalError(f"decoding images failed: {reason}; set fewer data.workers ({self.workers})") from error
        finally:
            if is_well:  # also when a pass is given up: the next one throws away what was decoded ahead
                self._idle[pin].append((queue, loader))

    def _start(self, pin: bool) -> tuple["_Queue", DataLoader[Decoded]]:
        queue = _Queue()
        loader: DataLoader[Decoded] = DataLoader(
            _Decoding(self.size),
            batch_sampler=queue,  # type: ignore[arg-type]  # its batches are of tasks, not of positions
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            collate_fn=_as_it_is,
            pin_memory=pin,
            generator=torch.Generator(),  # else each pass would draw from the global one
        )
        return queue, loader


class _Queue:
    """The batches of the pass that is to start."""

    batches: Iterable[Sequence[Task]] = ()

    def __iter__(self) -> Iterator[Sequence[Task]]:
        return iter(self.batches)


class _Decoding(Dataset[Decoded]):
    """From a batch of tasks to pixels; runs in a worker."""

    def __init__(self, size: int) -> None:
        try:
            from torchvision.transforms import v2
        except ImportError as error:
            raise LowcalError("decoding images needs torchvision: pip install 'lowcal[cli]'") from error
        self.size = size
        self.train = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
        self.test = v2.Compose([v2.Resize(round(RESIZED * size)), v2.CenterCrop(size), v2.PILToTensor()])

    def __getitems__(self, tasks: Sequence[Task]) -> Decoded:
        """What torch's loader calls with a batch."""
        return self[tasks]

    def __getitem__(self, tasks: Sequence[Task]) -> Decoded:
        from lowcal.data.decode import read_rgb, warnings_as_needed

        pixels = torch.zeros(len(tasks), 3, self.size, self.size, dtype=torch.uint8)
        failures = []
        with warnings_as_needed():
            for row, task in zip(pixels, tasks, strict=True):
                try:
                    image = read_rgb(task.path)
                except LowcalError as error:
                    failures.append((task.path, str(error)))
                    continue
                if task.seed is None:
                    row.copy_(self.test(_middle(image)))
                else:
                    with _drawing_from(task.seed):
                        row.copy_(self.train(image))
        return Decoded(pixels, torch.tensor([task.label for task in tasks], dtype=torch.int64), failures)


def available_workers() -> int:
    """As many as this process has processors, 16 at most."""
    present = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(present, MOST_WORKERS)


def _middle(image: "Image") -> "Image":
    """The image without what is far from the middle of a long strip, which, scaled up, could fill the memory."""
    width, height = image.size
    longest = STRIP * min(width, height)
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((left, top, width - left, height - top)) if left or top else image


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """Torchvision draws from torch's global generator: start it from `seed`, and leave it as it was."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


def _as_it_is(batch: Any) -> Any:
    return batch
