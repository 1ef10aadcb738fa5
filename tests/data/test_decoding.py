"""Decoding of images of every kind, compared with the pixels that they have by definition."""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, UnidentifiedImageError

from qat_runner.data.batches import WHOLE
from qat_runner.data.brightness import as_bytes
from qat_runner.data.decoding import SUFFIXES, decode_image, decode_pixels
from qat_runner.data.folder import FolderSource
from qat_runner.data.listing import Listing
from qat_runner.errors import RunError

GREYS = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
DEEP = np.arange(65536, dtype=np.uint16).reshape(256, 256)

Made = tuple[Image.Image, str, dict[str, Any]]


def three(greys: Any) -> Any:
    return np.repeat(np.asarray(greys)[..., None], 3, axis=2)


def read(path: Path) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = decode_image(path.read_bytes())
        pixels = decode_pixels(path.read_bytes())
    assert image.mode == "RGB"
    np.testing.assert_array_equal(pixels.permute(1, 2, 0), image)
    return np.asarray(image)


def palette(alpha: bool) -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 100, 50, 0, 0, 255])
    image.putdata([0, 1])
    if alpha:
        image.info["transparency"] = bytes([255, 0])
    return image


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composite colours onto white by the definition of the "over" operator, in float64."""
    share = alpha[..., None] / 255.0
    return np.rint(colours * share + 255 * (1 - share)).astype(np.uint8)


ALPHA = np.linspace(0, 255, 30).astype(np.uint8).reshape(6, 5)
RGBA = np.dstack([COLOURS, ALPHA])

KINDS: dict[str, tuple[Callable[[], Made], Any, int]] = {
    # the saved image, the expected pixels, the tolerance
    "RGB": (lambda: (Image.fromarray(COLOURS), "png", {}), COLOURS, 0),
    "L": (lambda: (Image.fromarray(GREYS), "png", {}), three(GREYS), 0),
    "1": (lambda: (Image.fromarray(GREYS > 99), "png", {}), three((GREYS > 99) * 255), 0),
    "1 in a TIFF": (lambda: (Image.fromarray(GREYS > 99), "tif", {}), three((GREYS > 99) * 255), 0),
    "P": (lambda: (palette(False), "png", {}), [[[200, 100, 50], [0, 0, 255]]], 0),
    "P with transparency": (lambda: (palette(True), "png", {}), [[[200, 100, 50], [255, 255, 255]]], 0),
    "RGBA": (lambda: (Image.fromarray(RGBA), "png", {}), on_white(COLOURS, ALPHA), 1),
    "RGBA in WebP": (lambda: (Image.fromarray(RGBA), "webp", {"lossless": True}), on_white(COLOURS, ALPHA), 1),
    "LA": (lambda: (Image.fromarray(RGBA[..., 2:], "LA"), "png", {}), on_white(three(COLOURS[..., 2]), ALPHA), 1),
    "RGB with a transparent colour": (
        lambda: (Image.fromarray(COLOURS), "png", {"transparency": tuple(COLOURS[0, 0].tolist())}),
        np.where((COLOURS[0, 0] == COLOURS).all(2)[..., None], 255, COLOURS),
        0,
    ),
    "L with a transparent grey": (
        lambda: (Image.fromarray(GREYS), "png", {"transparency": 7}),
        three(np.where(GREYS == 7, 255, GREYS)),
        0,
    ),
    "16 bits, PNG": (lambda: (Image.fromarray(DEEP), "png", {}), three(np.rint(DEEP / 257)), 0),
    "16 bits, TIFF": (lambda: (Image.fromarray(DEEP), "tif", {}), three(np.rint(DEEP / 257)), 0),
    "16 bits with a transparent grey": (
        lambda: (Image.fromarray(DEEP), "png", {"transparency": 514}),
        three(np.where(DEEP == 514, 255, np.rint(DEEP / 257))),
        0,
    ),
    "16 bits, 0 is white": (
        lambda: (Image.fromarray(DEEP), "tif", {"tiffinfo": {262: 0}}),
        three(255 - np.rint(DEEP / 257)),
        0,
    ),
    "8 bits, 0 is white": (lambda: (Image.fromarray(GREYS), "tif", {"tiffinfo": {262: 0}}), three(GREYS), 0),
    "16 bits, dark": (lambda: (Image.fromarray(DEEP[:1]), "png", {}), three(np.rint(DEEP[:1] / 257)), 0),
    "16 bits, other end first": (
        lambda: (Image.frombytes("I;16B", (256, 256), DEEP.astype(">u2").tobytes()), "tif", {}),
        three(np.rint(DEEP / 257)),
        0,
    ),
    "16 bits, PGM": (lambda: (Image.fromarray(DEEP), "pgm", {}), three(np.rint(DEEP / 257)), 0),
    "16 bits, dark PGM": (lambda: (Image.fromarray(DEEP[:1]), "pgm", {}), three(np.rint(DEEP[:1] / 257)), 0),
    "32 bits, bytes": (lambda: (Image.fromarray(GREYS.astype(np.int32)), "tif", {}), three(GREYS), 0),
    "32 bits, 16 used": (lambda: (Image.fromarray(DEEP.astype(np.int32)), "tif", {}), three(np.rint(DEEP / 257)), 0),
    "floats of 0..1": (lambda: (Image.fromarray((GREYS / 255).astype(np.float32)), "tif", {}), three(GREYS), 0),
    "floats of 0..255": (lambda: (Image.fromarray(GREYS.astype(np.float32)), "tif", {}), three(GREYS), 0),
    "CMYK": (
        lambda: (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "jpg", {"quality": 100}),
        [[[255, 0, 0]] * 2] * 2,
        3,
    ),
    "CMYK in a TIFF": (lambda: (Image.new("CMYK", (1, 1), (10, 100, 200, 50)), "tif", {}), [[[197, 125, 44]]], 1),
    "YCbCr": (lambda: (Image.new("YCbCr", (2, 2), (76, 85, 255)), "tif", {}), [[[254, 0, 0]] * 2] * 2, 2),
    "LAB": (lambda: (Image.new("LAB", (1, 1), (138, 128 + 81, 128 + 70)), "tif", {}), [[[255, 0, 0]]], 5),  # red at D50
    "1 pixel": (lambda: (Image.new("RGB", (1, 1), (1, 2, 3)), "bmp", {}), [[[1, 2, 3]]], 0),
    "GIF of two frames": (
        lambda: (_frame("red"), "gif", {"save_all": True, "append_images": [_frame("blue")]}),
        [[[255, 0, 0]] * 4] * 4,
        0,
    ),
    "WebP of two frames": (
        lambda: (_frame("red"), "webp", {"save_all": True, "append_images": [_frame("blue")], "lossless": True}),
        [[[255, 0, 0]] * 4] * 4,
        0,
    ),
    "PNG of two frames": (
        lambda: (_frame("red"), "apng", {"save_all": True, "append_images": [_frame("blue")]}),
        [[[255, 0, 0]] * 4] * 4,
        0,
    ),
    "TIFF of two pages": (
        lambda: (_frame("red"), "tiff", {"save_all": True, "append_images": [_frame("blue")]}),
        [[[255, 0, 0]] * 4] * 4,
        0,
    ),
}


def _frame(colour: str) -> Image.Image:
    return Image.new("RGB", (4, 4), colour)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image(tmp_path: Path, kind: str) -> None:
    make, seen, tolerance = KINDS[kind]
    image, suffix, options = make()
    path = tmp_path / f"0.{suffix}"
    image.save(path, **options)
    assert path.suffix in SUFFIXES
    np.testing.assert_allclose(read(path).astype(int), np.asarray(seen, dtype=int), atol=tolerance)


def test_12_bits(tmp_path: Path) -> None:
    """Pillow reads such TIFF files but cannot write them. The values are 0, 2048, 4095 and 1, two per three bytes."""
    packed = bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x01])
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8 + 2 + 9 * 12 + 4), (277, 1), (278, 1), (279, 6)]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    (tmp_path / "0.tif").write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + packed)
    assert read(tmp_path / "0.tif")[0, :, 0].tolist() == [0, 128, 255, 0]


UPRIGHT: dict[int, Callable[[Any], Any]] = {
    # EXIF 2.32, 4.6.4: from the stored image to the upright one
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg", "tif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_turned_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    stored = np.zeros((24, 16, 3), dtype=np.uint8)
    stored[:8, :8] = 250
    stored[:8, 8:] = 120
    exif = Image.Exif()
    exif[274] = orientation
    exact = {"png": {}, "tif": {}, "webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
    Image.fromarray(stored).save(tmp_path / f"0.{suffix}", exif=exif, **exact[suffix])
    np.testing.assert_allclose(read(tmp_path / f"0.{suffix}").astype(int), UPRIGHT[orientation](stored), atol=4)


def test_what_only_xmp_says_turns_a_jpeg_too(tmp_path: Path) -> None:
    stored = np.zeros((24, 16, 3), dtype=np.uint8)
    stored[:8] = 250
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    Image.fromarray(stored).save(tmp_path / "0.jpg", quality=100, subsampling=0, xmp=xmp)
    np.testing.assert_allclose(read(tmp_path / "0.jpg").astype(int), UPRIGHT[6](stored), atol=4)


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0XX*\0\1\2\3\4", b"Exif\0\0II*\0\xff\xff\xff\xff", b"nothing"]
)
def test_damaged_exif_data_leave_the_image(tmp_path: Path, exif: bytes) -> None:
    file = io.BytesIO()
    Image.fromarray(COLOURS).save(file, "JPEG", quality=100, subsampling=0)
    content = file.getvalue()
    marker = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    (tmp_path / "0.jpg").write_bytes(content[:2] + marker + content[2:])
    assert read(tmp_path / "0.jpg").shape == COLOURS.shape


def _png(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _saved(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def _floats(*values: float) -> bytes:
    return _saved(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "not one of JPEG, PNG"),
    "text": (lambda: b"<html>404 Not Found</html>", "not one of JPEG, PNG"),
    "truncated JPEG": (lambda: _saved(Image.new("RGB", (99, 99)), "JPEG")[:-400], "OSError: .*[Tt]runcated"),
    "truncated PNG": (lambda: _saved(Image.fromarray(COLOURS), "PNG")[:60], "OSError|SyntaxError|broken"),
    "head of a JPEG": (lambda: _saved(Image.new("RGB", (99, 99)), "JPEG")[:20], "decoded"),
    "bomb": (
        lambda: _png((b"IHDR", struct.pack(">IIBBBBB", 65535, 65535, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b""))),
        "DecompressionBombError: .*4294836225 pixels",
    ),
    "bomb in a text": (
        lambda: _png(
            (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)),
            (b"zTXt", b"key\0\0" + zlib.compress(bytes(10**8))),
            (b"IDAT", zlib.compress(b"\0\0")),
        ),
        "ValueError: ",
    ),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n", "not one of JPEG, PNG"),
    "an icon": (lambda: _saved(Image.new("RGB", (16, 16)), "ICO"), "not one of JPEG, PNG"),
    "NaN": (lambda: _floats(0.5, float("nan")), "values contain NaN"),
    "infinity": (lambda: _floats(0.5, float("inf")), "float32 from 0.5 to inf"),
    "normalized floats": (lambda: _floats(-1, 1), "float32 from -1 to 1; must be whole numbers in 0..255 or"),
    "odd floats": (lambda: _floats(0, 0.5, 1.5), "float32 from 0 to 1.5"),
    "negative numbers": (lambda: _saved(Image.new("I", (2, 2), -5), "TIFF"), "int32 from -5 to -5"),
    "large numbers": (lambda: _saved(Image.new("I", (2, 2), 65536), "TIFF"), "int32 from 65536 to 65536"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_images_are_named_in_a_sentence(tmp_path: Path, kind: str) -> None:
    make, message = BAD[kind]
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / split / "a" / "0.png")
    (tmp_path / "val" / "a" / "1\n.png").write_bytes(make())
    source = FolderSource(tmp_path, 8, 0, skip_corrupt=True)
    images, labels = next(source.val(2, range(1), WHOLE))
    assert (images.shape, labels.tolist()) == ((1, 3, 8, 8), [0])
    (text,) = source.corrupt
    assert text.startswith(f"image {str(tmp_path / 'val' / 'a' / '1')!r}"[:-1] + r"\n.png' cannot be decoded (")
    assert text.isprintable()
    assert re.search(message, text), text


def test_an_image_that_cannot_be_opened(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / split / "a" / "0.png")
    source = FolderSource(tmp_path, 8, 0)
    (tmp_path / "val" / "a" / "0.png").unlink()
    with pytest.raises(
        Exception, match=r"0\.png cannot be decoded \(No such file or directory\); set dataset\.skip_corrupt"
    ):
        next(source.val(1, range(1), WHOLE))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(24, "Too many open files"), "cannot be read (Too many open files)"),
        (MemoryError("no room"), "cannot be read (MemoryError: no room)"),
    ],
)
def test_what_the_machine_cannot_read_just_now_is_never_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    """Otherwise the images that a network is trained on would depend on the state of the machine."""
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for name in "01":
            Image.new("RGB", (9, 9)).save(tmp_path / split / "a" / f"{name}.png")
    source = FolderSource(tmp_path, 8, 0, skip_corrupt=True)
    content = Listing.content

    def failing(listing: Listing, index: int) -> bytes:
        if index == 1:
            raise error
        return content(listing, index)

    monkeypatch.setattr(Listing, "content", failing)
    with pytest.raises(RunError, match=re.escape(f"1.png {text}")):
        next(source.val(2, range(1), WHOLE))


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 3000), (3000, 1), (40, 700), (701, 40)])
def test_images_of_any_size_and_shape(tmp_path: Path, size: tuple[int, int]) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", size, (9, 99, 200)).save(tmp_path / split / "a" / "0.png")
    source = FolderSource(tmp_path, 32, 0)
    for images, _ in (next(source.val(1, range(1), WHOLE)), next(source.train(1, 0, 0, range(1), WHOLE))):
        assert torch.equal(images, torch.tensor([9, 99, 200], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 32))


def test_the_middle_of_a_long_image_is_seen(tmp_path: Path) -> None:
    long = np.zeros((4, 1000, 3), dtype=np.uint8)
    long[:, 490:510] = 255
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(long).save(tmp_path / split / "a" / "0.png")
    images, _ = next(FolderSource(tmp_path, 32, 0).val(1, range(1), WHOLE))
    assert images.min() == 255


def test_what_is_no_image_is_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(BAD["PostScript"][0]())
    with pytest.raises(UnidentifiedImageError):
        decode_image((tmp_path / "0.jpg").read_bytes())


BYTES = arrays(np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 4)), elements=st.integers(0, 255))


@given(
    values=BYTES,
    dtype=st.sampled_from(["u1", "u2", "u4", "u8", "i2", "i4", "i8", "f2", "f4", "f8", ">u2", ">i4", ">f4"]),
)
def test_bytes_come_back_from_any_type(values: np.ndarray, dtype: str) -> None:
    if np.dtype(dtype).kind == "f":
        np.testing.assert_array_equal(as_bytes((values / 255).astype(dtype)), values)
        if values.max() <= 1:
            return  # as floats, 0 and 1 are black and white
    np.testing.assert_array_equal(as_bytes(values.astype(dtype)), values)


@given(values=BYTES, wrong=st.sampled_from([-1, -0.001, 255.5, 256, 1e30, np.nan, np.inf, -np.inf]))
def test_other_values_are_refused(values: np.ndarray, wrong: float) -> None:
    spoiled = values.astype(np.float64)
    spoiled.flat[0] = wrong
    with pytest.raises(ValueError, match=r"contain NaN|must be whole numbers in 0\.\.255 or floats in 0\.\.1"):
        as_bytes(spoiled)
