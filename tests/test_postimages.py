"""POST /postimages, as contract §1 has it."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import anyio
import httpx2
import pytest

from tests.conftest import client_of
from tests.multipart import (
    BOUNDARY,
    DEADLINE_SECONDS,
    Part,
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
from tests.samples import (
    GIF,
    HEIC,
    IMAGES,
    JPEG,
    MP4,
    NEITHER,
    PNG,
    QUICKTIME,
    VIDEOS,
    WEBM,
    WEBP,
    Sample,
    longer_jpeg,
    longer_mp4,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.multipart import Connection, Server, StartServer

MEDIA_LIMIT = 10485760
# What lies in system buffers and in the server's queue when it says no.
IN_FLIGHT = 24 * 2**20
SLASHES = ["/postimages", "/postimages/"]


async def post(client: httpx2.AsyncClient, *parts: Part) -> httpx2.Response:
    return await client.post("/postimages", content=encode(*parts), headers=form_type())


async def assert_nothing_is_left(server: Server, database: Connection) -> None:
    assert await database.fetchval("SELECT count(*) FROM chatts") == 0
    # The answer may leave a moment before the half-written file is gone.
    await until(lambda: files(server.media) == [])


async def only_row(client: httpx2.AsyncClient) -> list[str]:
    (row,) = (await client.get("/getimages")).json()
    assert len(row) == 6
    return list(row)


@pytest.mark.parametrize("spelling", ["username", "name"])
@pytest.mark.parametrize("path", SLASHES)
async def test_a_form_without_files_is_a_chatt_without_media(
    server: Server, client: httpx2.AsyncClient, database: Connection, path: str, spelling: str
) -> None:
    form = encode(Part(spelling, b"ann"), Part("message", b"hi"))
    response = await client.post(path, content=form, headers=form_type())
    assert (response.status_code, response.content) == (200, b"{}")
    assert response.headers["content-type"] == "application/json"
    row = await only_row(client)
    assert row[:2] == ["ann", "hi"]
    assert row[4:] == [None, None]
    stored = await database.fetchrow("SELECT image, video FROM chatts")
    assert stored is not None
    assert tuple(stored) == (None, None)
    assert files(server.media) == []


@pytest.mark.parametrize("path", SLASHES)
async def test_a_picture_and_a_video_are_served_with_the_bytes_that_were_sent(
    server: Server, client: httpx2.AsyncClient, database: Connection, path: str
) -> None:
    form = encode(*fields(), image(JPEG), video(MP4))
    response = await client.post(path, content=form, headers=form_type())
    assert (response.status_code, response.content) == (200, b"{}")
    row = await only_row(client)
    stored = await database.fetchrow("SELECT image, video FROM chatts")
    assert stored is not None
    assert stored["image"] != stored["video"]
    for url, key, data in zip(row[4:], stored, (JPEG, MP4), strict=True):
        assert url == f"{server.url}/media/{key}"
        served = await client.get(url)
        assert (served.status_code, served.content) == (200, data)
    assert len(kept(server.media)) == 2


@pytest.mark.parametrize(
    ("field", "place", "other", "data"), [("image", 4, 5, PNG), ("video", 5, 4, WEBM)]
)
async def test_one_file_leaves_the_other_url_null(  # noqa: PLR0913  the table's columns
    server: Server,
    client: httpx2.AsyncClient,
    *,
    field: str,
    place: int,
    other: int,
    data: bytes,
) -> None:
    response = await post(client, *fields(), Part(field, data, "x", "application/octet-stream"))
    assert (response.status_code, response.content) == (200, b"{}")
    (row,) = (await client.get("/getimages")).json()
    assert row[other] is None
    assert (await client.get(row[place])).content == data
    assert len(kept(server.media)) == 1


@pytest.mark.parametrize("declared", ["image/jpeg", "text/html", "video/mp4", "nonsense", None])
@pytest.mark.parametrize("sample", IMAGES, ids=lambda sample: sample.kind)
async def test_a_picture_is_what_its_bytes_are(
    client: httpx2.AsyncClient, sample: Sample, declared: str | None
) -> None:
    part = Part("image", sample.data, "page.html", declared)
    response = await post(client, *fields(), part)
    assert (response.status_code, response.content) == (200, b"{}")
    await assert_served_as(client, (await only_row(client))[4], sample)


@pytest.mark.parametrize("declared", ["video/mp4", "text/html", "image/png", "nonsense", None])
@pytest.mark.parametrize("sample", VIDEOS, ids=lambda sample: sample.kind)
async def test_a_video_is_what_its_bytes_are(
    client: httpx2.AsyncClient, sample: Sample, declared: str | None
) -> None:
    part = Part("video", sample.data, "page.html", declared)
    response = await post(client, *fields(), part)
    assert (response.status_code, response.content) == (200, b"{}")
    await assert_served_as(client, (await only_row(client))[5], sample)


async def assert_served_as(client: httpx2.AsyncClient, url: str, sample: Sample) -> None:
    served = await client.get(url)
    assert (served.status_code, served.content) == (200, sample.stored)
    assert served.headers["content-type"] in sample.types
    assert "." + urlsplit(url).path.rpartition(".")[2] in sample.extensions
    assert ".html" not in url


async def test_what_a_picture_tells_about_its_place_is_not_stored(
    server: Server, client: httpx2.AsyncClient
) -> None:
    secret = b"GPS 42.2936N 83.7163W"
    comment = b"\xff\xfe" + (len(secret) + 2).to_bytes(2) + secret
    response = await post(client, *fields(), image(JPEG[:2] + comment + JPEG[2:] + secret))
    assert (response.status_code, response.content) == (200, b"{}")
    assert (await client.get((await only_row(client))[4])).content == JPEG
    (name,) = kept(server.media)
    assert (server.media / name).read_bytes() == JPEG


@pytest.mark.parametrize("part", [image(JPEG[:-2]), video(MP4 + b"?")], ids=["image", "video"])
async def test_what_cannot_be_cleaned_is_refused(
    server: Server, client: httpx2.AsyncClient, database: Connection, part: Part
) -> None:
    response = await post(client, *fields(), part)
    assert part.name in problem(response, 415)
    assert response.json()["code"] == f"{part.name}-unclean"
    await assert_nothing_is_left(server, database)


@pytest.mark.parametrize("field", ["image", "video"])
@pytest.mark.parametrize("kind", NEITHER)
async def test_bytes_that_are_neither_picture_nor_video_are_refused(
    server: Server, client: httpx2.AsyncClient, database: Connection, field: str, kind: str
) -> None:
    declared = "image/jpeg" if field == "image" else "video/mp4"
    response = await post(client, *fields(), Part(field, NEITHER[kind], "x.jpg", declared))
    assert field in problem(response, 415)
    await assert_nothing_is_left(server, database)


WRONG_KINDS = [
    pytest.param((image(MP4, kind="image/jpeg"),), id="mp4 as image"),
    pytest.param((image(QUICKTIME, kind="image/heic"),), id="quicktime as image"),
    pytest.param((image(WEBM, kind="image/webp"),), id="webm as image"),
    pytest.param((video(JPEG),), id="jpeg as video"),
    pytest.param((video(GIF),), id="gif as video"),
    pytest.param((video(WEBP),), id="webp as video"),
    pytest.param((video(HEIC),), id="heic as video"),
    pytest.param((image(MP4), video(JPEG)), id="exchanged"),
    pytest.param((image(JPEG), video(b"text")), id="good image and bad video"),
    pytest.param((video(MP4), image(b"text")), id="good video and bad image"),
]


@pytest.mark.parametrize("parts", WRONG_KINDS)
async def test_the_wrong_kind_of_media_is_refused(
    server: Server, client: httpx2.AsyncClient, database: Connection, parts: tuple[Part, ...]
) -> None:
    problem(await post(client, *fields(), *parts), 415)
    await assert_nothing_is_left(server, database)


BARE = [
    "alamofire.boundary.0f1e2d3c4b5a6978",
    "Boundary-7401355B-FC63-458A-BDDC-F90D2DA400D3",
    "7401355b-fc63-458a-bddc-f90d2da400d3",
    "----WebKitFormBoundary7MA4YWxkTrZu0gW",
    "x",
    "b" * 70,
]
# RFC 2046's other characters stand in quotes, and whatever stands bare may be quoted too.
QUOTED = ["'()+_,-./:=?", "two words", *BARE]


@pytest.mark.parametrize(
    ("boundary", "parameter"),
    [
        *(pytest.param(boundary, boundary, id=boundary) for boundary in BARE),
        *(pytest.param(boundary, f'"{boundary}"', id=f"quoted {boundary}") for boundary in QUOTED),
    ],
)
async def test_the_boundaries_of_real_clients_are_read(
    client: httpx2.AsyncClient, boundary: str, parameter: str
) -> None:
    form = encode(*fields("日本語", "é"), image(JPEG), boundary=boundary)
    response = await client.post("/postimages", content=form, headers=form_type(parameter))
    assert (response.status_code, response.content) == (200, b"{}")
    row = await only_row(client)
    assert row[:2] == ["日本語", "é"]
    assert (await client.get(row[4])).content == JPEG


def okhttp(part: Part) -> Part:
    """Add the length inside the part that OkHttp, the client of most Android Chatters, writes."""
    return part._replace(headers=(*part.headers, f"Content-Length: {len(part.data)}"))


NAMED = Part("username", b"ann")
SAYING = Part("message", b"hi")
SHAPES = {
    "file name without extension": encode(NAMED, SAYING, image(JPEG, "chattImage")),
    "file name with a path": encode(NAMED, SAYING, image(JPEG, "../../../etc/passwd")),
    "file name in Chinese": encode(NAMED, SAYING, image(JPEG, "照片.jpg")),
    "empty file name": encode(NAMED, SAYING, image(JPEG, "")),
    "OkHttp's lengths in the parts": encode(*map(okhttp, (NAMED, SAYING, image(JPEG)))),
    "typed text fields": encode(
        NAMED._replace(type="text/plain; charset=utf-8"),
        SAYING._replace(type="text/plain", headers=("Content-Transfer-Encoding: 8bit",)),
        image(JPEG),
    ),
    "binary transfer encoding": encode(
        NAMED, SAYING, image(JPEG)._replace(headers=("Content-Transfer-Encoding: binary",))
    ),
    "the file first": encode(image(JPEG), SAYING, NAMED),
    "a leading CRLF": b"\r\n" + encode(NAMED, SAYING, image(JPEG)),
    "an epilogue": encode(NAMED, SAYING, image(JPEG)) + b"The end.\r\n",
    "no CRLF at the end": encode(NAMED, SAYING, image(JPEG)).removesuffix(b"\r\n"),
    "header names in lower case": encode(NAMED, SAYING, image(JPEG)).replace(
        b"Content-Disposition", b"content-disposition"
    ),
}


@pytest.mark.parametrize("body", SHAPES.values(), ids=SHAPES)
async def test_the_forms_of_real_clients_are_read(
    client: httpx2.AsyncClient, database: Connection, body: bytes
) -> None:
    response = await client.post("/postimages", content=body, headers=form_type())
    assert (response.status_code, response.content) == (200, b"{}")
    row = await only_row(client)
    assert row[:2] == ["ann", "hi"]
    assert (await client.get(row[4])).content == JPEG
    assert await database.fetchval("SELECT count(*) FROM chatts") == 1


async def test_a_form_that_comes_byte_by_byte_is_read(
    server: Server, client: httpx2.AsyncClient
) -> None:
    almost = f"\r\n--{BOUNDARY[:-1]}\r\n--\r\r\n".encode()
    data = longer_jpeg(len(JPEG) + 1000, almost)
    form = encode(*fields(), image(data))
    async with connect(server.url) as wire:
        await wire.request(
            "POST",
            "/postimages",
            f"Content-Type: multipart/form-data; boundary={BOUNDARY}",
            "Transfer-Encoding: chunked",
        )
        for number in range(len(form)):
            await wire.send_chunk(form[number : number + 1])
        await wire.send(b"0\r\n\r\n")
        answer = await wire.answer("POST")
    assert (answer.status_code, answer.content) == (200, b"{}")
    assert (await client.get((await only_row(client))[4])).content == data


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("日本語", id="Chinese characters"),
        pytest.param("😀", id="emoji"),
        pytest.param("../../etc/x y", id="a path"),
        pytest.param("n" * 255, id="the longest"),
        pytest.param("😀" * 255, id="the longest in emoji"),
        pytest.param("..", id="dots"),
        pytest.param("CON", id="a device of Windows"),
        pytest.param('a/b\\c:d*e?f"g<h>i|j%k#l', id="punctuation"),
    ],
)
async def test_any_name_can_have_media(
    server: Server, client: httpx2.AsyncClient, database: Connection, name: str
) -> None:
    response = await post(client, *fields(name), image(JPEG), video(MP4))
    assert (response.status_code, response.content) == (200, b"{}")
    row = await only_row(client)
    assert row[0] == name
    assert row[4].isascii()
    assert (await client.get(row[4])).content == JPEG
    assert (await client.get(row[5])).content == MP4
    assert await database.fetchval("SELECT name FROM chatts") == name
    # Both lie in the folder itself, wherever the name pointed.
    assert len(kept(server.media)) == 2
    assert not any("/" in key for key in await keys(database))


async def keys(database: Connection) -> list[str]:
    rows = await database.fetch("SELECT image, video FROM chatts ORDER BY seq")
    return [key for row in rows for key in row if key is not None]


NO_CHATTS = [
    pytest.param((), id="no parts"),
    pytest.param((NAMED, image(JPEG)), id="no message"),
    pytest.param((SAYING, image(JPEG)), id="no name"),
    pytest.param((image(JPEG), video(MP4)), id="files alone"),
    pytest.param((*fields(""), image(JPEG)), id="empty name"),
    pytest.param((*fields(" \t"), image(JPEG)), id="blank name"),
    pytest.param((NAMED, SAYING, image(b"")), id="empty image"),
    pytest.param((NAMED, SAYING, video(b"")), id="empty video"),
    pytest.param((NAMED, SAYING, image(JPEG), video(b"")), id="image and empty video"),
    pytest.param((NAMED, SAYING, image(b"", filename="")), id="file field left blank"),
    pytest.param((NAMED, SAYING, Part("image", JPEG)), id="image as text"),
    pytest.param((NAMED, SAYING, Part("video", b"https://x.example/v")), id="video as text"),
    pytest.param((NAMED, Part("message", b"hi", "m.txt"), image(JPEG)), id="message as file"),
    pytest.param((Part("username", b"ann", "n"), SAYING, image(JPEG)), id="name as file"),
    pytest.param((NAMED, NAMED, SAYING, image(JPEG)), id="name twice"),
    pytest.param((NAMED, SAYING, SAYING, image(JPEG)), id="message twice"),
    pytest.param((NAMED, SAYING, image(JPEG), image(PNG)), id="image twice"),
    pytest.param((NAMED, SAYING, video(MP4), video(MP4)), id="video twice"),
    pytest.param((NAMED, Part("name", b"bob"), SAYING, image(JPEG)), id="two authors"),
    pytest.param((NAMED, SAYING, image(JPEG), Part("colour", b"red")), id="unknown field"),
    pytest.param((NAMED, SAYING, Part("file", JPEG, "x.jpg")), id="unknown file"),
    pytest.param((NAMED, SAYING, Part("", JPEG, "x.jpg")), id="nameless file"),
    pytest.param((NAMED, Part("message", b"a\x00b"), image(JPEG)), id="NUL in message"),
    pytest.param((Part("name", b"\x00"), SAYING, image(JPEG)), id="NUL in name"),
    pytest.param((NAMED, Part("message", b"\xff\xfe"), image(JPEG)), id="invalid UTF-8"),
    pytest.param((Part("name", b"\xed\xa0\x80"), SAYING, image(JPEG)), id="surrogate in UTF-8"),
]


@pytest.mark.parametrize("parts", NO_CHATTS)
async def test_a_form_that_is_no_chatt_is_refused_and_leaves_nothing(
    server: Server, client: httpx2.AsyncClient, database: Connection, parts: tuple[Part, ...]
) -> None:
    problem(await post(client, *parts), 422)
    await assert_nothing_is_left(server, database)


async def test_both_spellings_with_one_value_are_one_name(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    response = await post(client, Part("name", b"ann"), NAMED, SAYING, image(JPEG))
    assert (response.status_code, response.content) == (200, b"{}")
    assert await database.fetchval("SELECT name FROM chatts") == "ann"


async def test_an_empty_message_with_a_picture_is_fine(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    assert (await post(client, *fields("ann", ""), image(JPEG))).content == b"{}"
    assert await database.fetchval("SELECT message FROM chatts") == ""


WHOLE = encode(NAMED, SAYING, image(JPEG))
OPEN = b"--" + BOUNDARY.encode()
TYPE = f"multipart/form-data; boundary={BOUNDARY}"


BROKEN = [
    pytest.param(None, WHOLE, id="no type"),
    pytest.param("application/json", b'{"name":"ann","message":"hi"}', id="JSON"),
    pytest.param("application/x-www-form-urlencoded", b"name=ann&message=hi", id="web form"),
    pytest.param("multipart/mixed; boundary=" + BOUNDARY, WHOLE, id="multipart/mixed"),
    pytest.param("multipart/form-data", WHOLE, id="no boundary"),
    pytest.param("multipart/form-data; boundary=", WHOLE, id="empty boundary"),
    pytest.param("multipart/form-data; boundary=" + "b" * 300, WHOLE, id="long boundary"),
    pytest.param("multipart/form-data; boundary=other", WHOLE, id="another boundary"),
    pytest.param("multipart/form-data; boundary=\xff", WHOLE, id="boundary not ASCII"),
    pytest.param(TYPE, b"", id="empty body"),
    pytest.param(TYPE, b"hello", id="no parts"),
    pytest.param(TYPE, OPEN, id="opened only"),
    pytest.param(TYPE, OPEN + b"\r\n", id="opened with CRLF"),
    pytest.param(TYPE, OPEN + b"--\r\n", id="closed at once"),
    pytest.param(TYPE, WHOLE.replace(b"\r\n", b"\n"), id="line feeds alone"),
    pytest.param(TYPE, WHOLE.removesuffix(b"--\r\n"), id="no closing dashes"),
    pytest.param(TYPE, WHOLE[: WHOLE.index(JPEG) + 100], id="ends inside the file"),
    pytest.param(TYPE, WHOLE[: WHOLE.index(b"filename")], id="ends inside a header"),
    pytest.param(TYPE, encode(NAMED, SAYING).removesuffix(OPEN + b"--\r\n"), id="unclosed"),
    pytest.param(TYPE, WHOLE.replace(b"form-data; ", b""), id="no form-data"),
    pytest.param(TYPE, WHOLE.replace(b"Content-Disposition", b"X-Other"), id="no disposition"),
    pytest.param(TYPE, WHOLE.replace(b'name="message"', b"size=1"), id="a part without name"),
    pytest.param(
        TYPE, WHOLE.replace(b"Content-Disposition:", b"Content Disposition"), id="bad header"
    ),
]


@pytest.mark.parametrize(("content_type", "body"), BROKEN)
async def test_a_broken_form_is_refused_and_leaves_nothing(
    server: Server,
    client: httpx2.AsyncClient,
    database: Connection,
    content_type: str | None,
    body: bytes,
) -> None:
    headers = [] if content_type is None else [("Content-Type", content_type.encode("latin-1"))]
    request = client.build_request("POST", "/postimages", content=body)
    request.headers = httpx2.Headers(
        [*request.headers.raw, *((b"Content-Type", v) for _, v in headers)]
    )
    problem(await client.send(request), 422)
    await assert_nothing_is_left(server, database)


TOO_LONG = [
    pytest.param("ann", "m" * 4097, "message", ("4096", "4097"), id="message"),
    pytest.param("ann", "😀" * 4097, "message", ("4096", "4097"), id="message in emoji"),
    pytest.param("n" * 256, "hi", "name", ("255", "256"), id="name"),
    pytest.param("😀" * 256, "hi", "name", ("255", "256"), id="name in emoji"),
]


@pytest.mark.parametrize(("name", "message", "field", "numbers"), TOO_LONG)
@pytest.mark.parametrize("first", ["text", "file"])
async def test_text_over_its_limit_is_refused_and_leaves_no_file(  # noqa: PLR0913  the table's columns
    server: Server,
    client: httpx2.AsyncClient,
    database: Connection,
    *,
    name: str,
    message: str,
    field: str,
    numbers: tuple[str, str],
    first: str,
) -> None:
    parts = [*fields(name, message), image(JPEG)]
    if first == "file":
        parts.reverse()
    detail = problem(await post(client, *parts), 400)
    assert detail.startswith("Message too long")
    assert field in detail.removeprefix("Message too long")
    assert all(number in detail for number in numbers)
    await assert_nothing_is_left(server, database)


@pytest.mark.parametrize("field", ["image", "video"])
async def test_a_file_of_exactly_the_limit_is_kept(
    server: Server, client: httpx2.AsyncClient, field: str
) -> None:
    data = (longer_jpeg if field == "image" else longer_mp4)(MEDIA_LIMIT)
    response = await post(client, *fields(), Part(field, data, "x"))
    assert (response.status_code, response.content) == (200, b"{}")
    row = await only_row(client)
    assert (await client.get(row[4] or row[5])).content == data
    assert list(kept(server.media).values()) == [MEDIA_LIMIT]


@pytest.mark.parametrize("field", ["image", "video"])
async def test_a_file_one_byte_over_the_limit_is_refused(
    server: Server, client: httpx2.AsyncClient, database: Connection, field: str
) -> None:
    data = (longer_jpeg if field == "image" else longer_mp4)(MEDIA_LIMIT + 1)
    detail = problem(await post(client, *fields(), Part(field, data, "x")), 413)
    assert field in detail
    assert str(MEDIA_LIMIT) in detail
    await assert_nothing_is_left(server, database)


async def test_the_limit_is_for_each_file_and_not_for_both(
    server: Server, client: httpx2.AsyncClient
) -> None:
    parts = image(longer_jpeg(MEDIA_LIMIT)), video(longer_mp4(MEDIA_LIMIT))
    assert (await post(client, *fields(), *parts)).content == b"{}"
    assert list(kept(server.media).values()) == [MEDIA_LIMIT, MEDIA_LIMIT]


async def test_a_smaller_limit_is_honoured(start_server: StartServer, database: Connection) -> None:
    await database.execute("TRUNCATE chatts")
    server = start_server(MEDIA_MAX_SIZE="2000")
    async with client_of(server) as client:
        assert (await post(client, *fields(), image(longer_jpeg(2000)))).content == b"{}"
        problem(await post(client, *fields(), image(longer_jpeg(2001))), 413)
    assert await database.fetchval("SELECT count(*) FROM chatts") == 1
    await until(lambda: len(kept(server.media)) == 1)


def endless_upload() -> Iterator[bytes]:
    """Chunks of a form whose file never ends."""
    head = encode(NAMED, SAYING, image(JPEG)).partition(JPEG)[0] + JPEG
    yield b"%x\r\n%b\r\n" % (len(head), head)
    while True:
        yield b"10000\r\n" + bytes(65536) + b"\r\n"


@pytest.mark.direct(reason="Nginx takes a form of any kind up to the limit of all forms")
@pytest.mark.usefixtures("client")
async def test_a_file_without_end_is_refused_soon_after_the_limit(
    server: Server, database: Connection
) -> None:
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, stored_bytes(server.media))
            await anyio.lowlevel.checkpoint()

    async with connect(server.url) as wire, anyio.create_task_group() as group:
        group.start_soon(watch)
        await wire.request(
            "POST", "/postimages", f"Content-Type: {TYPE}", "Transfer-Encoding: chunked"
        )
        sent, answer = await wire.send_until_answered(endless_upload(), 100 * 2**20)
        group.cancel_scope.cancel()
    problem(answer, 413)
    assert MEDIA_LIMIT < sent < MEDIA_LIMIT + IN_FLIGHT
    assert 0 < most <= MEDIA_LIMIT
    await assert_nothing_is_left(server, database)


@pytest.mark.usefixtures("client")
async def test_a_declared_length_over_every_limit_is_refused_before_the_body_is_sent(
    server: Server, database: Connection
) -> None:
    async with connect(server.url) as wire:
        await wire.request(
            "POST", "/postimages", f"Content-Type: {TYPE}", f"Content-Length: {10**12}"
        )
        problem(await wire.answer("POST"), 413)
    await assert_nothing_is_left(server, database)


@pytest.mark.parametrize("field", ["username", "name", "message"])
async def test_a_text_field_of_over_64_kib_is_refused(
    server: Server, client: httpx2.AsyncClient, database: Connection, field: str
) -> None:
    others = [part for part in (NAMED, SAYING) if part.name != field and field == "message"]
    big = Part(field, b"m" * 65537)
    problem(await post(client, *others, image(JPEG), big), 413)
    await assert_nothing_is_left(server, database)


EXHAUSTING = [
    pytest.param(encode(*[Part(f"f{number}", b"") for number in range(20000)]), id="parts"),
    pytest.param(encode(*[NAMED] * 20000), id="parts of one name"),
    pytest.param(
        encode(NAMED, SAYING, Part("image", JPEG, "x", headers=("X-Pad: " + "p" * 2**20,))),
        id="a header of a MiB",
    ),
    pytest.param(
        encode(NAMED, SAYING, Part("image", JPEG, "x", headers=("X-Pad: p",) * 20000)),
        id="many headers",
    ),
    pytest.param(encode(NAMED, SAYING, Part("image", JPEG, "x" * 2**20)), id="file name"),
    pytest.param(encode(NAMED, SAYING, Part("i" * 2**20, JPEG, "x")), id="field name"),
    pytest.param(b"p" * 2**20 + b"\r\n", id="a preamble alone"),
    pytest.param(OPEN + b"\r\n" + b"h" * 2**20, id="a header without end"),
]


@pytest.mark.parametrize("body", EXHAUSTING)
async def test_a_form_made_to_exhaust_the_server_is_refused(
    server: Server, client: httpx2.AsyncClient, database: Connection, body: bytes
) -> None:
    with anyio.fail_after(DEADLINE_SECONDS):
        response = await client.post("/postimages", content=body, headers=form_type())
    assert response.status_code in {400, 413, 422}
    problem(response, response.status_code)
    await assert_nothing_is_left(server, database)


@pytest.mark.direct(reason="the server never hears of a client that leaves Nginx half-way")
@pytest.mark.parametrize("framing", ["Content-Length: 5000000", "Transfer-Encoding: chunked"])
async def test_a_client_that_leaves_half_way_leaves_nothing(
    server: Server, client: httpx2.AsyncClient, database: Connection, framing: str
) -> None:
    form = encode(NAMED, SAYING, image(JPEG.ljust(4 * 2**20, b"\0")))[: 2 * 2**20]
    async with connect(server.url) as wire:
        await wire.request("POST", "/postimages", f"Content-Type: {TYPE}", framing)
        if "chunked" in framing:
            await wire.send_chunk(form)
        else:
            await wire.send(form)
        # The upload is on its way into the folder when its client leaves.
        await until(lambda: stored_bytes(server.media) > 0)
    await assert_nothing_is_left(server, database)
    assert (await client.get("/getimages")).content == b"[]"


async def test_two_uploads_at_once_keep_their_own_bytes(
    server: Server, client: httpx2.AsyncClient, database: Connection
) -> None:
    async def upload(number: int) -> None:
        data = longer_jpeg(500_000, bytes([number]))
        response = await post(client, *fields("ann", str(number)), image(data), video(MP4))
        assert (response.status_code, response.content) == (200, b"{}")

    async with anyio.create_task_group() as group:
        for number in range(6):
            group.start_soon(upload, number)
    rows = (await client.get("/getimages")).json()
    assert sorted(row[1] for row in rows) == [str(number) for number in range(6)]
    for row in rows:
        assert (await client.get(row[4])).content == longer_jpeg(500_000, bytes([int(row[1])]))
        assert (await client.get(row[5])).content == MP4
    # The videos are all the same.
    assert len(set(await keys(database))) == len(kept(server.media)) == 7
