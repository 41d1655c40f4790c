"""Receiving request bodies: bounded in size and time while they arrive.

Forms are parsed as they arrive, texts into memory and files onto the disk: Starlette's
`request.form()` would take in everything before anything can be checked.
"""

import asyncio
import hashlib
import os
import sys
import types
import uuid
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import anyio
from anyio import to_thread
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from chatterd import metadata, metrics, settings
from chatterd.errors import Problem
from chatterd.media import SLOTS, SNIFF_SIZE, Kind, MediaStore, Slot, Upload, sniff

if TYPE_CHECKING:  # python-multipart defines it for type checkers only
    from python_multipart.multipart import MultipartCallbacks

_BYTES_SECONDS: Final = 30.0
# An upload gets as long from its begin, and then a second for each so many bytes, or a few slow
# clients would hold all the places of UPLOADS_MAX for UPLOAD_TIMEOUT. 2G phones are faster.
_SLOWEST_BYTES: Final = 1024
# The server hands over 64 KiB at once. More in memory would be more than 1 MiB for an upload, with
# what the server keeps.
_WRITE_SIZE: Final = 60 * 1024
FORM_MAX_SIZE: Final = len(SLOTS) * settings.MEDIA_MAX_SIZE + 4 * settings.JSON_MAX_SIZE
"""Bytes of a form: two files, three texts, and room for the headers of the parts."""
PROMPT_MAX_SIZE: Final = settings.MEDIA_MAX_SIZE
"""Bytes of a prompt, which may hold pictures."""
_TEXT_FIELDS: Final = {"name": "name", "username": "name", "message": "message"}
_ACCEPTED: Final = {
    "image": "a JPEG, PNG, GIF, WebP or HEIC picture",
    "video": "an MP4, QuickTime or WebM video",
}


@dataclass
class Form:
    """A form that has been received: its texts by field, its files by slot."""

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[Slot, Upload] = field(default_factory=dict)


async def received_bytes(headers: Headers, receive: Receive, limit: int) -> bytes:
    """Return a body of at most `limit` bytes.

    Raises `Problem` 408 or 413, `ClientDisconnect` when the client leaves before its end.
    """
    # Written out rather than put together from the parts below: posting is fast.
    _limit_declared(headers, limit)
    chunks: list[bytes] = []
    size = 0
    more = True
    deadline = 0.0
    while more:
        # Most bodies are there with their heads. Only for what is not is there a time limit: to
        # begin and end one is 13 % of what the application takes for a post.
        steps = receive().__await__()
        try:
            waited_for = next(steps)
        except StopIteration as done:
            message = done.value
        else:
            deadline = deadline or asyncio.get_running_loop().time() + _BYTES_SECONDS
            try:
                async with asyncio.timeout_at(deadline):
                    message = await _continued(steps, waited_for)
            except TimeoutError as error:
                raise _too_slow(_BYTES_SECONDS) from error
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > limit:
            raise too_large(limit)
        more = message.get("more_body", False)
    return b"".join(chunks)


@types.coroutine
def _continued(
    steps: Generator[Any, Any, Message],
    waited_for: Any,  # noqa: ANN401 - the event loop's
) -> Generator[Any, Any, Message]:
    """Await the rest of `steps`, of which the first has come to wait for `waited_for`."""
    while True:
        try:
            yield waited_for  # nothing comes back from an event loop, except an error
        except BaseException as error:  # noqa: BLE001 - also that the task is cancelled
            step = partial(steps.throw, error)
        else:
            step = partial(next, steps)
        try:
            waited_for = step()
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return] # StopIteration is not generic


@asynccontextmanager
async def received_form(
    headers: Headers, stream: AsyncIterator[bytes], media: MediaStore
) -> AsyncIterator[Form]:
    """Receive a multipart form, its files durably into the folder for what arrives.

    Whoever wants to keep a file moves it away while the context lasts; then the others are gone,
    whatever has happened.

    Raises `Problem` 408, 413, 415 or 422 as soon as the form turns out to be too slow, too large,
    of the wrong kind or broken, 503 when too many arrive already, 507 when there is no room for
    its files; `OSError` when the disk refuses.
    """
    with _refusals_counted(), media.uploading():
        receiver = _FormReceiver(headers, media)
        try:
            await receiver.receive(_limited(headers, _in_time(stream), FORM_MAX_SIZE))
            yield receiver.form
        finally:
            # Must finish although the request may be being cancelled.
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(_remove, receiver.parts)


@contextmanager
def _refusals_counted() -> Iterator[None]:
    try:
        yield
    except Problem as problem:
        metrics.UPLOADS_REFUSED.labels(problem.code).inc()
        raise


