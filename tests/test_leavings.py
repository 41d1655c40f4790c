"""The files of deleted chatts go, unless somebody needs them."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

from chatterd.media_sweep import Leavings
from tests.media_folder import Store, database, db, name_it, store, url
from tests.multipart import THUMBNAIL, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import pytest

    from chatterd.database import Database
    from tests.multipart import Connection

__all__ = ["database", "db", "store", "url"]  # fixtures

SETTLED = 60.0


@asynccontextmanager
async def leavings(
    database: Database, store: Store, settled_seconds: float = SETTLED
) -> AsyncIterator[Leavings]:
    async with aclosing(Leavings(database, store.root, settled_seconds)) as leavings:
        yield leavings


def removals() -> int:
    """How many files are on their way out."""
    names = (getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks())
    return sum(name == "Leavings._remove" for name in names)


async def remove(leavings: Leavings, *keys: str) -> None:
    """Remove files and wait until that is done, or decided against."""
    leavings.remove_soon(keys)
    assert removals() == len(keys)
    await until(lambda: removals() == 0)


async def test_what_goes_is_unnamed_and_ours(
    store: Store, db: Connection, database: Database, tmp_path: Path
) -> None:
    gone, named, film = (store.store(b"%d" % number) for number in range(3))
    thumbnail = store.put(gone + THUMBNAIL)
    await name_it(db, named)
    await name_it(db, video=film)
    outside = tmp_path / gone
    outside.write_bytes(b"outside")
    os.utime(outside, (0, 0))
    store.put("by-hand.jpeg")
    folder = f"{'0' * 64}.jpeg"
    (store.root / folder).mkdir()
    os.utime(store.root / folder, (0, 0))
    others = [f"../{gone}", str(outside), "by-hand.jpeg", folder]
    async with leavings(database, store) as removing:
        await remove(removing, gone, named, film, *others, f"{'1' * 64}.png")
    left = store.tree()
    assert {named, film, "by-hand.jpeg", folder} <= set(left)
    assert not {gone, thumbnail} & set(left)
    assert outside.read_bytes() == b"outside"


async def test_a_young_file_goes_when_it_is_old_enough(store: Store, database: Database) -> None:
    picture, young = store.store(b"1"), store.store(b"2", age=0)
    thumbnail = store.put(picture + THUMBNAIL, age=0)
    began = time.time()
    async with leavings(database, store, settled_seconds=0.5) as removing:
        await remove(removing, picture, young)
    assert not {picture, young, thumbnail} & set(store.tree())
    assert time.time() >= began + 0.4  # file times have a grain


async def test_a_file_that_is_posted_again_before_it_is_old_stays(
    store: Store, db: Connection, database: Database
) -> None:
    key = store.store(b"picture", age=0)
    async with leavings(database, store, settled_seconds=0.5) as removing:
        removing.remove_soon([key])
        await name_it(db, key)
        await until(lambda: removals() == 0)
    assert key in store


async def test_a_file_that_is_uploaded_again_meanwhile_counts_as_new(
    store: Store, database: Database
) -> None:
    began = time.time()
    key = store.store(b"picture", age=0)
    async with leavings(database, store, settled_seconds=1) as removing:
        removing.remove_soon([key])
        await until(lambda: time.time() > began + 0.5)
        store.store(b"picture", age=0)
        await until(lambda: removals() == 0)
    assert key in store


async def test_what_cannot_be_removed_now_is_left_to_the_sweep(
    store: Store, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    young = [store.store(b"%d" % number, age=0) for number in range(1_200)]
    async with leavings(database, store) as removing:
        removing.remove_soon(young)
        assert removals() == 1_000
    assert removals() == 0
    assert set(young) <= set(store.tree())
    assert not caplog.records


async def test_none_is_left_half_removed_at_the_end(store: Store, database: Database) -> None:
    keys = [store.store(b"%d" % number) for number in range(100)]
    async with leavings(database, store) as removing:
        removing.remove_soon(keys)
        await until(store.swept.exists)
    assert list(store.swept.iterdir()) == []
    assert removals() == 0
