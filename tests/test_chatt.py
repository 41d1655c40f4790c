"""GET and DELETE /v1/chatts/<id>, as contract §2 has it."""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections import Counter
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.conftest import client_of
from tests.multipart import (
    THUMBNAIL,
    encode,
    fields,
    files,
    form_type,
    image,
    problem,
    until,
    video,
)
from tests.objects import base_of, delete, objects, post
from tests.samples import JPEG, MP4, PNG
from tests.test_feed import A_FEW

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import httpx2

    from tests.conftest import StartServer
    from tests.multipart import Connection, Part, Server
    from tests.objects import Object

ID = "7401355b-fc63-458a-bddc-f90d2da400d3"
NO_IDS = {
    "unknown": ID,
    "nothing like it": "1",
    "no dashes": ID.replace("-", ""),
    "braces": f"%7B{ID}%7D",
    "a URN": f"urn:uuid:{ID}",
    "a digit short": ID[:-1],
    "a digit long": f"{ID}0",
    "no hexadecimal": ID.replace("7", "g"),
    "other digits": ID.replace("4", "%D9%A4"),
    "a line feed": f"{ID}%0A",
    "SQL": "%27%20OR%201=1%20--",
    "long": "a" * 5000,
}


async def upload(client: httpx2.AsyncClient, *parts: Part) -> Object:
    form = encode(*fields(), *parts)
    response = await client.post("/v1/chatts", content=form, headers=form_type())
    assert response.status_code == 201, response.content
    found: Object = response.json()
    if found["image"] is not None:  # its thumbnail is there when it is answered
        thumbnail = await client.get(found["image"]["url"] + "?thumb")
        assert thumbnail.status_code == 200
    return found


def name_of(file: Object) -> str:
    return str(file["url"].rpartition("/")[2])


def make_old(folder: Path, *names: str) -> None:
    for name in names:
        for path in folder.glob(f"{name}*"):
            os.utime(path, (time.time() - 3600, time.time() - 3600))


# One chatt


@pytest.mark.parametrize("slash", ["", "/"])
async def test_a_chatt_is_the_object_that_a_page_has(
    client: httpx2.AsyncClient, database: Connection, slash: str
) -> None:
    await database.execute(A_FEW)
    await upload(client, image(JPEG), video(MP4))
    chatts = await objects(database, base_of(client))
    assert (await client.get("/v1/chatts")).json()["chatts"] == chatts
    for chatt in chatts:
        for written in (chatt["id"], chatt["id"].upper()):
            response = await client.get(f"/v1/chatts/{written}{slash}")
            assert response.status_code == 200
            assert response.headers["content-type"] == "application/json"
            compact = json.dumps(chatt, ensure_ascii=False, separators=(",", ":"))
            assert response.content == compact.encode()
            head = await client.head(f"/v1/chatts/{written}{slash}")
            assert (head.status_code, head.content) == (200, b"")
            for name in ("content-type", "content-length", "etag", "cache-control"):
                assert head.headers[name] == response.headers[name]


