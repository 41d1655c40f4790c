"""The archive: other programs read it, each kind of damage is found, and none can do harm."""

from __future__ import annotations

import hashlib
import io
import itertools
import subprocess
import tarfile
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import pytest
from tqdm import tqdm

from chatterd.archive import (
    FORMAT,
    ArchiveReader,
    ArchiveWriter,
    BackupError,
    DamagedError,
    Manifest,
    Table,
)
from chatterd.backup import verify

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CREATED: Final = datetime(2026, 11, 21, 0, 5, 56, 407672, UTC)
PICTURE: Final = b"a picture" * 300
KEY: Final = hashlib.sha256(PICTURE).hexdigest() + ".jpeg"
FILES: Final[Mapping[str, bytes]] = {
    KEY: PICTURE,
    "büro 1.jpg": b"adopted",
    "l" * 250 + ".jpg": b"x" * 512,
    "empty.mp4": b"",
}
COLUMNS: Final = {"chatts": ["name", "message"], "media": ["key", "size"]}
ROWS: Final = {"chatts": (b"ann\thi\n", b"bob\t\\n\n"), "media": (b"key\t1\n",)}


def manifest_of(
    rows: Mapping[str, tuple[bytes, ...]] = ROWS,
    files: Mapping[str, bytes] = FILES,
    *,
    version: int = FORMAT,
    revision: str = "0003",
    columns: Mapping[str, list[str]] = COLUMNS,
) -> Manifest:
    return Manifest(
        format=version,
        chatterd="0.1.0",
        postgresql="18.4",
        revision=revision,
        created=CREATED,
        tables=[
            Table(name, columns[name], b"".join(parts).count(b"\n")) for name, parts in rows.items()
        ],
        files=len(files),
        bytes=sum(map(len, files.values())),
        missing=0,
        missing_keys=[],
    )


def write(
    manifest: Manifest,
    rows: Mapping[str, tuple[bytes, ...]] = ROWS,
    files: Mapping[str, bytes] = FILES,
) -> bytes:
    file = io.BytesIO()
    with ArchiveWriter(file, bool) as writer:
        writer.add_manifest(manifest)
        for name, parts in rows.items():
            for number, part in enumerate(parts, 1):
                writer.add_rows(name, number, part)
        for key, content in files.items():
            writer.add_file(key, len(content), [content])
        writer.finish()
    return file.getvalue()


ARCHIVE: Final = write(manifest_of())
# Where each member begins, its extended header with it; then the end.
with tarfile.open(fileobj=io.BytesIO(ARCHIVE)) as _opened:
    _OFFSETS: Final = [member.offset for member in _opened]
PARTS: Final = [
    ARCHIVE[begin:end] for begin, end in itertools.pairwise([*_OFFSETS, len(ARCHIVE) - 1024])
]
END: Final = bytes(1024)


def check(archive: bytes) -> None:
    verify(io.BytesIO(archive), tqdm(disable=True))


def read(archive: bytes) -> dict[str, bytes]:
    with ArchiveReader(io.BytesIO(archive), bool) as reader:
        return {member.name: b"".join(member.pieces) for member in reader.members()}


def test_what_is_written_is_read() -> None:
    check(ARCHIVE)
    content = read(ARCHIVE)
    assert content == {
        "tables/chatts.000001.copy": ROWS["chatts"][0],
        "tables/chatts.000002.copy": ROWS["chatts"][1],
        "tables/media.000001.copy": ROWS["media"][0],
    } | {f"media/{key}": data for key, data in FILES.items()}


