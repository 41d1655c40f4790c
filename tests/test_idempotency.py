"""Idempotency-Key: a post that is sent again is not stored again (contract §2)."""

from __future__ import annotations

import asyncio
import hashlib
from base64 import urlsafe_b64decode
from collections import Counter
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

import anyio
import httpx2
import pytest
from sqlalchemy.engine import make_url

from chatterd.database import Database
from chatterd.keys import IdempotencyKeys, old_keys_forgotten
from tests.conftest import client_of, connected, database_away
from tests.multipart import (
    BOUNDARY,
    DEADLINE_SECONDS,
    Part,
    Wire,
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
from tests.objects import delete
from tests.samples import JPEG, MP4, PNG, longer_jpeg
from tests.test_writer import held_log

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.engine import URL

    from tests.conftest import StartServer
    from tests.multipart import Connection
    from tests.process import Server

KEY = "8e03978e-40d5-43dd-bc93-6894a57f9324"
DRAFT = {"name": "ann", "message": "hi"}
LOCKS = (
    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


class Route(NamedTuple):
    """One way to post, with and without a form."""

    path: str
    is_form: bool

    def __str__(self) -> str:
        return f"{self.path}{' with files' if self.is_form else ''}"

    async def post(
        self,
        client: httpx2.AsyncClient,
        key: str | None = KEY,
        *,
        message: str = "hi",
        parts: tuple[Part, ...] = (image(JPEG), video(MP4)),
    ) -> httpx2.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        if not self.is_form:
            draft = {"name": "ann", "message": message}
            return await client.post(self.path, json=draft, headers=headers)
        form = encode(*fields("ann", message), *parts)
        return await client.post(self.path, content=form, headers=headers | form_type())


ROUTES = [
    Route("/postchatt", is_form=False),
    Route("/postimages", is_form=True),
    Route("/v1/chatts", is_form=False),
    Route("/v1/chatts", is_form=True),
]


@pytest.fixture(autouse=True)
async def no_keys(database: Connection) -> AsyncIterator[None]:
    """No keys from other tests, and none that is still in use after this one."""
    await database.execute("TRUNCATE idempotency_keys")
    yield
    with anyio.fail_after(DEADLINE_SECONDS):
        while await database.fetchval(LOCKS):  # noqa: ASYNC110 - PostgreSQL has no event for it
            await anyio.sleep(0.01)


async def rows(database: Connection) -> tuple[int, int]:
    """How many chatts and how many keys there are."""
    counts = await database.fetchrow(
        "SELECT (SELECT count(*) FROM chatts), (SELECT count(*) FROM idempotency_keys)"
    )
    assert counts is not None
    return counts[0], counts[1]


def assert_first(response: httpx2.Response) -> None:
    assert response.status_code in {200, 201}, response.content
    assert "idempotency-replayed" not in response.headers


def assert_replay(response: httpx2.Response, first: httpx2.Response) -> None:
    assert response.headers["idempotency-replayed"] == "true"
    assert (response.status_code, response.content) == (first.status_code, first.content)
    own = {"date", "x-request-id", "idempotency-replayed"}
    one, other = (
        {name: value for name, value in answer.headers.items() if name not in own}
        for answer in (response, first)
    )
    assert one == other


def assert_code(response: httpx2.Response, status: int, code: str) -> None:
    problem(response, status)
    assert response.json()["code"] == code


# Sent again


@pytest.mark.parametrize("route", ROUTES, ids=str)
async def test_the_same_post_again_is_answered_as_before_and_stores_nothing(
    server: Server, client: httpx2.AsyncClient, database: Connection, route: Route
) -> None:
    first = await route.post(client)
    assert_first(first)
    stored = kept(server.media)
    assert len(stored) == (2 if route.is_form else 0)
    row = await database.fetchrow("SELECT * FROM chatts")
    for key in (KEY, f'"{KEY}"', KEY):
        assert_replay(await route.post(client, key), first)
    assert await rows(database) == (1, 1)
    assert await database.fetchrow("SELECT * FROM chatts") == row
    assert kept(server.media) == stored
    assert not list((server.media / ".incoming").iterdir())
    # Another key, or none, is another post.
    others = [await route.post(client, "another"), await route.post(client, None)]
    for other in others:
        assert_first(other)
    locations = {answer.headers["location"] for answer in (first, *others)}
    assert len(locations) == 3
    assert await rows(database) == (3, 2)


async def test_what_counts_is_what_is_posted_and_not_how_it_is_written(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    headers = {"Idempotency-Key": KEY}
    first = await client.post("/v1/chatts", json=DRAFT, headers=headers)
    assert_first(first)
    bodies = (
        b'{"message":"hi","username":"ann"}',
        b'{ "name" : "\\u0061nn", "message": "hi" }',
        b'{"name":"ann","username":"ann","message":"hi"}',
    )
    for path in ("/v1/chatts", "/v1/chatts/"):
        for body in bodies:
            response = await client.post(path, content=body, headers=headers)
            assert_replay(response, first)
    form = encode(Part("message", b"hi"), Part("name", b"ann"))
    response = await client.post("/v1/chatts", content=form, headers=headers | form_type())
    assert_replay(response, first)
    assert await rows(database) == (1, 1)


@pytest.mark.parametrize("route", ROUTES, ids=str)
async def test_the_token_of_a_replay_deletes_the_chatt_and_then_the_first_answer_comes_still(
    client: httpx2.AsyncClient, database: Connection, route: Route
) -> None:
    first = await route.post(client)
    again = await route.post(client)
    location = again.headers["location"]
    token = again.headers.get("chatterd-delete-token") or again.json()["delete_token"]
    await delete(client, {"id": location.rpartition("/")[2], "delete_token": token})
    assert_replay(await route.post(client), first)
    assert (await client.get("/getchatts")).content == b"[]"
    assert (await client.get(location)).status_code == 404
    assert await rows(database) == (1, 1)
    left = await database.fetchrow("SELECT deleted, name, message, image, video FROM chatts")
    assert left is not None
    assert tuple(left) == (True, "", "", None, None)


@pytest.mark.parametrize("route", ROUTES, ids=str)
async def test_a_key_with_another_post_is_refused_and_stores_nothing(
    server: Server, client: httpx2.AsyncClient, database: Connection, route: Route
) -> None:
    first = await route.post(client)
    others = [await route.post(client, message="Hi"), await route.post(client, message="hi ")]
    others += [await other.post(client) for other in ROUTES if other.path != route.path]
    if route.is_form:
        for parts in ((image(PNG), video(MP4)), (image(JPEG),), (video(MP4),), ()):
            others.append(await route.post(client, parts=parts))
    for other in others:
        assert_code(other, 422, "idempotency-key-reused")
    assert await rows(database) == (1, 1)
    assert len(kept(server.media)) == (2 if route.is_form else 0)
    assert not [name for name in files(server.media) if name.startswith(".")]
    assert_replay(await route.post(client), first)


# The key itself


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("a", id="one character"),
        pytest.param("k" * 255, id="the longest"),
        pytest.param("".join(map(chr, (33, *range(35, 127)))), id="all there are"),
        pytest.param("it's,(a;key)=", id="punctuation"),
    ],
)
async def test_a_key_may_stand_in_quotation_marks(client: httpx2.AsyncClient, key: str) -> None:
    first = await ROUTES[0].post(client, key)
    assert_first(first)
    if "\\" not in key:  # which would have to be escaped (RFC 9651 §3.3.3)
        assert_replay(await ROUTES[0].post(client, f'"{key}"'), first)


@pytest.mark.parametrize("route", ROUTES, ids=str)
async def test_what_is_no_key_is_refused_and_stores_nothing(
    server: Server, client: httpx2.AsyncClient, database: Connection, route: Route
) -> None:
    bad = ["", '""', '"', '"a', 'a"', 'a"b', '"a"b', '"a";b', '"a\\"b"', '"a\\\\b"', "a b", '"a b"']
    bad += ["a\tb", "k" * 256, f'"{"k" * 256}"', "k" * 8000, "schlüssel", "鍵", "a\xa0b", "a\x7fb"]
    for key in bad:
        line = (b"Idempotency-Key", key.encode())
        request = client.build_request("POST", route.path, json=DRAFT)
        request.headers = httpx2.Headers([*request.headers.raw, line])
        assert_code(await client.send(request), 422, "idempotency-key-invalid")
    assert await rows(database) == (0, 0)
    assert files(server.media) == []


async def test_neither_key_nor_token_nor_text_can_be_read_in_the_table(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    tokens = []
    for route in ROUTES:
        key = f"{KEY}{route}".replace(" ", "").replace("/", "")
        response = await route.post(client, key, message="secret words")
        tokens.append(
            response.headers.get("chatterd-delete-token") or response.json()["delete_token"]
        )
    everything = b""
    for table in ("idempotency_keys", "chatts"):
        for row in await database.fetch(f"SELECT * FROM {table}"):
            cells = (cell if isinstance(cell, bytes) else str(cell).encode() for cell in row)
            everything += b"\n".join(cells)
            if table == "idempotency_keys":
                assert b"secret words" not in everything
                assert b"ann" not in everything
    for token in tokens:
        assert token.encode() not in everything
        assert urlsafe_b64decode(token) not in everything
    assert KEY.encode() not in everything
    digest = hashlib.sha256(f"{KEY}postchatt".encode()).digest()
    assert digest in everything


async def test_a_post_without_a_key_writes_no_row_for_it(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    for route in ROUTES:
        assert_first(await route.post(client, None))
    assert await rows(database) == (4, 0)


# The first under way


async def assert_in_use(client: httpx2.AsyncClient, route: Route) -> None:
    response = await route.post(client)
    assert_code(response, 409, "idempotency-key-in-use")
    assert response.headers["retry-after"] == "1"


async def free_again(client: httpx2.AsyncClient, route: Route) -> httpx2.Response:
    """Post until the key is no longer in use; return the answer."""
    with anyio.fail_after(DEADLINE_SECONDS):
        while True:
            response = await route.post(client)
            if response.status_code != 409:
                return response
            await anyio.sleep(0.02)


BIG = encode(*fields(), image(longer_jpeg(4 * 2**20)))
HALF = len(BIG) // 2


@asynccontextmanager
async def half_an_upload(server: Server) -> AsyncIterator[Wire]:
    """An upload to /v1/chatts with the key whose client has sent half of it, and waits."""
    async with connect(server.url) as wire:
        await wire.request(
            "POST",
            "/v1/chatts",
            f"Content-Type: multipart/form-data; boundary={BOUNDARY}",
            f"Content-Length: {len(BIG)}",
            f"Idempotency-Key: {KEY}",
        )
        await wire.send(BIG[:HALF])
        await until(lambda: stored_bytes(server.media) > 0)
        yield wire


async def test_while_the_first_is_under_way_others_are_told_so_by_every_server(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    one, other = (start_server(DATABASE_URL=own_database) for _ in range(2))
    async with client_of(one) as here, client_of(other) as there:
        async with half_an_upload(one) as wire:
            for client in (here, there, here):
                for route in ROUTES:
                    await assert_in_use(client, route)
            assert_first(await ROUTES[0].post(here, "another"))
            await wire.send(BIG[HALF:])
            answer = await wire.answer("POST")
            assert answer.status_code == 201, answer
        for client in (here, there):
            headers = {"Idempotency-Key": KEY} | form_type()
            host = {"Host": wire.host}
            response = await client.post("/v1/chatts", content=BIG, headers=headers | host)
            assert response.headers["idempotency-replayed"] == "true"
            assert response.content == answer.content
            assert_code(await ROUTES[0].post(client), 422, "idempotency-key-reused")
    assert await rows(psql) == (2, 2)
    # The server that has only been asked again keeps no file.
    assert kept(other.media) == {}


async def test_a_post_that_waits_for_the_database_is_under_way(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    one, other = (start_server(DATABASE_URL=own_database) for _ in range(2))
    async with (
        client_of(one) as here,
        client_of(other) as there,
        held_log(own_database) as log,
    ):
        first = asyncio.create_task(ROUTES[0].post(here))
        await log.waited_for()
        for client in (here, there):
            await assert_in_use(client, ROUTES[0])
        await log.release()
        assert_first(await first)
        for client in (here, there):
            assert_replay(await free_again(client, ROUTES[0]), await first)
    assert await rows(psql) == (2, 1)


async def test_an_upload_that_is_broken_off_leaves_its_key_free(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    one, other = (start_server(DATABASE_URL=own_database) for _ in range(2))
    async with client_of(other) as client:
        async with half_an_upload(one):
            await assert_in_use(client, ROUTES[2])
        assert_first(await free_again(client, ROUTES[2]))
    assert await rows(psql) == (1, 1)


async def test_a_server_that_is_killed_leaves_its_keys_free(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    one, other = (start_server(DATABASE_URL=own_database) for _ in range(2))
    async with client_of(other) as client, half_an_upload(one):
        await assert_in_use(client, ROUTES[3])
        one.kill()
        assert_first(await free_again(client, ROUTES[3]))
    assert await rows(psql) == (1, 1)


REFUSALS = {
    "no chatt": (422, (Part("message", b"hi"),)),
    "text too long": (400, fields("ann", "m" * 4097)),
    "file too large": (413, (*fields(), image(longer_jpeg(10_485_761)))),
    "no picture": (415, (*fields(), image(b"text"))),
}


@pytest.mark.parametrize(("status", "parts"), REFUSALS.values(), ids=REFUSALS)
async def test_a_refused_post_leaves_its_key_free(
    client: httpx2.AsyncClient, database: Connection, status: int, parts: tuple[Part, ...]
) -> None:
    headers = {"Idempotency-Key": KEY} | form_type()
    for path in ("/postimages", "/v1/chatts"):
        problem(await client.post(path, content=encode(*parts), headers=headers), status)
    for body in (b"{}", b'{"name":"ann","message":"%b"}' % (b"m" * 4097), b" " * 65_537):
        response = await client.post("/postchatt", content=body, headers={"Idempotency-Key": KEY})
        assert response.status_code in {400, 413, 422}
    assert await rows(database) == (0, 0)
    first = await ROUTES[2].post(client)
    assert_first(first)
    assert_replay(await ROUTES[2].post(client), first)


# Many at once


async def together(client: httpx2.AsyncClient, keys: list[str]) -> list[httpx2.Response]:
    return list(await asyncio.gather(*(ROUTES[2].post(client, key) for key in keys)))


async def test_many_keys_at_once_are_kept_apart(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    keys = [f"key-{number}" for number in range(90)]
    first = await together(client, keys)
    for response in first:
        assert_first(response)
    assert await rows(database) == (90, 90)
    again = await together(client, keys)
    for response, before in zip(again, first, strict=True):
        assert_replay(response, before)
    assert len({response.json()["delete_token"] for response in first}) == 90
    # Some are known, some new, some without.
    mixed = await asyncio.gather(
        *(ROUTES[2].post(client, key) for key in keys[:30]),
        *(ROUTES[2].post(client, f"new-{number}") for number in range(30)),
        *(ROUTES[2].post(client, None) for _ in range(30)),
    )
    counts = Counter("idempotency-replayed" in response.headers for response in mixed)
    assert counts == {True: 30, False: 60}
    assert await rows(database) == (150, 120)


async def test_of_many_with_one_key_at_once_one_is_stored(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    one, other = (start_server(DATABASE_URL=own_database) for _ in range(2))
    async with client_of(one) as here, client_of(other) as there:
        for number in range(10):
            key = f"key-{number}"
            answers = await together(here, [key] * 6)
            both = await asyncio.gather(together(here, [key] * 3), together(there, [key] * 6))
            answers += [answer for some in both for answer in some]
            stored = [answer for answer in answers if answer.status_code == 201]
            first = [answer for answer in stored if "idempotency-replayed" not in answer.headers]
            assert len(first) == 1
            for answer in answers:
                if answer.status_code == 201:
                    assert answer.json()["id"] == first[0].json()["id"]
                else:
                    assert_code(answer, 409, "idempotency-key-in-use")
    assert await rows(psql) == (10, 10)


# Without the database


async def test_while_the_database_is_away_nothing_is_promised(
    own_database: str, postgres_url: URL, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=own_database)
    async with client_of(server) as client:
        before = await ROUTES[2].post(client, "before")
        async with database_away(own_database, postgres_url):
            for route in ROUTES:
                for key in (KEY, "before"):
                    response = await route.post(client, key)
                    assert_code(response, 503, "database-unavailable")
                    assert response.headers["retry-after"] == "1"
        assert_first(await ROUTES[2].post(client))
        assert_replay(await ROUTES[2].post(client, "before"), before)
        assert_first(await ROUTES[3].post(client, "with-files"))
    async with connected(own_database) as psql:
        assert await rows(psql) == (3, 3)
    assert len(kept(server.media)) == 2


# Forgetting


@pytest.fixture
async def keys(database_url: str) -> AsyncIterator[IdempotencyKeys]:
    async with (
        aclosing(Database(make_url(database_url))) as database,
        aclosing(IdempotencyKeys(database)) as keys,
    ):
        yield keys


AGED = "UPDATE idempotency_keys SET created = created - $1 * interval '1 second'"
DAY = 24 * 3600


async def test_a_key_is_kept_for_a_day_and_then_forgotten(
    client: httpx2.AsyncClient, database: Connection, keys: IdempotencyKeys
) -> None:
    first = await ROUTES[2].post(client)
    await database.execute(AGED, DAY - 60)
    assert await keys.forget_old() == 0
    assert_replay(await ROUTES[2].post(client), first)
    await ROUTES[2].post(client, "another")
    await database.execute(AGED, 61)
    assert await keys.forget_old() == 1
    assert_replay(await ROUTES[2].post(client, "another"), await ROUTES[2].post(client, "another"))
    assert await rows(database) == (2, 1)
    assert_first(await ROUTES[2].post(client))
    assert await rows(database) == (3, 2)


async def test_however_many_are_old_all_are_forgotten(
    database: Connection, keys: IdempotencyKeys
) -> None:
    await database.execute(
        "INSERT INTO idempotency_keys (key_hash, fingerprint, salt, chatt_id, time, files, created)"
        " SELECT sha256(number::text::bytea), '', '', gen_random_uuid(), now(), '{}',"
        " now() - number * interval '1 hour' FROM generate_series(1, 20100) AS number"
    )
    assert await keys.forget_old() == 20_100 - 23
    newest = "SELECT count(*) FROM idempotency_keys WHERE created > now() - interval '1 day'"
    assert await database.fetchval(newest) == 23
    assert await database.fetchval("SELECT count(*) FROM idempotency_keys") == 23


async def test_a_server_forgets_in_the_background(
    client: httpx2.AsyncClient, database: Connection, keys: IdempotencyKeys
) -> None:
    async with old_keys_forgotten(keys, interval_seconds=0.01):
        for number in range(2):
            await ROUTES[2].post(client, f"old-{number}")
            await database.execute(AGED, DAY)
            with anyio.fail_after(DEADLINE_SECONDS):
                while await database.fetchval("SELECT count(*) FROM idempotency_keys"):  # noqa: ASYNC110 - PostgreSQL has no event for it
                    await anyio.sleep(0.01)
