"""The strict reader of image files, and unusual or unusable files met by each loader that reads files."""

import contextlib
import re
import struct
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFile

from lowcal.data.images import decode_files, fit_cropped, fit_exact, read_rgb, unreadable_files
from lowcal.errors import LowcalError

from ..faults.pictures import KINDS, LOADERS, check


def images():
    """Images of one colour in forms that are converted, each with the colour expected."""
    palette = Image.new("RGB", (4, 4), (10, 200, 30)).quantize(4)
    clear = palette.copy()
    clear.info["transparency"] = bytes([0] * 4)
    white = (255, 255, 255)
    yield Image.new("L", (4, 4), 77), (77, 77, 77)
    yield Image.new("1", (4, 4), 1), white
    yield palette, (10, 200, 30)
    yield clear, white
    yield Image.new("RGBA", (4, 4), (10, 20, 30, 255)), (10, 20, 30)
    yield Image.new("RGBA", (4, 4), (10, 20, 30, 0)), white


def test_every_mode_becomes_rgb_over_white(tmp_path):
    for image, colour in images():
        image.save(tmp_path / "a.png")
        found = read_rgb(str(tmp_path / "a.png"))
        assert (found.mode, found.getpixel((0, 0))) == ("RGB", colour)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    levels = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / f"a.{suffix}")
    image = np.asarray(read_rgb(str(tmp_path / f"a.{suffix}")))
    assert image[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # a camera turned by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_rgb(str(tmp_path / "a.jpg")).size == (4, 6)


def unreadable(*paths):
    _, failures = decode_files([str(path) for path in paths], 4, fit_cropped, "skip")
    return {paths[position].name: reason for position, reason in failures.items()}


@pytest.mark.parametrize("side", [10_000, 30_000])
def test_huge_dimensions_are_an_error_not_a_warning(tmp_path, side):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert re.search("more than 89,478,485 pixels", unreadable(tmp_path / "a.png")["a.png"])


def test_no_damaged_png_escapes_as_another_exception(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
        (tmp_path / "a.png").write_bytes(damaged)
        with contextlib.suppress(LowcalError):  # some bits do not matter
            read_rgb(str(tmp_path / "a.png"))


def test_pixels_and_reasons_come_in_the_order_of_the_files(tmp_path):
    for level in range(200):  # more than one chunk
        Image.new("L", (4, 4), level).save(tmp_path / f"{level:03}.png")
    for name, content in {"050.png": b"", "150.png": b"no image"}.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(path) for path in (*sorted(tmp_path.iterdir()), tmp_path / "gone.png")]
    pixels, failures = decode_files(paths, 4, fit_exact, "skip")
    assert pixels.shape == (201, 3, 4, 4)
    assert pixels[:, 0, 0, 0].tolist() == [0 if level in (50, 150, 200) else level for level in range(201)]
    assert list(failures.items()) == [
        (50, "the file is empty"), (150, "not an image"), (200, "No such file or directory"),
    ]  # fmt: skip
    assert unreadable_files(paths) == failures
    with pytest.raises(LowcalError, match=r"cannot read image .*050.png: the file is empty; .*data.on_error=skip"):
        decode_files(paths, 4, fit_exact, "stop")


QUICK = ("CMYK", "strip of 1x1,000,000", "truncated JPEG", "huge dimensions")  # the others are read alike


def loaded(kind, loader):
    slow = loader != "image-folder" and (kind not in QUICK or loader != "imagenet")
    return pytest.param(kind, loader, marks=pytest.mark.slow if slow else ())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12 on
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a single processor
@pytest.mark.parametrize(("kind", "loader"), [loaded(kind, loader) for loader in LOADERS for kind in KINDS])
def test_a_file_is_used_as_what_it_shows_or_named_or_left_out(tmp_path, kind, loader):
    check(tmp_path / "images", loader, KINDS[kind])


def test_the_check_tells_right_from_wrong(tmp_path, monkeypatch):
    """A reader that takes what it can from a truncated file, and a colour that is another."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(AssertionError, match="it was used"):
        check(tmp_path / "cut", "image-folder", KINDS["truncated JPEG"])
    with pytest.raises(AssertionError):
        check(tmp_path / "other", "image-folder", replace(KINDS["CMYK"], colour=(0, 254, 0)))
