"""`chatterd media doctor` and `sweep`: what they count, what they remove, and what never."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import subprocess
import tracemalloc
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import pytest
from sqlalchemy.engine import make_url
from starlette.applications import Starlette

from chatterd import settings
from chatterd.database import Database, migrate
from chatterd.embedded import postgres
from chatterd.errors import DatabaseUnavailable
from chatterd.lifespan import lifespan
from chatterd.media_upkeep import Report, Sweep, Swept, doctor, swept
from tests.conftest import _new_database, dsn
from tests.multipart import until
from tests.process import assert_refused, run
from tests.test_embedded import open_folder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from sqlalchemy.engine import URL

    from tests.multipart import Connection

AGE = 3600
OLD = 2 * AGE
THUMBNAIL = ".thumb.webp"
STATES = ("referenced", "temporary", "orphaned", "corrupt", "folders", "missing")


class Store:
    """A media folder, as uploads and operators leave it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.incoming = root / ".incoming"
        self.swept = root / ".swept"

    def prepare(self) -> None:
        self.incoming.mkdir(parents=True)

    def put(self, name: str, content: bytes = b"content", age: float = OLD) -> str:
        """Rename a file of this age into place, as an upload does; return its name."""
        arriving = self.incoming / "arriving"
        arriving.write_bytes(content)
        past = arriving.stat().st_mtime - age
        os.utime(arriving, (past, past))
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        arriving.rename(path)
        return name

    def store(self, content: bytes, age: float = OLD, extension: str = ".jpeg") -> str:
        """Put a file under its digest; return the key."""
        return self.put(hashlib.sha256(content).hexdigest() + extension, content, age)

    def __contains__(self, name: str) -> bool:
        return os.path.lexists(self.root / name)

    def tree(self) -> dict[str, bytes | None]:
        """Every name below the root, with the content of each file."""
        paths = self.root.rglob("*")
        return {
            str(path.relative_to(self.root)): path.read_bytes() if path.is_file() else None
            for path in paths
        }


def du(root: Path) -> int:
    """What du counts, and with it the folders, which it leaves out since coreutils 9.2."""
    command = ["du", "--apparent-size", "--bytes", "--summarize", "--", str(root)]
    count = int(subprocess.run(command, capture_output=True, check=True).stdout.split()[0])
    command[-1] = str(root / ".incoming" / "empty")
    (root / ".incoming" / "empty").mkdir()
    try:
        empty = subprocess.run(command, capture_output=True, check=True).stdout.split()[0]
    finally:
        (root / ".incoming" / "empty").rmdir()
    if int(empty):
        return count
    folders = (Path(folder) for folder, _, _ in os.walk(root))
    return count + sum(folder.lstat().st_size for folder in folders)


@pytest.fixture(scope="module")
def url(postgres_url: URL) -> Iterator[str]:
    """A database at head for these tests: the others' chatts would be missing files."""
    with _new_database(postgres_url) as url:
        migrate(make_url(url))
        yield url


@pytest.fixture
async def db(url: str) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(dsn(url))
    try:
        await connection.execute("TRUNCATE chatts, media")
        yield connection
    finally:
        await connection.close()


@pytest.fixture
async def database(url: str, db: Connection) -> AsyncIterator[Database]:  # noqa: ARG001 - empty
    database = Database(make_url(url))
    try:
        yield database
    finally:
        await database.aclose()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "media")
    store.prepare()
    return store


async def name_it(db: Connection, image: str | None = None, video: str | None = None) -> None:
    statement = "INSERT INTO chatts (name, message, image, video) VALUES ('ann', '', $1, $2)"
    await db.execute(statement, image, video)


async def record(db: Connection, *keys: str, age: float = OLD, size: int = 7) -> None:
    statement = (
        "INSERT INTO media (key, size, stored)"
        " SELECT key, $2, now() - $3 * interval '1 second' FROM unnest($1::text[]) AS key"
    )
    await db.execute(statement, keys, size, age)


async def records(db: Connection) -> set[str]:
    return {row["key"] for row in await db.fetch("SELECT key FROM media")}


