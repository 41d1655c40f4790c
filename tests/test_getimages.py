"""GET /getimages, as contract §1 has it."""

from __future__ import annotations

import json
import re
import uuid
from typing import TYPE_CHECKING

import pytest

from tests.conftest import client_of
from tests.multipart import encode, fields, form_type, image, problem, video
from tests.process import Server
from tests.samples import JPEG, MP4

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx2

    from tests.multipart import Connection, StartServer

SLASHES = ["/getimages", "/getimages/"]


@pytest.fixture(scope="module")
def chatter_example(
    database_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server that answers under this name alone."""
    settings = {"DATABASE_URL": database_url, "ALLOWED_HOSTS": "chatter.example"}
    with Server(tmp_path_factory.mktemp("chatter.example"), **settings) as server:
        yield server


async def post_both(client: httpx2.AsyncClient, **headers: str) -> None:
    form = encode(*fields("ann", "look"), image(JPEG), video(MP4))
    response = await client.post("/postimages", content=form, headers=form_type() | headers)
    assert (response.status_code, response.content) == (200, b"{}")


@pytest.mark.parametrize("path", SLASHES)
async def test_an_empty_feed_is_two_brackets(client: httpx2.AsyncClient, path: str) -> None:
    response = await client.get(path)
    assert (response.status_code, response.content) == (200, b"[]")
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("path", SLASHES)
async def test_a_row_is_that_of_getchatts_and_two_urls(
    server: Server, client: httpx2.AsyncClient, database: Connection, path: str
) -> None:
    await post_both(client)
    chatt = {"name": "bob", "message": "no picture"}
    assert (await client.post("/postchatt", json=chatt)).content == b"{}"
    with_media, without = (await client.get(path)).json()
    assert [with_media[:4], without[:4]] == (await client.get("/getchatts")).json()
    stored = await database.fetchrow("SELECT image, video FROM chatts ORDER BY seq LIMIT 1")
    assert stored is not None
    assert with_media[4:] == [
        f"{server.url}/media/{stored['image']}",
        f"{server.url}/media/{stored['video']}",
    ]
    # Absent media is null: iOS clients would try to load an empty string.
    assert without[4:] == [None, None]


async def test_the_bytes_are_compact_raw_utf8_without_a_newline(
    client: httpx2.AsyncClient,
) -> None:
    await post_both(client)
    chatt = {"name": "日本語", "message": "😀 <b>&</b> a/b"}
    assert (await client.post("/postchatt", json=chatt)).content == b"{}"
    response = await client.get("/getimages")
    assert response.headers["content-type"] == "application/json"
    assert (
        response.content
        == json.dumps(response.json(), ensure_ascii=False, separators=(",", ":")).encode()
    )
    assert '"日本語","😀 <b>&</b> a/b"'.encode() in response.content
    assert response.content.endswith(b",null,null]]")


async def test_rows_are_six_and_oldest_first_however_many(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    await database.execute(
        "INSERT INTO chatts (id, name, message, time)"
        " SELECT gen_random_uuid(), 'ann', number::text,"
        " timestamptz '2026-01-01 00:00:00+00' - number * interval '1 second'"
        " FROM generate_series(0, 4999) AS number"
    )
    rows = (await client.get("/getimages")).json()
    assert [row[1] for row in rows] == [str(number) for number in reversed(range(5000))]
    assert {len(row) for row in rows} == {6}
    assert rows[-1][3] == "2026-01-01T00:00:00.000000Z"


@pytest.mark.parametrize(
    "host",
    [
        pytest.param("chatter.example", id="name"),
        pytest.param("chatter.example:8443", id="name and port"),
        # TLS on a bare address is what most clients talk to.
        pytest.param("192.0.2.7", id="address"),
        pytest.param("192.0.2.7:8000", id="address and port"),
        pytest.param("[2001:db8::7]:8000", id="IPv6"),
    ],
)
async def test_urls_are_of_the_host_that_the_reader_asked(
    client: httpx2.AsyncClient, database: Connection, host: str
) -> None:
    await post_both(client, Host="writer.example")
    (row,) = (await client.get("/getimages", headers={"Host": host})).json()
    stored = await database.fetchrow("SELECT image, video FROM chatts")
    assert stored is not None
    assert row[4:] == [f"{client.base_url.scheme}://{host}/media/{key}" for key in stored]


async def test_a_url_is_never_stored(client: httpx2.AsyncClient, database: Connection) -> None:
    await post_both(client, Host="evil.example")
    stored = await database.fetchrow("SELECT row_to_json(chatts)::text, image, video FROM chatts")
    assert stored is not None
    assert "evil.example" not in stored[0]
    assert "http" not in stored[0]
    assert "/media" not in stored[0]
    for key in stored[1:]:
        assert re.fullmatch(r"[A-Za-z0-9._-]+", key)
    assert b"evil.example" not in (await client.get("/getimages")).content


async def test_the_public_url_is_used_whatever_the_host(
    start_server: StartServer, database: Connection
) -> None:
    await database.execute("TRUNCATE chatts")
    server = start_server(PUBLIC_URL="https://chatter.example")
    async with client_of(server) as client:
        await post_both(client)
        for headers in ({}, {"Host": "evil.example"}):
            (row,) = (await client.get("/getimages", headers=headers)).json()
            stored = await database.fetchrow("SELECT image, video FROM chatts")
            assert stored is not None
            assert row[4:] == [f"https://chatter.example/media/{key}" for key in stored]


@pytest.mark.parametrize("path", ["/getimages", "/getchatts", "/media/x.jpg", "/nowhere"])
@pytest.mark.parametrize("host", ["evil.example", "chatter.example.evil.example", "chatter.exampl"])
async def test_a_host_that_is_not_allowed_is_refused(
    chatter_example: Server, database: Connection, host: str, path: str
) -> None:
    await database.execute("TRUNCATE chatts")
    async with client_of(chatter_example) as client:
        problem(await client.get(path, headers={"Host": host}), 400)
        posted = await client.post(
            "/postchatt", json={"name": "ann", "message": "hi"}, headers={"Host": host}
        )
        problem(posted, 400)
    assert await database.fetchval("SELECT count(*) FROM chatts") == 0


async def test_an_allowed_host_is_answered_with_urls_of_its_own(
    chatter_example: Server, database: Connection
) -> None:
    await database.execute("TRUNCATE chatts")
    async with client_of(chatter_example) as client:
        await post_both(client, Host="chatter.example")
        for host in ("chatter.example", "chatter.example:8443", "Chatter.Example"):
            (row,) = (await client.get("/getimages", headers={"Host": host})).json()
            assert row[4].lower().startswith(f"http://{host.lower()}/media/")
    assert await database.fetchval("SELECT count(*) FROM chatts") == 1


async def test_the_media_of_a_row_that_another_program_wrote_have_urls_too(
    server: Server, client: httpx2.AsyncClient, database: Connection
) -> None:
    await database.execute(
        "INSERT INTO chatts (id, name, message, video) VALUES ($1, 'psql', 'hi', 'clip.mp4')",
        uuid.uuid4(),
    )
    (row,) = (await client.get("/getimages")).json()
    assert row[4:] == [None, f"{server.url}/media/clip.mp4"]


@pytest.mark.parametrize("path", SLASHES)
async def test_head_has_the_headers_of_get_and_no_body(
    client: httpx2.AsyncClient, path: str
) -> None:
    await post_both(client)
    got, head = await client.get(path), await client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == "application/json"
    assert head.headers.get("content-length") == got.headers.get("content-length")
