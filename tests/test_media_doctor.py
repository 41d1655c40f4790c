"""`chatterd media doctor`: what it counts, and what it says."""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.engine import make_url

from chatterd.database import Database, migrate
from chatterd.embedded import postgres
from chatterd.media_doctor import doctor, sample
from tests.conftest import connected
from tests.media_folder import (
    STATES,
    Store,
    counts,
    database,
    db,
    du,
    name_it,
    record,
    store,
    url,
)
from tests.multipart import THUMBNAIL
from tests.process import assert_refused, open_folder, run

if TYPE_CHECKING:
    from pathlib import Path

    from tests.multipart import Connection

__all__ = ["database", "db", "store", "url"]  # fixtures


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


async def test_a_sample_finds_what_is_missing_and_damaged_in_what_it_looks_at(
    store: Store, db: Connection, database: Database
) -> None:
    keys = [store.store(b"%d" % number * 100) for number in range(300)]
    for key in keys:
        await name_it(db, key)
    report = await sample(database, store.root, 1_000_000)
    assert report.is_healthy
    assert report.referenced.count == 200
    assert 200 * 100 <= report.referenced.bytes < 200 * 400
    for key in keys[:150]:
        (store.root / key).unlink()
    for key in keys[150:]:
        (store.root / key).write_bytes(b"other")
    report = await sample(database, store.root, 1_000_000)
    assert report.missing.count + report.corrupt.count == 200
    assert report.missing.count >= 50
    assert report.corrupt.count >= 50
    assert set(report.corrupt_keys) <= set(keys[150:])


async def test_a_sample_reads_no_more_than_it_may_and_at_least_one_file(
    store: Store, db: Connection, database: Database
) -> None:
    for number in range(10):
        await name_it(db, store.store(b"%d" % number * 1000))
    for most, count in (3500, 3), (10, 1):
        report = await sample(database, store.root, most)
        assert counts(report) == {"referenced": count}


def test_the_embedded_database_is_used_where_a_server_runs_it_and_where_none_does() -> None:
    with open_folder() as folder:
        store = Store(folder / "var" / "media")
        key = store.store(b"picture")
        with postgres(folder / "var", options=["fsync=off"]) as url:
            migrate(make_url(url))

            async def post() -> None:
                async with connected(url) as connection:
                    await name_it(connection, key)

            asyncio.run(post())
            beside = run(folder, "media", "doctor", "--json")
        alone = run(folder, "media", "doctor", "--json")
        for done in (beside, alone):
            assert (done.returncode, done.stderr) == (0, "")
            assert json.loads(done.stdout)["referenced"]["count"] == 1