def counts(result: Report | Swept) -> dict[str, int]:
    """How many of each state, where there are any."""
    tallies = {state: getattr(result, state, None) for state in (*STATES, "restored", "unknown")}
    return {state: tally.count for state, tally in tallies.items() if tally and tally.count}


async def sweep(database: Database, store: Store, older_than: float = AGE) -> Swept:
    return await Sweep(database, store.root, older_than, delete=True).run()


@asynccontextmanager
async def database_away(url: str, postgres_url: URL) -> AsyncIterator[None]:
    """Have PostgreSQL end the connections to a database and take no new ones."""
    name = make_url(url).database
    admin = await asyncpg.connect(dsn(postgres_url))
    try:
        await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        ended = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1"
        await admin.fetch(ended, name)
        try:
            yield
        finally:
            await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    finally:
        await admin.close()


# --- doctor


async def fill_with_everything(store: Store, db: Connection, elsewhere: Path) -> None:
    """Leave something of each state in the folder, and of each kind that a folder can hold."""
    picture = store.store(b"a picture")
    store.put(f"{picture}{THUMBNAIL}", b"a small picture")
    adopted, video = store.put("büro 1.jpg", b"adopted"), store.store(b"film", extension=".mp4")
    os.link(store.root / adopted, store.root / "the same.jpg")
    for image, film in ((picture, None), (picture, video), (adopted, None), (None, "the same.jpg")):
        await name_it(db, image, film)

    for name in ("0" * 32, f"{'1' * 32}.clean", "probe-1", "deep/er"):
        store.put(f".incoming/{name}", b"half a file")
    store.put(f".swept/{picture}", b"a picture")

    orphan = store.store(b"nobody's")
    store.put(f"{orphan}{THUMBNAIL}")
    store.put(f"{'2' * 64}.png{THUMBNAIL}")
    for name in ("notes.txt", ".hidden", "album/1.jpg", "new\nline.jpg"):
        store.put(name)
    store.put(os.fsdecode(b"\xff\xfe.jpg"))
    os.mkfifo(store.root / f"{'3' * 64}.jpeg")
    for name, target in (("dangling.jpg", "gone"), ("folder", elsewhere), ("4" * 64, elsewhere)):
        (store.root / name).symlink_to(target)

    named, unnamed = (store.store(content) for content in (b"right 1", b"right 2"))
    await name_it(db, named)
    for key in (named, unnamed):
        (store.root / key).write_bytes(b"wrong 1")

    await record(db, "5" * 64 + ".jpeg", size=1000)
    lost = ("5" * 64 + ".jpeg", "dangling.jpg", "../media/notes.txt", "new\nline.jpg", ".hidden")
    for key in (*lost, "album/1.jpg", "l" * 300, "album"):
        await name_it(db, key)


async def test_each_file_is_in_one_state_and_the_sum_is_that_of_du(
    store: Store, db: Connection, url: str, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "large").write_bytes(bytes(100_000))
    await fill_with_everything(store, db, tmp_path / "elsewhere")
    done = run(tmp_path, "media", "doctor", "--json", DATABASE_URL=url, MEDIA_ROOT=str(store.root))
    assert (done.returncode, done.stderr) == (1, "")
    report = json.loads(done.stdout)
    assert {state: report[state]["count"] for state in STATES} == {
        "referenced": 5,  # two pictures of which one has two names, a thumbnail, a video
        "temporary": 5,
        "orphaned": 3 + 4 + 1 + 1 + 3,  # own, foreign, not UTF-8, a pipe, links
        "corrupt": 2,
        "folders": 5,
        "missing": 8,
    }
    assert report["missing"]["bytes"] == 1000
    assert report["corrupt"]["bytes"] == 14
    assert report["referenced"]["bytes"] == len(b"a picturea small pictureadoptedfilm")
    parts = [report[state]["bytes"] for state in STATES if state != "missing"]
    assert sum(parts) == report["total"] == du(store.root)
    assert report["total"] < 100_000
    assert not report["healthy"]


