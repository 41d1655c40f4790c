"""`chatterd backup` and `chatterd restore`: what was there is there again, and nothing else."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import io
import os
import pty
import subprocess
import sys
import tarfile
import termios
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from sqlalchemy.engine import make_url
from tqdm import tqdm

from chatterd.archive import BackupError
from chatterd.backup import back_up, new_file, verify
from chatterd.database import StatementError, head_revision, migrate
from chatterd.embedded import postgres
from chatterd.media_sweep import Sweep
from chatterd.models import MEDIA_LOCK
from chatterd.restore import restore
from tests.conftest import client_of, connected, database_at_head, new_database
from tests.media_folder import AGE, Store, database, db, name_it, record, store, url
from tests.multipart import encode, fields, form_type, image, until
from tests.objects import delete, post
from tests.process import Server, assert_refused, environment, open_folder, run
from tests.samples import longer_jpeg
from tests.test_backup_archive import ARCHIVE, DAMAGE, END, PICTURE, manifest_of, write

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx2
    from sqlalchemy.engine import URL

    from chatterd.database import Database
    from tests.multipart import Connection

__all__ = ["database", "db", "store", "url"]  # fixtures

DEBIAN: Final = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
ROWS: Final = {
    "chatts": "name, message, id, time, image, video, deleted, delete_token_hash",
    "idempotency_keys": "key_hash, fingerprint, salt, chatt_id, time, files, created",
    "media": "key, size, width, height, stored",
}


@pytest.fixture(scope="module")
def debian_url() -> Iterator[URL]:
    """The PostgreSQL of the distribution, whose version is another than ours."""
    if not DEBIAN:
        pytest.skip("no other PostgreSQL is installed")
    with open_folder() as folder, postgres(folder, bin_dir=DEBIAN[-1], options=["fsync=off"]) as u:
        yield make_url(u)


@pytest.fixture
def debian_database(debian_url: URL) -> Iterator[str]:
    with new_database(debian_url) as url:
        yield url


@pytest.fixture
def another_database(postgres_url: URL) -> Iterator[str]:
    with database_at_head(postgres_url) as url:
        yield url


async def rows_of(url: str) -> dict[str, list[tuple[Any, ...]]]:
    """Every row, in the order of the log, without its number there."""
    orders = {"chatts": "seq"}
    async with connected(url) as connection:
        return {
            table: [
                tuple(row)
                for row in await connection.fetch(
                    f"SELECT {columns} FROM {table} ORDER BY {orders.get(table, '1')}"
                )
            ]
            for table, columns in ROWS.items()
        }


def files_of(root: Path) -> dict[str, bytes]:
    """What is served from a media folder, but for thumbnails, which are made anew."""
    return {
        path.name: path.read_bytes()
        for path in root.iterdir()
        if path.is_file() and not path.name.endswith(".thumb.webp")
    }


async def back_up_to(path: Path, url: str, root: Path) -> None:
    """Do what `chatterd backup` does, without waiting for another Python to start."""
    with new_file(path) as file:
        await back_up(make_url(url), root, file, tqdm(disable=True))


async def restore_from(archive: bytes, url: str, root: Path) -> None:
    """Do what `chatterd restore` does when it has verified the archive."""
    await restore(make_url(url), root, io.BytesIO(archive), tqdm(disable=True))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def members_of(archive: Path | io.BytesIO) -> dict[str, bytes]:
    file = archive if isinstance(archive, io.BytesIO) else io.BytesIO(archive.read_bytes())
    with tarfile.open(fileobj=file) as opened:
        return {m.name: opened.extractfile(m).read() for m in opened}  # type: ignore[union-attr] # files


def printed(stdout: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in stdout.splitlines()}


async def start(folder: Path, *arguments: str, **settings: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "chatterd",
        *arguments,
        cwd=folder,
        env=environment(folder, **settings),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


# Beside a server, and then from PostgreSQL to PostgreSQL


class Load:
    """People who post texts and pictures, and delete some of them, until they are told to stop.

    posted: what was acknowledged, by id. deleting, deleted: ids of those whose deletion has begun,
        or was acknowledged.
    """

    def __init__(self, client: httpx2.AsyncClient) -> None:
        self._client = client
        self._stopped = asyncio.Event()
        self.posted: dict[str, Any] = {}
        self.deleting: set[str] = set()
        self.deleted: set[str] = set()

    async def run(self, number: int) -> None:
        mine = []
        count = 0
        while not self._stopped.is_set():
            count += 1
            chatt = await self._post(f"{number}.{count}", has_picture=count % 4 == 1)
            self.posted[chatt["id"]] = chatt
            mine.append(chatt)
            if count % 3 == 0:
                gone = mine.pop(0)
                self.deleting.add(gone["id"])
                await delete(self._client, gone)
                self.deleted.add(gone["id"])

    async def _post(self, text: str, *, has_picture: bool) -> Any:  # noqa: ANN401 - JSON
        if not has_picture:
            return await post(self._client, text, **{"Idempotency-Key": text})
        picture = longer_jpeg(20_000, text.encode())
        body = encode(*fields(message=text), image(picture))
        answer = await self._client.post("/v1/chatts", content=body, headers=form_type())
        assert answer.status_code == 201, answer.content
        return answer.json()

    def stop(self) -> None:
        self._stopped.set()


async def backed_up_under_load(folder: Path, server: Server, url: str) -> Path:
    """Take a backup while people post; check what is in it; return it."""
    archive = folder / "chatter.tar"
    async with client_of(server) as client:
        load = Load(client)
        async with asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(load.run(number))
            await until(lambda: len(load.posted) > 24)
            before, gone = set(load.posted), set(load.deleted)
            backup = await start(
                folder, "backup", str(archive), DATABASE_URL=url, MEDIA_ROOT=str(server.media)
            )
            stdout, stderr = await backup.communicate()
            after, maybe_gone = set(load.posted), set(load.deleting)
            load.stop()
        assert (backup.returncode, stderr) == (0, b""), stderr
        assert len(after) > len(before), "nobody posted meanwhile"
    assert archive.stat().st_mode & 0o777 == 0o600
    assert names_in(folder) == ["chatter.tar", "server"]

    members = members_of(archive)
    lines = [
        line.split("\t")
        for name, content in members.items()
        if name.startswith("tables/chatts.")
        for line in content.decode().splitlines()
    ]
    ids = [line[2] for line in lines]
    assert len(ids) == len(set(ids)), "a chatt is there twice"
    assert before <= set(ids) <= set(load.posted)
    left = {line[2] for line in lines if line[6] == "f"}
    assert before - maybe_gone <= left <= set(ids) - gone
    named = {key for line in lines for key in line[4:6] if key != "\\N"}
    carried = {name.removeprefix("media/") for name in members if name.startswith("media/")}
    assert named == carried
    for key in carried:
        assert hashlib.sha256(members[f"media/{key}"]).hexdigest() == key.partition(".")[0]
    assert printed(stdout.decode())["files"][0] == str(len(carried))
    assert printed(stdout.decode())["chatts"][0] == str(len(ids))
    return archive


@pytest.mark.timeout(300)  # it takes 20 s of a processor, and a busy machine is slower
async def test_a_backup_under_load_is_restored_in_every_kind_of_place(
    tmp_path: Path, own_database: str, debian_database: str, another_database: str
) -> None:
    (tmp_path / "server").mkdir()
    media = tmp_path / "server" / "media"
    with Server(tmp_path / "server", DATABASE_URL=own_database, MEDIA_ROOT=str(media)) as server:
        archive = await backed_up_under_load(tmp_path, server, own_database)
        async with client_of(server) as client:
            chatt = await post(client, "to be posted again", **{"Idempotency-Key": "once"})
            cursor = (await client.get("/v1/chatts")).json()["cursor"]
        archive = tmp_path / "quiet.tar"
        settings = {"DATABASE_URL": own_database, "MEDIA_ROOT": str(media)}
        done = run(tmp_path, "backup", str(archive), **settings)
        assert (done.returncode, done.stderr) == (0, "")
        assert server.stop() == 0
    rows, files = await rows_of(own_database), files_of(media)
    named = {key for row in rows["chatts"] for key in row[4:6] if key}
    files = {key: content for key, content in files.items() if key in named}
    assert files
    summary = done.stdout

    # Into one of the operator's own, of another version.
    settings = {"DATABASE_URL": debian_database, "MEDIA_ROOT": str(tmp_path / "debian")}
    done = run(tmp_path, "restore", str(archive), **settings)
    assert (done.returncode, done.stdout, done.stderr) == (0, summary, "")
    assert await rows_of(debian_database) == rows
    assert files_of(tmp_path / "debian") == files
    archive = tmp_path / "debian.tar"
    assert run(tmp_path, "backup", str(archive), **settings).returncode == 0

    # From there into the embedded one; and a server runs on it.
    with open_folder() as embedded:
        done = run(embedded, "restore", str(archive))
        assert (done.returncode, done.stderr) == (0, "")
        assert not (embedded / "var" / "media" / ".restoring").exists()
        with Server(embedded) as server:
            async with client_of(server) as client:
                changes = (await client.get("/v1/chatts", params={"since": cursor})).json()
                assert changes["reset"]
                again = await client.post(
                    "/v1/chatts",
                    json={"name": "ann", "message": "to be posted again"},
                    headers={"Idempotency-Key": "once"},
                )
                assert again.headers["Idempotency-Replayed"] == "true"
                assert again.json() == chatt
                await assert_feed(client, rows, files)
                # Beside it, from there.
                archive = tmp_path / "embedded.tar"
                done = run(embedded, "backup", str(archive))
                assert (done.returncode, done.stderr) == (0, "")
                await delete(client, chatt)
            assert_refused(run(embedded, "restore", str(archive)), "in use by another chatterd")
            assert server.stop() == 0

    # And back into one of the operator's own, at our version, which has the tables already.
    settings = {"DATABASE_URL": another_database, "MEDIA_ROOT": str(tmp_path / "back")}
    assert run(tmp_path, "restore", str(archive), **settings).returncode == 0
    assert await rows_of(another_database) == rows
    assert files_of(tmp_path / "back") == files


async def assert_feed(
    client: httpx2.AsyncClient, rows: dict[str, list[tuple[Any, ...]]], files: dict[str, bytes]
) -> None:
    """Check that the server shows these chatts, and serves their files."""
    feed = (await client.get("/getimages")).json()
    left = sorted((row for row in rows["chatts"] if not row[6]), key=lambda row: row[3])
    assert [row[:3] for row in feed] == [[row[0], row[1], str(row[2])] for row in left]
    pictures = [row[4] for row in feed if row[4] is not None]
    assert pictures
    for address in pictures:
        assert (await client.get(address)).content == files[address.rpartition("/")[2]]


# Files that chatts name no more


async def test_files_of_chatts_that_are_deleted_meanwhile_are_in_it(
    tmp_path: Path, own_database: str, psql: Connection
) -> None:
    (tmp_path / "server").mkdir()
    with Server(tmp_path / "server", DATABASE_URL=own_database) as server:
        async with client_of(server) as client:
            chatts = []
            for number in range(3):
                body = encode(*fields(), image(longer_jpeg(300_000, b"%d" % number)))
                answer = await client.post("/v1/chatts", content=body, headers=form_type())
                chatts.append(answer.json())
            keys = {chatt["image"]["url"].rpartition("/")[2] for chatt in chatts}
            for path in server.media.iterdir():
                os.utime(path, (0, 0))  # else they are left alone for a minute anyway
            settings = {"DATABASE_URL": own_database, "MEDIA_ROOT": str(server.media)}
            backup = await start(tmp_path, "backup", "-", **settings)
            assert backup.stdout is not None
            # Nobody reads on: it has begun, and waits with most of the files before it.
            begin = await backup.stdout.readexactly(1)
            for chatt in chatts:
                await delete(client, chatt)
            assert await psql.fetchval("SELECT count(*) FROM chatts WHERE deleted") == 3
            swept = run(tmp_path, "media", "sweep", "--older-than=1", "--delete", **settings)
            assert swept.returncode == 0
            assert printed(swept.stdout)["orphaned"][0] == "0"
            rest, summary = await backup.communicate()
            assert backup.returncode == 0, summary
        members = members_of(io.BytesIO(begin + rest))
        assert keys == {name[6:] for name in members if name.startswith("media/")}
        swept = run(tmp_path, "media", "sweep", "--older-than=1", "--delete", **settings)
        assert int(printed(swept.stdout)["orphaned"][0]) >= 3
        assert not keys & set(files_of(server.media))


async def test_nothing_is_removed_beside_a_backup_and_two_may_remove_at_once(
    store: Store, db: Connection, url: str, database: Database
) -> None:
    one, other = store.store(b"1"), store.store(b"2")
    status = (store.root / one).lstat()
    await db.execute("SELECT pg_advisory_lock($1)", MEDIA_LOCK)
    await Sweep(database, store.root, AGE, delete=True).sweep_page([(one, status)])
    assert one in store
    await db.execute("SELECT pg_advisory_unlock($1)", MEDIA_LOCK)
    async with connected(url) as sweeping:
        await sweeping.execute("SELECT pg_advisory_lock_shared($1)", MEDIA_LOCK)
        sweep = Sweep(database, store.root, AGE, delete=True)
        await sweep.sweep_page([(one, status), (other, status)])
    assert not {one, other} & set(store.tree())


# Places and files that are not as they should be


@pytest.fixture
def settings(store: Store, url: str) -> dict[str, str]:
    return {"DATABASE_URL": url, "MEDIA_ROOT": str(store.root)}


async def fill(store: Store, db: Connection) -> None:
    """Leave everything that a chatt can name, and cannot."""
    key = store.store(b"right")
    store.put(f"{key}.thumb.webp", b"small")
    await name_it(db, key, store.put("büro 1.mp4", b"adopted"))
    await name_it(db, store.put("l" * 250 + ".jpg", b""))
    corrupt = store.store(b"as it was")
    (store.root / corrupt).write_bytes(b"as it is")
    await name_it(db, corrupt)
    (store.root / "link.jpg").symlink_to("/etc/passwd")
    store.put("album/1.jpg")
    lost = ("0" * 64 + ".jpeg", "link.jpg", "../media", "album/1.jpg", ".hidden", "l" * 300, "\x1b")
    for name in (*lost, "album"):
        await name_it(db, name)
    await record(db, key)
    store.store(b"nobody's")
    texts = ["\\.", "\\N", "", "\t\r\n\\n", "😀 日本語", "\u2028\u200b\x01\x7f"]
    for text in texts:
        await db.execute("INSERT INTO chatts (name, message) VALUES ($1, $1)", text)
    times = ("0001-01-01 00:00:00+00", "9999-12-31 23:59:59.999999+00", "2026-11-21 00:00:00.5+05")
    for time in times * 2:
        await db.execute(f"INSERT INTO chatts (name, message, time) VALUES ('t', '', '{time}')")


async def test_what_is_odd_is_carried_and_what_is_missing_or_corrupt_is_said(
    store: Store,
    db: Connection,
    settings: dict[str, str],
    tmp_path: Path,
    own_database: str,
) -> None:
    await fill(store, db)
    name = make_url(settings["DATABASE_URL"]).database
    for setting in ("datestyle = 'SQL, DMY'", "bytea_output = 'escape'", "timezone = 'Asia/Tokyo'"):
        await db.execute(f"ALTER DATABASE {name} SET {setting}")
    try:
        made = run(tmp_path, "backup", "a.tar", **settings)
    finally:
        await db.execute(f"ALTER DATABASE {name} RESET ALL")
    assert made.returncode == 0, made.stderr
    with pytest.raises(BackupError, match="MEDIA_ROOT, /nowhere, is not there"):
        await back_up_to(tmp_path / "b.tar", settings["DATABASE_URL"], Path("/nowhere"))
    verified = run(tmp_path, "backup", "verify", "a.tar")
    place = {"DATABASE_URL": own_database, "MEDIA_ROOT": str(tmp_path / "new")}
    restored = run(tmp_path, "restore", "a.tar", **place)
    for done in (made, verified, restored):
        assert done.returncode == 0, done.stderr
        assert printed(done.stdout) == printed(made.stdout)
        assert printed(done.stdout)["missing"] == ["8"]
        assert printed(done.stdout)["corrupt"] == ["1"]
        lines = done.stderr.splitlines()
        assert [line.split()[0] for line in lines] == ["missing:"] * 8 + ["corrupt:"]
        assert "\x1b" not in done.stderr
    own = {hashlib.sha256(text).hexdigest() + ".jpeg" for text in (b"right", b"as it was")}
    files = files_of(tmp_path / "new")
    assert set(files) == own | {"büro 1.mp4", "l" * 250 + ".jpg"}
    assert {key: files_of(store.root)[key] for key in files} == files
    assert await rows_of(own_database) == await rows_of(settings["DATABASE_URL"])


async def test_equal_times_keep_their_order_and_the_epoch_is_another(
    db: Connection, url: str, tmp_path: Path, own_database: str, psql: Connection
) -> None:
    await db.execute(
        "INSERT INTO chatts (name, message, time)"
        " SELECT n::text, repeat('x', 1900), '2026-01-01' FROM generate_series(1, 6000) AS n"
    )
    # So the last has the first place on disk.
    await db.execute("DELETE FROM chatts WHERE name::int <= 100")
    await db.execute("VACUUM (INDEX_CLEANUP ON) chatts")
    await db.execute("UPDATE chatts SET message = repeat('y', 1900) WHERE name = '6000'")
    assert (await rows_of(url))["chatts"][-1][0] == "6000"
    assert await db.fetchval("SELECT name FROM chatts LIMIT 1") == "6000"
    await back_up_to(tmp_path / "a.tar", url, tmp_path)
    rows = [name for name in members_of(tmp_path / "a.tar") if name.startswith("tables/chatts")]
    assert len(rows) > 2
    epoch = await psql.fetchval("SELECT epoch FROM feed")
    await restore_from((tmp_path / "a.tar").read_bytes(), own_database, tmp_path / "new")
    assert await rows_of(own_database) == await rows_of(url)
    names = await psql.fetch("SELECT name FROM chatts ORDER BY time, seq")
    assert [int(name) for (name,) in names] == list(range(101, 6001))
    assert await psql.fetchval("SELECT epoch FROM feed") not in {
        epoch,
        await db.fetchval("SELECT epoch FROM feed"),
    }
    assert await psql.fetchval("SELECT reltuples FROM pg_class WHERE relname = 'chatts'") == 5900


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "a.tar"
    path.write_bytes(archive_at("0003"))
    return path


KEY: Final = hashlib.sha256(PICTURE).hexdigest() + ".jpeg"
CHATT: Final = uuid.UUID(int=1)


def archive_at(revision: str) -> bytes:
    """An archive as the version of that revision has made it, with one chatt that has a file."""
    columns = {"chatts": ["name", "message", "id", "time", "image"], "media": ["key", "size"]}
    rows = {
        "chatts": (f"ann\thi\t{CHATT}\t2026-11-21 00:00:00+00\t{KEY}\n".encode(),),
        "media": (f"{KEY}\t{len(PICTURE)}\n".encode(),),
    }
    files = {KEY: PICTURE}
    return write(manifest_of(rows, files, revision=revision, columns=columns), rows, files)


async def assert_restored(db: Connection, media: Path) -> None:
    chatts = await db.fetch("SELECT id, image, deleted FROM chatts")
    assert [tuple(chatt) for chatt in chatts] == [(CHATT, KEY, False)]
    assert files_of(media) == {KEY: PICTURE}
    assert not (media / ".restoring").exists()


@pytest.mark.parametrize("is_migrated", [False, True])
async def test_an_archive_of_an_older_version_ends_at_this_ones_schema(
    tmp_path: Path, empty_database: str, *, is_migrated: bool
) -> None:
    if is_migrated:
        await asyncio.to_thread(migrate, make_url(empty_database))
    await restore_from(archive_at("0002"), empty_database, tmp_path / "media")
    async with connected(empty_database) as connection:
        await assert_restored(connection, tmp_path / "media")
        revision = await connection.fetchval("SELECT version_num FROM alembic_version")
    assert revision == head_revision()


async def test_an_archive_of_an_unknown_version_is_refused(
    tmp_path: Path, empty_database: str
) -> None:
    with pytest.raises(BackupError, match=r'revision "9999" of chatterd .* is unknown'):
        await restore_from(archive_at("9999"), empty_database, tmp_path / "media")
    async with connected(empty_database) as connection:
        assert await connection.fetchval("SELECT to_regclass('chatts')") is None
    assert names_in(tmp_path) == []


def test_a_damaged_archive_is_refused_before_anything_is_changed(
    tmp_path: Path, archive: Path
) -> None:
    with archive.open("ab") as file:
        file.write(b"\0")  # what is found last of all
    for command in (("backup", "verify", "a.tar"), ("restore", "a.tar")):
        done = run(tmp_path, *command)
        assert_refused(done, "a.tar: It is damaged before byte ", "something follows behind")
    assert names_in(tmp_path) == ["a.tar"]


async def test_an_archive_that_is_damaged_while_it_is_restored_leaves_no_rows(
    tmp_path: Path, own_database: str, psql: Connection
) -> None:
    """As by a disk that reads something else the second time: nothing but files is left."""
    for name, (parts, _) in DAMAGE.items():
        with pytest.raises((BackupError, StatementError)):
            await restore_from(b"".join(parts) + END, own_database, tmp_path / "media")
        assert await psql.fetchval("SELECT count(*) FROM chatts") == 0, name
    await restore_from(ARCHIVE, own_database, tmp_path / "media")
    assert await psql.fetchval("SELECT count(*) FROM chatts") == 2


async def test_a_place_that_is_not_empty_is_refused_and_left_as_it_is(
    tmp_path: Path, own_database: str, psql: Connection
) -> None:
    media = tmp_path / "media"
    place = archive_at("0003"), own_database, media
    for table, columns in (("chatts", "name, message"), ("media", "key, size")):
        await psql.execute(f"INSERT INTO {table} ({columns}) VALUES ('a', '1')")
        with pytest.raises(BackupError, match=f"not empty, {table} has rows"):
            await restore_from(*place)
        assert await psql.fetchval(f"SELECT count(*) FROM {table}") == 1
        assert not media.exists()
        await psql.execute(f"TRUNCATE {table}")
    (media / ".incoming").mkdir(parents=True)
    (media / "a.jpg").write_bytes(b"")
    with pytest.raises(BackupError, match=r'not empty, "a\.jpg" is there'):
        await restore_from(*place)
    assert names_in(media) == [".incoming", "a.jpg"]
    (media / "a.jpg").unlink()
    async with connected(own_database) as server:
        await server.execute("SET application_name = 'chatterd'")
        with pytest.raises(BackupError, match="A server uses the database"):
            await restore_from(*place)
    assert names_in(media) == [".incoming"]
    assert await psql.fetchval("SELECT count(*) FROM chatts") == 0
    await restore_from(*place)
    await assert_restored(psql, media)


async def test_what_is_posted_while_a_restore_begins_is_not_mixed_with_it(
    tmp_path: Path, own_database: str, psql: Connection
) -> None:
    place = archive_at("0003"), own_database, tmp_path / "media"
    async with connected(own_database) as other:
        async with other.transaction():
            await other.execute("INSERT INTO chatts (name, message) VALUES ('ann', 'hi')")
            restoring = asyncio.create_task(restore_from(*place))
            waiting = "SELECT count(*) FROM pg_locks WHERE relation = 'chatts'::regclass"
            while not await psql.fetchval(f"{waiting} AND NOT granted"):  # noqa: ASYNC110 - in PostgreSQL
                await asyncio.sleep(0.01)
        with pytest.raises(BackupError, match="not empty, chatts has rows"):
            await restoring
    assert [tuple(row) for row in await psql.fetch("SELECT name FROM chatts")] == [("ann",)]
    assert files_of(tmp_path / "media") == {}


@pytest.mark.usefixtures("archive")
async def test_a_restore_that_is_killed_before_its_end_can_be_started_again(
    tmp_path: Path, own_database: str, psql: Connection
) -> None:
    media = tmp_path / "media"
    place = {"DATABASE_URL": own_database, "MEDIA_ROOT": str(media)}
    async with psql.transaction():
        await psql.execute("LOCK TABLE feed")  # where it gets its epoch, with all else done
        killed = await start(tmp_path, "restore", "a.tar", **place)
        await until((media / KEY).exists)
        killed.kill()
        await killed.wait()
    assert await psql.fetchval("SELECT count(*) FROM chatts") == 0
    assert (media / ".restoring").is_dir()
    await restore_from(archive_at("0003"), own_database, media)
    await assert_restored(psql, media)


async def test_a_file_is_there_when_it_is_whole_and_is_not_written_over(
    tmp_path: Path, own_database: str, psql: Connection
) -> None:
    media = tmp_path / "var" / "media"
    partial, whole = tmp_path / "a.tar.partial", tmp_path / "a.tar"
    name = make_url(own_database).database
    await psql.execute(f"ALTER DATABASE {name} SET statement_timeout = '2s'")
    await psql.execute("SELECT pg_advisory_lock($1)", MEDIA_LOCK)  # as another backup does
    with pytest.raises(BackupError, match="Another backup, or a restore, is under way"):
        await back_up_to(whole, own_database, media)
    assert names_in(tmp_path) == []

    killed = await start(tmp_path, "backup", "a.tar", DATABASE_URL=own_database)
    await until(partial.exists)
    killed.kill()
    await killed.wait()
    assert not whole.exists()
    await psql.execute("SELECT pg_advisory_unlock($1)", MEDIA_LOCK)
    partial.write_bytes(bytes(100_000))  # as one that has come farther leaves it
    await back_up_to(whole, own_database, media)
    assert names_in(tmp_path) == ["a.tar"]
    content = whole.read_bytes()
    verify(io.BytesIO(content), tqdm(disable=True))
    with pytest.raises(BackupError, match=r"is there already, .* name another"):
        await back_up_to(whole, own_database, media)
    assert whole.read_bytes() == content
    with (tmp_path / "b.tar.partial").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BackupError, match=r"b\.tar\.partial is being written by another"):
            await back_up_to(tmp_path / "b.tar", own_database, media)
    assert names_in(tmp_path) == ["a.tar", "b.tar.partial"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("backup", "no/folder/a.tar"), "no/folder/a.tar cannot be written: No such file"),
        (("restore", "no.tar"), "no.tar cannot be read: No such file"),
    ],
)
def test_what_cannot_be_read_or_written_is_said_in_one_line(
    tmp_path: Path, own_database: str, command: tuple[str, ...], words: str
) -> None:
    assert_refused(run(tmp_path, *command, DATABASE_URL=own_database), words)
    assert names_in(tmp_path) == []


def test_a_backup_needs_a_database_and_makes_none(tmp_path: Path, empty_database: str) -> None:
    assert_refused(run(tmp_path, "backup", "a.tar"), "there is no database in var/postgres")
    done = run(tmp_path, "backup", "a.tar", DATABASE_URL=empty_database)
    assert_refused(done, "schema is at revision none", "Run: chatterd migrate")
    assert names_in(tmp_path) == []


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own."""
    folder.mkdir()
    mount = ["/bin/mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount")
    try:
        yield folder
    finally:
        subprocess.run(["/bin/umount", str(folder)], check=True)


