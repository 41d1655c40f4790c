"""Pictures and videos: which formats are accepted, where they are kept, how they are served.

A file is named by its key, one path segment under `MEDIA_ROOT`. A key is never used twice and
what it names never changes.
"""

import hashlib
import os
import re
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, Final, Literal, NamedTuple

from anyio import to_thread
from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from werkzeug.http import parse_etags, parse_range_header
from werkzeug.utils import secure_filename

from chatterd.errors import Problem

Slot = Literal["image", "video"]
"""The two places for media in a chatt."""

SLOTS: Final[tuple[Slot, ...]] = ("image", "video")
SNIFF_SIZE: Final = 512
"""As many bytes of a file's beginning as `sniff` wants to see."""
_CHUNK_SIZE: Final = 256 * 1024


class Kind(NamedTuple):
    """A file format that is accepted: where it belongs, what it is called."""

    slot: Slot
    media_type: str
    extension: str


JPEG: Final = Kind("image", "image/jpeg", ".jpeg")
PNG: Final = Kind("image", "image/png", ".png")
GIF: Final = Kind("image", "image/gif", ".gif")
WEBP: Final = Kind("image", "image/webp", ".webp")
HEIC: Final = Kind("image", "image/heic", ".heic")
HEIF: Final = Kind("image", "image/heif", ".heif")
MP4: Final = Kind("video", "video/mp4", ".mp4")
QUICKTIME: Final = Kind("video", "video/quicktime", ".mov")
WEBM: Final = Kind("video", "video/webm", ".webm")

_MEDIA_TYPES: Final = {
    kind.extension: kind.media_type
    for kind in (JPEG, PNG, GIF, WEBP, HEIC, HEIF, MP4, QUICKTIME, WEBM)
} | {".jpg": JPEG.media_type}

# Brands of ISO base media files (ISO/IEC 14496-12 §4.3), by what plays them.
_BRANDS: Final[Mapping[bytes, Kind]] = {
    brand: kind
    for brands, kind in (
        (b"heic|heix|heim|heis|hevc|hevx", HEIC),
        (b"mif1|msf1", HEIF),
        (b"isom|iso2|iso3|iso4|iso5|iso6|iso7|iso8|iso9|mp41|mp42|mp71", MP4),
        (b"avc1|M4V |M4VH|M4VP|MSNV|dash|3gp4|3gp5|3gp6|3gp7", MP4),
        (b"qt  ", QUICKTIME),
    )
    for brand in brands.split(b"|")
}


def sniff(head: bytes) -> Kind | None:  # noqa: PLR0911 - a table of patterns, as the standard's
    """Tell the format from a file's first bytes, or None if it is none that is accepted.

    The patterns are those of the WHATWG MIME Sniffing standard (§6.1, §6.2), and the brands of
    ISO base media files for HEIC, MP4 and QuickTime.
    """
    if head.startswith(b"\xff\xd8\xff"):
        return JPEG
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    if head.startswith((b"GIF87a", b"GIF89a")):
        return GIF
    if head[:4] == b"RIFF" and head[8:14] == b"WEBPVP":
        return WEBP
    if head.startswith(b"\x1a\x45\xdf\xa3") and b"\x42\x82\x84webm" in head[:64]:
        return WEBM
    if head[4:8] == b"ftyp":
        return _brand_kind(head)
    # QuickTime files of before 2001 begin without naming a brand.
    if head[4:8] in {b"moov", b"mdat", b"wide"}:
        return QUICKTIME
    return None


def _brand_kind(head: bytes) -> Kind | None:
    size = int.from_bytes(head[:4])
    compatible = (head[i : i + 4] for i in range(16, min(size, len(head)) - 3, 4))
    brands = [head[8:12], *compatible]
    # Files that name a brand of ours besides: AVIF, which the clients do not show, and audio.
    if b"avif" in brands or b"avis" in brands or brands[0] in {b"M4A ", b"M4B ", b"M4P "}:
        return None
    return next((_BRANDS[brand] for brand in brands if brand in _BRANDS), None)


