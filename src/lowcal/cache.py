"""Frozen layers computed once for each image: `Cached`."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lowcal.activations import FILE, FileStore, Layout, MemoryStore, free_bytes
from lowcal.errors import LowcalError, is_count
from lowcal.files import memory
from lowcal.layers import unchanged
from lowcal.local import LoCal
from lowcal.program import Program, Suffix, record

_SAME = 1e-2  # two computations of one thing differ by less, in any precision


class Inputs(Protocol):
    """The network's inputs of all images, such as a tensor (N, C, H, W)."""

    def __len__(self) -> int:
        """Number of images, N."""
        ...

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """The inputs of the images at `index`, int64 (n,): (n, C, H, W). They are the same in each call."""
        ...


class Cached:
    """The network of `local`, called with the numbers of images; it computes its frozen layers once for each image.

    The first call behind a boundary runs the layers before it on all images, and stores what crosses the boundary.
    Later calls take that and run the other layers only. When the boundary has moved, or the weights before it have
    changed, the next call fills the store again. In evaluation mode, or without a boundary, the whole network runs.

    With `views` the images may change from epoch to epoch, as augmentation does. The first `views` epochs behind a
    boundary have images of their own, which are all stored by the first call; the later epochs use them again in turn.

    In single precision the results are those of the network itself, bit for bit, where its products do not depend on
    the place of an image in the mini-batch.

    Args:
        local: the controller, with ``rule=Frozen()``; ``norm_stats="running"`` if there is batch normalisation.
        inputs: the images as the network gets them, without augmentation: a tensor (N, C, H, W); a dataset of torch,
            whose items are images or tuples that begin with one; or any object like `Inputs`. With `views`: a function
            of the epoch that returns its augmented images as one of these, the same ones in each call.
        folder: where to store on disk, in a memory-mapped file of safetensors; None: in the memory of the network's
            device. A later process with the same images and weights uses the file again.
        limit: the most bytes to store; None: those that are free. Nothing is computed or written beyond it.
        half: whether single precision is stored as float16, which rounds it.
        views: how many epochs' augmented images are stored at each boundary; None: the images never change.

    Raises:
        LowcalError: the rule changes layers before the boundary. Calls raise it if these layers cannot be cached (batch
            statistics, random numbers, values that decide what runs), if the limit is too low, or if `folder` holds a
            cache of other images, weights or settings.

    Example:
        >>> from lowcal import Fixed, Frozen
        >>> images, labels = torch.randn(8, 4), torch.zeros(8, dtype=torch.int64)
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> local = LoCal(model, optimizer, epochs=2, rule=Frozen(), schedule=Fixed({0: 1}), example_inputs=images[:1])
        >>> cached = Cached(local, images)
        >>> for index in torch.randperm(8).split(4):
        ...     loss = nn.functional.cross_entropy(cached(index), labels[index])
    """

    def __init__(
        self,
        local: LoCal,
        inputs: Inputs | Dataset[Any] | Callable[[int], Inputs | Dataset[Any]],
        *,
        folder: Path | str | None = None,
        limit: int | None = None,
        half: bool = False,
        views: int | None = None,
    ) -> None:
        if local.rule.collects or local.rule.opens:
            raise LowcalError(
                f"Cached: {local.rule} changes the layers before the boundary, so that their outputs cannot be kept; "
                "give LoCal rule=lowcal.Frozen()"
            )
        if views is not None and not is_count(views):
            raise LowcalError(f"Cached: views is {views!r}; give a whole number, at least 1")
        if callable(inputs) != (views is not None):
            raise LowcalError(
                "Cached: a function of the epoch as inputs and a number of views belong together; "
                "give both, or images that never change"
            )
        self.suffix = Suffix(local.model)
        self._local, self._views = local, views or 1

        @lru_cache(1)  # so that a function of the epoch is called once in an epoch
        def images_of(epoch: int) -> Inputs:
            found = inputs(epoch) if callable(inputs) else inputs
            return _Stacked(found) if isinstance(found, Dataset) else found

        self._images_of = images_of
        self._folder = None if folder is None else Path(folder)
        self._limit, self._half = limit, half
        self._layouts: list[Layout] = []
        self._store: MemoryStore | None = None
        self._owns_file = False
        self._made_for: tuple[Any, ...] = ()

    def __call__(self, index: Tensor) -> Tensor:
        """The network's output for the images at `index`, int64 (n,)."""
        if not (self._local.model.training and self._local.boundary and torch.is_grad_enabled()):
            return self._local.model(self._take(index))
        return self.suffix(*self.gather(index))

    def gather(self, index: Tensor) -> tuple[Tensor, ...]:
        """The tensors that cross the boundary for the images at `index`, for `suffix`; they may be changed."""
        if self._situation() != self._made_for:
            self.suffix.programs.clear()
            self._store = None
        if len(index) not in self.suffix.programs:
            self._record(index)
        if self._store is None:
            self._fill(len(index))
        assert self._store is not None
        view = (self._local.epoch - self._epochs.start) % len(self._epochs)
        return self._store.read(view * self._count + index)

    def check(self, device: torch.device | None = None) -> None:
        """Checks that the layers before the boundary can be cached and that all images fit; computes two of them.

        Args:
            device: on which the tensors would be stored; None: the network's.

        Raises:
            LowcalError: as a call would.
        """
        self._record(torch.arange(min(2, self._count)))
        self._check_limit(device or self._device)

    def _check_limit(self, device: torch.device) -> None:
        needed = self._rows * sum(layout.bytes_per_image for layout in self._layouts)
        remedies = [] if self._half else ["halve what is stored (half)"]
        remedies += ["store fewer views"] if len(self._epochs) > 1 else []
        remedies += (
            ["take a later boundary"] if self._folder is not None else ["store it on disk", "take a later boundary"]
        )
        views = f" in {len(self._epochs)} views" if len(self._epochs) > 1 else ""
        for most, what in ((self._limit, "are allowed (limit)"), (free_bytes(device, self._folder), "are free")):
            if most is not None and needed > most:
                raise LowcalError(
                    f"the cache at boundary {self._local.boundary} needs {memory(needed)} for {self._count} "
                    f"images{views}, but {memory(most)} {what}; {', or '.join(remedies)}"
                )

    @property
    def _device(self) -> torch.device:
        return next(self._local.model.parameters()).device

    @property
    def _epochs(self) -> range:
        """The epochs whose images are stored: the first ones at the present boundary."""
        start = self._local.history[-1][0] if self._local.history else 0
        return range(start, start + max(1, min(self._views, self._local.epochs - start)))

    @cached_property
    def _count(self) -> int:
        """Number of images."""
        return len(self._images_of(self._local.epoch))

    @property
    def _rows(self) -> int:
        """Number of images in all views."""
        return len(self._epochs) * self._count

    def _take(self, index: Tensor) -> Tensor:
        return self._images_of(self._local.epoch)[index.cpu()].to(self._device)

    def _situation(self) -> tuple[Any, ...]:
        """What recorded passes and stored tensors depend on."""
        versions = [tensor._version for program in self.suffix.programs.values() for tensor in program.prefix.tensors]
        return self._local.boundary, self._epochs, _precision(self._device), versions

    def _record(self, index: Tensor) -> None:
        model, images = self._local.model, self._take(index)
        with unchanged(model):
            program, layouts = self._recorded(model, images)
        if self._store is not None and layouts != self._layouts:
            raise LowcalError("Cached: what crosses the boundary depends on the number of images; use no cache")
        self._layouts = layouts
        self.suffix.programs[len(index)] = program
        self._made_for = self._situation()

    def _recorded(self, model: nn.Module, images: Tensor) -> tuple[Program, list[Layout]]:
        """A recorded pass after all checks, and how to store what crosses the boundary."""
        with torch.enable_grad():
            program = record(model, images)
        self._check_norms()
        if program.reads:
            raise LowcalError(
                "Cached: the forward pass reads values of tensors, which may decide what it runs, so that it cannot be "
                "recorded; use no cache"
            )
        with torch.no_grad():
            before = _random_state(self._device)
            crossing = program.prefix({0: images})
            if not all(map(torch.equal, before, _random_state(self._device))):
                raise LowcalError(
                    "Cached: the layers before the boundary draw random numbers (dropout, drop path), so that their "
                    "outputs are not the same in each epoch; set that rate to 0, or take an earlier boundary"
                )
            if not all(tensor.dim() and len(tensor) == len(images) for tensor in crossing.values()):
                raise LowcalError(
                    "Cached: a tensor that crosses the boundary has no row for each image; take another boundary"
                )
            layouts = [Layout.of(tensor, half=self._half) for tensor in crossing.values()]
            kept = max(1, len(images) // 2)
            changed = program.prefix({0: torch.cat((images[:kept], torch.zeros_like(images[kept:])))})
            if not all(_same(crossing[slot][:kept], changed[slot][:kept]) for slot in crossing):
                raise LowcalError(
                    "Cached: before the boundary an image's values depend on the other images of its mini-batch; "
                    "take an earlier boundary"
                )
            torch.manual_seed(0)
            wanted = model(images)
            torch.manual_seed(0)
            copies = {
                slot: layout.restore(layout.lay(crossing[slot]).clone(memory_format=torch.contiguous_format))
                for slot, layout in zip(crossing, layouts, strict=True)
            }
            (found,) = program.suffix(copies).values()
        if not _same(found, wanted):
            raise LowcalError("Cached: a recorded forward pass gives other results than the network; use no cache")
        return program, layouts

    def _check_norms(self) -> None:
        """Checks, right after a pass, that normalisation before the boundary uses running statistics."""
        order = self._local._local_layers.discovery.order
        before = self._local.layers[: self._local.boundary]
        for name, layer in order.norms.items():
            if layer in before and self._local.model.get_submodule(name).training:
                raise LowcalError(
                    f"Cached: normalisation layer '{name}' is before the boundary and uses batch statistics, which "
                    "differ in each epoch; set norm_stats to 'running'"
                )

    def _fill(self, size: int) -> None:
        """Stores what crosses the boundary for all images, or finds it in the folder."""
        self._check_limit(self._device)
        device, folder = self._device, self._folder
        if folder is not None and (folder / FILE).exists() and not self._owns_file:
            digest = self._digest(self._batches(size))
            self._store = FileStore.open(self._layouts, self._rows, device, folder, digest)
        else:
            self._store = self._filled(size)
        self._owns_file = True

    def _filled(self, size: int) -> MemoryStore:
        device, folder = self._device, self._folder
        store = (
            MemoryStore(self._layouts, self._rows, device)
            if folder is None
            else FileStore(self._layouts, self._rows, device, folder)
        )

        def written() -> Iterator[Tensor]:
            row = 0
            for images in self._batches(size):
                if len(images) not in self.suffix.programs:
                    self._record(torch.arange(len(images)))
                with torch.no_grad():
                    crossing = self.suffix.programs[len(images)].prefix({0: images.to(device)})
                store.write(row, list(crossing.values()))
                row += len(images)
                yield images

        if folder is None:
            for _ in written():
                pass
        else:
            store.finish(self._digest(written()))
        return store

    def _batches(self, size: int) -> Iterator[Tensor]:
        for epoch in self._epochs:
            images = self._images_of(epoch)
            for index in torch.arange(len(images)).split(size):
                yield images[index]

    def _digest(self, batches: Iterator[Tensor]) -> str:
        """What the stored tensors depend on, as text of 64 characters: images, weights, layers and types."""
        found = hashlib.sha256()
        for images in batches:
            found.update(_bytes(images))
        program = next(iter(self.suffix.programs.values()))
        for tensor in program.prefix.tensors:
            found.update(_bytes(tensor))
        one = self._take(torch.zeros(1, dtype=torch.int64))
        layers, precision = self._local.layers[: self._local.boundary], _precision(self._device)
        found.update(repr((layers, precision, self._layouts, self._rows, one.shape, one.dtype)).encode())
        return found.hexdigest()


class _Stacked:
    """A dataset of torch as `Inputs`."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: Tensor, /) -> Tensor:
        items = (self._dataset[number] for number in index.tolist())
        return torch.stack([item[0] if isinstance(item, tuple | list) else item for item in items])


def _precision(device: torch.device) -> torch.dtype | None:
    """The type of the autocast context around the call; None without one."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _random_state(device: torch.device) -> Sequence[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal but for rounding."""
    one, other = one.float(), other.float()
    return not bool((one - other).norm() > _SAME * one.norm())


def _bytes(tensor: Tensor) -> bytes:
    tensor = tensor.detach().cpu().contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)  # without NumPy