async def test_addresses_are_of_the_host_that_the_reader_asked(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    path = f"/v1/chatts/{(await upload(client, image(JPEG), video(MP4)))['id']}"
    etags = set()
    for host in ("one.example", "other.example:8443"):
        response = await client.get(path, headers={"Host": host})
        assert [response.json()] == await objects(database, f"{client.base_url.scheme}://{host}")
        etags.add(response.headers["etag"])
    assert len(etags) == 2


@pytest.mark.parametrize(
    "chatt_id",
    [
        *(pytest.param(value, id=name) for name, value in NO_IDS.items()),
        # To Nginx it is no path at all: its 404 is that of any address that is not there.
        pytest.param("%00", id="NUL", marks=pytest.mark.direct(reason="Nginx takes no %00")),
    ],
)
async def test_an_id_of_no_chatt_is_not_found(client: httpx2.AsyncClient, chatt_id: str) -> None:
    token = {"Chatterd-Delete-Token": "a" * 24}
    for method, headers in (("GET", {}), ("DELETE", {}), ("DELETE", token)):
        response = await client.request(method, f"/v1/chatts/{chatt_id}", headers=headers)
        assert len(problem(response, 404)) < 200
        assert response.json()["code"] == "chatt-not-found"


@pytest.mark.direct(reason="this Nginx takes no field that comes in several lines, against the RFC")
async def test_a_known_tag_may_come_in_a_line_of_its_own(client: httpx2.AsyncClient) -> None:
    path = f"/v1/chatts/{(await post(client, 'hi'))['id']}"
    etag = (await client.get(path)).headers["etag"]
    lines = [("If-None-Match", '"a"'), ("If-None-Match", etag)]
    response = await client.get(path, headers=lines)
    assert (response.status_code, response.content) == (304, b"")


async def test_a_known_chatt_is_answered_304_until_it_changes(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    chatt = await post(client, "hi")
    path = f"/v1/chatts/{chatt['id']}"
    got = await client.get(path)
    etag = got.headers["etag"]
    assert re.fullmatch(r'"[!#-~]+"', etag), "no strong entity tag"
    assert got.headers["cache-control"] == "no-cache"
    await post(client, "another")
    for known in (etag, f'"a", {etag}', "*", f"W/{etag}"):
        response = await client.get(path, headers={"If-None-Match": known})
        assert (response.status_code, response.content) == (304, b""), known
        assert response.headers["etag"] == etag
        assert response.headers["cache-control"] == "no-cache"
    await database.execute("UPDATE chatts SET message = 'other' WHERE id = $1", chatt["id"])
    response = await client.get(path, headers={"If-None-Match": etag})
    assert (response.status_code, response.json()["message"]) == (200, "other")
    assert response.headers["etag"] != etag
    await delete(client, chatt)
    problem(await client.get(path, headers={"If-None-Match": "*"}), 404)


# Deleting


@pytest.mark.parametrize("slash", ["", "/"])
async def test_whoever_has_the_token_deletes_the_chatt(
    client: httpx2.AsyncClient, database: Connection, slash: str
) -> None:
    await database.execute(A_FEW)
    chatt = await upload(client, image(JPEG), video(MP4))
    path = f"/v1/chatts/{chatt['id']}{slash}"
    headers = {"Chatterd-Delete-Token": chatt["delete_token"]}
    response = await client.delete(path, headers=headers)
    assert (response.status_code, response.content) == (204, b"")
    assert "content-length" not in response.headers  # RFC 9110 §8.6
    left = await objects(database, base_of(client))
    assert len(left) == 5
    for feed in ("/getchatts", "/getimages", "/getchatts?limit=50", "/getimages?limit=6"):
        rows = (await client.get(feed)).json()
        assert [row[2] for row in rows] == [other["id"] for other in left]
    for query in ("", "?limit=6", f"?after={left[0]['id']}", f"?before={chatt['id']}"):
        page = (await client.get(f"/v1/chatts{query}")).json()["chatts"]
        assert page == (left[1:] if "after" in query else left)
    for again in (await client.delete(path, headers=headers), await client.get(path)):
        problem(again, 404)
        assert again.json()["code"] == "chatt-not-found"
    problem(await client.delete(path), 404)


async def test_a_deleted_chatt_leaves_neither_text_nor_file_nor_token_in_the_table(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    chatt = await upload(client, image(JPEG), video(MP4))
    await post(client, "later")
    before = await database.fetchrow("SELECT * FROM chatts WHERE id = $1", chatt["id"])
    await delete(client, chatt)
    after = await database.fetchrow("SELECT * FROM chatts WHERE id = $1", chatt["id"])
    assert before is not None
    assert after is not None
    newest = await database.fetchval("SELECT max(seq) FROM chatts")
    assert dict(after) == {
        "seq": newest,
        "name": "",
        "message": "",
        "id": before["id"],
        "time": before["time"],
        "image": None,
        "video": None,
        "deleted": True,
        "delete_token_hash": None,
    }
    assert newest == before["seq"] + 2
    assert await database.fetchval("SELECT count(*) FROM chatts") == 2


async def test_a_wrong_token_deletes_nothing(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    chatt, other = await post(client, "hi"), await post(client, "other")
    token = chatt["delete_token"]
    digest = await database.fetchval("SELECT delete_token_hash FROM chatts ORDER BY seq LIMIT 1")
    wrong = (
        None,
        "",
        "a" * 24,
        other["delete_token"],
        token[:-1],
        f"{token}A",
        f'"{token}"',
        token.swapcase(),
        digest.hex(),
        "\xff",
        "t" * 8000,
    )
    for given in wrong:
        lines = [] if given is None else [("Chatterd-Delete-Token", given.encode("latin-1"))]
        headers = [(name.encode(), value) for name, value in lines]
        response = await client.delete(f"/v1/chatts/{chatt['id']}", headers=headers)
        assert token not in problem(response, 403), given
        assert response.json()["code"] == "delete-token-wrong"
    assert len((await client.get("/v1/chatts")).json()["chatts"]) == 2
    await delete(client, chatt)


async def test_what_was_there_before_there_were_tokens_cannot_be_deleted(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    await database.execute("INSERT INTO chatts (name, message) VALUES ('psql', 'adopted')")
    (chatt,) = (await client.get("/v1/chatts")).json()["chatts"]
    for headers in ({}, {"Chatterd-Delete-Token": ""}, {"Chatterd-Delete-Token": "a" * 24}):
        response = await client.delete(f"/v1/chatts/{chatt['id']}", headers=headers)
        problem(response, 403)
    assert (await client.get("/v1/chatts")).json()["chatts"] == [chatt]


async def test_of_many_that_delete_a_chatt_at_once_one_has_deleted_it(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    chatt = await post(client, "hi")
    headers = {"Chatterd-Delete-Token": chatt["delete_token"]}
    seq = await database.fetchval("SELECT seq FROM chatts")
    statuses: Counter[int] = Counter()

    async def attempt() -> None:
        response = await client.delete(f"/v1/chatts/{chatt['id']}", headers=headers)
        statuses[response.status_code] += 1

    async with anyio.create_task_group() as group:
        for _ in range(12):
            group.start_soon(attempt)
    assert statuses == {204: 1, 404: 11}
    assert await database.fetchval("SELECT seq FROM chatts") == seq + 1


async def test_a_chatt_deleted_through_one_server_is_gone_from_the_other_at_once(
    own_database: str, start_server: StartServer
) -> None:
    one, other = (start_server(DATABASE_URL=own_database) for _ in range(2))
    async with client_of(one) as writing, client_of(other) as reading:
        chatts = [await post(writing, str(number)) for number in range(20)]
        for chatt in chatts:
            assert chatt["id"] in (await reading.get("/getchatts")).text
            await delete(writing, chatt)
            for path in ("/getchatts", "/getimages?limit=500", "/v1/chatts?limit=500"):
                assert chatt["id"] not in (await reading.get(path)).text
            assert (await reading.get(f"/v1/chatts/{chatt['id']}")).status_code == 404
        unknown = f"/v1/chatts/{uuid.uuid4()}"
        assert (await reading.get(unknown)).json()["code"] == "chatt-not-found"


# Their files


@pytest.fixture
async def cleared(server: Server, client: httpx2.AsyncClient) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the shared server, whose folder is empty before and after."""
    yield client
    for name in files(server.media):
        (server.media / name).unlink()


async def test_old_files_of_a_deleted_chatt_and_their_thumbnail_go_at_once(
    server: Server, cleared: httpx2.AsyncClient
) -> None:
    chatt = await upload(cleared, image(JPEG), video(MP4))
    picture, film = name_of(chatt["image"]), name_of(chatt["video"])
    assert files(server.media) == sorted([picture, picture + THUMBNAIL, film])
    make_old(server.media, picture, film)
    await delete(cleared, chatt)
    await until(lambda: files(server.media) == [])
    for address in (chatt["image"]["url"], chatt["image"]["url"] + "?thumb", chatt["video"]["url"]):
        assert (await cleared.get(address)).status_code == 404


async def test_a_file_that_another_chatt_names_stays_until_that_is_deleted_too(
    server: Server, cleared: httpx2.AsyncClient
) -> None:
    one, other = await upload(cleared, image(JPEG), video(MP4)), await upload(cleared, video(MP4))
    picture, film = name_of(one["image"]), name_of(one["video"])
    assert name_of(other["video"]) == film
    make_old(server.media, picture, film)
    await delete(cleared, one)
    await until(lambda: picture not in files(server.media))
    assert (await cleared.get(other["video"]["url"])).content == MP4
    await delete(cleared, other)
    await until(lambda: files(server.media) == [])


async def test_a_file_younger_than_a_minute_stays_for_now(
    server: Server, cleared: httpx2.AsyncClient
) -> None:
    """Whoever has just uploaded it again may be about to post it."""
    chatt = await upload(cleared, image(PNG), video(MP4))
    make_old(server.media, name_of(chatt["video"]))
    await delete(cleared, chatt)
    await until(lambda: name_of(chatt["video"]) not in files(server.media))
    assert (await cleared.get(chatt["image"]["url"])).content == PNG
    again = await upload(cleared, image(PNG))
    assert (await cleared.get(again["image"]["url"])).content == PNG


async def test_a_server_that_waits_for_a_file_to_grow_old_stops_at_once(
    own_database: str, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=own_database)
    async with client_of(server) as client:
        chatt = await upload(client, image(JPEG))
        await delete(client, chatt)
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 10
    assert "Traceback" not in server.log
    # What is left is the sweep's.
    assert name_of(chatt["image"]) in files(server.media)
    assert not list((server.media / ".swept").glob("*"))
