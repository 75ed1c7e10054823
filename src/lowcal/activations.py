"""Tensors stored per image, in memory or in a memory-mapped file of safetensors."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowcal.errors import LowcalError
from lowcal.files import refused, temporary

FILE = "activations.safetensors"
_NAMES = {  # of types in a file of safetensors
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How the tensors of one name are stored: an image's values lie together, in the order in which they came.

    Attributes:
        shape: of one image's part, in the order in which it lies in memory.
        order: the dimensions of a mini-batch's tensor in this order.
        dtype: of a mini-batch's tensor.
        stored: of the stored one.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    stored: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor, *, half: bool) -> Layout:
        """The layout of tensors like `tensor`, (N, ...); with `half` single precision is stored as float16."""
        strides = tensor.stride()
        rest = sorted(range(1, tensor.dim()), key=lambda dim: (-strides[dim], dim))
        stored = torch.float16 if half and tensor.dtype == torch.float32 else tensor.dtype
        return cls(tuple(tensor.shape[dim] for dim in rest), (0, *rest), tensor.dtype, stored)

    @property
    def values(self) -> int:
        """Numbers that one image takes."""
        return torch.Size(self.shape).numel()

    @property
    def bytes_per_image(self) -> int:
        """Bytes that one image takes."""
        return self.values * self.stored.itemsize

    def lay(self, tensor: Tensor) -> Tensor:
        """The tensor of a mini-batch as it is stored."""
        return tensor.permute(self.order).to(self.stored)

    def restore(self, stored: Tensor) -> Tensor:
        """The tensor of a mini-batch from what is stored of it."""
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return stored.to(self.dtype).permute(back)


class MemoryStore:
    """Tensors for `count` images on `device`."""

    def __init__(self, layouts: Sequence[Layout], count: int, device: torch.device) -> None:
        self._layouts = layouts
        self._tensors = [torch.empty(count, *layout.shape, dtype=layout.stored, device=device) for layout in layouts]

    def write(self, start: int, tensors: Sequence[Tensor]) -> None:
        """Stores the tensors of the images from `start` on."""
        for into, layout, tensor in zip(self._tensors, self._layouts, tensors, strict=True):
            part = layout.lay(tensor)
            if layout.stored != layout.dtype and not bool(part.isfinite().all()):
                raise LowcalError("Cached: values at the boundary are too large for float16; do not halve them (half)")
            into[start : start + len(part)] = part

    def read(self, index: Tensor) -> tuple[Tensor, ...]:
        """The tensors of the images at `index`, int64 (n,): new ones in each call."""
        return tuple(
            layout.restore(tensor.index_select(0, index.to(tensor.device)))
            for layout, tensor in zip(self._layouts, self._tensors, strict=True)
        )

    def finish(self, digest: str) -> None:
        """Ends the writing; `digest` says what is stored."""


class FileStore(MemoryStore):
    """The same in `folder`, memory-mapped; the tensors that `read` returns are on `device`.

    The file has its name only after `finish`, so that one with this name is whole.

    Raises:
        LowcalError: safetensors is not installed, or the system refuses.
    """

    def __init__(self, layouts: Sequence[Layout], count: int, device: torch.device, folder: Path) -> None:
        _safetensors()
        self._layouts, self._device, self._path = layouts, device, folder / FILE
        unfinished = temporary(self._path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                head, offsets, end = _head(layouts, count)
                _reserve(file.fileno(), end)
                file.write(head)
            storage: Any = torch.UntypedStorage.from_file(str(unfinished), True, end)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise refused(unfinished, error) from error
        self._tensors = [
            torch.empty(0, dtype=layout.stored)
            .set_(storage, at // layout.stored.itemsize, (count * layout.values,), (1,))
            .view(count, *layout.shape)
            for layout, at in zip(layouts, offsets, strict=True)
        ]

    @classmethod
    def open(cls, layouts: Sequence[Layout], count: int, device: torch.device, folder: Path, digest: str) -> FileStore:
        """The file that an earlier process has finished.

        Raises:
            LowcalError: it holds something other than what `digest` says, or is damaged.
        """
        store = cls.__new__(cls)
        store._layouts, store._device, store._path = layouts, device, folder / FILE
        if (found := store._load()) != digest:
            what = "is not a cache of lowcal" if found is None else "is of other images, weights or settings"
            raise LowcalError(f"{store._path} {what}; give another folder, or remove the file")
        if any(len(tensor) != count for tensor in store._tensors):
            raise LowcalError(f"{store._path} is damaged; remove it")
        return store

    def read(self, index: Tensor) -> tuple[Tensor, ...]:
        """As `MemoryStore`."""
        index = index.to("cpu")
        return tuple(
            layout.restore(tensor.index_select(0, index).to(self._device))
            for layout, tensor in zip(self._layouts, self._tensors, strict=True)
        )

    def finish(self, digest: str) -> None:
        """As `MemoryStore`; from here on the file is only read."""
        del self._tensors
        unfinished = temporary(self._path)
        try:
            with unfinished.open("r+b") as file:
                head = file.read(struct.unpack("<Q", file.read(8))[0])
                file.seek(8)
                file.write(head.replace(_UNKNOWN, digest.encode()))
            unfinished.replace(self._path)
        except OSError as error:
            raise refused(self._path, error) from error
        self._load()

    def _load(self) -> str | None:
        """Maps the file; returns its digest."""
        try:
            with _safetensors().safe_open(str(self._path), framework="pt") as file:
                self._tensors = [file.get_tensor(str(number)) for number in range(len(self._layouts))]
                metadata: dict[str, str] = file.metadata() or {}
                return metadata.get("lowcal")
        except Exception as error:  # safetensors has an error class of its own
            reason = str(error).partition("\n")[0]
            raise LowcalError(f"{self._path} cannot be read ({reason}); give another folder, or remove it") from None


def free_bytes(device: torch.device, folder: Path | None) -> int | None:
    """Bytes that a new store may take: on the disk of `folder`, or in the memory of `device`; None if not known."""
    if folder is not None:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        return shutil.disk_usage(existing).free
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _reserve(descriptor: int, size: int) -> None:
    """Gives an open file `size` bytes on the disk: where none are left, writing to mapped memory ends the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


_UNKNOWN = b"0" * 64  # in place of the digest until the file is whole


def _head(layouts: Sequence[Layout], count: int) -> tuple[bytes, list[int], int]:
    """The first bytes of a file of safetensors, the place of each tensor in it, and its length.

    The format: the length of a JSON header as a little-endian number of 8 bytes, the header, and the tensors' bytes
    without gaps (https://huggingface.co/docs/safetensors/index#format). The widest come first, so that all are aligned.
    """
    entries: dict[str, Any] = {"__metadata__": {"lowcal": _UNKNOWN.decode()}}
    places, at = [0] * len(layouts), 0
    for number in sorted(range(len(layouts)), key=lambda number: -layouts[number].stored.itemsize):
        layout = layouts[number]
        size = count * layout.bytes_per_image
        entries[str(number)] = {
            "dtype": _NAMES[layout.stored],
            "shape": [count, *layout.shape],
            "data_offsets": [at, at + size],
        }
        places[number] = at
        at += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, [len(head) + place for place in places], len(head) + at


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors")
    except ImportError:
        raise LowcalError("a cache on disk needs safetensors; pip install safetensors, or keep it in memory") from None
