"""POST /v1/chatts, as JSON and as a form, as contract §2 has it."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING

import httpx2
import pytest

from tests import test_postchatt as text
from tests import test_postimages as media
from tests.multipart import (
    Part,
    connect,
    encode,
    fields,
    form_type,
    image,
    kept,
    problem,
    video,
)
from tests.objects import base_of, objects
from tests.samples import JPEG, MP4, NEITHER, PNG, WEBM, longer_jpeg

if TYPE_CHECKING:
    from tests.multipart import Connection, Server
    from tests.objects import Object

SLASHES = ["/v1/chatts", "/v1/chatts/"]
TOKEN = re.compile(r"[A-Za-z0-9_-]{24}")


async def post_form(client: httpx2.AsyncClient, *parts: Part) -> httpx2.Response:
    return await client.post("/v1/chatts", content=encode(*parts), headers=form_type())


async def assert_posted(
    client: httpx2.AsyncClient, database: Connection, response: httpx2.Response
) -> Object:
    """Check that this is the answer to the only chatt there is; return the chatt."""
    assert response.status_code == 201, response.content
    assert response.headers["content-type"] == "application/json"
    assert "idempotency-replayed" not in response.headers
    assert "chatterd-delete-token" not in response.headers  # it is in the body
    (chatt,) = await objects(database, base_of(client))
    token = response.json()["delete_token"]
    assert TOKEN.fullmatch(token)
    document = chatt | {"delete_token": token}
    compact = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    assert response.content == compact.encode()
    assert response.headers["location"] == f"/v1/chatts/{chatt['id']}"
    digest = await database.fetchval("SELECT delete_token_hash FROM chatts")
    assert digest == hashlib.sha256(token.encode()).digest()
    # Where it is said to be, it is; and nobody is told the token again.
    for path in (response.headers["location"], response.headers["location"] + "/"):
        found = await client.get(path)
        assert (found.status_code, found.json()) == (200, chatt)
    assert token not in (await client.get("/v1/chatts")).text
    return chatt


@pytest.mark.parametrize("path", SLASHES)
@pytest.mark.parametrize("spelling", ["name", "username"])
async def test_a_text_is_answered_with_the_chatt_and_its_delete_token(
    client: httpx2.AsyncClient, database: Connection, path: str, spelling: str
) -> None:
    response = await client.post(path, json={spelling: "日本語", "message": "😀 é"})
    chatt = await assert_posted(client, database, response)
    assert (chatt["name"], chatt["message"]) == ("日本語", "😀 é")
    assert (chatt["image"], chatt["video"]) == (None, None)


@pytest.mark.parametrize("path", SLASHES)
@pytest.mark.parametrize("spelling", ["name", "username"])
async def test_a_form_is_answered_with_the_addresses_of_its_files(
    server: Server, client: httpx2.AsyncClient, database: Connection, path: str, spelling: str
) -> None:
    form = encode(Part(spelling, b"ann"), Part("message", b""), image(PNG), video(WEBM))
    response = await client.post(path, content=form, headers=form_type())
    chatt = await assert_posted(client, database, response)
    size = {"size": len(PNG), "width": 2, "height": 2}
    assert {name: chatt["image"][name] for name in size} == size
    assert (chatt["image"]["type"], chatt["video"]["type"]) == ("image/png", "video/webm")
    assert chatt["video"]["size"] == len(WEBM)
    for file, data in ((chatt["image"], PNG), (chatt["video"], WEBM)):
        assert file["url"].startswith(f"{server.url}/media/")
        assert (await client.get(file["url"])).content == data
    assert len(kept(server.media)) == 2


@pytest.mark.parametrize(
    ("parts", "slot"), [((), None), ((image(JPEG),), "image"), ((video(MP4),), "video")]
)
async def test_a_form_needs_no_file(
    client: httpx2.AsyncClient, database: Connection, parts: tuple[Part, ...], slot: str | None
) -> None:
    chatt = await assert_posted(client, database, await post_form(client, *fields(), *parts))
    assert [name for name in ("image", "video") if chatt[name]] == ([slot] if slot else [])


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/mixed; boundary=x",
        "nonsense",
        None,
    ],
)
async def test_what_is_said_to_be_no_form_is_read_as_json(
    client: httpx2.AsyncClient, database: Connection, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    body = b'{"name":"ann","message":"hi"}'
    await assert_posted(
        client, database, await client.post("/v1/chatts", content=body, headers=headers)
    )


async def test_a_form_is_one_however_its_type_is_written(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    headers = {"Content-Type": form_type()["Content-Type"].replace("multipart", "MultiPart")}
    response = await client.post("/v1/chatts", content=encode(*fields()), headers=headers)
    await assert_posted(client, database, response)


async def test_every_chatt_has_a_token_of_its_own(client: httpx2.AsyncClient) -> None:
    draft = {"name": "ann", "message": "the same"}
    responses = [await client.post("/v1/chatts", json=draft) for _ in range(20)]
    assert len({response.json()["delete_token"] for response in responses}) == 20
    assert len({response.json()["id"] for response in responses}) == 20


async def test_the_tutorials_routes_tell_the_token_and_the_place_in_their_headers(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    draft = {"name": "ann", "message": "hi"}
    form = encode(*fields(), image(JPEG))
    answers = [
        await client.post("/postchatt", json=draft),
        await client.post("/postimages", content=form, headers=form_type()),
    ]
    chatts = await objects(database, base_of(client))
    for answer, chatt in zip(answers, chatts, strict=True):
        # Byte for byte as ever, for clients that know no more.
        assert (answer.status_code, answer.content) == (200, b"{}")
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["content-length"] == "2"
        assert answer.headers["location"] == f"/v1/chatts/{chatt['id']}"
        assert (await client.get(answer.headers["location"])).json() == chatt
        token = answer.headers["chatterd-delete-token"]
        assert TOKEN.fullmatch(token)
        deleted = await client.delete(
            answer.headers["location"], headers={"Chatterd-Delete-Token": token}
        )
        assert deleted.status_code == 204


# What is refused, as on the tutorial's routes


@pytest.mark.parametrize("body", text.NO_CHATTS)
async def test_what_is_no_chatt_is_refused_and_stores_nothing(
    client: httpx2.AsyncClient, database: Connection, body: bytes
) -> None:
    problem(await client.post("/v1/chatts", content=body), 422)
    assert await text.stored(database) == []


@pytest.mark.parametrize(("name", "message", "field", "limit", "length"), text.TOO_LONG)
async def test_text_over_its_limit_is_refused(  # noqa: PLR0913  the table's columns
    client: httpx2.AsyncClient,
    database: Connection,
    *,
    name: str,
    message: str,
    field: str,
    limit: int,
    length: int,
) -> None:
    response = await client.post("/v1/chatts", json={"username": name, "message": message})
    detail = problem(response, 400)
    assert detail.startswith("Message too long")
    for word in (field, str(limit), str(length)):
        assert word in detail.removeprefix("Message too long")
    assert await text.stored(database) == []


@pytest.mark.parametrize("parts", media.NO_CHATTS)
async def test_a_form_that_is_no_chatt_is_refused_and_leaves_nothing(
    server: Server, client: httpx2.AsyncClient, database: Connection, parts: tuple[Part, ...]
) -> None:
    problem(await post_form(client, *parts), 422)
    await media.assert_nothing_is_left(server, database)


@pytest.mark.parametrize("parts", media.WRONG_KINDS)
async def test_the_wrong_kind_of_media_is_refused(
    server: Server, client: httpx2.AsyncClient, database: Connection, parts: tuple[Part, ...]
) -> None:
    problem(await post_form(client, *fields(), *parts), 415)
    await media.assert_nothing_is_left(server, database)


@pytest.mark.parametrize("kind", NEITHER)
async def test_bytes_that_are_neither_picture_nor_video_are_refused(
    server: Server, client: httpx2.AsyncClient, database: Connection, kind: str
) -> None:
    for field in ("image", "video"):
        part = Part(field, NEITHER[kind], "x.jpg", "image/jpeg")
        assert field in problem(await post_form(client, *fields(), part), 415)
    await media.assert_nothing_is_left(server, database)


@pytest.mark.parametrize(
    ("content_type", "body"), [param for param in media.BROKEN if param.id != "JSON"]
)
async def test_a_broken_form_is_refused_and_leaves_nothing(
    server: Server,
    client: httpx2.AsyncClient,
    database: Connection,
    content_type: str | None,
    body: bytes,
) -> None:
    request = client.build_request("POST", "/v1/chatts", content=body)
    if content_type is not None:
        line = (b"Content-Type", content_type.encode("latin-1"))
        request.headers = httpx2.Headers([*request.headers.raw, line])
    problem(await client.send(request), 422)
    await media.assert_nothing_is_left(server, database)


@pytest.mark.parametrize(("name", "message", "field", "numbers"), media.TOO_LONG)
async def test_text_over_its_limit_in_a_form_leaves_no_file(  # noqa: PLR0913  the table's columns
    server: Server,
    client: httpx2.AsyncClient,
    database: Connection,
    *,
    name: str,
    message: str,
    field: str,
    numbers: tuple[str, str],
) -> None:
    detail = problem(await post_form(client, image(JPEG), *fields(name, message)), 400)
    assert all(word in detail for word in (field, *numbers))
    await media.assert_nothing_is_left(server, database)


@pytest.mark.parametrize("body", media.EXHAUSTING)
async def test_a_form_made_to_exhaust_the_server_is_refused(
    server: Server, client: httpx2.AsyncClient, database: Connection, body: bytes
) -> None:
    response = await client.post("/v1/chatts", content=body, headers=form_type())
    assert response.status_code in {400, 413, 422}
    problem(response, response.status_code)
    await media.assert_nothing_is_left(server, database)


async def test_a_file_one_byte_over_the_limit_is_refused(
    server: Server, client: httpx2.AsyncClient, database: Connection
) -> None:
    big = image(longer_jpeg(media.MEDIA_LIMIT + 1))
    assert str(media.MEDIA_LIMIT) in problem(await post_form(client, *fields(), big), 413)
    await media.assert_nothing_is_left(server, database)


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("kind", ["application/json", form_type()["Content-Type"]])
async def test_a_declared_length_over_every_limit_is_refused_before_the_body_is_sent(
    server: Server, database: Connection, kind: str
) -> None:
    async with connect(server.url) as wire:
        lines = f"Content-Type: {kind}", f"Content-Length: {10**12}"
        await wire.request("POST", "/v1/chatts", *lines)
        problem(await wire.answer("POST"), 413)
    await media.assert_nothing_is_left(server, database)


@pytest.mark.direct(reason="Nginx waits for the whole of what may be a form")
@pytest.mark.usefixtures("client")
async def test_a_json_body_over_its_limit_is_refused_while_the_client_waits(
    server: Server, database: Connection
) -> None:
    async with connect(server.url) as wire:
        await wire.request("POST", "/v1/chatts", "Transfer-Encoding: chunked")
        await wire.send_chunk(text.padded(text.JSON_LIMIT + 1))
        problem(await wire.answer("POST"), 413)
    assert await text.stored(database) == []
