"""A media folder as uploads and operators leave it, and chatts that name what lies in it."""

from __future__ import annotations

import hashlib
import os
import subprocess
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy.engine import make_url

from chatterd.database import Database
from tests.conftest import connected, database_at_head

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from sqlalchemy.engine import URL

    from chatterd.media_doctor import Report
    from chatterd.media_sweep import Swept
    from tests.multipart import Connection

AGE = 3600
OLD = 2 * AGE
STATES = ("referenced", "temporary", "orphaned", "corrupt", "folders", "missing")


class Store:
    """A media folder, as uploads and operators leave it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.incoming = root / ".incoming"
        self.swept = root / ".swept"
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


# The fixtures of the tests of the doctor and the sweep


@pytest.fixture(scope="module")
def url(postgres_url: URL) -> Iterator[str]:
    """A database at head for these tests: the others' chatts would be missing files."""
    with database_at_head(postgres_url) as url:
        yield url


@pytest.fixture
async def db(url: str) -> AsyncIterator[Connection]:
    async with connected(url) as connection:
        await connection.execute("TRUNCATE chatts, media")
        yield connection


@pytest.fixture
async def database(url: str, db: Connection) -> AsyncIterator[Database]:  # noqa: ARG001 - empty
    async with aclosing(Database(make_url(url))) as database:
        yield database


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "media")


async def name_it(db: Connection, image: str | None = None, video: str | None = None) -> None:
    statement = "INSERT INTO chatts (name, message, image, video) VALUES ('ann', '', $1, $2)"
    await db.execute(statement, image, video)


async def record(db: Connection, *keys: str, age: float = OLD, size: int = 7) -> None:
    statement = (
        "INSERT INTO media (key, size, stored)"
        " SELECT key, $2, now() - $3 * interval '1 second' FROM unnest($1::text[]) AS key"
    )
    await db.execute(statement, keys, size, age)


def counts(result: Report | Swept) -> dict[str, int]:
    """How many of each state, where there are any."""
    tallies = {state: getattr(result, state, None) for state in (*STATES, "restored", "unknown")}
    return {state: tally.count for state, tally in tallies.items() if tally and tally.count}
