"""GET /getchatts, as contract §1 has it."""

from __future__ import annotations

import json
import re
import uuid
from typing import TYPE_CHECKING

import pytest

from tests.multipart import encode, fields, form_type, image
from tests.samples import JPEG

if TYPE_CHECKING:
    import httpx2

    from tests.multipart import Connection

SLASHES = ["/getchatts", "/getchatts/"]
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


async def post(client: httpx2.AsyncClient, name: str, message: str) -> None:
    response = await client.post("/postchatt", json={"name": name, "message": message})
    assert (response.status_code, response.content) == (200, b"{}")


async def insert(database: Connection, name: str, time: str) -> None:
    """Insert as psql would, at a time written in PostgreSQL's own way."""
    await database.execute(
        "INSERT INTO chatts (id, name, message, time) VALUES ($1, $2, 'hi', $3::text::timestamptz)",
        uuid.uuid4(),
        name,
        time,
    )


@pytest.mark.parametrize("path", SLASHES)
async def test_an_empty_feed_is_two_brackets(client: httpx2.AsyncClient, path: str) -> None:
    response = await client.get(path)
    assert response.status_code == 200
    assert response.content == b"[]"
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("path", SLASHES)
async def test_a_row_is_name_message_id_and_time(
    client: httpx2.AsyncClient, database: Connection, path: str
) -> None:
    await post(client, "ann", "hi")
    response = await client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    # A row with more or fewer elements is skipped by iOS clients, and one element that is
    # neither a string nor null empties their whole timeline.
    (row,) = response.json()
    assert [type(element) for element in row] == [str, str, str, str]
    name, message, identity, time = row
    assert (name, message) == ("ann", "hi")
    stored = await database.fetchrow(
        "SELECT id, to_char(time AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"') AS time"
        " FROM chatts"
    )
    assert stored is not None
    assert identity == str(stored["id"])
    assert time == stored["time"]


async def test_the_bytes_are_compact_raw_utf8_without_a_newline(
    client: httpx2.AsyncClient,
) -> None:
    await post(client, "日本語", '😀 é \u2028 <b>&amp;</b> "quoted" a/b \\ it\'s')
    await post(client, "bob", "two\nlines\tand a tab")
    content = (await client.get("/getchatts")).content
    assert (
        content
        == json.dumps(json.loads(content), ensure_ascii=False, separators=(",", ":")).encode()
    )
    assert content.startswith(
        '[["日本語","😀 é \u2028 <b>&amp;</b> \\"quoted\\" a/b \\\\ it\'s","'.encode()
    )
    assert b'],["bob","two\\nlines\\tand a tab","' in content
    assert b"\\u" not in content
    assert content.endswith(b'Z"]]')


async def test_every_id_is_a_lower_case_uuid_of_its_own(client: httpx2.AsyncClient) -> None:
    for _ in range(20):
        await post(client, "ann", "the same")
    ids = [row[2] for row in (await client.get("/getchatts")).json()]
    assert len(set(ids)) == 20
    for identity in ids:
        assert str(uuid.UUID(identity)) == identity
        assert uuid.UUID(identity).variant == uuid.RFC_4122


async def test_chatts_come_oldest_first(client: httpx2.AsyncClient) -> None:
    for number in range(12):
        await post(client, "ann", str(number))
    rows = (await client.get("/getchatts")).json()
    assert [row[1] for row in rows] == [str(number) for number in range(12)]
    times = [row[3] for row in rows]
    assert times == sorted(times)
    assert all(TIME.fullmatch(time) for time in times)


async def test_the_feed_is_sorted_by_time_and_not_by_insertion(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    await insert(database, "third", "2026-03-03 00:00:00+00")
    await insert(database, "first", "2026-01-01 00:00:00+00")
    await insert(database, "second", "2026-02-02 00:00:00+00")
    rows = (await client.get("/getchatts")).json()
    assert [row[0] for row in rows] == ["first", "second", "third"]


async def test_chatts_of_one_instant_keep_the_order_of_their_insertion(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    names = [f"name {number}" for number in range(10)]
    for name in names:
        await insert(database, name, "2026-01-01 00:00:00+00")
    rows = (await client.get("/getchatts")).json()
    assert [row[0] for row in rows] == names


@pytest.mark.parametrize(
    ("stored", "served"),
    [
        pytest.param("2026-11-21 00:05:56+00", "2026-11-21T00:05:56.000000Z", id="whole second"),
        pytest.param("2026-11-21 00:00:00+00", "2026-11-21T00:00:00.000000Z", id="midnight"),
        pytest.param("2026-11-21 00:05:56.4+00", "2026-11-21T00:05:56.400000Z", id="tenths"),
        pytest.param("2026-11-21 00:05:56.000001+00", "2026-11-21T00:05:56.000001Z", id="micro"),
        pytest.param("2026-11-21 02:05:56.407672+02", "2026-11-21T00:05:56.407672Z", id="east"),
        pytest.param("1999-12-31 23:59:59.999999-11:30", "2000-01-01T11:29:59.999999Z", id="west"),
        pytest.param("0999-01-02 03:04:05+00", "0999-01-02T03:04:05.000000Z", id="three digits"),
    ],
)
async def test_a_time_is_utc_with_six_fraction_digits_and_a_z(
    client: httpx2.AsyncClient, database: Connection, stored: str, served: str
) -> None:
    await insert(database, "psql", stored)
    (row,) = (await client.get("/getchatts")).json()
    assert row[3] == served


async def test_a_row_inserted_by_another_program_is_in_the_next_answer(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    for number in range(5):
        await database.execute(
            "INSERT INTO chatts (id, name, message) VALUES ($1, 'psql', $2)",
            uuid.uuid4(),
            str(number),
        )
        rows = (await client.get("/getchatts")).json()
        assert [row[1] for row in rows] == [str(shown) for shown in range(number + 1)]


async def test_the_whole_feed_is_returned_however_long_it_is(
    client: httpx2.AsyncClient, database: Connection
) -> None:
    await database.execute(
        "INSERT INTO chatts (id, name, message, time)"
        " SELECT gen_random_uuid(), 'ann', number::text,"
        " timestamptz '2026-01-01 00:00:00+00' + number * interval '1 second'"
        " FROM generate_series(0, 11999) AS number"
    )
    rows = (await client.get("/getchatts")).json()
    assert [row[1] for row in rows] == [str(number) for number in range(12000)]
    assert {len(row) for row in rows} == {4}


async def test_a_chatt_with_a_picture_is_a_row_of_four_here_too(
    client: httpx2.AsyncClient,
) -> None:
    form = encode(*fields("ann", "look"), image(JPEG))
    assert (await client.post("/postimages", content=form, headers=form_type())).content == b"{}"
    (row,) = (await client.get("/getchatts")).json()
    assert row[:2] == ["ann", "look"]
    assert len(row) == 4


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("path", SLASHES)
async def test_head_has_the_headers_of_get_and_no_body(
    client: httpx2.AsyncClient, path: str, rows: int
) -> None:
    for number in range(rows):
        await post(client, "ann", str(number))
    got = await client.get(path)
    head = await client.head(path)
    assert head.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == "application/json"
    assert head.headers.get("content-length") == got.headers.get("content-length")