class MediaStore:
    """The media folder. File work is done in threads; every method may raise `OSError`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # In the same file system, so that a finished file is moved without copying; hidden, so
        # that no key reaches it.
        self.incoming = root / ".incoming"

    def prepare(self) -> None:
        """Make the folders. Raises `OSError` where they cannot be written."""
        self.incoming.mkdir(parents=True, exist_ok=True)
        probe = self.incoming / f"probe-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()

    async def keep(self, files: Mapping[Slot, tuple[Path, Kind]], name: str) -> dict[Slot, str]:
        """Move received files to where they are served from, durably; return their keys.

        `name`, the author's, makes keys readable; nothing depends on it.
        """
        stem = secure_filename(name)[:64] or "chatt"

        def move() -> dict[Slot, str]:
            keys: dict[Slot, str] = {}
            for slot, (path, kind) in files.items():
                keys[slot] = f"{stem}-{uuid.uuid4()}{kind.extension}"
                path.rename(self.root / keys[slot])
            _sync_folder(self.root)
            return keys

        return await to_thread.run_sync(move) if files else {}

    async def forget(self, keys: Iterable[str]) -> None:
        """Remove the files of `keys`, which no chatt names."""
        paths = [self.root / key for key in keys]

        def remove() -> None:
            for path in paths:
                path.unlink(missing_ok=True)

        await to_thread.run_sync(remove)

    async def response(self, key: str, method: str, headers: Headers) -> Response:
        """Return the answer to a request for the file of `key` (RFC 9110 §13, §14).

        Raises `Problem` 404 when there is no such file, 416 when no byte of it is asked for.
        """
        file = await to_thread.run_sync(self._open, key)
        size = os.fstat(file.fileno()).st_size
        # A key's file never changes, so the key identifies the bytes, on every node.
        etag = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32]
        answer_headers = {
            "content-type": _MEDIA_TYPES.get(Path(key).suffix.lower(), "application/octet-stream"),
            "accept-ranges": "bytes",
            "etag": f'"{etag}"',
            "cache-control": "public, max-age=31536000, immutable",
            # What strangers uploaded must never run as a page of this site.
            "x-content-type-options": "nosniff",
            "content-security-policy": "default-src 'none'; sandbox",
        }
        try:
            if parse_etags(headers.get("if-none-match")).contains_weak(etag):
                file.close()
                return Response(status_code=304, headers=answer_headers)
            # RFC 9110 §14.2 defines Range for GET alone.
            span = _requested_span(headers, size, f'"{etag}"') if method == "GET" else None
        except Problem:
            file.close()
            raise
        status = 200 if span is None else 206
        start, stop = span or (0, size)
        answer_headers["content-length"] = str(stop - start)
        if span is not None:
            answer_headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
        if method == "HEAD":
            file.close()
            return Response(status_code=status, headers=answer_headers)
        return _FileResponse(file, start, stop, status, answer_headers)

    def _open(self, key: str) -> BinaryIO:
        # Keys of adopted databases were made elsewhere, so any plain file name is one.
        if key.startswith(".") or re.search(r"[/\\\0-\x1f]", key):
            raise _not_found()
        try:
            return (self.root / key).open("rb", buffering=0)
        except OSError as error:  # not there, a folder, a name too long for the file system
            raise _not_found() from error


def _not_found() -> Problem:
    return Problem("not-found", "There is no such file.")


def _sync_folder(folder: Path) -> None:
    """Make names in `folder` durable, as fsync does a file's contents."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _requested_span(headers: Headers, size: int, etag: str) -> tuple[int, int] | None:
    """Return the first byte asked for and the one after the last, or None for the whole file.

    What cannot be understood, and several ranges at once, count as no range: RFC 9110 §14.2
    allows a server to answer with the whole.
    """
    header = headers.get("range", "")
    # If-Range may also be a date, which no answer of ours has given anybody.
    if headers.get("if-range", etag) != etag:
        return None
    wanted = parse_range_header(header)
    if wanted is not None and wanted.units == "bytes" and len(wanted.ranges) == 1:
        start, stop = wanted.ranges[0]
        start = max(0, size + start) if start < 0 else start
        stop = size if stop is None else min(stop, size)
    elif re.fullmatch(r"bytes=-0+", header):  # the last 0 bytes; werkzeug takes it for malformed
        start = stop = size
    else:
        return None
    if start >= stop:
        raise Problem(
            "range-not-satisfiable",
            f"The range is outside of the file, which has {size} bytes.",
            {"Content-Range": f"bytes */{size}"},
        )
    return start, stop


class _FileResponse(StreamingResponse):
    """Bytes `start` to `stop` of an open file, which is closed whatever happens."""

    def __init__(
        self, file: BinaryIO, start: int, stop: int, status: int, headers: Mapping[str, str]
    ) -> None:
        super().__init__(self._chunks(start, stop), status, headers)
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._file.close()

    async def _chunks(self, start: int, stop: int) -> AsyncIterator[bytes]:
        descriptor = self._file.fileno()
        while start < stop:
            chunk = await to_thread.run_sync(
                os.pread, descriptor, min(_CHUNK_SIZE, stop - start), start
            )
            if not chunk:
                raise OSError("The file became shorter while it was sent")
            start += len(chunk)
            yield chunk
