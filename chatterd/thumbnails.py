"""Decoding a picture and making it small. Runs in the worker process of `pictures`, nowhere else.

Importing this imports Pillow, which the server itself does without.
"""

from collections.abc import Callable
from io import BytesIO
from typing import BinaryIO, Final

import pillow_heif
from PIL import ExifTags, Image, ImageCms

_MAX_SIDE: Final = 512
_QUALITY: Final = 80
_FORMATS: Final = ("JPEG", "PNG", "GIF", "WEBP", "HEIF")

# What turns a picture upright, by its Exif orientation.
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What a picture without transparency is made small as, by its mode; RGB if it is none of these.
_PLAIN_MODES: Final = {"1": "L", "L": "L", "I;16": "L", "CMYK": "CMYK"}

# Our limit is checked as soon as the size is known, and tells it.
Image.MAX_IMAGE_PIXELS = None
# An embedded thumbnail need not show what the picture shows. One thread: more would take more
# memory, and the processors are the server's.
pillow_heif.register_heif_opener(
    decode_threads=1, thumbnails=False, depth_images=False, aux_images=False
)


class TooManyPixels(Exception):  # noqa: N818 - a fact about the picture, not a fault
    """A picture has more pixels than it may have."""

    def __init__(self, pixels: int) -> None:
        super().__init__(pixels)
        self.pixels = pixels


def measured(file: BinaryIO, max_pixels: int) -> tuple[int, int]:
    """Return the width and height of a picture, upright; no pixel is decoded.

    Raises as `reduced` does.
    """
    with Image.open(file, formats=_FORMATS) as image:
        size = _size(image, max_pixels)
        # Pillow would decode a PNG to see whether its Exif block stands behind its pixels.
        turn = _orientation(lambda: _png_exif(file) if image.format == "PNG" else image.getexif())
    return size[::-1] if turn >= 5 else size


def reduced(file: BinaryIO, max_pixels: int) -> bytes:
    """Return the thumbnail of a picture's first frame, upright, as WebP.

    Raises `TooManyPixels` before any pixel is decoded, and whatever Pillow raises for what it
    cannot decode.
    """
    with Image.open(file, formats=_FORMATS) as image:
        _size(image, max_pixels)
        small = _small(image)
        orientation = _orientation(image.getexif)  # now: a PNG's may stand behind its pixels
    if orientation in _TURNS:
        small = small.transpose(_TURNS[orientation])
    small = _in_srgb(small)
    thumbnail = BytesIO()
    small.save(thumbnail, "WEBP", quality=_QUALITY)
    return thumbnail.getvalue()


def _size(image: Image.Image, max_pixels: int) -> tuple[int, int]:
    width, height = image.size
    if width * height > max_pixels:
        raise TooManyPixels(width * height)
    return width, height


def _png_exif(file: BinaryIO) -> Image.Exif:
    """Return the Exif block of a PNG, or an empty one (PNG §5.3, §11.3.3.6)."""
    exif = Image.Exif()
    file.seek(8)  # behind the signature
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4]), head[4:]
        if kind == b"eXIf":
            exif.load(file.read(length))
            break
        file.seek(length + 4, 1)  # the checksum, too
    return exif


def _small(image: Image.Image) -> Image.Image:
    """Return a picture with sides of at most `_MAX_SIDE`, in the mode L, RGB, RGBA or CMYK."""
    if image.mode == "I;16":
        # Pillow's conversion takes all but the darkest for white, and knows no transparent grey.
        image = image.point(lambda grey: grey * (1 / 256))
        image.info.pop("transparency", None)
    # Before it is made small: colours of a palette cannot be averaged. What has such a mode
    # already is left to `thumbnail`, for which a JPEG is decoded in part only.
    mode = "RGBA" if image.has_transparency_data else _PLAIN_MODES.get(image.mode, "RGB")
    if image.mode != mode:
        image = image.convert(mode)
    size = (_MAX_SIDE, _MAX_SIDE)
    image.draft(None, size)  # closer to the end than `thumbnail` would, in a third of the time
    image.thumbnail(size)
    image.load()
    return image


def _orientation(read_exif: Callable[[], Image.Exif]) -> int:
    """Return the Exif orientation, from 1 to 8 (Exif 2.32 §4.6.4)."""
    try:
        value = read_exif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001 - whatever is wrong with the Exif block, the pixels are there
        return 1
    # A HEIC is turned as it is decoded, and its plug-in sets the value to 1.
    return value if value in _TURNS else 1


def _in_srgb(image: Image.Image) -> Image.Image:
    """Return a picture in sRGB, with the transparency it has."""
    try:
        profile = ImageCms.ImageCmsProfile(BytesIO(image.info.get("icc_profile") or b""))
        modes = {"CMYK": "CMYK"} if image.mode == "CMYK" else {"GRAY": "L", "RGB ": "RGB"}
        mode = modes[profile.profile.xcolor_space]
        colours = ImageCms.profileToProfile(
            image.convert(mode), profile, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
        assert colours is not None  # None is for a picture that is changed in place
    except (OSError, ValueError, KeyError, ImageCms.PyCMSError):  # none, or a broken one
        colours = image.convert("RGB")
    if image.mode == "RGBA":
        colours.putalpha(image.getchannel("A"))
    return colours
