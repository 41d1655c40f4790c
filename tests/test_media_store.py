"""What is kept of an upload: one file for the same bytes, a thumbnail, and no more than allowed."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import time
import zlib
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx2
import pytest
from PIL import Image
from sqlalchemy.engine import make_url
from starlette.applications import Starlette

from chatterd import pictures, settings
from chatterd.app import create_app
from chatterd.database import Database
from chatterd.errors import Problem
from chatterd.media import MediaStore
from chatterd.media_room import Room
from tests.conftest import client_of, connected
from tests.metadata_parts import tagged_movie, tagged_webm
from tests.multipart import (
    THUMBNAIL,
    connect,
    encode,
    fields,
    files,
    form_type,
    image,
    kept,
    problem,
    stored_bytes,
    until,
    video,
)
from tests.samples import JPEG, MP4, PNG, VIDEOS, longer_jpeg, longer_mp4

if TYPE_CHECKING:
    from collections.abc import Callable

    import asyncpg
    from starlette.types import Receive, Scope, Send

    from tests.multipart import Connection, Part, Server, StartServer

BEHIND = b"bytes behind the end of a picture"


async def post(client: httpx2.AsyncClient, *parts: Part) -> httpx2.Response:
    form = encode(*fields(), *parts)
    return await client.post("/postimages", content=form, headers=form_type())


async def newest_urls(client: httpx2.AsyncClient) -> tuple[str, str]:
    *_, row = (await client.get("/getimages")).json()
    return row[4], row[5]


def key_of(url: str) -> str:
    return urlsplit(url).path.rpartition("/")[2]


def photo(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(file, "JPEG")
    return file.getvalue()


async def test_the_same_bytes_are_one_file_under_their_digest(
    server: Server, client: httpx2.AsyncClient
) -> None:
    for _ in range(2):
        assert (await post(client, image(JPEG), video(MP4))).content == b"{}"
    first, second = (await client.get("/getimages")).json()
    assert first[4:] == second[4:]
    for url in first[4:]:
        answer = await client.get(url)
        digest = hashlib.sha256(answer.content).hexdigest()
        assert key_of(url).partition(".")[0] == digest
        assert answer.headers["etag"] == f'"{digest[:32]}"'
    picture, movie = map(key_of, first[4:])
    assert kept(server.media).keys() == {picture, movie}


async def test_an_upload_that_waits_for_another_holds_nothing_that_the_other_may_want(
    own_database: str, psql: asyncpg.Connection, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=own_database)
    parts = {"image": image(JPEG), "video": video(MP4)}
    async with client_of(server) as client, connected(own_database) as other:
        assert (await post(client, *parts.values())).content == b"{}"
        urls = dict(zip(parts, map(key_of, await newest_urls(client)), strict=True))
        first, last = sorted(urls, key=urls.__getitem__)
        lock = "SELECT FROM media WHERE key = $1 FOR UPDATE NOWAIT"
        async with psql.transaction():
            await psql.execute(lock, urls[first])
            uploading = asyncio.create_task(post(client, parts[last], parts[first]))
            while not await other.fetchval("SELECT exists(SELECT FROM pg_locks WHERE NOT granted)"):
                assert not uploading.done()
            await other.execute(lock, urls[last])
        assert (await uploading).content == b"{}"


async def test_bytes_that_differ_in_metadata_alone_are_one_file(
    server: Server, client: httpx2.AsyncClient
) -> None:
    comment = JPEG[:2] + b"\xff\xfe\x00\x09at home" + JPEG[2:]
    for data in (JPEG, comment):
        assert (await post(client, image(data))).content == b"{}"
    assert len(kept(server.media)) == 1


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(image(JPEG + BEHIND), id="a small picture"),
        # Longer than what is cleaned before it is written.
        pytest.param(image(longer_jpeg(600_000) + BEHIND), id="a large picture"),
        pytest.param(video(tagged_movie()), id="an MP4 video"),
        pytest.param(video(tagged_webm()), id="a WebM video"),
    ],
)
async def test_the_key_of_an_unclean_file_is_the_digest_of_what_is_served(
    server: Server, client: httpx2.AsyncClient, part: Part
) -> None:
    assert (await post(client, part)).content == b"{}"
    (key,) = kept(server.media)
    served = (await client.get(f"/media/{key}")).content
    assert served != part.data
    assert key.partition(".")[0] == hashlib.sha256(served).hexdigest()


class Disk:
    """What is asked of the disk, by the inodes it is asked of, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.synced: list[tuple[int, int]] = []
        """Each inode that was synced, with its size then."""
        self.named: dict[str, tuple[int, int]] = {}
        """Each name that was given: to which inode, and after how many of `synced`."""
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, self._recorded_sync(getattr(os, name)), raising=False)
        for name in ("rename", "replace", "link"):
            patch.setattr(os, name, self._recorded_naming(getattr(os, name)))

    def _recorded_sync(self, sync: Callable[[int], None]) -> Callable[[int], None]:
        def record(descriptor: int) -> None:
            sync(descriptor)
            status = os.fstat(descriptor)
            self.synced.append((status.st_ino, status.st_size))

        return record

    def _recorded_naming(self, give_name: Callable[..., None]) -> Callable[..., None]:
        def record(source: Path, target: Path, **options: object) -> None:
            inode = Path(source).stat().st_ino
            self.named[str(target)] = (inode, len(self.synced))
            give_name(source, target, **options)

        return record

    def was_synced_before_it_had_its_name(self, path: Path) -> bool:
        inode, count = self.named[str(path)]
        status = path.stat()
        return status.st_ino == inode and (inode, status.st_size) in self.synced[:count]

    def was_named_durably(self, path: Path) -> bool:
        _, count = self.named[str(path)]
        return path.parent.stat().st_ino in {inode for inode, _ in self.synced[count:]}


