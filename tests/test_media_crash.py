"""A server that is killed at any moment of an upload: a whole chatt, or nothing after the sweep."""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import aclosing, contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

import anyio
import pytest
from sqlalchemy.engine import make_url

from chatterd.database import Database
from chatterd.media_doctor import doctor
from chatterd.media_sweep import Sweep
from tests.media_folder import du
from tests.multipart import (
    DEADLINE_SECONDS,
    THUMBNAIL,
    connect,
    encode,
    fields,
    files,
    form_type,
    image,
    kept,
    video,
)
from tests.process import environment
from tests.samples import longer_jpeg, longer_mp4

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.multipart import Connection

KILLS = 200
UPLOADS_AT_ONCE = 3
SIZE = 400_000
# Some uploads are answered before their server is killed.
LONGEST = 1.3
SEED = 20261121
OTHERS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
# What a connection to a killed server ends in.
CUT = (OSError, anyio.BrokenResourceError, anyio.EndOfStream, anyio.IncompleteRead)


class Forked(NamedTuple):
    pid: int
    url: str


@contextmanager
def forking_servers(folder: Path, **settings: str) -> Iterator[Callable[[], Forked]]:
    """Yield what starts a server, in place of one that has been killed."""
    with (
        (folder / "stderr").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "tests.forking_server"],
            cwd=folder,
            env=environment(folder, **settings),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def start() -> Forked:
            stdin.write("\n")
            stdin.flush()
            pid, url = stdout.readline().split()
            return Forked(int(pid), url)

        yield start
        stdin.close()


def has_picture(number: int) -> bool:
    """Whether an upload has a picture: a new server's first takes long."""
    return number // UPLOADS_AT_ONCE % 5 == 0


def media_of(number: int) -> tuple[bytes, bytes]:
    """A picture and a video that no other upload has."""
    filling = number.to_bytes(4)
    return longer_jpeg(SIZE, filling), longer_mp4(SIZE, filling)


@pytest.mark.timeout(300)
async def test_a_killed_server_leaves_whole_chatts_or_nothing_after_the_sweep(
    own_database: str, psql: Connection, tmp_path: Path
) -> None:
    chance = random.Random(SEED)  # noqa: S311 - no secret
    media = tmp_path / "media"
    media.mkdir()
    answered: set[str] = set()
    numbers = iter(range(10**9))

    async def upload(url: str) -> None:
        number = next(numbers)
        picture, movie = media_of(number)
        parts = [image(picture), video(movie)] if has_picture(number) else [video(movie)]
        form = encode(*fields("ann", str(number)), *parts)
        with suppress(*CUT):
            async with connect(url) as wire:
                lines = (
                    f"Content-Type: {form_type()['Content-Type']}",
                    f"Content-Length: {len(form)}",
                )
                await wire.request("POST", "/postimages", *lines)
                await wire.send(form)
                answer = await wire.answer("POST")
                assert (answer.status_code, answer.content) == (200, b"{}")
                answered.add(str(number))

    settings = {"DATABASE_URL": own_database, "MEDIA_ROOT": str(media)}
    with forking_servers(tmp_path, **settings) as start:
        longest = math.inf  # the first ones are waited for
        for _ in range(KILLS):
            server = await asyncio.to_thread(start)
            begun = time.monotonic()
            with anyio.move_on_after(chance.random() * longest):
                async with anyio.create_task_group() as group:
                    for _ in range(UPLOADS_AT_ONCE):
                        group.start_soon(upload, server.url)
            if longest == math.inf:
                longest = LONGEST * (time.monotonic() - begun)
            os.kill(server.pid, signal.SIGKILL)
            await nothing_is_left_over(psql, own_database, media)
    await all_is_right(own_database, media)
    stored = await psql.fetch("SELECT message, image, video FROM chatts")
    assert answered <= {row["message"] for row in stored}
    assert 0 < len(stored) < KILLS * UPLOADS_AT_ONCE
    for row in stored:
        number = int(row["message"])
        for key, data in zip((row["image"], row["video"]), media_of(number), strict=True):
            if key is not None:
                assert key.partition(".")[0] == hashlib.sha256(data).hexdigest()
        assert (row["image"] is not None) == has_picture(number)
    named = {key for row in stored for key in (row["image"], row["video"]) if key is not None}
    assert kept(media).keys() == named


async def nothing_is_left_over(psql: Connection, url: str, media: Path) -> None:
    """Sweep; then what is there is what chatts name."""
    # What PostgreSQL had been sent it may still commit. A sweep is not so soon otherwise.
    with anyio.fail_after(DEADLINE_SECONDS):
        while await psql.fetchval(OTHERS):
            pass
    async with aclosing(Database(make_url(url))) as database:
        await Sweep(database, media, 0, delete=True).run()
    stored = await psql.fetch("SELECT image, video FROM chatts")
    named = {key for row in stored for key in row if key is not None}
    assert {name.removesuffix(THUMBNAIL) for name in files(media)} == named


async def all_is_right(url: str, media: Path) -> None:
    """Check that every file is named, complete, and all that is there.

    Once is enough: no chatt is deleted, and what one names stays as it is.
    """
    async with aclosing(Database(make_url(url))) as database:
        report = await doctor(database, media)
    states = (report.temporary, report.orphaned, report.corrupt, report.missing)
    assert [state.count for state in states] == [0, 0, 0, 0], report
    assert report.total == await asyncio.to_thread(du, media)
