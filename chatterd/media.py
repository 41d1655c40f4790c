"""Pictures and videos: which formats are accepted, and where they are kept.

A file is named by its key, one path segment under `MEDIA_ROOT`: the digest of its content and the
extension of its format. What a key names never changes.
"""

import asyncio
import logging
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeVar

from anyio import to_thread

from chatterd import metrics, settings
from chatterd.database import Database
from chatterd.errors import Problem
from chatterd.media_room import Room
from chatterd.models import upsert_media
from chatterd.pictures import PictureReader

logger = logging.getLogger(__name__)

T = TypeVar("T")

Slot = Literal["image", "video"]
"""The two places for media in a chatt."""

SLOTS: Final[tuple[Slot, ...]] = ("image", "video")
SNIFF_SIZE: Final = 512
"""As many bytes of a file's beginning as `sniff` wants to see."""
INCOMING: Final = ".incoming"
"""The folder, below the media folder, of what is arriving."""
THUMBNAIL_SUFFIX: Final = ".thumb.webp"
"""What a thumbnail's file is called behind the picture's key. An empty one: there is none."""
_NAME_MAX: Final = 255  # bytes of a file's name, on Linux and macOS
# For what arrives. More would wait for each other, and the requests beside them for all.
_THREADS: Final = 2
_KEY: Final = re.compile(r"([0-9a-f]{64})\.[a-z0-9]+")


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

