"""The file of a backup: a plain tar, written and read from front to back, every byte checked.

docs/backup.md has the format. Its headers are made here and not by tarfile, so that each is the
only one that its member can have: what the reader itself makes of the same name, size and date.
"""

import hashlib
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from tempfile import SpooledTemporaryFile
from types import TracebackType
from typing import IO, Annotated, Final, Self

import msgspec

from chatterd.media import is_key

FORMAT: Final = 1
"""The version of the format, which a change that older readers cannot read increases."""

_MANIFEST: Final = "manifest.json"
_SUMS: Final = "SHA256SUMS"
_MEMBER: Final = re.compile(r"tables/(?P<table>[a-z_]+)\.\d{6,}\.copy|media/(?P<key>.+)", re.DOTALL)

_BLOCK: Final = 512
_PIECE: Final = 1 << 18
# A manifest of ours has some kilobytes, of which the keys of missing files are the most.
_MANIFEST_MAX: Final = 1 << 20
_SPOOL_MAX: Final = 1 << 20
_KEY_MAX: Final = 255  # bytes: a file's name on Linux and macOS
# POSIX.1-2017, pax, "ustar Interchange Format": name, mode, uid, gid, size, mtime, checksum, type,
# linkname, magic, version, uname, gname, devmajor, devminor, prefix.
_HEADER: Final = struct.Struct("100s 8s 8s 8s 12s 12s 8s c 100s 6s 2s 32s 32s 8s 8s 155s 12x")
_FILE, _EXTENDED = b"0", b"x"
_EXTENDED_MAX: Final = 1024
_SIZE_MAX: Final = 8**11 - 1  # what eleven octal digits hold: 8 GiB

OnBytes = Callable[[int], object]


class BackupError(Exception):
    """A backup cannot be made or restored. The message is for the operator."""


class DamagedError(BackupError):
    """The archive is not what was written. The message says what is wrong, and where."""


# They go to a terminal.
_Version = Annotated[str, msgspec.Meta(max_length=100, pattern="^[ -~]*$")]


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table in the archive: its rows are members in PostgreSQL's COPY text format."""

    name: str
    columns: list[str]
    rows: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the archive holds; its first member.

    format: see `FORMAT`. chatterd, postgresql: the versions it was made with.
    revision: of the schema.
    created: when the state was taken that it holds.
    files, bytes: of the media in it.
    missing: how many files chatts named that were not there, and so are not here.
    missing_keys: the first of them.
    """

    format: int
    chatterd: _Version
    postgresql: _Version
    revision: _Version
    created: datetime
    tables: Annotated[list[Table], msgspec.Meta(min_length=1)]
    files: int
    bytes: int
    missing: int
    missing_keys: list[str]


class _Format(msgspec.Struct):
    format: int


class ArchiveWriter:
    """Writes an archive to `file`, which need not be seekable.

    The manifest comes first, `finish` makes it a whole one. `on_bytes` is called with how many
    bytes have been written. Its methods raise `BackupError` when the file cannot be written.
    """

    def __init__(self, file: IO[bytes], on_bytes: OnBytes) -> None:
        self._file = file
        self._on_bytes = on_bytes
        self._time = 0
        self._sums = SpooledTemporaryFile(_SPOOL_MAX)  # noqa: SIM115 - __exit__ closes it

    def add_manifest(self, manifest: Manifest) -> None:
        """Begin the archive. All members bear the manifest's date."""
        self._time = int(manifest.created.timestamp())
        content = msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
        self._add(_MANIFEST, len(content), [content])

    def add_rows(self, table: str, number: int, rows: bytes) -> None:
        """Add whole rows of a table, in COPY text format; a table's members are numbered from 1."""
        self._add(f"tables/{table}.{number:06}.copy", len(rows), [rows])

    def add_file(self, key: str, size: int, pieces: Iterable[bytes]) -> str:
        """Add a media file of `size` bytes; return its digest."""
        return self._add(f"media/{key}", size, pieces)

    def finish(self) -> None:
        """Write the digests, and the end."""
        size = self._sums.tell()
        self._sums.seek(0)
        self._write(_header(_SUMS, size, self._time))
        while piece := self._sums.read(_PIECE):
            self._write(piece)
        self._write(bytes(-size % _BLOCK + 2 * _BLOCK))

    def _add(self, name: str, size: int, pieces: Iterable[bytes]) -> str:
        digest = hashlib.sha256()
        self._write(_header(name, size, self._time))
        left = size
        for piece in pieces:
            digest.update(piece)
            self._write(piece)
            left -= len(piece)
        if left:
            raise BackupError(f"{name} changed while it was read.")
        self._write(bytes(-size % _BLOCK))
        self._sums.write(_sum_line(digest.hexdigest(), name))
        return digest.hexdigest()

    def _write(self, data: bytes) -> None:
        try:
            left = memoryview(data)
            while left:  # without a buffer in between, not all may be written at once
                left = left[self._file.write(left) :]
        except OSError as error:
            raise BackupError(f"The archive cannot be written: {error.strerror}.") from error
        self._on_bytes(len(data))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._sums.close()


