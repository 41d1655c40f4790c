"""What is uploaded: pictures and a video, the same ones in every run."""

import io
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

from tests.samples import longer_mp4

VIDEO_BYTES: Final = 10_000_000
_SEED: Final = 441
_BOUNDARY: Final = "alamofire.boundary.0f1e2d3c4b5a6978"
FORM_TYPE: Final = {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}
_WIDTH: Final = 2400
# How much of a picture each of its rows takes, as noise of this quality.
_ROW_BYTES: Final = 4_864
_QUALITY: Final = 92
_GPS_IFD: Final = 0x8825
_GPS: Final = {1: "N", 2: (42.0, 17.0, 30.0), 3: "W", 4: (83.0, 42.0, 45.0)}
_MAKE: Final = 0x010F
_DQT: Final = b"\xff\xdb"
# A step of quantisation may be 1 to 255. load.lua writes numbers the same way.
_DIGITS: Final = 255


@dataclass(frozen=True)
class Form:
    """The body of a multipart form, with a picture that is another one for each number.

    A number is four bytes between `before` and `after`.
    """

    before: bytes
    after: bytes

    def body(self, number: int) -> bytes:
        """Return the whole body; `number` is below 4 000 000 000."""
        digits = bytes(1 + number // _DIGITS**place % _DIGITS for place in range(4))
        return b"".join((self.before, digits, self.after))

    def write(self, folder: Path) -> None:
        """Write the form into `folder`, for programs that `read` it or are written in Lua."""
        folder.mkdir()
        (folder / "before").write_bytes(self.before)
        (folder / "after").write_bytes(self.after)


def read(folder: Path) -> Form:
    """Return the form that was written into `folder`."""
    return Form((folder / "before").read_bytes(), (folder / "after").read_bytes())


def picture_form(size: int) -> Form:
    """Return a form with a picture of about `size` bytes."""
    data = _picture(size)
    # The last of the 64 steps of the first table (ITU-T T.81 §B.2.4.1), behind the marker, the
    # length and the table's number: the finest grain of the picture becomes another.
    at = data.index(_DQT) + 5 + 60
    head, tail = _around("image", "chattImage", "image/jpeg")
    return Form(head + data[:at], data[at + 4 :] + tail)


def video() -> bytes:
    """Return an MP4 file of `VIDEO_BYTES`."""
    return longer_mp4(VIDEO_BYTES)


def video_body() -> bytes:
    """Return the body of a form with the video."""
    head, tail = _around("video", "chattVideo", "video/mp4")
    return head + video() + tail


def _picture(size: int) -> bytes:
    """Return a JPEG of noise that tells where it was taken; nothing makes noise smaller."""
    shape = (_WIDTH, round(size / _ROW_BYTES))
    noise = random.Random(_SEED).randbytes(3 * shape[0] * shape[1])
    exif = Image.Exif()
    exif[_MAKE] = "Noise"
    exif[_GPS_IFD] = _GPS
    file = io.BytesIO()
    Image.frombytes("RGB", shape, noise).save(
        file, "JPEG", quality=_QUALITY, subsampling=0, exif=exif
    )
    return file.getvalue()


def _around(name: str, filename: str, media_type: str) -> tuple[bytes, bytes]:
    """Return what stands before and after the one file of a form (RFC 7578)."""
    texts = "".join(
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"\r\n\r\n{text}\r\n'
        for field, text in (("username", "ann"), ("message", "a picture or a video"))
    )
    head = (
        f'{texts}--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}";'
        f' filename="{filename}"\r\nContent-Type: {media_type}\r\n\r\n'
    )
    return head.encode(), f"\r\n--{_BOUNDARY}--\r\n".encode()
