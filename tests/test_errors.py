"""Errors and request ids, as contract §3 has them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.multipart import connect, encode, fields, form_type, image, problem
from tests.samples import JPEG

if TYPE_CHECKING:
    import httpx2

    from tests.multipart import Connection, Server

READ = ["/getchatts", "/getimages", "/media/7401355b-fc63-458a-bddc-f90d2da400d3.jpg"]
WRITE = ["/postchatt", "/postimages", "/llmprompt"]
SANE = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Refusal(NamedTuple):
    status: int
    method: str
    path: str
    content: bytes = b""
    type: str | None = None


CHATT = b'{"name":"ann","message":"hi"}'
FORM = form_type()["Content-Type"]
REFUSALS = {
    "unknown path": Refusal(404, "GET", "/nowhere"),
    "unknown path, posted": Refusal(404, "POST", "/nowhere", CHATT),
    "below a route": Refusal(404, "GET", "/getchatts/x"),
    "a route in capitals": Refusal(404, "GET", "/GetChatts"),
    "unknown file": Refusal(404, "GET", "/media/unknown.jpg"),
    "wrong method": Refusal(405, "GET", "/postchatt"),
    "wrong method, posted": Refusal(405, "POST", "/getchatts", CHATT),
    "long message": Refusal(
        400, "POST", "/postchatt", b'{"name":"ann","message":"%b"}' % (b"m" * 4097)
    ),
    "long body": Refusal(413, "POST", "/postchatt", b" " * 65537),
    "no picture": Refusal(415, "POST", "/postimages", encode(*fields(), image(b"text")), FORM),
    "no name": Refusal(422, "POST", "/postchatt", b'{"message":"hi"}'),
    "no message": Refusal(422, "POST", "/postchatt", b'{"name":"ann"}'),
    "no JSON": Refusal(422, "POST", "/postchatt", b"hello"),
    "no form": Refusal(422, "POST", "/postimages", b"hello"),
    "broken form": Refusal(422, "POST", "/postimages", b"hello", FORM),
    "no name in a form": Refusal(422, "POST", "/postimages", encode(fields()[1]), FORM),
}


async def refuse(client: httpx2.AsyncClient, refusal: Refusal, **headers: str) -> httpx2.Response:
    if refusal.type is not None:
        headers["Content-Type"] = refusal.type
    return await client.request(
        refusal.method, refusal.path, content=refusal.content, headers=headers
    )


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
async def test_every_refusal_is_a_problem_with_a_request_id_of_its_own(
    client: httpx2.AsyncClient, database: Connection, refusal: Refusal
) -> None:
    ids = set()
    for _ in range(2):
        response = await refuse(client, refusal)
        problem(response, refusal.status)
        ids.add(response.headers["x-request-id"])
    assert len(ids) == 2
    assert all(SANE.fullmatch(identity) for identity in ids)
    assert await database.fetchval("SELECT count(*) FROM chatts") == 0


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
async def test_the_request_id_of_the_client_is_in_every_refusal(
    client: httpx2.AsyncClient, refusal: Refusal
) -> None:
    response = await refuse(client, refusal, **{"X-Request-Id": "from.the-client_1"})
    problem(response, refusal.status)
    assert response.headers["x-request-id"] == "from.the-client_1"


async def test_one_fault_has_one_code_and_another_fault_another(
    client: httpx2.AsyncClient,
) -> None:
    codes = {
        kind: (await refuse(client, refusal)).json()["code"] for kind, refusal in REFUSALS.items()
    }
    assert codes["no name"] == codes["no name in a form"]
    assert codes["unknown path"] == codes["below a route"]
    assert codes["wrong method"] == codes["wrong method, posted"]
    different = ["unknown path", "wrong method", "long message", "long body", "no picture"]
    different += ["no name", "no message", "no JSON", "no form"]
    assert len({codes[kind] for kind in different}) == len(different)
    # The one that contract §3 spells out.
    assert codes["no message"] == "message-missing"


async def test_the_problem_that_the_contract_shows_is_answered_so(
    client: httpx2.AsyncClient,
) -> None:
    response = await client.post("/postchatt", json={"name": "ann"})
    assert response.json() == {
        "type": "about:blank",
        "title": "Unprocessable Content",
        "status": 422,
        "detail": response.json()["detail"],
        "code": "message-missing",
        "request_id": response.headers["x-request-id"],
    }
    assert response.json()["detail"].startswith("message is missing")


async def test_a_range_past_the_end_is_a_problem_too(client: httpx2.AsyncClient) -> None:
    form = encode(*fields(), image(JPEG))
    assert (await client.post("/postimages", content=form, headers=form_type())).content == b"{}"
    (row,) = (await client.get("/getimages")).json()
    problem(await client.get(row[4], headers={"Range": "bytes=99999-"}), 416)


@pytest.mark.parametrize("slash", ["", "/"], ids=["no slash", "slash"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"])
@pytest.mark.parametrize("path", READ)
async def test_what_is_read_allows_get_and_head_alone(
    client: httpx2.AsyncClient, path: str, method: str, slash: str
) -> None:
    response = await client.request(method, path + slash)
    problem(response, 405)
    assert allowed(response) == {"GET", "HEAD"}


@pytest.mark.parametrize("slash", ["", "/"], ids=["no slash", "slash"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"])
@pytest.mark.parametrize("path", WRITE)
async def test_what_is_written_allows_post_alone(
    client: httpx2.AsyncClient, database: Connection, path: str, method: str, slash: str
) -> None:
    content = b"" if method == "GET" else CHATT
    response = await client.request(method, path + slash, content=content)
    problem(response, 405)
    assert allowed(response) == {"POST"}
    assert await database.fetchval("SELECT count(*) FROM chatts") == 0


def allowed(response: httpx2.Response) -> set[str]:
    return {method.strip() for method in response.headers["allow"].split(",")}


@pytest.mark.parametrize(
    ("path", "status"),
    [*((path, 405) for path in WRITE), ("/nowhere", 404), ("/media/unknown.jpg", 404)],
)
async def test_a_refused_head_has_no_body(
    client: httpx2.AsyncClient, path: str, status: int
) -> None:
    response = await client.head(path)
    assert (response.status_code, response.content) == (status, b"")
    assert response.headers["content-type"] == "application/problem+json"
    assert SANE.fullmatch(response.headers["x-request-id"])


GOOD = [
    ("GET", "/getchatts", b""),
    ("HEAD", "/getchatts", b""),
    ("GET", "/getimages", b""),
    ("POST", "/postchatt", CHATT),
    ("POST", "/postimages", encode(*fields(), image(JPEG))),
    ("POST", "/llmprompt", b'{"model":"echo","prompt":"hi"}'),
]


@pytest.mark.parametrize(("method", "path", "content"), GOOD)
async def test_every_good_answer_carries_a_request_id(
    client: httpx2.AsyncClient, method: str, path: str, content: bytes
) -> None:
    made = await client.request(method, path, content=content, headers=form_type())
    assert made.status_code == 200
    assert SANE.fullmatch(made.headers["x-request-id"])
    headers = form_type() | {"X-Request-Id": "7401355B-fc63-458a-bddc-f90d2da400d3"}
    taken = await client.request(method, path, content=content, headers=headers)
    assert taken.status_code == 200
    assert taken.headers["x-request-id"] == "7401355B-fc63-458a-bddc-f90d2da400d3"


@pytest.mark.parametrize(
    "given",
    ["a", "7401355b-fc63-458a-bddc-f90d2da400d3", "01JD3Z8Q9V", "a.b_c-D9", "x" * 64],
)
async def test_a_sane_request_id_is_taken(client: httpx2.AsyncClient, given: str) -> None:
    response = await client.get("/nowhere", headers={"X-Request-Id": given})
    problem(response, 404)
    assert response.headers["x-request-id"] == given


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize(
    "given",
    [
        pytest.param("", id="empty"),
        pytest.param(" ", id="blank"),
        pytest.param("two words", id="blank inside"),
        pytest.param("a\tb", id="tab"),
        pytest.param("x" * 1000, id="too long"),
        pytest.param("caf\xe9", id="not ASCII"),
        pytest.param("<script>", id="markup"),
        pytest.param('a"b', id="quote"),
        pytest.param("a\\nb", id="backslash"),
        pytest.param("%0d%0aSet-Cookie:x", id="escaped line break"),
        pytest.param("a\x1b[31m", id="terminal escape"),
        pytest.param("a\x7fb", id="DEL"),
    ],
)
async def test_another_request_id_is_made_anew(server: Server, given: str) -> None:
    async with connect(server.url) as wire:
        await wire.request("GET", "/nowhere", f"X-Request-Id: {given}")
        answer = await wire.answer()
    if answer.status_code == 400:
        # The HTTP parser itself may refuse what no header may contain.
        assert not given.isprintable()
        return
    problem(answer, 404)
    assert answer.headers["x-request-id"] != given
    assert SANE.fullmatch(answer.headers["x-request-id"])
