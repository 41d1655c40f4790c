"""`chatterd media sweep`, and that of a server: what is removed, and what never."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import tracemalloc
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.engine import make_url
from starlette.applications import Starlette

from chatterd import settings
from chatterd.database import Database, migrate
from chatterd.errors import DatabaseUnavailable
from chatterd.lifespan import lifespan
from chatterd.media_doctor import doctor
from chatterd.media_sweep import Sweep, Swept, swept
from tests.conftest import connected, database_away
from tests.media_folder import AGE, Store, counts, database, db, name_it, record, store, url
from tests.multipart import THUMBNAIL, until
from tests.process import assert_refused, run

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy.engine import URL

    from tests.multipart import Connection

__all__ = ["database", "db", "store", "url"]  # fixtures


async def records(db: Connection) -> set[str]:
    return {row["key"] for row in await db.fetch("SELECT key FROM media")}


async def sweep(database: Database, store: Store, older_than: float = AGE) -> Swept:
    return await Sweep(database, store.root, older_than, delete=True).run()


async def test_a_sweep_removes_exactly_what_is_old_unnamed_and_ours(
    store: Store, db: Connection, url: str, tmp_path: Path
) -> None:
    orphan, film = store.store(b"orphan"), store.store(b"film", extension=".webm")
    gone = {
        orphan,
        store.put(f"{orphan}{THUMBNAIL}"),
        film,
        store.put(f"{'2' * 64}.png{THUMBNAIL}"),
        store.put(f".incoming/{'0' * 32}"),
        store.put(f".incoming/{'1' * 32}.clean"),
        store.put(".incoming/probe-1"),
        store.put(f".swept/{orphan}"),
    }
    young, named = store.store(b"young", age=0), store.store(b"named")
    thumbnailed = store.store(b"with a young thumbnail")
    store.put(f"{thumbnailed}{THUMBNAIL}", age=0)
    gone.add(thumbnailed)
    store.put(f"{young}{THUMBNAIL}")
    store.put(f"{named}{THUMBNAIL}")
    store.put(f".incoming/{'2' * 32}", age=0)
    store.put(f".swept/{'6' * 64}.png", age=0)
    for name in ("adopted.jpg", f"adopted.jpg{THUMBNAIL}", "notes.txt", f"{'a' * 64}.txt"):
        store.put(name)
    store.put(f"album/{orphan}")
    (store.root / f"{'b' * 64}.png").symlink_to("notes.txt")
    (store.root / f"{'c' * 64}.png").mkdir()
    await name_it(db, named, "adopted.jpg")
    await record(db, orphan, film, named, "long gone.jpg")
    await record(db, "only just.jpg", age=0)

    before = store.tree()
    arguments = ("media", "sweep", "--older-than", str(AGE))
    dry = run(tmp_path, *arguments, DATABASE_URL=url, MEDIA_ROOT=str(store.root))
    assert (dry.returncode, dry.stderr) == (0, "")
    assert store.tree() == before
    assert len(await records(db)) == 5

    done = run(tmp_path, *arguments, "--delete", DATABASE_URL=url, MEDIA_ROOT=str(store.root))
    assert (done.returncode, done.stderr) == (0, "")
    assert set(before) - set(store.tree()) == gone
    assert set(store.tree()) <= set(before)
    assert await records(db) == {named, "only just.jpg"}
    for printed, first in ((dry, "would be removed"), (done, "removed")):
        assert printed.stdout.startswith(first)
        lines = [line.split() for line in printed.stdout.splitlines()]
        assert [
            "orphaned",
            "5",
            str(len(b"orphanfilmwith a young thumbnail") + 14),
            "bytes",
        ] in lines
        assert ["temporary", "4", "28", "bytes"] in lines
        assert ["records", "3" if printed is done else "1"] in lines
        assert [line[1] for line in lines if line[0] == "unknown"] == ["4"]


async def test_a_file_that_is_uploaded_again_between_looking_and_moving_stays(
    store: Store, database: Database
) -> None:
    key = store.store(b"picture")
    one = Sweep(database, store.root, AGE, delete=True)
    assert await one.candidates([(key, (store.root / key).lstat())]) == [key]
    store.store(b"picture", age=0)
    assert one.move([key]) == []
    assert (store.root / key).read_bytes() == b"picture"


async def test_a_file_that_is_uploaded_again_while_it_is_moved_is_put_back(
    store: Store, database: Database
) -> None:
    key = store.store(b"picture")
    one = Sweep(database, store.root, AGE, delete=True)
    moved = one.move([key])
    # What a rename one moment later would have got hold of.
    os.utime(moved[0].place)
    assert await one.settle(moved) == []
    assert store.tree() == {".incoming": None, ".swept": None, key: b"picture"}


async def test_a_file_that_is_uploaded_again_after_it_was_moved_stays_and_the_old_one_goes(
    store: Store, database: Database
) -> None:
    key = store.store(b"picture")
    one = Sweep(database, store.root, AGE, delete=True)
    moved = one.move([key])
    store.store(b"picture", age=0)
    assert await one.settle(moved) == [key]
    assert store.tree() == {".incoming": None, ".swept": None, key: b"picture"}


@pytest.mark.parametrize("is_there_again", [False, True])
async def test_a_file_that_a_chatt_names_after_it_was_moved_is_put_back(
    store: Store, db: Connection, database: Database, *, is_there_again: bool
) -> None:
    key, other = store.store(b"picture"), store.store(b"other", extension=".mp4")
    one = Sweep(database, store.root, AGE, delete=True)
    moved = one.move([key, other])
    assert key not in store
    if is_there_again:
        store.store(b"picture", age=0)
    await name_it(db, key)
    assert await one.settle(moved) == [other]
    assert store.tree() == {".incoming": None, ".swept": None, key: b"picture"}
    assert (await doctor(database, store.root)).is_healthy


async def test_a_thumbnail_stays_when_its_picture_is_uploaded_again_meanwhile(
    store: Store, database: Database
) -> None:
    key = store.store(b"picture")
    thumbnail = store.put(f"{key}{THUMBNAIL}")
    one = Sweep(database, store.root, AGE, delete=True)
    assert await one.settle(one.move([key])) == [key]
    moved = one.move([thumbnail])
    store.store(b"picture", age=0)
    assert await one.settle(moved) == []
    assert thumbnail in store


async def test_a_database_that_goes_away_after_files_were_moved_has_them_put_back(
    store: Store, database: Database, url: str, postgres_url: URL
) -> None:
    key = store.store(b"picture")
    one = Sweep(database, store.root, AGE, delete=True)
    moved = one.move([key])
    async with database_away(url, postgres_url):
        with pytest.raises(DatabaseUnavailable):
            await one.settle(moved)
    assert store.tree() == {".incoming": None, ".swept": None, key: b"picture"}


async def test_two_sweeps_at_once_lose_nothing_that_is_uploaded_again(
    store: Store, db: Connection, database: Database
) -> None:
    """Both have looked; one has moved the old file, the other the one that was uploaded then."""
    key = store.store(b"picture")
    one, other = (Sweep(database, store.root, AGE, delete=True) for _ in range(2))
    moved_by_one = one.move([key])
    store.store(b"picture")
    moved_by_other = other.move([key])
    assert len(list(store.swept.iterdir())) == 2
    os.utime(moved_by_other[0].place)
    await sweep(database, store)  # a third, which finds what both have moved
    await one.settle(moved_by_one)
    await other.settle(moved_by_other)
    await name_it(db, key)
    assert store.tree() == {".incoming": None, ".swept": None, key: b"picture"}


async def test_a_sweep_that_was_killed_is_finished_by_the_next(
    store: Store, db: Connection, database: Database
) -> None:
    named, there, old, young = (store.store(b"%d" % number) for number in range(4))
    thumbnail = store.put(f"{named}{THUMBNAIL}")
    killed = Sweep(database, store.root, AGE, delete=True)
    killed.move([named, there, old, young, thumbnail])
    for path in store.swept.glob(f"{young}*"):
        os.utime(path)
    store.put(f".swept/{store.store(b'by hand')}", b"by hand")
    (store.root / store.store(b"by hand")).unlink()
    for key in (named, store.store(b"1"), hashlib.sha256(b"by hand").hexdigest() + ".jpeg"):
        await name_it(db, key)

    dry = await Sweep(database, store.root, AGE).run()
    assert len(list(store.swept.iterdir())) == 6
    result = await sweep(database, store)
    assert counts(dry) == counts(result) == {"restored": 3, "temporary": 2}
    assert (await doctor(database, store.root)).is_healthy
    assert {thumbnail, named, there} <= set(store.tree())
    assert old not in store
    # Its chatt may be about to come.
    assert [path.name.partition(".")[0] for path in store.swept.iterdir()] == [young[:64]]


async def test_a_link_in_place_of_a_folder_of_ours_leads_nowhere(
    store: Store, database: Database, tmp_path: Path
) -> None:
    store.incoming.rmdir()
    (tmp_path / "elsewhere").mkdir()
    for folder in (store.incoming, store.swept):
        folder.symlink_to(tmp_path / "elsewhere")
    file = tmp_path / "elsewhere" / ("0" * 32)
    file.touch()
    os.utime(file, (0, 0))
    assert counts(await sweep(database, store)) == {"unknown": 2}
    assert file.exists()


# --- A database that does not answer, or not the truth


def drop_an_index(url: str) -> None:
    async def drop() -> None:
        async with connected(url) as connection:
            await connection.execute("DROP INDEX ix_chatts_video")

    asyncio.run(drop())


@pytest.mark.parametrize("trouble", ["away", "not migrated", "being restored"])
def test_nothing_is_removed_unless_the_database_knows_what_is_named(
    store: Store, postgres_url: URL, empty_database: str, tmp_path: Path, trouble: str
) -> None:
    store.store(b"orphan")
    store.put(f".incoming/{'0' * 32}")
    store.put(f".swept/{'0' * 64}.png")
    before = store.tree()
    url, word = empty_database, "migrate"
    if trouble == "away":
        away = postgres_url.set(host="127.0.0.1", port=1, query={})
        url, word = away.render_as_string(hide_password=False), "127.0.0.1"
    if trouble == "being restored":
        migrate(make_url(empty_database))
        word = "restored"
        drop_an_index(empty_database)
    arguments = ("media", "sweep", "--older-than", "0", "--delete")
    done = run(tmp_path, *arguments, DATABASE_URL=url, MEDIA_ROOT=str(store.root))
    assert_refused(done, word)
    assert store.tree() == before


def test_where_there_is_no_embedded_database_none_is_made(tmp_path: Path) -> None:
    store = Store(tmp_path / "media")
    key = store.store(b"picture")
    done = run(tmp_path, "media", "sweep", "--delete", MEDIA_ROOT=str(store.root))
    assert_refused(done, "var/postgres", "DATABASE_URL")
    assert [path.name for path in tmp_path.iterdir()] == ["media"]
    assert key in store


# --- Many files


async def test_twenty_thousand_files_are_looked_at_and_swept_in_bounded_memory(
    store: Store, db: Connection, database: Database
) -> None:
    count = 20_000
    for number in range(count):
        name = hashlib.sha256(b"%d" % number).hexdigest()
        path = store.root / f"{name}.jpeg"
        path.write_bytes(b"%d" % number)
        os.utime(path, (0, 0))
    await db.execute(
        "INSERT INTO chatts (name, message, image) SELECT 'ann', '',"
        " encode(sha256(number::text::bytea), 'hex') || '.jpeg'"
        f" FROM generate_series(0, {count - 1}, 2) AS number"
    )
    await doctor(database, store.incoming)  # what is made once is made
    tracemalloc.start()
    try:
        report = await doctor(database, store.root)
        assert counts(report) == {"referenced": 10_000, "orphaned": 10_000, "folders": 2}
        # What is known of all files would be 20 MB.
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert counts(await sweep(database, store)) == {"orphaned": 10_000}
    assert len(list(store.root.glob("*.jpeg"))) == 10_000


# --- In the background of a server


async def test_a_server_sweeps_again_and_again_and_says_so_only_when_something_went(
    store: Store, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "chatterd")
    caplog.clear()
    young, first = store.store(b"young", age=AGE / 2), store.store(b"first")
    async with swept(database, store.root, first_seconds=0, interval_seconds=0.01):
        await until(lambda: "removed 1 orphaned files of 5 bytes" in caplog.text)
        second = store.store(b"second")
        await until(lambda: "removed 1 orphaned files of 6 bytes" in caplog.text)
    assert set(store.tree()) == {".incoming", ".swept", young}
    assert not {first, second} & set(store.tree())
    assert len(caplog.messages) == 2


async def test_a_server_sweeps_nothing_that_an_upload_of_the_longest_time_may_need(
    store: Store, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = 4 * 3600
    monkeypatch.setattr(settings, "UPLOAD_TIMEOUT", longest)
    needed = {store.put(f".incoming/{'0' * 32}", age=longest), store.store(b"a", age=longest)}
    left = {store.put(f".incoming/{'1' * 32}", age=2 * longest), store.store(b"b", age=2 * longest)}
    async with swept(database, store.root, first_seconds=0):
        await until(lambda: not any(name in store for name in left))
    assert all(name in store for name in needed)


async def test_a_server_that_stops_while_it_sweeps_leaves_nothing_moved_away(
    store: Store, database: Database
) -> None:
    keys = [store.store(b"%d" % number) for number in range(1_000)]
    async with swept(database, store.root, first_seconds=0):
        await until(store.swept.exists)
    assert list(store.swept.iterdir()) == []
    assert len(set(keys) - set(store.tree())) > 0


async def test_a_server_goes_on_sweeping_after_its_database_or_its_folder_were_away(
    store: Store,
    database: Database,
    url: str,
    postgres_url: URL,
    caplog: pytest.LogCaptureFixture,
) -> None:
    key = store.store(b"picture")
    async with database_away(url, postgres_url):
        sweeping = swept(database, store.root, first_seconds=0, interval_seconds=0.01)
        await sweeping.__aenter__()
        await until(lambda: "not available" in caplog.text)
        assert key in store
    try:
        await until(lambda: key not in store)
        store.root.rename(store.root.with_name("elsewhere"))
        await until(lambda: "cannot be swept: No such file or directory" in caplog.text)
        store.root.with_name("elsewhere").rename(store.root)
        key = store.store(b"picture")
        await until(lambda: key not in store)
    finally:
        await sweeping.__aexit__(None, None, None)
    assert "Traceback" not in caplog.text


async def test_the_sweep_of_a_server_begins_and_ends_with_it(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sweeping() -> list[str]:
        names = (getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks())
        return [name for name in names if name.startswith("swept.")]

    monkeypatch.setattr(settings, "MEDIA_ROOT", tmp_path / "media")
    async with lifespan(make_url(url), asyncio.Event())(Starlette()):
        assert len(sweeping()) == 1
    assert sweeping() == []
