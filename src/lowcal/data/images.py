"""From image files to 8-bit RGB pixels: a strict reader, run in threads at the start or in processes in training."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lowcal.data.policy import Policy
from lowcal.errors import LowcalError

OnError = Literal["stop", "skip"]
Failure = tuple[int, str]  # the position of a file that cannot be read, and the reason

MAX_PIXELS = 89_478_485  # Pillow's own limit: it treats a larger file as a decompression bomb
DEEP = ("PNG", "PPM")  # older releases of Pillow read their 16 bits in its 32-bit mode
CHUNK = 128  # files per task of a thread
MAX_WORKERS = 16
STRIP = 4  # an image this many times as long as wide has parts that evaluation never sees
RESIZED = 256 / 224  # in evaluation: the shorter side before the crop, over the side of the crop


def read_rgb(path: str, *, reduced: bool = False) -> Image.Image:
    """Read one file as 8-bit RGB: the first frame, upright by its EXIF tag, transparency over white.

    With `reduced` a JPEG comes at an eighth of its size. All its bytes are still read, in about half the time.

    Raises:
        LowcalError: the file cannot be read. The text is the reason, without the file's name.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise LowcalError(f"{width}x{height} pixels, more than {MAX_PIXELS:,}")
            if reduced:
                image.draft(image.mode, (1, 1))
            image.load()
            upright = ImageOps.exif_transpose(image) if "exif" in image.info else image
            return to_rgb(upright, image.format)
    except LowcalError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise LowcalError(f"more than {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        empty = os.path.getsize(path) == 0
        raise LowcalError("the file is empty" if empty else "not an image") from error
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise LowcalError(reason) from error


def to_rgb(image: Image.Image, image_format: str | None) -> Image.Image:
    """Return an image as 8-bit RGB, transparency over white; LowcalError if the scale of its pixels is unknown."""
    if image.mode == "RGB":
        return image
    if image.mode == "F" or (image.mode == "I" and image_format not in DEEP):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise LowcalError(f"{kind} pixels, whose scale is unknown: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):  # Pillow would clip 16 bits instead of scaling them
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def fit_cropped(image: Image.Image, size: int) -> Image.Image:
    """Keep the largest square in the middle, scaled to size x size with antialiasing."""
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BILINEAR)


def fit_evaluated(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to 256/224 of `size` and keep the middle, size x size, as tests on ImageNet do."""
    from torchvision.transforms.v2 import functional  # imported late: it takes a second

    resized = functional.resize(_middle(image), [round(RESIZED * size)])
    cropped: Image.Image = functional.center_crop(resized, [size, size])
    return cropped


def fit_exact(image: Image.Image, size: int) -> Image.Image:
    """Return the image unchanged; LowcalError if it is not size x size."""
    if image.size != (size, size):
        raise LowcalError(
            f"{image.size[0]}x{image.size[1]} pixels, where CIFAR has {size}x{size} (other sizes: "
            "--set data.name=image-folder --set data.image_size=...)"
        )
    return image


def _read_each(
    paths: Sequence[str], use: Callable[[int, Image.Image], object], *, reduced: bool = False
) -> list[Failure]:
    """Call `use` with the position and the image of each file; return the files that cannot be read or used."""
    failures = []
    for position, path in enumerate(paths):
        try:
            use(position, read_rgb(path, reduced=reduced))
        except LowcalError as error:
            failures.append((position, str(error)))
    return failures


@contextmanager
def _pillow_warnings() -> Iterator[None]:
    """Make Pillow's bomb warning an error and silence its remarks on odd metadata, in all threads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


# All files at once, in threads


def decode_files(
    paths: Sequence[str],
    size: int,
    fit: Callable[[Image.Image, int], Image.Image],
    on_error: OnError,
    watch: Callable[[int], None] | None = None,
) -> tuple[Tensor, dict[int, str]]:
    """Decode files into uint8 (N, 3, size, size); `fit` brings an image to size x size.

    `watch` is called with the number of finished files from time to time.

    Returns:
        The pixels, zeros for files that cannot be read, and the reasons by these files' positions.

    Raises:
        LowcalError: a file cannot be read and `on_error` is "stop". It names the first one.
    """
    pixels = torch.zeros(len(paths), 3, size, size, dtype=torch.uint8)
    rows: NDArray[Any] = pixels.numpy()

    def use(position: int, image: Image.Image) -> None:
        rows[position] = np.asarray(fit(image, size)).transpose(2, 0, 1)

    failures = {}
    for position, reason in _read_in_threads(paths, use, watch=watch):
        if on_error == "stop":
            raise unreadable(f"{paths[position]}: {reason}")
        failures[position] = reason
    return pixels, failures


def unreadable_files(paths: Sequence[str], watch: Callable[[int], None] | None = None) -> dict[int, str]:
    """Read each file; return the reasons, by position, for those that cannot be read."""
    return dict(_read_in_threads(paths, lambda position, image: None, reduced=True, watch=watch))


def unreadable(file_and_reason: str) -> LowcalError:
    """The error for a file that cannot be read and may not be skipped."""
    return LowcalError(
        f"cannot read image {file_and_reason}; fix or remove it, or leave such files out with --set data.on_error=skip"
    )


def _read_in_threads(
    paths: Sequence[str],
    use: Callable[[int, Image.Image], object],
    *,
    reduced: bool = False,
    watch: Callable[[int], None] | None = None,
) -> Iterator[Failure]:
    """As `_read_each`; the failures come in the order of the files, as soon as they are known."""

    def read_chunk(start: int) -> list[Failure]:
        chunk = paths[start : start + CHUNK]
        failures = _read_each(chunk, lambda position, image: use(start + position, image), reduced=reduced)
        return [(start + position, reason) for position, reason in failures]

    with _pillow_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            starts = range(0, len(paths), CHUNK)
            for start, failures in zip(starts, pool.map(read_chunk, starts), strict=True):
                yield from failures
                if watch:
                    watch(min(start + CHUNK, len(paths)))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


# Batch by batch, in processes


class Task(NamedTuple):
    """An image to make: of a file, or of a position in memory.

    `seed` decides what happens to it at random; None: what evaluation does.
    """

    path: str | int
    label: int
    seed: int | None


class Decoded(NamedTuple):
    """A batch: pixels uint8 (n, C, H, W), labels int64 (n,), and the unreadable files with reasons."""

    pixels: Tensor
    labels: Tensor
    failures: list[str]

    def checked(self) -> tuple[Tensor, Tensor]:
        """Pixels and labels; LowcalError if a file cannot be read."""
        if self.failures:
            raise unreadable(self.failures[0])
        return self.pixels, self.labels


class Decoders:
    """Worker processes that make batches of images ahead of their use, in order.

    The result of a task depends on the task alone, not on the worker or the number of workers, so all loaders of a
    program can share them. A pass that starts during another one gets workers of its own. The workers of a finished
    pass serve the next. With CUDA the batches come in pinned memory.

    Args:
        shape: channels, height and width of the images.
        make: returns what turns a batch of tasks into images.
        workers: processes per pass; 0: decode in this process. None: `available_workers`.
    """

    def __init__(
        self, shape: tuple[int, int, int], make: Callable[[], Dataset[Decoded]], workers: int | None = None
    ) -> None:
        self.shape = shape
        self._make = make
        self.workers = available_workers() if workers is None else workers
        self._idle: dict[bool, list[tuple[_Queue, DataLoader[Decoded]]]] = {True: [], False: []}

    def decode(self, tasks: Sequence[Task]) -> tuple[Tensor, Tensor]:
        """Decode one batch in this process; errors as `run`."""
        return self._make()[tasks].checked()

    def run(self, batches: Iterable[Sequence[Task]], *, pin: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Decode batch after batch into pixels uint8 (n, C, H, W) and labels int64 (n,); `pin`: pin memory.

        Raises:
            LowcalError: a file cannot be read, or a worker process dies.
        """
        queue, loader = self._idle[pin].pop() if self._idle[pin] else self._start(pin)
        queue.batches = batches
        is_alive = True
        try:
            for decoded in loader:
                yield decoded.checked()
        except RuntimeError as error:  # a worker was killed, or shared memory is full
            is_alive = False
            reason = str(error).partition("\n")[0]
            raise LowcalError(f"decoding images failed: {reason}; set fewer data.workers ({self.workers})") from error
        finally:
            if is_alive:  # also after a pass that was given up: the next one drops what was decoded ahead
                self._idle[pin].append((queue, loader))

    def _start(self, pin: bool) -> tuple["_Queue", DataLoader[Decoded]]:
        queue = _Queue()
        loader: DataLoader[Decoded] = DataLoader(
            self._make(),
            batch_sampler=queue,  # type: ignore[arg-type]  # its batches are of tasks, not of positions
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            collate_fn=_identity,
            pin_memory=pin,
            generator=torch.Generator(),  # otherwise each pass would draw from the global one
        )
        return queue, loader


class _Queue:
    """The batches of the next pass."""

    batches: Iterable[Sequence[Task]] = ()

    def __iter__(self) -> Iterator[Sequence[Task]]:
        return iter(self.batches)


class Decoding(Dataset[Decoded]):
    """From a batch of tasks, which name files, to pixels uint8 (n, 3, size, size); runs in a worker."""

    def __init__(self, size: int, policy: Policy) -> None:
        from torchvision.transforms import v2  # imported late: it takes a second

        self.size = size
        middle = [v2.Resize(round(RESIZED * size)), v2.CenterCrop(size)]
        self.train = policy.transform([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()], middle)

    def __getitems__(self, tasks: Sequence[Task]) -> Decoded:
        """What torch's loader calls with a batch."""
        return self[tasks]

    def __getitem__(self, tasks: Sequence[Task]) -> Decoded:
        pixels = torch.zeros(len(tasks), 3, self.size, self.size, dtype=torch.uint8)

        def use(position: int, image: Image.Image) -> None:
            seed = tasks[position].seed
            if seed is None:
                pixels[position] = torch.from_numpy(np.array(fit_evaluated(image, self.size))).permute(2, 0, 1)
            else:
                with seeded(seed):
                    pixels[position] = self.train(image)

        with _pillow_warnings():
            failures = _read_each([str(task.path) for task in tasks], use)
        labels = torch.tensor([task.label for task in tasks], dtype=torch.int64)
        return Decoded(pixels, labels, [f"{tasks[position].path}: {reason}" for position, reason in failures])


def available_workers() -> int:
    """The number of this process's processors, at most 16."""
    present = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(present, MAX_WORKERS)


def _middle(image: Image.Image) -> Image.Image:
    """The middle of a long strip; scaled up as a whole, a strip could fill the memory."""
    width, height = image.size
    longest = STRIP * min(width, height)
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((left, top, width - left, height - top)) if left or top else image


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator, which torchvision draws from, and restore it afterwards."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


def _identity(batch: Any) -> Any:
    return batch