def enlarge(disk: Path, size: str) -> None:
    subprocess.run(["/bin/mount", "-o", f"remount,size={size}", str(disk)], check=True)


async def test_a_disk_that_is_full_is_said_and_nothing_is_left_half_done(
    tmp_path: Path, store: Store, db: Connection, settings: dict[str, str], own_database: str
) -> None:
    for number in range(4):
        await name_it(db, store.store(os.urandom(200_000) + b"%d" % number))
    with small_disk(tmp_path / "disk", "500k") as disk:
        done = run(tmp_path, "backup", "disk/a.tar", **settings)
        assert_refused(done, "The archive cannot be written: No space left on device")
        assert names_in(disk) == []

        await back_up_to(tmp_path / "a.tar", settings["DATABASE_URL"], store.root)
        place = (tmp_path / "a.tar").read_bytes(), own_database, disk / "media"
        with pytest.raises(BackupError, match="media, cannot be written: No space left on device"):
            await restore_from(*place)
        assert (await rows_of(own_database))["chatts"] == []
        enlarge(disk, "2m")
        await restore_from(*place)
        assert files_of(disk / "media") == files_of(store.root)
    assert await rows_of(own_database) == await rows_of(settings["DATABASE_URL"])


async def test_memory_does_not_grow_with_what_is_backed_up(
    tmp_path: Path, store: Store, db: Connection, settings: dict[str, str], own_database: str
) -> None:
    peaks = []
    for size in (1, 200 << 20):
        await name_it(db, store.put("adopted.mp4", b""))
        os.truncate(store.root / "adopted.mp4", size)
        place = {"DATABASE_URL": own_database, "MEDIA_ROOT": str(tmp_path / str(size))}
        archive = f"{size}.tar"
        peaks.append([peak(tmp_path, "backup", archive, **settings)])
        peaks[-1].append(peak(tmp_path, "restore", archive, **place))
        assert (tmp_path / str(size) / "adopted.mp4").stat().st_size == size
        async with connected(own_database) as connection:
            await connection.execute("TRUNCATE chatts, media")
    for small, large in zip(*peaks, strict=True):
        assert large - small < 64 << 20


