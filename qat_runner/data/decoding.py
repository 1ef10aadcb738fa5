"""Decode image files of any supported kind to RGB images with one byte per channel.

- An image is rotated upright according to the orientation in its EXIF data.
- Transparent pixels are composited onto white.
- Greyscale values of more than 8 bits are scaled, not clipped at 255: see `_deep_grey`.
- Of several frames, the first one is used.
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
"""Suffixes, in lower case, of the files that count as images."""

FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "AVIF", "BMP", "PPM")
"""Formats that such a file may contain. They are restricted because Pillow detects formats by content, and passes some
of them to other programs (EPS)."""

BITS_PER_SAMPLE = 258
"""TIFF tag of the bits per sample"""

PHOTOMETRIC, WHITE_IS_ZERO = 262, 0
"""TIFF tag of the photometric interpretation, and its value for greyscale images in which 0 is white"""

ORIENTATION = 274
"""EXIF tag of the orientation"""


def decode_image(content: bytes) -> Image.Image:
    """Decode the content of a file to an image of mode RGB.

    Raises:
        OSError: the content is not an image of FORMATS, or is incomplete.
        ValueError: the range of the pixel values is ambiguous.
        Image.DecompressionBombError: the image has more pixels than Pillow allows.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged EXIF data and the like, which affect no pixel
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        image.load()
        with suppress(Exception):  # the EXIF data may be invalid; the pixels are decoded already
            ImageOps.exif_transpose(image, in_place=True)
        return _in_colour(image)


def decode_pixels(content: bytes) -> Tensor:
    """Decode the content of a file to the same pixels as `decode_image`, but faster where torchvision can decode it.

    torchvision decodes upright greyscale or colour JPEGs. Both libraries use libjpeg, and give the same bytes where
    they are built with the same kind of it, as in the published wheels.

    Returns:
        [3, H, W], uint8; the three channels of a pixel are adjacent in memory.

    Raises:
        OSError, ValueError, Image.DecompressionBombError: as `decode_image`.
    """
    if plain_jpeg(content):
        with suppress(RuntimeError):  # the file is damaged: Pillow reports what is wrong
            return jpeg_pixels([as_tensor(content)], torch.device("cpu"))[0]
    return torch.from_numpy(np.array(decode_image(content))).permute(2, 0, 1)


def plain_jpeg(content: bytes) -> bool:
    """Return whether the content, by its header, is a JPEG that torchvision decodes to the same pixels as Pillow."""
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(content), formats=("JPEG",))  # raises for decompression bombs
        says = {"exif", "xmp"} & image.info.keys()  # either may contain an orientation
        upright = not says or image.getexif().get(ORIENTATION, 1) == 1
        return image.format == "JPEG" and image.mode in ("L", "RGB") and upright
    return False


def jpeg_pixels(jpegs: list[Tensor], device: torch.device) -> list[Tensor]:
    """Decode JPEGs that are `plain_jpeg` on a device, to the same format as `decode_pixels`.

    Raises:
        RuntimeError: one of them is damaged.
    """
    # The decoder allocates memory on the current stream, but writes to it on its own stream without synchronizing. On
    # the training stream it could get memory that training kernels, which are queued but have not run yet, still use.
    aside = _aside(device) if device.type == "cuda" else None
    with warnings.catch_warnings(), nullcontext() if aside is None else torch.cuda.stream(aside):
        warnings.simplefilter("ignore")
        from torchvision.io import ImageReadMode, decode_jpeg  # deferred: the import takes a second

        pixels: list[Tensor] = decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=device)
    if aside is not None:
        training = torch.cuda.current_stream(device)
        training.wait_stream(aside)
        for image in pixels:
            image.record_stream(training)
    return pixels


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """Return a stream of the device whose memory only decoded images use."""
    return torch.cuda.Stream(device)


def as_tensor(content: bytes) -> Tensor:
    """Return the bytes as a writable tensor, uint8 [length]."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _in_colour(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _deep_grey(image)
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """Convert a greyscale image of 12, 16 or 32 bits or floats to bytes; a transparent grey value becomes white.

    Values of 12 and 16 bits are scaled from the whole range of their type. Values of 32 bits do not use the whole range
    in practice: whole numbers up to 255 count as bytes, up to 65535 as 16 bits, and floats are taken as in `as_bytes`.

    Raises:
        ValueError: the values are in another range.
    """
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    elif image.mode == "I" and (image.format == "PPM" or (values.min() >= 0 and 255 < values.max() <= 65535)):
        bits = 16  # Pillow scales the values of PGM files to 16 bits
    else:
        bits = 0
    greys = np.rint(values * (255 / (2**bits - 1))).astype(np.uint8) if bits else as_bytes(values)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow handles this only for images of 8 bits
        greys = 255 - greys
    if isinstance(transparent := image.info.get("transparency"), int):
        greys = np.where(values == transparent, 255, greys).astype(np.uint8)
    return Image.fromarray(greys)
