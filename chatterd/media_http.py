"""Serving stored pictures, videos and thumbnails (RFC 9110 §13, §14)."""

import hashlib
import os
import re
import stat
from collections.abc import AsyncIterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Final

from anyio import to_thread
from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from werkzeug.http import parse_etags, parse_range_header

from chatterd.errors import Problem
from chatterd.media import THUMBNAIL_SUFFIX, digest_of_key, media_type_of

_CHUNK_SIZE: Final = 256 * 1024


async def media_response(path: Path | None, method: str, headers: Headers) -> Response:
    """Return the answer to a request for the file at `path`.

    Raises `Problem` 404 when there is no such file, 416 when no byte of it is asked for.
    """
    if path is None:
        raise _not_found()
    file, size, etag = await to_thread.run_sync(_open, path)
    answer_headers = {
        "content-type": media_type_of(path),
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


def _open(path: Path) -> tuple[BinaryIO, int, str]:
    """Return the open file, its size, and its ETag: the digest of its content, on every node."""
    try:
        # A link is not followed, a pipe not waited for, should one have come into the folder.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:  # not there, a link, a name too long for the file system
        raise _not_found() from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise _not_found()
    file = open(descriptor, "rb", buffering=0)  # noqa: PTH123, SIM115 - a descriptor; the answer's
    if not status.st_size and path.name.endswith(THUMBNAIL_SUFFIX):
        file.close()
        raise _not_found()
    digest = digest_of_key(path.name)
    if digest is None:
        try:
            digest = _digest(path, status.st_ino, status.st_mtime_ns, status.st_size)
        except OSError:
            file.close()
            raise
    return file, status.st_size, digest[:32]


def _not_found() -> Problem:
    return Problem("not-found", "There is no such file.")


@lru_cache(4096)
def _digest(path: Path, *_identity: int) -> str:
    """Return the digest of a file whose name does not tell it: an adopted one, a thumbnail."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
