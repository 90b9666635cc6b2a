"""Reading images of all kinds, and refusing what is none, with the file and the rule."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mhmoe_fairseq.data.images.reading import MAX_PIXELS, ImageError, read_image


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def pixels(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def png(
    width: int, height: int, kind: int = 2, depth: int = 8, data: bytes = b"", before: dict[bytes, bytes] | None = None
) -> bytes:
    """A PNG file by hand: its header may promise more than there is; ``before`` are chunks before the pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">2I5B", width, height, depth, kind, 0, 0, 0)
    more = b"".join(chunk(name, content) for name, content in (before or {}).items())
    pixels_and_end = chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + pixels_and_end


def packed(samples: list[int], depth: int) -> bytes:
    """One row of samples as PNG keeps them, after its filter byte."""
    bits = "".join(format(sample, f"0{depth}b") for sample in samples)
    bits += "0" * (-len(bits) % 8)
    return b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")


GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6


@pytest.mark.parametrize(
    ("kind", "depth"),
    [*((GREY, depth) for depth in (1, 2, 4, 8, 16)), *((PALETTE, depth) for depth in (1, 2, 4, 8)),
     *((kind, depth) for kind in (RGB, GREY_ALPHA, RGB_ALPHA) for depth in (8, 16))],
)  # fmt: skip
def test_what_is_transparent_is_white_in_every_kind_of_png(tmp_path, kind, depth):
    """A transparent and an opaque pixel, side by side, of every kind and depth that PNG has."""
    largest = 2**depth - 1
    clear, solid = {1: (0, 1), 2: (1, 2)}.get(depth, (largest // 3, largest // 2))
    samples, chunks = {
        GREY: ([clear, solid], {b"tRNS": struct.pack(">H", clear)}),
        RGB: ([clear, clear // 2, 0, solid, solid, solid], {b"tRNS": struct.pack(">3H", clear, clear // 2, 0)}),
        PALETTE: ([0, 1], {b"PLTE": bytes([9, 8, 7] + 3 * [round(255 * solid / largest)]), b"tRNS": b"\0"}),
        GREY_ALPHA: ([clear, 0, solid, largest], {}),
        RGB_ALPHA: ([clear, 0, 0, 0, solid, solid, solid, largest], {}),
    }[kind]
    path = tmp_path / "a.png"
    path.write_bytes(png(2, 2, kind, depth, 2 * packed(samples, depth), chunks))
    rows = pixels(path)
    assert (rows[:, 0] == 255).all()
    assert np.abs(rows[:, 1].astype(int) - 255 * solid / largest).max() <= 1


def test_rgb_is_read_as_it_is(tmp_path):
    values = noise(5, 7, 3)
    assert np.array_equal(pixels(saved(Image.fromarray(values), tmp_path / "a.png")), values)


def test_transparent_parts_become_white(tmp_path):
    values = noise(4, 6, 4)
    values[0, :, 3], values[1, :, 3] = 0, 255
    alpha = values[..., 3:].astype(float) / 255
    expected = values[..., :3] * alpha + 255 * (1 - alpha)  # composition over white, slowly
    read = pixels(saved(Image.fromarray(values), tmp_path / "a.png"))
    assert np.abs(read - expected).max() <= 1
    assert (read[0] == 255).all() and np.array_equal(read[1], values[1, :, :3])


def test_a_palette_with_alpha(tmp_path):
    image = Image.new("P", (3, 2))
    image.putpalette([10, 20, 30, 200, 100, 50, 7, 7, 7])
    image.putdata([0, 1, 2, 2, 1, 0])
    path = saved(image, tmp_path / "a.png", transparency=bytes([255, 0, 255]))
    assert pixels(path).tolist() == [
        [[10, 20, 30], [255, 255, 255], [7, 7, 7]],
        [[7, 7, 7], [255, 255, 255], [10, 20, 30]],
    ]


def test_one_transparent_colour_of_grey_and_rgb(tmp_path):
    grey = Image.fromarray(np.array([[0, 9, 255]] * 2, dtype=np.uint8))
    assert pixels(saved(grey, tmp_path / "a.png", transparency=9))[0].tolist() == [[0] * 3, [255] * 3, [255] * 3]
    colour = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]] * 2, dtype=np.uint8))
    assert pixels(saved(colour, tmp_path / "b.png", transparency=(1, 2, 3)))[0].tolist() == [[255] * 3, [4, 5, 6]]


def test_cmyk_is_converted(tmp_path):
    flat = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # magenta and yellow make red
    red = pixels(saved(flat, tmp_path / "a.jpg", quality=95))
    assert (red[..., 0] > 200).all() and (red[..., 1:] < 60).all()


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_keeps_its_shades(tmp_path, suffix):
    values = np.array([[0, 257, 32896], [65535, 128, 51400]], dtype=np.uint16)
    read = pixels(saved(Image.fromarray(values), tmp_path / f"a.{suffix}"))
    assert read[..., 0].tolist() == [[0, 1, 128], [255, 0, 200]]
    assert (read == read[..., :1]).all()


