"""GET /v1/chatts, page by page, as contract §2 has it."""

from __future__ import annotations

import json
import re
import uuid
from typing import TYPE_CHECKING

import pytest

from tests.conftest import client_of
from tests.multipart import encode, fields, form_type, image, problem, video
from tests.objects import TOMBSTONE, base_of, delete, objects, post
from tests.samples import HEIC, JPEG, MP4, PNG, WEBM
from tests.test_feed import A_FEW, BAD_QUERIES, INSERT_MANY, TIE, links

if TYPE_CHECKING:
    import httpx2

    from tests.conftest import StartServer
    from tests.multipart import Connection
    from tests.objects import Object

SLASHES = ["/v1/chatts", "/v1/chatts/"]


async def page(client: httpx2.AsyncClient, path: str = "/v1/chatts") -> list[Object]:
    response = await client.get(path)
    assert response.status_code == 200, response.content
    document = response.json()
    assert list(document) == ["chatts", "cursor"]
    found: list[Object] = document["chatts"]
    return found


async def upload(client: httpx2.AsyncClient, picture: bytes, film: bytes) -> None:
    form = encode(*fields(), image(picture), video(film))
    response = await client.post("/postimages", content=form, headers=form_type())
    assert (response.status_code, response.content) == (200, b"{}")


# What is answered


@pytest.mark.parametrize("path", SLASHES)
async def test_a_page_is_an_object_of_the_chatts_and_a_cursor(
    client: httpx2.AsyncClient, database: Connection, path: str
) -> None:
    await database.execute(A_FEW)
    await post(client, '日本語 😀 \u2028 <b>&</b> "quoted" a/b')
    response = await client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-cache"
    cursor = response.json()["cursor"]
    document = {"chatts": await objects(database, base_of(client)), "cursor": cursor}
    assert (
        response.content == json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    )
    assert len(document["chatts"]) == 6
    # A cursor goes into a query and into a header as it is.
    assert re.fullmatch(r"[0-9a-f.]+", cursor)