def test_tar_extracts_it_and_sha256sum_finds_every_member_right(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(ARCHIVE)
    tar = ["tar", "--extract", "--file=a.tar"]
    done = subprocess.run(tar, cwd=tmp_path, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
    for key, content in FILES.items():
        assert (tmp_path / "media" / key).read_bytes() == content
    sums = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(sums, cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout.count(b": OK\n") == len(PARTS) - 1
    with tarfile.open(tmp_path / "a.tar") as opened:
        assert {member.mtime for member in opened} == {int(CREATED.timestamp())}
        assert {member.mode for member in opened} == {0o600}


def test_a_file_of_more_than_8_gib_has_its_size_in_an_extended_header() -> None:
    size = 8**11 + 5

    class Hole(io.RawIOBase):
        """Keeps the headers, and not what is in the file."""

        def __init__(self) -> None:
            self.heads = b""

        def write(self, data: object, /) -> int:
            assert isinstance(data, memoryview)
            if len(data) <= 4096:
                self.heads += bytes(data)
            return len(data)

    file = Hole()
    with (
        ArchiveWriter(file, bool) as writer,  # type: ignore[arg-type] # of IO it uses write alone
        pytest.raises(BackupError, match="changed while it was read"),
    ):
        writer.add_file("a.mp4", size, [b""])
    with tarfile.open(fileobj=io.BytesIO(file.heads)) as opened:
        member = opened.next()
    assert member is not None
    assert (member.name, member.size) == ("media/a.mp4", size)


def test_a_flipped_bit_is_found_wherever_it_is() -> None:
    # Over the members, 7 meets each byte of a header, and each bit.
    for place in range(0, len(ARCHIVE), 7):
        damaged = bytearray(ARCHIVE)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(BackupError):
            check(bytes(damaged))


def test_an_archive_that_ends_too_early_is_found_wherever_it_ends() -> None:
    ends = {near for block in range(0, len(ARCHIVE), 512) for near in (block, block + 1)}
    for end in sorted(end for end in ends if end < len(ARCHIVE)):
        with pytest.raises(DamagedError, match=r"ends too early"):
            check(ARCHIVE[:end])


def swapped(one: int, other: int) -> list[bytes]:
    parts = list(PARTS)
    parts[one], parts[other] = parts[other], parts[one]
    return parts


def header_with(header: bytes, begin: int, data: bytes) -> bytes:
    """A member's header with something else in it, and the checksum that goes with it."""
    changed = header[:begin] + data + header[begin + len(data) : 512]
    checksum = sum(changed[:148] + b" " * 8 + changed[156:])
    return changed[:148] + b"%06o\0 " % checksum + changed[156:]


def renamed(member: int, name: str) -> list[bytes]:
    part = header_with(PARTS[member], 0, name.encode().ljust(100, b"\0")) + PARTS[member][512:]
    return [*PARTS[:member], part, *PARTS[member + 1 :]]


DAMAGE: Final[Mapping[str, tuple[list[bytes], str]]] = {
    **{
        f"member {n} removed": (
            [*PARTS[:n], *PARTS[n + 1 :]],
            r"differ|begins with|not there|no header",
        )
        for n in range(len(PARTS))
    },
    **{
        f"member {n} doubled": ([*PARTS[: n + 1], *PARTS[n:]], r"differ|belong|not there|follows")
        for n in range(len(PARTS))
    },
    "rows swapped": (swapped(1, 2), r'"tables/chatts.000002.copy" and its digest .* differ'),
    "files swapped": (swapped(4, 5), r'"media/büro 1.jpg" and its digest in SHA256SUMS differ'),
    "rows and files swapped": (swapped(3, 4), f'"media/{KEY}" and its digest .* differ'),
    "file renamed": (renamed(4, "media/0.jpeg"), r'"media/0.jpeg" and its digest .* differ'),
    "rows renamed": (renamed(2, "tables/media.000009.copy"), r"differ"),
    "file appended": ([*PARTS, PARTS[4]], r"follows where it should end"),
    "archive appended": ([*PARTS, END, ARCHIVE], r"follows behind its end"),
}


@pytest.mark.parametrize(("parts", "words"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_and_its_place_is_said(parts: list[bytes], words: str) -> None:
    with pytest.raises(DamagedError, match=words):
        check(b"".join(parts) + END)


@pytest.mark.parametrize("garbage", [b"\0", b"x", bytes(512), bytes(9216), b"garbage" * 100])
def test_nothing_may_follow_behind_the_end(garbage: bytes) -> None:
    with pytest.raises(DamagedError, match="follows behind its end"):
        check(ARCHIVE + garbage)


@pytest.mark.parametrize(
    ("rows", "files", "words"),
    [
        ({"chatts": ROWS["chatts"][:1], "media": ROWS["media"]}, FILES, "1 rows of chatts .* 2"),
        ({"chatts": ROWS["chatts"]}, FILES, "0 rows of media and should have 1"),
        (ROWS, {KEY: PICTURE}, "1 files of 2700 bytes and should have 4 of"),
        (ROWS, {**FILES, "more.jpg": b""}, "5 files of .* should have 4 of"),
    ],
)
def test_what_is_left_out_with_its_digest_is_found_by_the_counts(
    rows: Mapping[str, tuple[bytes, ...]], files: Mapping[str, bytes], words: str
) -> None:
    with pytest.raises(DamagedError, match=words):
        check(write(manifest_of(), rows, files))


def test_a_newer_format_is_said_to_be_one() -> None:
    with pytest.raises(BackupError, match="has format 2, and this version of chatterd reads 1"):
        check(write(manifest_of(version=2)))


def test_an_own_file_that_was_corrupt_when_it_was_taken_is_named_and_no_damage() -> None:
    files = {KEY: b"wrong", "büro 1.jpg": b"adopted"}
    contents = verify(io.BytesIO(write(manifest_of(files=files), files=files)), tqdm(disable=True))
    assert (contents.corrupt, contents.corrupt_keys) == (1, [KEY])


# What nobody's writer has written


NAMES: Final = [
    "media/../outside",
    "media/..",
    "media/.",
    "media/",
    "media//etc/outside",
    "media/a/b",
    "media/a\\b",
    "media/.incoming",
    "media/line\nbreak",
    "media",
    "../outside",
    "/etc/outside",
    "./media/a.jpg",
    "tables/feed.000001.copy",
    "tables/pg_authid.000001.copy",
    "tables/../chatts.000001.copy",
    "tables/chatts.copy",
    "chatts",
    "manifest.json",
    "",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_no_backup_has_is_refused(name: str) -> None:
    with pytest.raises(DamagedError, match="does not belong into it"):
        read(b"".join(renamed(4, name)) + END)


def test_a_name_that_no_file_can_have_is_refused() -> None:
    files = {"l" * 256: b""}
    with pytest.raises(DamagedError, match="does not belong into it"):
        read(write(manifest_of(files=files), files=files))


@pytest.mark.parametrize("kind", [bytes([kind]) for kind in range(256) if kind != ord("0")])
def test_what_is_no_file_is_refused(kind: bytes) -> None:
    """Links, devices, folders, and whatever else a tar can hold."""
    link = header_with(header_with(PARTS[4], 156, kind), 157, b"/etc/passwd")
    with pytest.raises(DamagedError, match=r"no header|too early"):
        read(b"".join([*PARTS[:4], link, *PARTS[5:]]) + END)


def test_a_size_that_is_not_true_needs_no_memory() -> None:
    size = b"%011o\0" % (8**11 - 1)
    for member in range(len(PARTS)):
        part = header_with(PARTS[member], 124, size) + PARTS[member][512:]
        with pytest.raises(DamagedError):
            read(b"".join([*PARTS[:member], part, *PARTS[member + 1 :]]) + END)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[" * 100_000,
        b'{"format": 1, "x": ' + b"[" * 100_000,
        b'{"format": 1}',
        b'{"format": 1e400}',
        b" " * (1 << 20) + b"{}",
        b'{"format": 1, "chatterd": "\\u001b[2J"}',
    ],
    ids=range(8),
)
def test_a_manifest_that_is_none_is_refused(content: bytes) -> None:
    header = header_with(PARTS[0], 124, b"%011o\0" % len(content))
    archive = header + content + bytes(-len(content) % 512) + b"".join(PARTS[1:]) + END
    with pytest.raises(DamagedError, match=r"is not as it was written|no backup of chatterd's"):
        read(archive)


@pytest.mark.parametrize("content", [b"", b"text", bytes(10_000), b"PK\x03\x04" * 1000])
def test_what_is_no_archive_is_refused(content: bytes) -> None:
    with pytest.raises(DamagedError):
        read(content)


def test_a_tar_of_somebody_elses_is_refused(tmp_path: Path) -> None:
    (tmp_path / "passwd").symlink_to("/etc/passwd")
    tar = ["tar", "--create", "--file=-", "passwd"]
    done = subprocess.run(tar, cwd=tmp_path, capture_output=True, check=True)
    with pytest.raises(DamagedError, match=r"no header of a member|no backup of chatterd's"):
        read(done.stdout)
