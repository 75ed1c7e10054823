import contextlib
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from lowcal.data.decode import decode_files, read_rgb
from lowcal.errors import LowcalError


def pixel(path):
    image = read_rgb(str(path))
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def test_grey_becomes_equal_channels(tmp_path):
    Image.new("L", (4, 4), 77).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == (77, 77, 77)


def test_black_and_white(tmp_path):
    Image.new("1", (4, 4), 1).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == (255, 255, 255)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    levels = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / f"a.{suffix}")
    image = np.asarray(read_rgb(str(tmp_path / f"a.{suffix}")))
    assert image[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)  # red ink
    red, green, blue = pixel(tmp_path / "a.jpg")
    assert red > 240
    assert green < 15
    assert blue < 15


def test_palette(tmp_path):
    Image.new("RGB", (4, 4), (10, 200, 30)).quantize(4).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == (10, 200, 30)


def test_palette_with_transparency_gives_no_warning(tmp_path):
    image = Image.new("RGB", (4, 4), (10, 200, 30)).quantize(4)
    image.save(tmp_path / "a.png", transparency=bytes([0] * 4))
    assert pixel(tmp_path / "a.png") == (255, 255, 255)


@pytest.mark.parametrize(("alpha", "expected"), [(255, (10, 20, 30)), (0, (255, 255, 255))])
def test_transparency_lies_over_white(tmp_path, alpha, expected):
    Image.new("RGBA", (4, 4), (10, 20, 30, alpha)).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == expected


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixel(tmp_path / "a.gif") == (255, 0, 0)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # a camera turned by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_rgb(str(tmp_path / "a.jpg")).size == (4, 6)


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == (255, 0, 0)


def huge_png(path, width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [10_000, 30_000])
def test_huge_dimensions_are_an_error_not_a_warning(tmp_path, side):
    huge_png(tmp_path / "a.png", side, side)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        failures = failures_of(tmp_path / "a.png")
    assert "more than" in failures["a.png"]
    assert "pixels" in failures["a.png"]


def failures_of(*paths):
    failures = {}
    decode_files(
        [str(path) for path in paths], 4, lambda image, size: image.resize((size, size)),
        lambda path, reason: failures.update({path.rpartition("/")[2]: reason}),
    )  # fmt: skip
    return failures


def test_each_kind_of_damage_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    Image.fromarray(noise).save(tmp_path / "whole.png")
    for suffix in ("jpg", "png"):
        whole = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not pixels")
    Image.fromarray(noise[..., 0].astype(np.float32)).save(tmp_path / "float.tif")
    failures = failures_of(*sorted(tmp_path.iterdir()), tmp_path / "gone.png")
    assert set(failures) == {"cut.jpg", "cut.png", "empty.jpg", "text.jpg", "float.tif", "gone.png"}
    assert failures["empty.jpg"] == "the file is empty"
    assert failures["text.jpg"] == "not an image"
    assert "truncated" in failures["cut.jpg"]
    assert "floating-point" in failures["float.tif"]
    assert failures["gone.png"] == "No such file or directory"


def test_no_damaged_png_escapes_as_another_exception(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
        (tmp_path / "a.png").write_bytes(damaged)
        with contextlib.suppress(LowcalError):  # some bits do not matter
            read_rgb(str(tmp_path / "a.png"))


def test_pixels_come_in_the_order_of_the_files(tmp_path):
    for level in range(200):  # more than one task's share
        Image.new("L", (4, 4), level).save(tmp_path / f"{level:03}.png")
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    pixels, read = decode_files(paths, 4, lambda image, size: image, lambda path, reason: None)
    assert read.all()
    assert pixels.shape == (200, 3, 4, 4)
    assert pixels[:, 0, 0, 0].tolist() == list(range(200))