async def test_files_are_told_by_address_type_and_what_is_known_of_them(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    await upload(client, JPEG, MP4)
    await upload(client, HEIC, WEBM)
    chatts = await page(client)
    assert chatts == await objects(database, base_of(client))
    pictures = [{**chatt["image"], "url": None} for chatt in chatts]
    assert pictures == [
        {"url": None, "type": "image/jpeg", "size": len(JPEG), "width": 2, "height": 2},
        {"url": None, "type": "image/heic", "size": len(HEIC), "width": 8, "height": 8},
    ]
    films = [(chatt["video"]["type"], chatt["video"]["size"]) for chatt in chatts]
    assert films == [("video/mp4", len(MP4)), ("video/webm", len(WEBM))]
    for chatt, data in zip(chatts, (JPEG, HEIC), strict=True):
        assert (await client.get(chatt["image"]["url"])).content == data
        thumbnail = await client.get(chatt["image"]["url"] + "?thumb")
        assert thumbnail.headers["content-type"] == "image/webp"


async def test_what_is_not_known_of_an_adopted_file_is_null(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    await database.execute(
        "INSERT INTO chatts (name, message, image, video)"
        " VALUES ('psql', '', 'a ü?.jpeg', 'clip.webm'), ('psql', '', 'picture', 'b.exe')"
    )
    one, other = await page(client)
    media = f"{base_of(client)}/media/"
    unknown = dict.fromkeys(["size", "width", "height"])
    assert one["image"] == {"url": media + "a%20%C3%BC%3F.jpeg", "type": "image/jpeg", **unknown}
    assert one["video"] == {"url": media + "clip.webm", "type": "video/webm", "size": None}
    assert other["image"]["type"] == other["video"]["type"] == "application/octet-stream"


@pytest.mark.parametrize("path", SLASHES)
async def test_an_empty_feed_has_a_cursor_and_a_link_to_what_will_come(
    client: httpx2.AsyncClient, path: str
) -> None:
    response = await client.get(path)
    assert response.json()["chatts"] == []
    assert response.headers["link"] == f'<{path}?limit=50>; rel="next"'
    await post(client, "hi")
    (chatt,) = await page(client, links(response)["next"])
    assert chatt["message"] == "hi"
    news = await client.get(path, params={"since": response.json()["cursor"]})
    assert news.json()["chatts"] == [chatt]


@pytest.mark.parametrize("path", SLASHES)
@pytest.mark.parametrize("rows", ["SELECT", A_FEW], ids=["empty", "some"])
@pytest.mark.parametrize("query", ["", "?limit=2"])
async def test_head_has_the_headers_of_get_and_no_body(
    client: httpx2.AsyncClient, database: Connection, path: str, rows: str, query: str
) -> None:
    await database.execute(rows)
    got, head = await client.get(path + query), await client.head(path + query)
    assert (head.status_code, head.content) == (200, b"")
    for response in (got, head):
        del response.headers["x-request-id"], response.headers["date"]
    assert head.headers == got.headers
    assert int(head.headers["content-length"]) == len(got.content)
    known = await client.head(path + query, headers={"If-None-Match": got.headers["etag"]})
    assert known.status_code == 304


# Which chatts


async def test_a_page_is_the_chatts_before_or_after_one_or_the_newest(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    await database.execute(INSERT_MANY.format(700))
    # One instant of more chatts than a page has; their numbers are their order.
    await database.execute(TIE.format("2026-01-01 00:05:00+00", 60))
    await database.execute(TOMBSTONE + " WHERE seq % 5 = 0")
    whole = await objects(database, base_of(client))
    middle = len(whole) // 2
    bound = whole[middle]["id"]
    pages = {
        "": whole[-50:],
        "?": whole[-50:],
        "?limit=1": whole[-1:],
        "?limit=050": whole[-50:],
        "?limit=500": whole[-500:],
        f"?before={bound}": whole[middle - 50 : middle],
        f"?after={bound}": whole[middle + 1 : middle + 51],
        f"?before={bound.upper()}": whole[middle - 50 : middle],
        f"?limit=7&before={bound}": whole[middle - 7 : middle],
        f"?after={bound}&limit=7": whole[middle + 1 : middle + 8],
        f"?limit=500&before={bound}": whole[:middle],
        f"?limit=3&before={whole[1]['id']}": whole[:1],
        f"?limit=3&after={whole[-2]['id']}": whole[-1:],
        f"?before={whole[0]['id']}": [],
        f"?after={whole[-1]['id']}": [],
    }
    for query, wanted in pages.items():
        assert await page(client, "/v1/chatts" + query) == wanted, query


@pytest.mark.parametrize("path", SLASHES)
@pytest.mark.parametrize("limit", [1, 3, 4, 500])
async def test_the_links_lead_through_the_whole_feed_both_ways(
    client: httpx2.AsyncClient, database: Connection, path: str, limit: int
) -> None:
    await database.execute(A_FEW)
    await database.execute(INSERT_MANY.format(6))
    await database.execute(TIE.format("2026-01-02", 5))
    await database.execute(TOMBSTONE + " WHERE seq IN (2, 7, 9)")
    whole = await objects(database, base_of(client))

    async def walk(response: httpx2.Response, relation: str) -> list[httpx2.Response]:
        pages = [response]
        while pages[-1].json()["chatts"]:
            assert len(pages) <= len(whole) + 1
            assert set(links(pages[-1])) == {"prev", "next"}
            pages.append(await client.get(links(pages[-1])[relation]))
            assert pages[-1].status_code == 200
        return pages

    backwards = await walk(await client.get(path, params={"limit": limit}), "prev")
    rows = [page.json()["chatts"] for page in backwards]
    assert [row for page in reversed(rows) for row in page] == whole
    # From the oldest page that has chatts, which is the last but one.
    forwards = await walk(backwards[-2], "next")
    assert [row for page in forwards for row in page.json()["chatts"]] == whole
    # An empty page is a place to wait at.
    assert links(forwards[-1])["next"] == links(forwards[-2])["next"]
    await post(client, "one more")
    (chatt,) = await page(client, links(forwards[-1])["next"])
    assert chatt["message"] == "one more"


async def test_a_reader_goes_on_from_a_chatt_that_was_deleted_meanwhile(
    client: httpx2.AsyncClient,
) -> None:
    chatts = [await post(client, str(number)) for number in range(7)]
    newest = await client.get("/v1/chatts?limit=3")
    await delete(client, chatts[4])  # the first of the page
    older = await client.get(links(newest)["prev"])
    assert [chatt["message"] for chatt in older.json()["chatts"]] == ["1", "2", "3"]
    await delete(client, chatts[3])
    newer = await client.get(links(older)["next"])
    assert [chatt["message"] for chatt in newer.json()["chatts"]] == ["5", "6"]
    for chatt in (chatts[0], chatts[1], chatts[2], chatts[5], chatts[6]):
        await delete(client, chatt)
    for relation in ("prev", "next"):
        response = await client.get(links(newer)[relation])
        assert response.json()["chatts"] == []
        assert set(links(response)) == {"prev", "next"}


# What cannot be answered


BAD = BAD_QUERIES | {
    "wait=1": "bound-invalid",
    "wait=": "bound-invalid",
    "since=a&before={id}": "bound-invalid",
    "since=a&after={id}": "bound-invalid",
    "since=a&since=a": "bound-invalid",
    "since=a&wait=1&wait=1": "bound-invalid",
    "since=a&wait=56": "wait-invalid",
    "since=a&wait=-1": "wait-invalid",
    "since=a&wait=1.5": "wait-invalid",
    "since=a&wait=": "wait-invalid",
    "since=a&wait=x": "wait-invalid",
    "since=a&wait=%D9%A1": "wait-invalid",
    "since=a&wait=%201": "wait-invalid",
    "since=a&wait=100": "wait-invalid",
    "since=a&limit=501": "limit-invalid",
    "since=a&limit=0": "limit-invalid",
}


@pytest.mark.parametrize(("query", "code"), BAD.items(), ids=lambda text: text[:40])
async def test_a_query_that_cannot_be_answered_is_refused(
    client: httpx2.AsyncClient, query: str, code: str
) -> None:
    response = await client.get(f"/v1/chatts?{query.replace('{id}', str(uuid.uuid4()))}")
    problem(response, 422)
    assert response.json()["code"] == code


@pytest.mark.parametrize("path", SLASHES)
@pytest.mark.parametrize("bound", ["before", "after"])
async def test_a_bound_that_is_no_chatt_is_not_found(
    client: httpx2.AsyncClient, path: str, bound: str
) -> None:
    unknown = str(uuid.uuid4())
    response = await client.get(path, params={bound: unknown})
    assert unknown in problem(response, 404)
    assert response.json()["code"] == "chatt-not-found"


async def test_other_methods_are_told_which_there_are(client: httpx2.AsyncClient) -> None:
    for path, methods in (
        ("/v1/chatts", {"GET", "HEAD", "POST"}),
        (f"/v1/chatts/{uuid.uuid4()}", {"GET", "HEAD", "DELETE"}),
        ("/v1/stream", {"GET", "HEAD"}),
    ):
        for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - methods:
            response = await client.request(method, path)
            problem(response, 405)
            assert {word.strip() for word in response.headers["allow"].split(",")} == methods


# Conditional reads


@pytest.mark.parametrize("query", ["", "?limit=2", "?limit=1", "?limit=2&before={id}"])
@pytest.mark.parametrize("path", SLASHES)
async def test_a_known_page_is_answered_304_without_a_body(
    client: httpx2.AsyncClient, database: Connection, path: str, query: str
) -> None:
    await database.execute(A_FEW)
    bound = await database.fetchval("SELECT id::text FROM chatts WHERE name = 'zoe'")
    target = path + query.format(id=bound)
    got = await client.get(target)
    etag = got.headers["etag"]
    assert re.fullmatch(r'"[!#-~]+"', etag), "no strong entity tag"
    for known in (etag, f'"a", {etag}', f'{etag},"b"', "*", f"W/{etag}"):
        response = await client.get(target, headers={"If-None-Match": known})
        assert (response.status_code, response.content) == (304, b"")
        assert response.headers["etag"] == etag
        assert response.headers["cache-control"] == "no-cache"
    for other in ('"a"', f'"x{etag[1:]}', f'"{etag[2:]}', '""'):
        response = await client.get(target, headers={"If-None-Match": other})
        assert (response.status_code, response.content) == (200, got.content)


async def test_a_known_page_is_answered_without_reading_it(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    await database.execute(A_FEW)
    etag = (await client.get("/v1/chatts")).headers["etag"]
    async with database.transaction():
        # Whoever reads chatts with their files has to wait for this.
        await database.execute("LOCK TABLE media IN ACCESS EXCLUSIVE MODE")
        response = await client.get("/v1/chatts", headers={"If-None-Match": etag})
        assert response.status_code == 304


async def test_every_post_and_every_delete_changes_the_etag_of_every_page(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    await database.execute(A_FEW)
    chatt = await post(client, "first")
    targets = ["/v1/chatts", "/v1/chatts?limit=1", "/getchatts", "/getimages?limit=2"]
    seen = {target: {(await client.get(target)).headers["etag"]} for target in targets}

    async def assert_all_changed() -> None:
        for target, etags in seen.items():
            (known,) = etags
            response = await client.get(target, headers={"If-None-Match": known})
            assert response.status_code == 200
            assert response.headers["etag"] != known
            seen[target] = {response.headers["etag"]}

    await post(client, "second")
    await assert_all_changed()
    await delete(client, chatt)
    await assert_all_changed()
    await database.execute("UPDATE chatts SET message = 'other' WHERE name = 'zoe'")
    await assert_all_changed()
    await database.execute("DELETE FROM chatts WHERE name = 'zoe'")
    await assert_all_changed()


async def test_two_servers_and_two_hosts(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    """Servers agree on the ETag and the cursor of a page; hosts have addresses of their own."""
    await psql.execute(A_FEW)
    etags = set()
    for server in (start_server(DATABASE_URL=own_database) for _ in range(2)):
        async with client_of(server) as client:
            for host in ("one.example", "other.example:8443", "[2001:db8::7]"):
                response = await client.get("/v1/chatts", headers={"Host": host})
                assert response.json()["chatts"] == await objects(psql, f"http://{host}")
                etags.add((response.headers["etag"], response.json()["cursor"]))
    assert len(etags) == 3
    assert len({cursor for _, cursor in etags}) == 1


async def test_the_public_url_is_used_whatever_the_host(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    await psql.execute(A_FEW)
    public = "https://chatter.example"
    server = start_server(DATABASE_URL=own_database, PUBLIC_URL=public)
    async with client_of(server) as client:
        form = encode(*fields(), image(PNG))
        posted = await client.post("/v1/chatts", content=form, headers=form_type())
        assert posted.json()["image"]["url"].startswith(f"{public}/media/")
        assert posted.headers["location"] == f"/v1/chatts/{posted.json()['id']}"
        for headers in ({}, {"Host": "evil.example"}):
            response = await client.get("/v1/chatts", headers=headers)
            assert response.json()["chatts"] == await objects(psql, public)
            one = await client.get(posted.headers["location"], headers=headers)
            assert one.json() == (await objects(psql, public))[-1]


async def test_a_host_that_is_not_allowed_is_refused_everywhere(
    own_database: str, psql: Connection, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=own_database, ALLOWED_HOSTS="chatter.example")
    async with client_of(server) as client:
        headers = {"Host": "evil.example"}
        draft = {"name": "ann", "message": "hi"}
        problem(await client.post("/v1/chatts", json=draft, headers=headers), 400)
        for path in ("/v1/chatts", "/v1/chatts?since=a", f"/v1/chatts/{uuid.uuid4()}"):
            problem(await client.get(path, headers=headers), 400)
        problem(await client.get("/v1/stream", headers=headers), 400)
    assert await psql.fetchval("SELECT count(*) FROM chatts") == 0