def peak(folder: Path, *arguments: str, **settings: str) -> int:
    """Run the command; return the most memory that it had, in bytes."""
    command = [sys.executable, "-m", "chatterd", *arguments]
    process = subprocess.Popen(
        command, cwd=folder, env=environment(folder, **settings), stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024


def test_progress_is_shown_on_a_terminal(tmp_path: Path, archive: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    os.set_blocking(ours, False)
    done = subprocess.run(
        [sys.executable, "-m", "chatterd", "backup", "verify", archive],
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=theirs,
        check=True,
    )
    assert b"0%" in os.read(ours, 4096)
    os.close(ours)
    os.close(theirs)
    assert b"%" not in done.stdout


def in_shell(folder: Path, line: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a line in which chatterd stands for the command."""
    line = line.replace("chatterd", f"{sys.executable} -m chatterd")
    return subprocess.run(
        ["/bin/sh", "-c", line],
        cwd=folder,
        env=environment(folder, **settings),
        capture_output=True,
        text=True,
        check=False,
    )


async def test_an_archive_goes_through_a_pipe_but_not_onto_a_terminal(
    tmp_path: Path, settings: dict[str, str], db: Connection, store: Store
) -> None:
    await fill(store, db)
    done = in_shell(tmp_path, "chatterd backup - | chatterd backup verify -", **settings)
    assert done.returncode == 0
    assert printed(done.stdout)["chatts"] == ["23", "rows"]
    done = in_shell(tmp_path, "chatterd backup - 2>&1 >/dev/full", **settings)
    assert done.stdout == "chatterd: The archive cannot be written: No space left on device.\n"
    done = in_shell(tmp_path, "chatterd backup - | chatterd restore /dev/stdin", **settings)
    assert "chatterd: /dev/stdin cannot be read twice: restore from a file.\n" in done.stderr
    done = in_shell(tmp_path, "script --quiet --command 'chatterd backup -' /dev/null", **settings)
    assert "chatterd: The standard output is a terminal" in done.stdout
