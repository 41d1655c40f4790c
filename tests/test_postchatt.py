"""POST /postchatt, as contract §1 has it."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.multipart import connect, problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx2

    from tests.multipart import Connection, Server

JSON_LIMIT = 65536
SLASHES = ["/postchatt", "/postchatt/"]
COMBINING = "e\u0301"  # One character on the screen, two as PostgreSQL counts.
FAMILY = "👨\u200d👩\u200d👧"  # One picture on the screen, five characters.


async def stored(database: Connection) -> list[tuple[str, str]]:
    rows = await database.fetch("SELECT name, message FROM chatts ORDER BY seq")
    return [(row["name"], row["message"]) for row in rows]


def padded(length: int) -> bytes:
    """Write a valid chatt whose JSON has this many bytes, most of them blanks."""
    chatt = b'{"name":"ann","message":"hi"}'
    return chatt + b" " * (length - len(chatt))


@pytest.mark.parametrize("field", ["name", "username"])
@pytest.mark.parametrize("path", SLASHES)
async def test_a_valid_chatt_is_answered_with_two_braces(
    client: httpx2.AsyncClient, database: Connection, path: str, field: str
) -> None:
    response = await client.post(path, json={field: "ann", "message": "hi"})
    # Any other status, or an empty body, is a failure to iOS clients.
    assert response.status_code == 200
    assert response.content == b"{}"
    assert response.headers["content-type"] == "application/json"
    assert response.headers["content-length"] == "2"
    assert await stored(database) == [("ann", "hi")]


async def test_a_chatt_is_committed_and_in_the_feed_before_its_answer_leaves(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    # Clients fetch the feed right after each post and look for their own chatt in it.
    for number in range(10):
        response = await client.post("/postchatt", json={"name": "ann", "message": str(number)})
        assert response.content == b"{}"
        assert len(await stored(database)) == number + 1
        rows = (await client.get("/getchatts")).json()
        assert rows[-1][:2] == ["ann", str(number)]


async def test_chatts_posted_at_once_are_all_there_exactly_once(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    messages = [f"message {number}" for number in range(64)]

    async def post(message: str) -> None:
        response = await client.post("/postchatt", json={"name": "ann", "message": message})
        assert (response.status_code, response.content) == (200, b"{}")

    async with anyio.create_task_group() as group:
        for message in messages:
            group.start_soon(post, message)
    assert sorted(await stored(database)) == sorted(("ann", message) for message in messages)
    rows = (await client.get("/getchatts")).json()
    in_order = await database.fetch("SELECT id FROM chatts ORDER BY seq")
    assert [row[2] for row in rows] == [str(row["id"]) for row in in_order]


async def test_the_server_gives_the_id_and_the_time(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    assert (await client.post("/postchatt", json={"name": "a", "message": "b"})).content == b"{}"
    row = await database.fetchrow(
        "SELECT id, clock_timestamp() - time BETWEEN '0' AND '1 minute' AS recent, image, video"
        " FROM chatts"
    )
    assert row is not None
    assert uuid.UUID(str(row["id"])).version is not None
    assert row["recent"] is True
    assert (row["image"], row["video"]) == (None, None)


TEXTS = [
    pytest.param("ann", "", id="empty message"),
    pytest.param("ann", " \n\t ", id="blank message"),
    pytest.param(" ann ", " hi ", id="blanks around"),
    pytest.param("日本語", "😀 é \u2028 <b> \" ' \\ / %s $1 ; --", id="every script"),
    pytest.param("ann", "\x01\x1f\x7f\u200b\ufeff\ufffd", id="control characters"),
    pytest.param("\ufeffann", "\u202eright to left", id="a mark inside"),
    pytest.param("n" * 255, "m" * 4096, id="both at their limits"),
    pytest.param("😀" * 255, "😀" * 4096, id="limits in emoji"),
    pytest.param(COMBINING * 127 + "e", COMBINING * 2048, id="limits in combining marks"),
    pytest.param(FAMILY * 51, FAMILY * 819 + "m", id="limits in joined emoji"),
]


@pytest.mark.parametrize(("name", "message"), TEXTS)
@pytest.mark.parametrize("escaped", [False, True], ids=["raw", "escaped"])
async def test_text_is_stored_and_returned_as_it_was_sent(
    client: httpx2.AsyncClient, database: Connection, name: str, message: str, *, escaped: bool
) -> None:
    body = json.dumps({"name": name, "message": message}, ensure_ascii=escaped).encode()
    response = await client.post("/postchatt", content=body)
    assert (response.status_code, response.content) == (200, b"{}")
    assert await stored(database) == [(name, message)]
    (row,) = (await client.get("/getchatts")).json()
    assert row[:2] == [name, message]


TOO_LONG = [
    pytest.param("n" * 256, "hi", "name", 255, 256, id="name"),
    pytest.param("😀" * 256, "hi", "name", 255, 256, id="name in emoji"),
    pytest.param(COMBINING * 128, "hi", "name", 255, 256, id="name in combining marks"),
    pytest.param("n" * 5000, "hi", "name", 255, 5000, id="a much too long name"),
    pytest.param("ann", "m" * 4097, "message", 4096, 4097, id="message"),
    pytest.param("ann", "😀" * 4097, "message", 4096, 4097, id="message in emoji"),
    pytest.param("ann", "m" * 60000, "message", 4096, 60000, id="a much too long message"),
]


@pytest.mark.parametrize(("name", "message", "field", "limit", "length"), TOO_LONG)
@pytest.mark.parametrize("spelling", ["name", "username"])
async def test_text_over_its_limit_is_refused_with_the_limit_and_the_length(  # noqa: PLR0913  the table's columns
    client: httpx2.AsyncClient,
    database: Connection,
    *,
    spelling: str,
    name: str,
    message: str,
    field: str,
    limit: int,
    length: int,
) -> None:
    response = await client.post("/postchatt", json={spelling: name, "message": message})
    detail = problem(response, 400)
    assert detail.startswith("Message too long")
    said = detail.removeprefix("Message too long")
    assert field in said
    assert str(limit) in said
    assert str(length) in said
    assert await stored(database) == []


NO_CHATTS = [
    pytest.param(b"", id="empty"),
    pytest.param(b" \r\n", id="blank"),
    pytest.param(b"hello", id="not JSON"),
    pytest.param(b"name=ann&message=hi", id="a web form"),
    pytest.param(b'{"name":"ann","message":"hi"', id="truncated"),
    pytest.param(b'{"name":"ann","message":"hi"}}', id="a brace too many"),
    pytest.param(b'{"name":"ann","message":"hi"}{}', id="two documents"),
    pytest.param(b'{"name":"ann","message":"hi",}', id="a comma too many"),
    pytest.param(b"{'name':'ann','message':'hi'}", id="single quotes"),
    pytest.param(b'{"name":"ann","message":"two\nlines"}', id="a raw line feed in a string"),
    pytest.param(b"[]", id="array"),
    pytest.param(b'["ann","hi"]', id="array of the values"),
    pytest.param(b'[{"name":"ann","message":"hi"}]', id="array of the object"),
    pytest.param(b'"ann"', id="string"),
    pytest.param(b"1", id="number"),
    pytest.param(b"null", id="null"),
    pytest.param(b"true", id="boolean"),
    pytest.param(b"NaN", id="NaN"),
    pytest.param(b"{}", id="empty object"),
    pytest.param(b'{"message":"hi"}', id="no name"),
    pytest.param(b'{"name":"ann"}', id="no message"),
    pytest.param(b'{"username":"ann"}', id="username without message"),
    pytest.param(b'{"name":null,"message":"hi"}', id="null name"),
    pytest.param(b'{"username":null,"message":"hi"}', id="null username"),
    pytest.param(b'{"name":"ann","username":null,"message":"hi"}', id="name and null username"),
    pytest.param(b'{"name":"ann","message":null}', id="null message"),
    pytest.param(b'{"name":1,"message":"hi"}', id="number name"),
    pytest.param(b'{"name":"ann","message":1.5}', id="number message"),
    pytest.param(b'{"name":"ann","message":%b}' % (b"9" * 5000), id="big integer"),
    pytest.param(b'{"name":"ann","message":1e999}', id="infinite float"),
    pytest.param(b'{"name":"ann","message":NaN}', id="NaN message"),
    pytest.param(b'{"name":"ann","message":-Infinity}', id="Infinity message"),
    pytest.param(b'{"name":true,"message":"hi"}', id="boolean name"),
    pytest.param(b'{"name":{},"message":"hi"}', id="object name"),
    pytest.param(b'{"name":"ann","message":{"text":"hi"}}', id="object message"),
    pytest.param(b'{"name":"ann","message":["hi"]}', id="array message"),
    pytest.param(b'{"name":"ann","message":"hi","id":"1"}', id="unknown key"),
    pytest.param(b'{"name":"ann","message":"hi","":0}', id="nameless key"),
    pytest.param(b'{"Name":"ann","message":"hi"}', id="key in another case"),
    pytest.param(b'{"name":"ann","username":"bob","message":"hi"}', id="two authors"),
    pytest.param(b'{"name":"","message":"hi"}', id="empty name"),
    pytest.param(b'{"username":"","message":"hi"}', id="empty username"),
    pytest.param(b'{"name":" ","message":"hi"}', id="blank name"),
    pytest.param(b'{"name":"\\t\\r\\n","message":"hi"}', id="name of tab and newline"),
    pytest.param('{"name":"\u00a0\u3000","message":"hi"}'.encode(), id="name of wide blanks"),
    pytest.param(b'{"name":"a\\u0000b","message":"hi"}', id="NUL in name"),
    pytest.param(b'{"name":"ann","message":"\\u0000"}', id="NUL in message"),
    pytest.param(b'{"name":"ann","message":"a\x00b"}', id="raw NUL"),
    pytest.param(b'{"name":"\\ud800","message":"hi"}', id="lone high surrogate in name"),
    pytest.param(b'{"name":"ann","message":"x\\ud83dx"}', id="lone high surrogate"),
    pytest.param(b'{"name":"ann","message":"\\ude00"}', id="lone low surrogate"),
    pytest.param(b'{"name":"ann","message":"\\ude00\\ud83d"}', id="surrogates swapped"),
    pytest.param(b'{"name":"ann","message":"\xff"}', id="invalid UTF-8"),
    pytest.param(b'{"name":"ann","message":"\xc0\x80"}', id="overlong NUL"),
    pytest.param(b'{"name":"ann","message":"\xed\xa0\x80"}', id="surrogate in UTF-8"),
    pytest.param(b'{"name":"ann","message":"\xf0\x9f\x98"}', id="cut emoji"),
    pytest.param(b'{"\xff":"","name":"ann","message":"hi"}', id="invalid UTF-8 in a key"),
    pytest.param('{"name":"ann","message":"é"}'.encode("latin-1"), id="Latin-1"),
    pytest.param('{"name":"ann","message":"hi"}'.encode("utf-16"), id="UTF-16"),
    # RFC 8259 §8.1: a sender MUST NOT add it.
    pytest.param(b'\xef\xbb\xbf{"name":"ann","message":"hi"}', id="byte order mark"),
    pytest.param(b"[" * 30000 + b"]" * 30000, id="deep array"),
    pytest.param(b"[" * 60000, id="deep and open array"),
    pytest.param(b'{"name":' * 7000 + b"1" + b"}" * 7000, id="deep object"),
    pytest.param(
        b'{"name":"ann","message":%b%b}' % (b"[" * 30000, b"]" * 30000), id="deep message"
    ),
    pytest.param(
        b'{"name":"ann","message":"hi","x":%b%b}' % (b"[" * 30000, b"]" * 30000),
        id="deep unknown key",
    ),
]


@pytest.mark.parametrize("body", NO_CHATTS)
async def test_what_is_no_chatt_is_refused_and_stores_nothing(
    client: httpx2.AsyncClient, database: Connection, body: bytes
) -> None:
    problem(await client.post("/postchatt", content=body), 422)
    assert await stored(database) == []


@pytest.mark.parametrize(
    ("body", "word"),
    [
        pytest.param({"message": "hi"}, "name", id="no name"),
        pytest.param({"name": "ann"}, "message", id="no message"),
        pytest.param({"name": 1, "message": "hi"}, "name", id="number name"),
        pytest.param({"name": "ann", "message": None}, "message", id="null message"),
        pytest.param({"name": " ", "message": "hi"}, "name", id="blank name"),
        pytest.param({"name": "ann", "message": "hi", "colour": "red"}, "colour", id="unknown key"),
        pytest.param({"name": "a", "username": "b", "message": ""}, "username", id="two authors"),
        pytest.param({"name": "ann", "message": "\0"}, "message", id="NUL"),
    ],
)
async def test_a_refusal_names_the_field(
    client: httpx2.AsyncClient, body: dict[str, object], word: str
) -> None:
    assert word in problem(await client.post("/postchatt", json=body), 422)


async def test_both_spellings_with_one_value_are_one_name(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    body = {"name": "ann", "username": "ann", "message": "hi"}
    assert (await client.post("/postchatt", json=body)).content == b"{}"
    assert await stored(database) == [("ann", "hi")]


async def test_of_a_key_written_twice_the_last_counts(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    body = b'{"name":"ann","message":"first","message":"last"}'
    assert (await client.post("/postchatt", content=body)).content == b"{}"
    assert await stored(database) == [("ann", "last")]


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        'application/json;charset="UTF-8"',
        "application/json; charset=latin-1",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "nonsense",
        None,
    ],
)
async def test_the_content_type_is_not_looked_at(
    client: httpx2.AsyncClient, database: Connection, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    body = '{"name":"日本語","message":"é"}'.encode()
    response = await client.post("/postchatt", content=body, headers=headers)
    assert (response.status_code, response.content) == (200, b"{}")
    assert await stored(database) == [("日本語", "é")]


async def test_a_body_of_exactly_the_limit_is_read(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    response = await client.post("/postchatt", content=padded(JSON_LIMIT))
    assert (response.status_code, response.content) == (200, b"{}")
    assert await stored(database) == [("ann", "hi")]


async def test_a_chunked_body_of_exactly_the_limit_is_read(
    server: Server, client: httpx2.AsyncClient, database: Connection
) -> None:
    body = padded(JSON_LIMIT)
    async with connect(server.url) as wire:
        await wire.request("POST", "/postchatt", "Transfer-Encoding: chunked")
        await wire.send_chunk(body[:100])
        await wire.send_chunk(body[100:])
        await wire.send(b"0\r\n\r\n")
        answer = await wire.answer()
    assert (answer.status_code, answer.content) == (200, b"{}")
    assert len((await client.get("/getchatts")).json()) == 1
    assert await stored(database) == [("ann", "hi")]


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("path", SLASHES)
@pytest.mark.parametrize("length", [JSON_LIMIT + 1, 10**9, 10**18])
async def test_a_declared_length_over_the_limit_is_refused_before_the_body_is_sent(
    server: Server, database: Connection, path: str, length: int
) -> None:
    async with connect(server.url) as wire:
        await wire.request("POST", path, f"Content-Length: {length}")
        problem(await wire.answer(), 413)
    assert await stored(database) == []


@pytest.mark.usefixtures("client")
async def test_a_chunked_body_over_the_limit_is_refused_before_its_end(
    server: Server, database: Connection
) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"1D\r\n" + padded(29) + b"\r\n"
        while True:
            yield b"2000\r\n" + b" " * 8192 + b"\r\n"

    async with connect(server.url) as wire:
        await wire.request("POST", "/postchatt", "Transfer-Encoding: chunked")
        # What the system's own buffers swallow before the answer is none of the server's doing.
        sent, answer = await wire.send_until_answered(chunks(), 64 * 2**20)
    problem(answer, 413)
    assert sent > JSON_LIMIT
    assert await stored(database) == []


@pytest.mark.usefixtures("client")
async def test_a_body_one_byte_over_the_limit_is_refused_while_the_client_waits(
    server: Server, database: Connection
) -> None:
    async with connect(server.url) as wire:
        await wire.request("POST", "/postchatt", "Transfer-Encoding: chunked")
        await wire.send_chunk(padded(JSON_LIMIT + 1))
        problem(await wire.answer(), 413)
    assert await stored(database) == []


async def test_a_client_that_leaves_inside_its_body_stores_nothing(
    server: Server, client: httpx2.AsyncClient, database: Connection
) -> None:
    async with connect(server.url) as wire:
        await wire.request("POST", "/postchatt", "Content-Length: 1000")
        await wire.send(b'{"name":"ann","message":"hi"}')
    # The next request is answered, and it is the only one that left a row.
    response = await client.post("/postchatt", json={"name": "bob", "message": "here"})
    assert response.content == b"{}"
    assert await stored(database) == [("bob", "here")]