MEDIA_TYPES: Final = {
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


class Upload(NamedTuple):
    """A file that has been received, cleaned and synced, and waits in `.incoming`."""

    path: Path
    kind: Kind
    size: int
    digest: str

    @property
    def key(self) -> str:
        """The name it will have."""
        return self.digest + self.kind.extension


class StoredFile(NamedTuple):
    """A file that is in place: its key, its bytes, and of a picture its pixels, right way up."""

    key: str
    size: int
    width: int | None
    height: int | None


class MediaStore:
    """The media folder. File work is done in threads; every method may raise `OSError`.

    docs/decisions/0009-media-store.md says why its steps have this order.
    """

    def __init__(self, root: Path, database: Database) -> None:
        self.root = root
        # In the same file system, so that a finished file is moved without copying; hidden, so
        # that no key reaches it.
        self.incoming = root / INCOMING
        self.room = Room(root, settings.MEDIA_TOTAL_SIZE, settings.MEDIA_FREE_FLOOR)
        # To ask one of anyio's takes 60 µs more, for each of a file's many parts.
        self._threads = ThreadPoolExecutor(_THREADS, "arriving media")
        self._database = database
        # A picture that is long in being decoded holds up no upload.
        self._measuring = PictureReader(settings.MEDIA_MAX_PIXELS)
        self._reducing = PictureReader(settings.MEDIA_MAX_PIXELS)
        self._thumbnails: dict[str, asyncio.Task[None]] = {}
        self._uploads = 0

    def prepare(self) -> None:
        """Make the folders. Raises `OSError` where they cannot be written."""
        self.incoming.mkdir(parents=True, exist_ok=True)
        self.probe()

    def probe(self) -> None:
        """Write a file and remove it. Raises `OSError` where that is impossible."""
        probe = self.incoming / f"probe-{uuid.uuid4().hex}"
        try:
            probe.write_bytes(b"\0")  # an empty one is made on a full disk, too
        finally:
            probe.unlink(missing_ok=True)

    @contextmanager
    def uploading(self) -> Iterator[None]:
        """Count an upload while it lasts. Raises `Problem` 503 when there are too many."""
        if self._uploads >= settings.UPLOADS_MAX:
            raise Problem(
                "too-many-uploads",
                f"{settings.UPLOADS_MAX} uploads are under way; try again in a moment.",
                {"Retry-After": "1"},
            )
        self._uploads += 1
        try:
            yield
        finally:
            self._uploads -= 1

    @property
    def uploads(self) -> int:
        """How many uploads are under way."""
        return self._uploads

    async def keep(self, uploads: Mapping[Slot, Upload]) -> dict[Slot, StoredFile]:
        """Move uploads to where they are served from, durably; return what they are now.

        The same bytes have the same key. A chatt that names it must follow soon: what no chatt
        names is swept. Raises `Problem` 413, 415 or 503 for a picture as `PictureReader.measure`
        does, `DatabaseUnavailable`.
        """
        files: dict[Slot, StoredFile] = {}
        for slot, upload in uploads.items():
            size = await self._measuring.measure(upload.path) if slot == "image" else (None, None)
            files[slot] = StoredFile(upload.key, upload.size, *size)
        if files:
            # Two that upload the same files must not wait for each other's rows.
            rows = [file._asdict() for file in sorted(files.values())]
            async with self._database.transaction() as session:
                await session.execute(upsert_media(), rows)
            moves = [(upload.path, self.root / upload.key) for upload in uploads.values()]
            await to_thread.run_sync(self._move, moves)
            for slot in files:
                metrics.UPLOAD_FILES.labels(slot).inc()
        if "image" in files:
            self._begin_thumbnail(files["image"].key)
        return files

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Do work on a file that arrives, also to its end when this is cancelled."""
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise

    def path(self, key: str) -> Path | None:
        """Return where the file of `key` would be; None for what is no key."""
        return self.root / key if is_key(key) else None

    async def thumbnail_path(self, key: str) -> Path | None:
        """Return where the thumbnail of the picture `key` is, which is made now if it was not.

        None for what is no picture. Raises `Problem` 503 when too many are being made.
        """
        picture = None if key.endswith(THUMBNAIL_SUFFIX) else self.path(key)
        if picture is None or not media_type_of(picture).startswith("image/"):
            return None
        path = _thumbnail_path(picture)
        if len(os.fsencode(path.name)) > _NAME_MAX:
            return None
        if not await to_thread.run_sync(path.exists):
            if not await to_thread.run_sync(is_file, picture):
                return None
            # Others may be waiting for it, too.
            await asyncio.shield(self._begin_thumbnail(key))
        return path

    async def aclose(self) -> None:
        """End the making of thumbnails; what is not made is made when somebody asks for it."""
        for task in self._thumbnails.values():
            task.cancel()
        await asyncio.gather(*self._thumbnails.values(), return_exceptions=True)
        self._threads.shutdown(wait=False)

    def _begin_thumbnail(self, key: str) -> "asyncio.Task[None]":
        task = self._thumbnails.get(key)
        if task is None:
            task = self._thumbnails[key] = asyncio.create_task(self._make_thumbnail(key))
            task.add_done_callback(partial(self._end_thumbnail, key))
        return task

    def _end_thumbnail(self, key: str, task: "asyncio.Task[None]") -> None:
        del self._thumbnails[key]
        # Whoever waits for it is told as well; after an upload nobody may.
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, Problem):
            logger.error("A thumbnail cannot be made: %r", error)

    async def _make_thumbnail(self, key: str) -> None:
        picture = self.root / key
        try:
            data = await self._reducing.thumbnail(picture)
        except FileNotFoundError:  # it has just been removed
            return
        except Problem as problem:
            if problem.code == "too-many-uploads":
                raise
            data = b""  # what cannot be decoded is not tried again
        place = self.incoming / uuid.uuid4().hex
        await to_thread.run_sync(self._keep_thumbnail, place, data, picture)

    def _keep_thumbnail(self, place: Path, data: bytes, picture: Path) -> None:
        thumbnail = _thumbnail_path(picture)
        try:
            self._write(place, data)
            self._move([(place, thumbnail)])
        finally:
            place.unlink(missing_ok=True)
        if not picture.exists():  # it was removed meanwhile, and its thumbnail was not there yet
            thumbnail.unlink(missing_ok=True)

    def _write(self, path: Path, data: bytes) -> None:
        with self.room.taken(len(data)), path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _move(self, moves: Iterable[tuple[Path, Path]]) -> None:
        for source, target in moves:
            # Also over a file with the same bytes: its date tells the sweep that it is in use.
            source.replace(target)
        sync_folder(self.root)


def is_key(name: str) -> bool:
    """Tell whether a file of this name is served."""
    # Keys of adopted databases were made elsewhere, so any plain file name is one.
    return name != "" and not name.startswith(".") and not re.search(r"[/\\\0-\x1f]", name)


def digest_of_key(key: str) -> str | None:
    """Return the digest of a file's content that its key tells; None for an adopted file."""
    match = _KEY.fullmatch(key)
    return match[1] if match else None


def media_type_of(path: Path) -> str:
    """Return the media type that a file is served with."""
    return MEDIA_TYPES.get(path.suffix.lower(), "application/octet-stream")


def is_file(path: Path) -> bool:
    """Tell whether there is a file that is served: no link, no pipe."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:  # not there, a name too long for the file system
        return False


def _thumbnail_path(path: Path) -> Path:
    return path.with_name(path.name + THUMBNAIL_SUFFIX)


def sync_folder(folder: Path) -> None:
    """Make names in `folder` durable, as fsync does a file's contents."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
