"""The checks of what lies on the disk: `disk` and `media`."""

import os
import shlex
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Final

from sqlalchemy.engine import URL

from chatterd import settings
from chatterd.database import Database, refusal
from chatterd.doctor import Finding, fault, ok, warning
from chatterd.errors import DatabaseUnavailable
from chatterd.media import SLOTS
from chatterd.media_doctor import Report, doctor, sample
from chatterd.media_room import bytes_in

# What all uploads that a process takes at once may have.
_UPLOADS: Final = settings.UPLOADS_MAX * len(SLOTS) * settings.MEDIA_MAX_SIZE
_INODES: Final = 10_000
_DATABASE_ROOM, _DATABASE_FAULT_ROOM = 2**30, 2**26
_SAMPLE_BYTES: Final = 2**26


def disk_check(data: Path | None) -> list[Finding]:
    """See whether files can be stored, and the database can grow in `data`, if that is ours."""
    root = settings.MEDIA_ROOT
    place = shlex.quote(str(root))
    if not root.is_dir():
        return [
            fault(
                f"MEDIA_ROOT, {root}, is not there.",
                "If its disk is not mounted, mount it. Else start the server, which makes it, or"
                " make it for the server's user:",
                f"sudo install -d -o chatterd -g chatterd {place}",
            )
        ]
    disk = os.statvfs(root)
    free = disk.f_bavail * disk.f_frsize
    findings = [*_writable(root, disk), *_room(root, disk, free), *_total(root, disk)]
    if data is not None and (there := os.statvfs(data)).f_frsize:
        findings += _database_room(data, there.f_bavail * there.f_frsize)
    return findings or [ok(f"{_size(free)} free for {root}")]


def _writable(root: Path, disk: os.statvfs_result) -> Iterator[Finding]:
    if disk.f_flag & os.ST_RDONLY:
        yield fault(
            f"The disk of MEDIA_ROOT, {root}, is read-only: no picture can be stored.",
            "If the kernel has made it so after an error, save what is on it; else let it write:",
            "sudo dmesg --level err",
            f"sudo mount -o remount,rw {shlex.quote(str(_mount_point(root)))}",
        )
        return
    for folder in (root, root / ".incoming"):
        if folder.is_dir() and not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            yield fault(
                f"{folder} belongs to {folder.owner()}, and this user may not write there.",
                "Look as the server's user (sudo -u chatterd); if you did, give it the folder:",
                f"sudo chown -R chatterd: {shlex.quote(str(root))}",
            )
            return


def _mount_point(path: Path) -> Path:
    return next(each for each in (path.resolve(), *path.resolve().parents) if each.is_mount())


def _room(root: Path, disk: os.statvfs_result, free: int) -> Iterator[Finding]:
    largest = f"sudo du -xh {shlex.quote(str(_mount_point(root)))} | sort -h | tail -20"
    mend = "Make room, or give MEDIA_ROOT a larger disk. What takes most:"
    floor = settings.MEDIA_FREE_FLOOR
    if free <= floor:
        yield fault(
            f"{_size(free)} are free for {root}, and MEDIA_FREE_FLOOR keeps {_size(floor)}:"
            " uploads get 507.",
            mend,
            largest,
        )
    elif free - floor < _UPLOADS:
        yield warning(
            f"{_size(free)} are free for {root}, and MEDIA_FREE_FLOOR keeps {_size(floor)}: all"
            f" uploads that are taken at once need {_size(_UPLOADS)}.",
            mend,
            largest,
        )
    if disk.f_files and disk.f_favail < _INODES:
        judge = warning if disk.f_favail > settings.UPLOADS_MAX else fault
        yield judge(
            f"The disk of {root} has room for {disk.f_favail} more files, however small.",
            "Remove what nobody needs, and what no chatt names; or move to a file system with more"
            " inodes:",
            "chatterd media sweep --delete",
            f"df -i {shlex.quote(str(root))}",
        )


def _total(root: Path, disk: os.statvfs_result) -> Iterator[Finding]:
    if (total := settings.MEDIA_TOTAL_SIZE) is None:
        return
    used = bytes_in(root)
    mend = (
        "Set MEDIA_TOTAL_SIZE higher and start the server anew, or see what no chatt names:",
        "chatterd media sweep",
    )
    if total - used < settings.MEDIA_MAX_SIZE:
        yield fault(
            f"All files have {_size(used)} of the {_size(total)} of MEDIA_TOTAL_SIZE: uploads get"
            " 507.",
            *mend,
        )
    elif used > 0.9 * total:
        yield warning(f"All files have {_size(used)} of MEDIA_TOTAL_SIZE, {_size(total)}.", *mend)
    elif total > disk.f_blocks * disk.f_frsize:
        yield warning(
            f"MEDIA_TOTAL_SIZE is {_size(total)}, and the disk of {root} has"
            f" {_size(disk.f_blocks * disk.f_frsize)}: it limits nothing.",
            "Set it to what the disk can hold, or to nothing.",
        )


def _database_room(data: Path, free: int) -> Iterator[Finding]:
    if free < _DATABASE_ROOM:
        judge = warning if free > _DATABASE_FAULT_ROOM else fault
        yield judge(
            f"{_size(free)} are free for the database in {data}; without room, it stops.",
            "Make room. What takes most:",
            f"sudo du -xh {shlex.quote(str(_mount_point(data)))} | sort -h | tail -20",
        )


async def media_check(url: URL, *, is_whole: bool) -> list[Finding]:
    """See whether files that chatts name are there and what was uploaded: all, or some."""
    async with aclosing(Database(url)) as database:
        try:
            if is_whole:
                report = await doctor(database, settings.MEDIA_ROOT)
            else:
                report = await sample(database, settings.MEDIA_ROOT, _SAMPLE_BYTES)
        except DatabaseUnavailable as error:
            raise refusal(error) from error
    return list(_damage(report)) or [ok(_looked_at(report, is_whole=is_whole))]


def _damage(report: Report) -> Iterator[Finding]:
    for name, tally, keys in (
        ("missing", report.missing, report.missing_keys),
        ("damaged", report.corrupt, report.corrupt_keys),
    ):
        if tally.count:
            yield fault(
                f"{tally.count} of the files that chatts name are {name}, such as {keys[0]}.",
                "See whether MEDIA_ROOT is the right folder, and bring them back from a backup."
                " This lists them:",
                "chatterd media doctor",
            )


def _looked_at(report: Report, *, is_whole: bool) -> str:
    files, size = report.referenced.count, _size(report.referenced.bytes)
    if is_whole:
        return f"all {files} files, {size}, are there and what was uploaded"
    return f"{files} files, {size}, are there and what was uploaded; --media reads all"


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