def test_16_bit_colour_and_grey_with_alpha(tmp_path):
    colour = struct.pack(">B6H", 0, 0, 257 * 9, 65535, 65535, 0, 257 * 200) * 2
    (tmp_path / "a.png").write_bytes(png(2, 2, kind=2, depth=16, data=colour))
    assert pixels(tmp_path / "a.png")[0].tolist() == [[0, 9, 255], [255, 0, 200]]
    grey = struct.pack(">B4H", 0, 257 * 50, 65535, 257 * 50, 0) * 2
    (tmp_path / "b.png").write_bytes(png(2, 2, kind=4, depth=16, data=grey))
    assert pixels(tmp_path / "b.png")[0].tolist() == [[50] * 3, [255] * 3]


def test_black_and_white_and_the_first_frame(tmp_path):
    assert pixels(saved(Image.new("1", (4, 4), 1), tmp_path / "a.png")).min() == 255
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    path = saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (pixels(path) == [255, 0, 0]).all()


@pytest.mark.parametrize(
    "image, rule",
    [
        (Image.fromarray(np.array([[-1, 5]] * 2, dtype=np.int32)), "grey values from -1 to 5"),
        (Image.fromarray(np.array([[1, 65536]] * 2, dtype=np.int32)), "grey values from 1 to 65536"),
        (Image.fromarray(np.zeros((2, 2), np.float32)), "colours of mode F"),
        (Image.new("LAB", (2, 2)), "colours of mode LAB"),
    ],
    ids=["negative", "large", "float", "lab"],
)
def test_values_without_a_rule_are_refused(tmp_path, image, rule):
    path = saved(image, tmp_path / "a.tiff")
    with pytest.raises(ImageError, match=rf"a\.tiff: {rule}, must have 8 or 16 bits"):
        read_image(path)


def test_big_endian_and_32_bit_grey(tmp_path):
    values = np.array([[0, 257, 32896], [65535, 128, 51400]])
    (tmp_path / "a.pgm").write_bytes(b"P5 3 2 65535\n" + values.astype(">u2").tobytes())
    saved(Image.fromarray(values.astype(np.int32)), tmp_path / "b.tiff")
    for name in ("a.pgm", "b.tiff"):
        assert pixels(tmp_path / name)[..., 0].tolist() == [[0, 1, 128], [255, 0, 200]]


def test_programs_are_no_images(tmp_path):
    path = saved(Image.new("RGB", (8, 8)), tmp_path / "a.eps")
    with pytest.raises(ImageError, match=r"a\.eps: not an image of a known format \(JPEG, PNG, "):
        read_image(path)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1)])
def test_one_pixel_is_refused_and_two_are_not(tmp_path, size):
    path = saved(Image.new("RGB", size), tmp_path / "a.png")
    with pytest.raises(ImageError, match=rf"a\.png: {size[0]} x {size[1]} pixels, each side must have at least 2"):
        read_image(path)
    assert pixels(saved(Image.new("RGB", (2, 2)), tmp_path / "b.png")).shape == (2, 2, 3)


@pytest.mark.parametrize("suffix, options", [("png", {}), ("jpg", {"quality": 90}), ("webp", {"lossless": True})])
def test_truncated_files_are_refused(tmp_path, suffix, options):
    path = saved(Image.fromarray(noise(64, 64, 3)), tmp_path / f"a.{suffix}", **options)
    content = path.read_bytes()
    for share in (0.3, 0.6, 0.95):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ImageError, match=rf"a\.{suffix}: (truncated or damaged image|not an image)"):
            read_image(path)


def test_damaged_bytes_are_refused(tmp_path):
    path = saved(Image.fromarray(noise(64, 64, 3)), tmp_path / "a.png")
    content = bytearray(path.read_bytes())
    content[200:300] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.png: truncated or damaged image \(.+\)"):
        read_image(path)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG", b"<svg/>"])
def test_what_is_no_image(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.png: not an image of a known format"):
        read_image(path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(ImageError, match=r"a\.png: no such image"):
        read_image(tmp_path / "a.png")
    with pytest.raises(IsADirectoryError):  # no fault of an image
        read_image(tmp_path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8_001, 10_000, 20_000, 60_000])
def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, side):
    """The file has no pixel at all: only its header can have been read."""
    path = tmp_path / "a.png"
    path.write_bytes(png(side, side))
    assert side * side > MAX_PIXELS
    with pytest.raises(ImageError, match=r"a\.png: .*more than 64 megapixels"):
        read_image(path)
    path.write_bytes(png(8_000, 8_000))
    with pytest.raises(ImageError, match=r"a\.png: truncated"):  # so many may be, but there are none
        read_image(path)