async def _in_time(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Pass `stream` on as long as it keeps up; raises `Problem` 408 when it waits for too long."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    received = 0
    while True:
        allowed = min(settings.UPLOAD_TIMEOUT, _BYTES_SECONDS + received / _SLOWEST_BYTES)
        try:
            async with asyncio.timeout_at(begun + allowed):
                chunk = await anext(stream, None)
        except TimeoutError as error:
            raise _too_slow(allowed) from error
        if chunk is None:
            return
        received += len(chunk)
        yield chunk


def _too_slow(seconds: float) -> Problem:
    return Problem("request-timeout", f"The body took longer than {seconds:.0f} s to arrive.")


def too_large(limit: int | str) -> Problem:
    """Return what is said of a body that is larger than `limit` bytes."""
    return Problem("body-too-large", f"The body is larger than the limit of {limit} bytes.")


def _limit_declared(headers: Headers, limit: int) -> None:
    declared = headers.get("content-length", "0")
    # A number of a hundred digits is too large without being computed.
    if len(declared) > 20 or int(declared) > limit:
        raise too_large(limit)


async def _limited(
    headers: Headers, stream: AsyncIterator[bytes], limit: int
) -> AsyncIterator[bytes]:
    """Pass `stream` on until it turns out to be longer than `limit` bytes."""
    _limit_declared(headers, limit)
    size = 0
    async for chunk in stream:
        size += len(chunk)
        if size > limit:
            raise too_large(limit)
        yield chunk


def _remove(parts: Iterable["_FilePart"]) -> None:
    for part in parts:
        part.close()
        part.path.unlink(missing_ok=True)


class _FormReceiver:
    """Feeds a multipart body to the parser as it arrives, and the parser's parts to files."""

    def __init__(self, headers: Headers, media: MediaStore) -> None:
        content_type, parameters = parse_options_header(headers.get("content-type"))
        if content_type != b"multipart/form-data" or not parameters.get(b"boundary"):
            raise Problem("form-invalid", "The body must be multipart/form-data with a boundary.")
        self.form = Form()
        self.parts: list[_FilePart] = []
        self._media = media
        self._names: set[str] = set()
        self._part: _FilePart | _TextPart | None = None
        self._header_name = self._header_value = b""
        self._part_headers: dict[bytes, bytes] = {}
        self._complete = False
        self._events: list[tuple[str, bytes]] = []
        try:
            self._parser = MultipartParser(parameters[b"boundary"], self._callbacks())
        except FormParserError as error:
            raise Problem("form-invalid", "The boundary of the form is too long.") from error

    async def receive(self, stream: AsyncIterator[bytes]) -> None:
        """Receive the whole body; raises as `received_form` does."""
        async for chunk in stream:
            try:
                self._parser.write(chunk)
            except FormParserError as error:
                raise Problem("form-invalid", "The body is no valid multipart form.") from error
            # The parser calls back within write(), where nothing can be awaited.
            events, self._events = self._events, []
            for event, data in events:
                await self._take(event, data)
        if not self._complete:
            raise Problem("form-invalid", "The form ends before its last boundary.")

    def _callbacks(self) -> "MultipartCallbacks":
        def with_data(event: str) -> Callable[[bytes, int, int], None]:
            return lambda data, start, end: self._events.append((event, data[start:end]))

        def without_data(event: str) -> Callable[[], None]:
            return lambda: self._events.append((event, b""))

        return {
            "on_header_field": with_data("header_field"),
            "on_header_value": with_data("header_value"),
            "on_header_end": without_data("header_end"),
            "on_headers_finished": without_data("headers_finished"),
            "on_part_data": with_data("part_data"),
            "on_part_end": without_data("part_end"),
            "on_end": without_data("end"),
        }

    async def _take(self, event: str, data: bytes) -> None:
        match event:
            case "part_data":
                assert self._part is not None
                await self._part.write(data)
            case "header_field":
                self._header_name += data
            case "header_value":
                self._header_value += data
            case "header_end":
                self._part_headers[self._header_name.lower()] = self._header_value
                self._header_name = self._header_value = b""
            case "headers_finished":
                self._part = self._begin_part()
                self._part_headers = {}
            case "part_end":
                assert self._part is not None
                await self._part.finish(self.form)
            case "end":
                self._complete = True

    def _begin_part(self) -> "_FilePart | _TextPart":
        """Open the part that the headers read so far describe (RFC 7578 §4.2)."""
        _, parameters = parse_options_header(self._part_headers.get(b"content-disposition"))
        name = parameters.get(b"name", b"").decode(errors="replace")
        is_file = b"filename" in parameters
        if name in self._names:
            raise Problem("field-duplicate", f"The form has {name} twice.")
        self._names.add(name)
        for slot in SLOTS:
            if name == slot:
                if not is_file:
                    raise Problem(f"{slot}-invalid", f"{slot} must be a file, not a text.")
                self.parts.append(_FilePart(slot, self._media))
                return self.parts[-1]
        if name not in _TEXT_FIELDS:
            raise Problem(
                "field-unknown",
                f"There is no field {name[:64]!r}; a chatt has name (or username), message, image"
                " and video.",
            )
        if is_file:
            raise Problem(f"{_TEXT_FIELDS[name]}-invalid", f"{name} must be a text, not a file.")
        return _TextPart(name)


class _FilePart:
    """A file while it arrives."""

    def __init__(self, slot: Slot, media: MediaStore) -> None:
        self.path = media.incoming / uuid.uuid4().hex
        self._media = media
        self._slot = slot
        self._size = 0
        self._kind: Kind | None = None
        self._chunks: list[bytes] = []
        self._chunks_size = 0
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()

    async def write(self, data: bytes) -> None:
        """Take the next bytes; what passes the limit is never written."""
        self._size += len(data)
        metrics.UPLOAD_BYTES.count += len(data)
        if self._size > settings.MEDIA_MAX_SIZE:
            raise Problem(
                f"{self._slot}-too-large",
                f"{self._slot} is larger than the limit of {settings.MEDIA_MAX_SIZE} bytes.",
            )
        self._chunks.append(data)
        self._chunks_size += sys.getsizeof(data)  # many small ones take more than their bytes
        if self._kind is None and self._size >= SNIFF_SIZE:
            self._kind = self._recognise()
        if self._chunks_size >= _WRITE_SIZE:
            await self._media.in_thread(self._flush)

    async def finish(self, form: Form) -> None:
        """Take the end of the part: the file is durable and clean then, and in `form`."""
        if not self._size:
            raise Problem(f"{self._slot}-invalid", f"{self._slot} is empty; leave the part out.")
        kind = self._kind = self._kind or self._recognise()
        try:
            form.files[self._slot] = await self._media.in_thread(
                partial(self._clean_and_sync, kind)
            )
        except metadata.Uncleanable as error:
            raise Problem(
                f"{self._slot}-unclean",
                f"{self._slot} may tell where it was taken and by whom, and it cannot be taken out:"
                f" {error}.",
            ) from error

    def close(self) -> None:
        """Give the file back to the system."""
        if self._file is not None:
            self._file.close()

    def _recognise(self) -> Kind:
        kind = sniff(b"".join(self._chunks)[:SNIFF_SIZE])
        if kind is None or kind.slot != self._slot:
            accepted = _ACCEPTED[self._slot]
            raise Problem(f"{self._slot}-unsupported", f"{self._slot} is not {accepted}.")
        return kind

    def _flush(self) -> None:
        chunks, self._chunks, self._chunks_size = self._chunks, [], 0
        with self._media.room.taken(sum(map(len, chunks))):
            if self._file is None:
                assert self._kind is not None
                self._file = self.path.open("xb")
                chunks = [metadata.clean_beginning(b"".join(chunks), self._kind.media_type)]
            for chunk in chunks:
                self._file.write(chunk)
                self._digest.update(chunk)

    def _clean_and_sync(self, kind: Kind) -> Upload:
        self._flush()
        self.close()
        self._media.room.require_free(self._size)  # cleaning may make a copy, which replaces it
        is_changed = metadata.clean(self.path, kind.media_type)
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            if is_changed:
                self._digest = hashlib.file_digest(file, "sha256")
            size = file.seek(0, os.SEEK_END)
        return Upload(self.path, kind, size, self._digest.hexdigest())


class _TextPart:
    """A text while it arrives."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._buffer = bytearray()

    async def write(self, data: bytes) -> None:
        """Take the next bytes, in memory."""
        self._buffer += data
        if len(self._buffer) > settings.JSON_MAX_SIZE:
            raise Problem(
                "body-too-large",
                f"{self._name} is larger than the limit of {settings.JSON_MAX_SIZE} bytes.",
            )

    async def finish(self, form: Form) -> None:
        """Take the end of the part: the text is in `form` then."""
        try:
            form.fields[self._name] = self._buffer.decode()
        except UnicodeDecodeError as error:
            raise Problem(
                f"{_TEXT_FIELDS[self._name]}-invalid", f"{self._name} must be UTF-8 text."
            ) from error
