"""The content of a file as a picture of three bytes a pixel, whatever kind of picture it is.

- It is turned upright where its EXIF data say how the camera was held.
- Transparency is shown on white.
- Greys of more than 8 bits are scaled, not cut off at 255: see `_deep_grey`.
- Of several frames, the first is the picture.
"""

import functools
import io
import warnings
from contextlib import nullcontext, suppress

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from qat_runner.data.brightness import as_bytes

SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".apng", ".tif", ".tiff", ".webp", ".gif", ".avif"),
    *(".bmp", ".ppm", ".pgm", ".pbm"),
)
"""Of files that are taken for pictures, in lower case."""

FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "AVIF", "BMP", "PPM")
"""What such a file may hold. Pillow goes by content, and knows formats that it hands to other programs (EPS)."""

BITS_PER_SAMPLE = 258
"""TIFF's tag"""

PHOTOMETRIC, WHITE_IS_ZERO = 262, 0
"""TIFF's tag that says what is white, and one of its values"""

ORIENTATION = 274
"""EXIF's tag"""


def decode_picture(content: bytes) -> Image.Image:
    """The picture that a file holds, of mode RGB.

    Raises:
        OSError: it is no picture of these formats, or part of one.
        ValueError: its numbers could mean anything.
        Image.DecompressionBombError: it has more pixels than Pillow allows.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged EXIF data, and the like, which change no pixel
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
        picture.load()
        with suppress(Exception):  # EXIF data may be anything; the pixels are there
            ImageOps.exif_transpose(picture, in_place=True)
        return _in_colour(picture)


def decode_pixels(content: bytes) -> Tensor:
    """The pixels of `decode_picture`, sooner where torchvision can decode them: those of upright grey or colour JPEGs.

    Both decode by libjpeg, to the same bytes where theirs are of one kind, as in the published wheels.

    Returns:
        [3, H, W], uint8, the colours of a pixel side by side in memory.

    Raises:
        OSError, ValueError, Image.DecompressionBombError: as `decode_picture`.
    """
    if plain_jpeg(content):
        with suppress(RuntimeError):  # damaged: Pillow knows what is wrong
            return jpeg_pixels([as_tensor(content)], torch.device("cpu"))[0]
    return torch.from_numpy(np.array(decode_picture(content))).permute(2, 0, 1)


def plain_jpeg(content: bytes) -> bool:
    """Whether it seems to be a JPEG that torchvision decodes to what Pillow does, by its head."""
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = Image.open(io.BytesIO(content), formats=("JPEG",))  # refuses bombs
        says = {"exif", "xmp"} & picture.info.keys()  # either may turn it
        upright = not says or picture.getexif().get(ORIENTATION, 1) == 1
        return picture.format == "JPEG" and picture.mode in ("L", "RGB") and upright
    return False


def jpeg_pixels(jpegs: list[Tensor], device: torch.device) -> list[Tensor]:
    """The pixels of JPEGs that are `plain_jpeg`, as `decode_pixels` gives them, decoded on a device.

    Raises:
        RuntimeError: one of them is damaged.
    """
    # The decoder takes memory of the current stream and writes it on a stream of its own, which waits for nothing: it
    # must not get what kernels of training, which are still to run, have been the last to need.
    aside = _aside(device) if device.type == "cuda" else None
    with warnings.catch_warnings(), nullcontext() if aside is None else torch.cuda.stream(aside):
        warnings.simplefilter("ignore")
        from torchvision.io import ImageReadMode, decode_jpeg  # which takes a second to import

        pixels: list[Tensor] = decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=device)
    if aside is not None:
        training = torch.cuda.current_stream(device)
        training.wait_stream(aside)
        for picture in pixels:
            picture.record_stream(training)
    return pixels


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """A stream whose memory nothing but decoded pictures uses."""
    return torch.cuda.Stream(device)


def as_tensor(content: bytes) -> Tensor:
    """Bytes as uint8 [length], which may be written to."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _in_colour(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):
        picture = _deep_grey(picture)
    elif picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _deep_grey(picture: Image.Image) -> Image.Image:
    """Greys of 12, 16 or 32 bits or floats, as bytes; on white where one of them is transparent.

    12 and 16 bits count as the whole range of their type. 32 bits hold no such range in practice: whole numbers up to
    255 count as bytes, up to 65535 as 16 bits, and floats as in `as_bytes`.

    Raises:
        ValueError: other values.
    """
    values = np.asarray(picture)
    tags = getattr(picture, "tag_v2", {})
    if picture.mode.startswith("I;16"):
        bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    elif picture.mode == "I" and (picture.format == "PPM" or (values.min() >= 0 and 255 < values.max() <= 65535)):
        bits = 16  # Pillow stretches those of PGM to that
    else:
        bits = 0
    greys = np.rint(values * (255 / (2**bits - 1))).astype(np.uint8) if bits else as_bytes(values)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # which Pillow sees to in bytes alone
        greys = 255 - greys
    if isinstance(transparent := picture.info.get("transparency"), int):
        greys = np.where(values == transparent, 255, greys).astype(np.uint8)
    return Image.fromarray(greys)
