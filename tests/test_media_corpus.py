"""Files of real encoders, and files that nobody makes, through POST /postimages of a server."""

from __future__ import annotations

import asyncio
import hashlib
import random
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Final

import pytest

from chatterd.metadata import Source, clean, edits
from tests.conftest import client_of
from tests.metadata_corpus import MEDIA_TYPES, make_pictures, make_videos, surplus
from tests.multipart import Part, encode, fields, files, form_type, kept, until
from tests.test_metadata_hostile import WALKERS, mutated, seeds

if TYPE_CHECKING:
    from pathlib import Path

    import httpx2

    from tests.conftest import StartServer
    from tests.multipart import Connection, Server

BROKEN: Final = 45
"""So many broken files of each format are sent."""
CONNECTIONS: Final = 4


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("pictures", "videos"):
        (folder / name).mkdir()
    return make_pictures(folder / "pictures") + make_videos(folder / "videos")


async def post(
    client: httpx2.AsyncClient, data: bytes, media_type: str, message: str
) -> httpx2.Response:
    slot = media_type.partition("/")[0]
    form = encode(*fields(message=message), Part(slot, data, "file", media_type))
    return await client.post("/postimages", content=form, headers=form_type())


async def stored_keys(database: Connection) -> dict[str, str]:
    """The keys of all chatts, by their messages."""
    rows = await database.fetch("SELECT message, coalesce(image, video) AS key FROM chatts")
    return {row["message"]: row["key"] for row in rows}


def assert_named_by_digest(path: Path) -> None:
    assert path.name.partition(".")[0] == hashlib.sha256(path.read_bytes()).hexdigest()


async def test_what_is_served_of_a_file_of_a_real_encoder_is_the_file_without_its_metadata(
    server: Server,
    client: httpx2.AsyncClient,
    database: Connection,
    planted: list[Path],
    tmp_path: Path,
) -> None:
    for path in planted:
        answer = await post(client, path.read_bytes(), MEDIA_TYPES[path.suffix], path.name)
        assert (answer.status_code, answer.content) == (200, b"{}"), path.name
    keys = await stored_keys(database)
    assert set(kept(server.media)) == set(keys.values())
    for path in planted:
        media_type = MEDIA_TYPES[path.suffix]
        cleaned = tmp_path / path.name
        shutil.copy(path, cleaned)
        clean(cleaned, media_type)
        answer = await client.get(f"/media/{keys[path.name]}")
        assert answer.headers["content-type"] == media_type
        assert answer.content == cleaned.read_bytes(), path.name
        assert_named_by_digest(server.media / keys[path.name])
        if media_type.startswith("image/"):
            thumbnail = await client.get(f"/media/{keys[path.name]}?thumb")
            assert thumbnail.status_code == 200, path.name
    # In the thumbnails neither.
    assert surplus([server.media / name for name in files(server.media)]) == {}


def broken(media_type: str, more: list[bytes]) -> list[bytes]:
    """Files that have been changed, cut off, or have one bit turned over."""
    numbers = random.Random(media_type)  # noqa: S311 - the same files in every run
    found = [mutated(media_type, numbers) for _ in range(BROKEN // 3)]
    for _ in range(BROKEN // 3):
        data = bytearray(numbers.choice([*seeds(media_type), *more]))
        data[numbers.randrange(len(data))] ^= 1 << numbers.randrange(8)
        whole = numbers.choice([*seeds(media_type), *more])
        found += [bytes(data), whole[: numbers.randrange(1, len(whole))]]
    return found


async def test_broken_files_are_kept_or_refused_and_leave_nothing_behind(
    start_server: StartServer, own_database: str, psql: Connection, planted: list[Path]
) -> None:
    server = start_server(DATABASE_URL=own_database)
    uploads = [
        (media_type, data)
        for media_type in WALKERS
        for data in broken(
            media_type,
            [path.read_bytes() for path in planted if MEDIA_TYPES[path.suffix] == media_type],
        )
    ]
    answers: dict[str, int] = {}
    waiting = iter(enumerate(uploads))

    async def send(client: httpx2.AsyncClient) -> None:
        for number, (media_type, data) in waiting:
            answer = await post(client, data, media_type, str(number))
            answers[str(number)] = answer.status_code

    async with client_of(server) as client:
        await asyncio.gather(*[send(client) for _ in range(CONNECTIONS)])
    statuses = Counter(answers.values())
    assert statuses.total() == len(uploads) > 300
    assert set(statuses) <= {200, 413, 415, 422}, statuses
    # Neither is everything refused nor does everything pass.
    assert len(uploads) // 20 < statuses[200] < len(uploads) * 19 // 20
    keys = await stored_keys(psql)
    assert set(keys) == {number for number, status in answers.items() if status == 200}
    assert set(kept(server.media)) == set(keys.values())
    for key in kept(server.media):
        path = server.media / key
        assert_named_by_digest(path)
        with path.open("rb") as file:
            assert edits(Source(file), MEDIA_TYPES[path.suffix]) == [], key
    # The last thumbnail may be under way.
    await until(lambda: not any((server.media / ".incoming").iterdir()))
    assert server.stop() == 0
    assert "Traceback" not in server.log, server.log