class Member:
    """A part of the archive: rows of `table`, or the media file `key`.

    pieces: its content, to be taken before the next member is; what is left over is skipped.
    digest: SHA-256 of the content, when all pieces have been taken.
    """

    def __init__(self, name: str, match: re.Match[str], pieces: Iterator[bytes]) -> None:
        self.name = name
        self.table: str | None = match["table"]
        self.key: str | None = match["key"]
        self.pieces = pieces
        self.digest = ""


class ArchiveReader:
    """Reads an archive from `file`, once, from front to back; memory is bounded whatever it holds.

    What `members` yields may be used before the whole is known to be sound, where it can be taken
    back. `on_bytes` is called with how many have been read. Raises `DamagedError` where the archive
    is not exactly what a writer writes, `BackupError` where it cannot be read.
    """

    def __init__(self, file: IO[bytes], on_bytes: OnBytes) -> None:
        self._file = file
        self._on_bytes = on_bytes
        self._offset = 0
        self._time: int | None = None
        self._sums = SpooledTemporaryFile(_SPOOL_MAX)  # noqa: SIM115 - __exit__ closes it
        self.manifest: Manifest

    def members(self) -> Iterator[Member]:
        """Yield the rows and the files; when it ends, every byte has been found right."""
        rows: Counter[str] = Counter()
        files = size_of_files = 0
        while True:
            name, size = self._read_header()
            if name == _SUMS:
                break
            match = _MEMBER.fullmatch(name)
            if match is None or not self._belongs(match):
                raise self._damaged(f"{quoted(name)} does not belong into it")
            member = Member(name, match, iter(()))
            member.pieces = self._content(member, size, rows)
            yield member
            for _ in member.pieces:
                pass
            if member.key is not None:
                files += 1
                size_of_files += size
        self._check_sums(size)
        self._check_end()
        self._check_counts(rows, files, size_of_files)

    def _belongs(self, match: re.Match[str]) -> bool:
        """Tell whether a member is what the manifest and the media folder have a place for."""
        if (key := match["key"]) is not None:
            return is_key(key) and len(key.encode()) <= _KEY_MAX
        return any(table.name == match["table"] for table in self.manifest.tables)

    def _read_manifest(self) -> Manifest:
        name, size = self._read_header()
        if name != _MANIFEST or size > _MANIFEST_MAX:
            raise DamagedError("It is no backup of chatterd's: it begins with another member.")
        content = self._read(size)
        self._read_padding(size)
        self._sums.write(_sum_line(hashlib.sha256(content).hexdigest(), name))
        try:
            version = msgspec.json.decode(content, type=_Format).format
            if version != FORMAT:
                raise BackupError(
                    f"It has format {version}, and this version of chatterd reads {FORMAT}:"
                    " use the version that made it, or a newer one."
                )
            manifest = msgspec.json.decode(content, type=Manifest)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise self._damaged(f"{_MANIFEST} is not as it was written") from None
        if manifest.created.tzinfo is None or int(manifest.created.timestamp()) != self._time:
            raise self._damaged(f"{_MANIFEST} has another date than its header")
        return manifest

    def _content(self, member: Member, size: int, rows: Counter[str]) -> Iterator[bytes]:
        digest = hashlib.sha256()
        left = size
        while left:
            piece = self._read(min(left, _PIECE))
            left -= len(piece)
            digest.update(piece)
            if member.table is not None:
                rows[member.table] += piece.count(b"\n")  # within a value it is written \n
            yield piece
        self._read_padding(size)
        member.digest = digest.hexdigest()
        self._sums.write(_sum_line(member.digest, member.name))

    def _check_sums(self, size: int) -> None:
        """Compare the digests in the archive with those of what was read, line by line."""
        self._sums.seek(0)
        left = size
        for line in self._sums:
            piece = self._read(min(left, len(line)))
            left -= len(piece)
            if piece != line:
                name = line.decode().partition("  ")[2].rstrip("\n")
                raise self._damaged(f"{quoted(name)} and its digest in {_SUMS} differ")
        if left:
            raise self._damaged(f"members that {_SUMS} names are not there")
        self._read_padding(size)

    def _check_end(self) -> None:
        if self._read(2 * _BLOCK).strip(b"\0"):
            raise self._damaged("something follows where it should end")
        if self._take(1):
            raise self._damaged("something follows behind its end")

    def _check_counts(self, rows: Counter[str], files: int, size_of_files: int) -> None:
        for table in self.manifest.tables:
            if rows[table.name] != table.rows:
                raise self._damaged(
                    f"it has {rows[table.name]} rows of {table.name} and should have {table.rows}"
                )
        if (files, size_of_files) != (self.manifest.files, self.manifest.bytes):
            raise self._damaged(
                f"it has {files} files of {size_of_files} bytes and should have"
                f" {self.manifest.files} of {self.manifest.bytes}"
            )

    def _read_header(self) -> tuple[str, int]:
        """Read the next member's name and size."""
        read = block = self._read(_BLOCK)
        fields = _HEADER.unpack(block)
        try:
            extended: dict[bytes, bytes] = {}
            if fields[7] == _EXTENDED:
                size = int(fields[4].rstrip(b"\0"), 8)
                if size > _EXTENDED_MAX:
                    raise ValueError  # noqa: TRY301 - one place says what it is about
                content = self._read(size + -size % _BLOCK)
                for record in content[:size].split(b"\n"):
                    key, _, value = record.partition(b" ")[2].partition(b"=")
                    extended[key] = value
                block = self._read(_BLOCK)
                fields = _HEADER.unpack(block)
                read += content + block
            name = extended.get(b"path", fields[0].rstrip(b"\0")).decode()
            size = int(extended.get(b"size") or int(fields[4].rstrip(b"\0"), 8))
            time = int(fields[5].rstrip(b"\0"), 8)
            if self._time is None:
                self._time = time
            if read != _header(name, size, self._time):
                raise ValueError  # noqa: TRY301 - as above
        except ValueError:
            raise self._damaged("there is no header of a member where one should be") from None
        return name, size

    def _read_padding(self, size: int) -> None:
        if self._read(-size % _BLOCK).strip(b"\0"):
            raise self._damaged("the padding between two members is not zero")

    def _read(self, size: int) -> bytes:
        """Read exactly `size` bytes."""
        data = self._take(size)
        if len(data) < size:
            raise self._damaged("it ends too early")
        return data

    def _take(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except OSError as error:
            raise BackupError(f"The archive cannot be read: {error.strerror}.") from error
        self._offset += len(data)
        self._on_bytes(len(data))
        return data

    def _damaged(self, what: str) -> DamagedError:
        return DamagedError(f"It is damaged before byte {self._offset}: {what}.")

    def __enter__(self) -> Self:
        try:
            self.manifest = self._read_manifest()
        except BaseException:
            self._sums.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._sums.close()


def _header(name: str, size: int, time: int) -> bytes:
    """Return what stands before a member's content.

    Raises `ValueError` for what no member can be.
    """
    raw = name.encode()
    records = b""
    if len(raw) > 100 or not raw.isascii():
        records += _record(b"path", raw)
    if size > _SIZE_MAX:
        records += _record(b"size", b"%d" % size)
    plain = _ustar(name.encode("ascii", "replace")[:100], min(size, _SIZE_MAX), time, _FILE)
    if not records:
        return plain
    padding = bytes(-len(records) % _BLOCK)
    return _ustar(b"pax", len(records), time, _EXTENDED) + records + padding + plain


def _record(key: bytes, value: bytes) -> bytes:
    """Return a record of an extended header; its length counts its own digits."""
    rest = b" %s=%s\n" % (key, value)
    length = len(rest)
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return b"%d%s" % (length, rest)


def _ustar(name: bytes, size: int, time: int, kind: bytes) -> bytes:
    if size < 0 or not 0 <= time <= _SIZE_MAX:
        raise ValueError(size, time)
    none = b"0000000\0"
    numbers = (b"0000600\0", none, none, b"%011o\0" % size, b"%011o\0" % time)
    rest = (kind, b"", b"ustar\0", b"00", b"", b"", none, none, b"")
    checksum = sum(_HEADER.pack(name, *numbers, b" " * 8, *rest))
    return _HEADER.pack(name, *numbers, b"%06o\0 " % checksum, *rest)


def _sum_line(digest: str, name: str) -> bytes:
    return f"{digest}  {name}\n".encode()


def quoted(name: str) -> str:
    """Return a name, which may hold anything, as it can be shown on a terminal."""
    return f'"{name}"' if name.isprintable() else ascii(name)


def pieces_of(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Yield what is in `file`, up to `size` bytes."""
    while size and (piece := file.read(min(size, _PIECE))):
        size -= len(piece)
        yield piece