async def test_the_doctor_prints_the_keys_in_question_and_the_total_last(
    store: Store, db: Connection, url: str, tmp_path: Path
) -> None:
    key = store.store(b"right")
    (store.root / key).write_bytes(b"wrong")
    await name_it(db, "lost\x1b[2J ü.jpg")
    await name_it(db, store.store(b"fine"))
    done = run(tmp_path, "media", "doctor", DATABASE_URL=url, MEDIA_ROOT=str(store.root))
    assert (done.returncode, done.stderr) == (1, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[:2] == [["corrupt:", f'"{key}"'], ["missing:", '"lost\\u001b[2J', '\\u00fc.jpg"']]
    assert [line[:2] for line in lines[2:-2]] == [
        ["missing", "1"],
        ["referenced", "1"],
        ["temporary", "0"],
        ["orphaned", "0"],
        ["corrupt", "1"],
    ]
    assert lines[-1] == ["total", str(du(store.root)), "bytes"]


async def test_a_folder_where_all_is_well_is_status_0_whatever_else_lies_there(
    store: Store, db: Connection, url: str, tmp_path: Path
) -> None:
    await name_it(db, store.store(b"picture"))
    store.store(b"orphan")
    store.put("notes.txt")
    done = run(tmp_path, "media", "doctor", DATABASE_URL=url, MEDIA_ROOT=str(store.root))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["doctor", "sweep"])
def test_without_a_media_folder_one_line_says_so(url: str, tmp_path: Path, command: str) -> None:
    root = tmp_path / "unmounted"
    done = run(tmp_path, "media", command, DATABASE_URL=url, MEDIA_ROOT=str(root))
    assert_refused(done, str(root), "No such file or directory")
    assert not root.exists()


async def test_files_and_folders_that_vanish_while_the_doctor_looks_are_no_error(
    store: Store, db: Connection, database: Database
) -> None:
    keys = [store.store(b"%d" % number) for number in range(1_000)]
    for number in range(50):
        store.put(f"album {number}/1.jpg")
    await name_it(db, keys[0])
    looking = asyncio.create_task(doctor(database, store.root))
    for path in store.root.rglob("*.jpeg"):
        if path.name != keys[0]:
            path.unlink()
        await asyncio.sleep(0)
    for path in store.root.glob("album*/*"):
        path.unlink()
        path.parent.rmdir()
        await asyncio.sleep(0)
    report = await looking
    assert report.is_healthy
    assert report.referenced.count == 1


async def test_the_doctor_follows_the_keys_of_many_chatts_page_by_page(
    store: Store, db: Connection, database: Database
) -> None:
    await db.execute(
        "INSERT INTO chatts (name, message, image, video) SELECT 'ann', '',"
        " 'p' || number % 1500, 'v' || number % 1700 FROM generate_series(1, 5000) AS number"
    )
    for name in ("p0", "v0"):
        store.put(name)
    report = await doctor(database, store.root)
    assert counts(report) == {"referenced": 2, "folders": 2, "missing": 3198}
    assert len(report.missing_keys) == 100


# --- sweep


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
        connection = await asyncpg.connect(dsn(url))
        await connection.execute("DROP INDEX ix_chatts_video")
        await connection.close()

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


def test_the_embedded_database_is_used_where_a_server_runs_it_and_where_none_does() -> None:
    with open_folder() as folder:
        store = Store(folder / "var" / "media")
        store.prepare()
        key = store.store(b"picture")
        with postgres(folder / "var", options=["fsync=off"]) as url:
            migrate(make_url(url))

            async def post() -> None:
                connection = await asyncpg.connect(dsn(url))
                await name_it(connection, key)
                await connection.close()

            asyncio.run(post())
            beside = run(folder, "media", "doctor", "--json")
        alone = run(folder, "media", "doctor", "--json")
        for done in (beside, alone):
            assert (done.returncode, done.stderr) == (0, "")
            assert json.loads(done.stdout)["referenced"]["count"] == 1


def test_where_there_is_no_embedded_database_none_is_made(tmp_path: Path) -> None:
    store = Store(tmp_path / "media")
    store.prepare()
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
    async with lifespan(make_url(url))(Starlette()):
        assert len(sweeping()) == 1
    assert sweeping() == []