async def test_a_file_is_synced_before_it_has_its_key_and_its_folder_before_the_answer(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    media = tmp_path / "media"
    monkeypatch.setattr(settings, "MEDIA_ROOT", media)
    app = create_app(make_url(database_url))
    starlette = app.app
    assert isinstance(starlette, Starlette)
    async with starlette.router.lifespan_context(starlette) as state:

        async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope, "state": state}, receive, send)

        disk = Disk(monkeypatch)
        transport = httpx2.ASGITransport(with_state)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            # One of them is as it came, one is replaced by its cleaned copy.
            answer = await post(client, image(JPEG), video(tagged_movie()))
        assert answer.content == b"{}"
        keys = kept(media)
        assert len(keys) == 2
        for key in keys:
            assert disk.was_synced_before_it_had_its_name(media / key), key
            assert disk.was_named_durably(media / key), key
        await until(lambda: any(media.glob(f"*{THUMBNAIL}")))
        (thumbnail,) = media.glob(f"*{THUMBNAIL}")
        assert disk.was_synced_before_it_had_its_name(thumbnail)


async def test_what_is_known_of_a_file_is_in_the_table(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    data = photo(1200, 800)
    for _ in range(2):
        assert (await post(client, image(data), video(MP4))).content == b"{}"
    picture, movie = map(key_of, await newest_urls(client))
    rows = await database.fetch("SELECT * FROM media WHERE key = ANY($1)", [picture, movie])
    found = {row["key"]: (row["size"], row["width"], row["height"]) for row in rows}
    size = len((await client.get(f"/media/{picture}")).content)
    assert found == {picture: (size, 1200, 800), movie: (len(MP4), None, None)}


async def test_a_second_upload_of_the_same_bytes_makes_the_file_young_again(
    server: Server, client: httpx2.AsyncClient, database: Connection
) -> None:
    assert (await post(client, image(JPEG))).content == b"{}"
    key = key_of((await newest_urls(client))[0])
    os.utime(server.media / key, (0, 0))
    await database.execute("UPDATE media SET stored = 'epoch' WHERE key = $1", key)
    assert (await post(client, image(JPEG))).content == b"{}"
    assert (server.media / key).stat().st_mtime > 1e9
    stored = await database.fetchval("SELECT stored FROM media WHERE key = $1", key)
    assert stored.year > 2000


async def test_a_thumbnail_is_served_behind_the_pictures_address(
    client: httpx2.AsyncClient,
) -> None:
    assert (await post(client, image(photo(1200, 800)))).content == b"{}"
    url = (await newest_urls(client))[0]
    answer = await client.get(url + "?thumb")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp")
    assert Image.open(io.BytesIO(answer.content)).size == (512, 341)
    digest = hashlib.sha256(answer.content).hexdigest()
    assert answer.headers["etag"] == f'"{digest[:32]}"'
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = await client.get(url + "?thumb", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    part = await client.get(url + "?thumb=1", headers={"Range": "bytes=0-3"})
    assert (part.status_code, part.content) == (206, b"RIFF")


async def test_a_thumbnail_is_made_before_anybody_asks_for_it(
    server: Server, client: httpx2.AsyncClient
) -> None:
    assert (await post(client, image(photo(1200, 800)))).content == b"{}"
    (key,) = kept(server.media)
    thumbnail = server.media / (key + THUMBNAIL)
    await until(thumbnail.exists)
    with Image.open(thumbnail) as reduced:
        assert (reduced.format, reduced.size) == ("WEBP", (512, 341))


async def test_a_video_has_no_thumbnail(client: httpx2.AsyncClient) -> None:
    assert (await post(client, video(MP4))).content == b"{}"
    problem(await client.get((await newest_urls(client))[1] + "?thumb"), 404)


async def test_a_thumbnail_has_no_thumbnail(server: Server, client: httpx2.AsyncClient) -> None:
    assert (await post(client, image(JPEG))).content == b"{}"
    url = (await newest_urls(client))[0]
    assert (await client.get(url + "?thumb")).status_code == 200
    assert (await client.get(url + THUMBNAIL)).status_code == 200
    problem(await client.get(url + THUMBNAIL + "?thumb"), 404)
    assert len(files(server.media)) == 2


async def test_a_missing_thumbnail_is_made_when_somebody_asks_for_it(
    server: Server, client: httpx2.AsyncClient
) -> None:
    adopted = server.media / "ann.png"
    Image.new("RGB", (1000, 10), (9, 9, 200)).save(adopted)
    answers = await asyncio.gather(*[client.get("/media/ann.png?thumb") for _ in range(5)])
    assert len({answer.content for answer in answers}) == 1
    assert Image.open(io.BytesIO(answers[0].content)).size == (512, 5)
    assert files(server.media) == ["ann.png", "ann.png" + THUMBNAIL]


async def test_a_thumbnail_that_is_given_up_for_the_moment_is_made_later(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ann.png", "bob.png"):
        (tmp_path / name).write_bytes(PNG)
    async with (
        aclosing(Database(make_url(database_url))) as database,
        aclosing(MediaStore(tmp_path, database)) as store,
    ):
        store.prepare()
        await store.thumbnail_path("ann.png")
        with monkeypatch.context() as patch:
            patch.setattr(pictures, "_START_SECONDS", 0)
            with pytest.raises(Problem) as refused:
                await store.thumbnail_path("bob.png")
        assert (refused.value.status, refused.value.code) == (503, "too-many-uploads")
        assert f"bob.png{THUMBNAIL}" not in files(tmp_path)
        thumbnail = await store.thumbnail_path("bob.png")
        assert thumbnail is not None
        assert thumbnail.stat().st_size > 0


async def test_what_cannot_be_decoded_has_no_thumbnail(client: httpx2.AsyncClient) -> None:
    start = PNG.index(b"IDAT")
    length = int.from_bytes(PNG[start - 4 : start])
    pixels = b"IDAT" + bytes(length)
    broken = PNG[:start] + pixels + zlib.crc32(pixels).to_bytes(4) + PNG[start + length + 8 :]
    assert (await post(client, image(broken))).content == b"{}"
    url = (await newest_urls(client))[0]
    assert (await client.get(url)).content == broken
    for _ in range(2):
        problem(await client.get(url + "?thumb"), 404)


async def test_the_etag_of_an_adopted_file_is_that_of_its_bytes(
    server: Server, client: httpx2.AsyncClient
) -> None:
    adopted = server.media / "ann-7401355b.jpeg"
    tags = []
    for data in (longer_jpeg(1000, b"a"), longer_jpeg(1000, b"b")):  # of one size
        adopted.write_bytes(data)
        answer = await client.get("/media/ann-7401355b.jpeg")
        assert answer.content == data
        tags.append(answer.headers["etag"])
        assert tags[-1] == f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    assert tags[0] != tags[1]


async def test_a_picture_that_no_decoder_reads_is_refused_and_leaves_nothing(
    server: Server, client: httpx2.AsyncClient, database: Connection
) -> None:
    broken = JPEG[: JPEG.index(b"\xff\xc0") + 4] + bytes(400) + b"\xff\xd9"
    problem(await post(client, image(broken)), 415)
    await until(lambda: files(server.media) == [])
    assert await database.fetchval("SELECT count(*) FROM chatts") == 0


async def test_a_picture_of_too_many_pixels_is_refused_and_leaves_nothing(
    server: Server, client: httpx2.AsyncClient
) -> None:
    size = JPEG.index(b"\xff\xc0") + 5  # of frame: height and width follow (T.81 §B.2.2)
    bomb = JPEG[:size] + (20_000).to_bytes(2) + (20_000).to_bytes(2) + JPEG[size + 4 :]
    detail = problem(await post(client, image(bomb)), 413)
    assert "400000000" in detail
    assert "50000000" in detail
    await until(lambda: files(server.media) == [])


async def test_all_media_together_stay_below_their_limit(
    start_server: StartServer, client: httpx2.AsyncClient
) -> None:
    limit = 1_000_000
    server = start_server(MEDIA_TOTAL_SIZE=str(limit))
    assert client  # the table is empty
    async with client_of(server) as full:
        for number in range(3):
            data = longer_mp4(300_000, bytes([number]))
            assert (await post(full, video(data))).content == b"{}"
            assert stored_bytes(server.media) <= limit
        answer = await post(full, video(longer_mp4(300_000, b"\xff")))
        assert "1000000" in problem(answer, 507)
        await until(lambda: len(files(server.media)) == 3)
        # The operator makes room; nothing has to be restarted.
        (server.media / files(server.media)[0]).unlink()
        while (await post(full, video(longer_mp4(300_000, b"\xfe")))).status_code != 200:
            assert stored_bytes(server.media) <= limit
        assert len(files(server.media)) == 3


async def test_the_disk_keeps_what_is_to_stay_free(start_server: StartServer) -> None:
    floor = 2**50
    server = start_server(MEDIA_FREE_FLOOR=str(floor))
    async with client_of(server) as client:
        assert str(floor) in problem(await post(client, image(JPEG)), 507)
        await until(lambda: files(server.media) == [])
        assert (await post(client)).content == b"{}"  # a text needs no room there


async def test_a_disk_without_room_refuses_an_upload_before_anything_is_written(
    start_server: StartServer,
) -> None:
    server = start_server(MEDIA_FREE_FLOOR=str(2**50))
    before = (server.media / ".incoming").stat().st_mtime_ns
    form = encode(*fields(), video(longer_mp4(600_000)))
    async with connect(server.url) as wire:
        kind = f"Content-Type: {form_type()['Content-Type']}"
        await wire.request("POST", "/postimages", kind, f"Content-Length: {len(form)}")
        await wire.send(form[:500_000])
        problem(await wire.answer("POST"), 507)  # the rest is not waited for
    assert (server.media / ".incoming").stat().st_mtime_ns == before


def test_what_is_about_to_be_written_has_its_room_when_the_folder_is_counted_again(
    tmp_path: Path,
) -> None:
    room = Room(tmp_path, 1_000, 0)
    with room.taken(600):
        # It is counted again when a second has passed.
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            with pytest.raises(Problem, match="1000"), room.taken(600):
                pass


async def test_more_uploads_than_allowed_are_told_to_come_again(
    start_server: StartServer,
) -> None:
    server = start_server(UPLOADS_MAX="1")
    form = encode(*fields(), video(longer_mp4(600_000)))
    async with client_of(server) as client, connect(server.url) as wire:
        kind = f"Content-Type: {form_type()['Content-Type']}"
        await wire.request("POST", "/postimages", kind, f"Content-Length: {len(form)}")
        await wire.send(form[:500_000])
        await until(lambda: stored_bytes(server.media) > 0)
        refused = await post(client, video(VIDEOS[0].data))
        assert "1 uploads" in problem(refused, 503)
        assert refused.headers["retry-after"] == "1"
        await wire.send(form[500_000:])
        assert (await wire.answer("POST")).content == b"{}"
        assert (await post(client, video(VIDEOS[0].data))).content == b"{}"


async def test_the_limits_in_force_can_be_read(start_server: StartServer) -> None:
    server = start_server(MEDIA_MAX_SIZE="1000", MEDIA_TOTAL_SIZE="20000", UPLOADS_MAX="3")
    async with client_of(server) as client:
        answer = await client.get("/v1/limits")
        assert answer.headers["content-type"] == "application/json"
        assert answer.json() == {
            "name_max_length": 255,
            "message_max_length": 4096,
            "json_max_size": 65536,
            "media_max_size": 1000,
            "media_max_pixels": 50_000_000,
            "media_total_size": 20000,
            "media_free_floor": 268435456,
            "uploads_max": 3,
            "stream_max_subscribers": 1000,
            "upload_timeout": 300,
        }


async def test_without_a_limit_for_all_media_it_is_null(client: httpx2.AsyncClient) -> None:
    assert (await client.get("/v1/limits/")).json()["media_total_size"] is None
