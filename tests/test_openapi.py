"""The OpenAPI document says what the server does: routes, statuses, headers, bodies, codes."""

from __future__ import annotations

import json
import uuid
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import anyio
import jsonschema_rs
import pytest
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR
from starlette.routing import Route, WebSocketRoute

from chatterd.errors import BY_NGINX, CATALOGUE
from chatterd.openapi import DOCUMENT
from chatterd.routes import routes
from tests.conftest import client_of, database_away
from tests.multipart import connect, encode, fields, form_type, image
from tests.samples import JPEG

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

    import httpx2
    from sqlalchemy.engine import URL

    from tests.conftest import StartServer
    from tests.multipart import Answer, Wire
    from tests.process import Server

Object: TypeAlias = dict[str, Any]
Place: TypeAlias = tuple[str, str, str]
"""A method, a path as the document has it, and a status."""

OPERATIONS = [
    (method.upper(), path)
    for path, item in DOCUMENT["paths"].items()
    for method in item
    if method != "parameters"
]
WEB_SOCKET = "/v1/ws"
# What every HTTP answer may have, whatever it is; the last two come from Nginx.
COMMON_HEADERS = {
    *("content-type", "content-length", "date", "transfer-encoding"),
    *("connection", "server"),
}
# RFC 6455 §4.2.2.
WEB_SOCKET_HEADERS = {"connection", "upgrade", "sec-websocket-accept"}


def codes_of(method: str, path: str) -> Iterator[str]:
    for answer in DOCUMENT["paths"][path][method.lower()]["responses"].values():
        for kind, content in answer.get("content", {}).items():
            if kind == "application/problem+json":
                yield from content["schema"]["allOf"][1]["properties"]["code"]["enum"]


class Case(NamedTuple):
    """A request, and the status of its answer.

    In braces stand names of what is there, see `stock`, or of `given`.
    """

    status: int
    method: str
    path: str
    query: str = ""
    headers: Mapping[str, str] = MappingProxyType({})
    content: bytes = b""
    given: Mapping[str, str] = MappingProxyType({})


CHATT = b'{"name":"ann","message":"hi"}'
LONG = b'{"name":"ann","message":"%b"}' % (b"m" * 4097)
LARGE = b" " * 65537
FORM = encode(*fields(), image(JPEG))
FORM_LONG = encode(*fields(message="m" * 4097))
FORM_LARGE = encode(*fields(message="m" * 65537))
FORM_NO_PICTURE = encode(*fields(), image(b"text"))
PROMPT = b'{"model":"echo","prompt":"hi"}'
DELETING = "Chatterd-Delete-Token"
UNKNOWN = "7401355b-fc63-458a-bddc-f90d2da400d3"

CASES = [
    *(
        case
        for path in ("/getchatts", "/getimages", "/v1/chatts")
        for case in (
            Case(200, "GET", path),
            Case(200, "GET", path, "?limit=1"),
            Case(304, "GET", path, "", {"If-None-Match": "*"}),
            Case(404, "GET", path, f"?before={UNKNOWN}"),
            Case(422, "GET", path, "?limit=0"),
            Case(422, "GET", path, "?after=x"),
        )
    ),
    *(
        case
        for path, done in (("/postchatt", 200), ("/v1/chatts", 201))
        for case in (
            Case(done, "POST", path, content=CHATT),
            Case(400, "POST", path, content=LONG),
            Case(413, "POST", path, content=LARGE),
            Case(422, "POST", path, content=b"{}"),
            Case(422, "POST", path, "", {"Idempotency-Key": "two words"}, CHATT),
            Case(422, "POST", path, "", {"Idempotency-Key": "{used}"}, CHATT),
        )
    ),
    *(
        case
        for path, done in (("/postimages", 200), ("/v1/chatts", 201))
        for case in (
            Case(done, "POST", path, "", form_type(), FORM),
            Case(400, "POST", path, "", form_type(), FORM_LONG),
            Case(413, "POST", path, "", form_type(), FORM_LARGE),
            Case(415, "POST", path, "", form_type(), FORM_NO_PICTURE),
            Case(422, "POST", path, "", form_type(), b"no form"),
        )
    ),
    # The second time.
    Case(201, "POST", "/v1/chatts", "", form_type() | {"Idempotency-Key": "{used}"}, FORM),
    Case(200, "GET", "/v1/chatts", "?since={cursor}"),
    Case(200, "GET", "/v1/chatts", "?since=nonsense&wait=5"),
    Case(422, "GET", "/v1/chatts", "?since={cursor}&wait=56"),
    Case(422, "GET", "/v1/chatts", "?since={cursor}&before={id}"),
    Case(200, "GET", "/v1/chatts/{id}"),
    Case(304, "GET", "/v1/chatts/{id}", "", {"If-None-Match": "*"}),
    Case(404, "GET", "/v1/chatts/{id}", given={"id": UNKNOWN}),
    Case(204, "DELETE", "/v1/chatts/{id}", "", {DELETING: "{token}"}, given={"id": "{doomed}"}),
    Case(403, "DELETE", "/v1/chatts/{id}", "", {DELETING: "x"}),
    Case(404, "DELETE", "/v1/chatts/{id}", "", {DELETING: "x"}, given={"id": UNKNOWN}),
    Case(200, "HEAD", "/v1/stream"),
    Case(404, "GET", WEB_SOCKET),
    Case(200, "GET", "/media/{key}"),
    Case(200, "GET", "/media/{key}", "?thumb"),
    Case(206, "GET", "/media/{key}", "", {"Range": "bytes=0-1"}),
    Case(304, "GET", "/media/{key}", "", {"If-None-Match": "*"}),
    Case(404, "GET", "/media/{key}", given={"key": "unknown.jpeg"}),
    Case(416, "GET", "/media/{key}", "", {"Range": "bytes=9999-"}),
    Case(200, "POST", "/llmprompt", content=PROMPT),
    Case(400, "POST", "/llmprompt", content=b"no JSON"),
    Case(404, "POST", "/llmprompt", content=b'{"model":"missing"}'),
    Case(413, "POST", "/llmprompt", content=bytes(10_485_761)),
    Case(500, "POST", "/llmprompt", content=b'{"model":"broken"}'),
    Case(502, "POST", "/llmprompt", content=b'{"model":"hangup"}'),
    Case(200, "GET", "/v1/limits"),
    Case(200, "GET", "/livez"),
    Case(200, "GET", "/readyz"),
    Case(200, "GET", "/metrics"),
    Case(200, "GET", "/metrics", "", {"Accept": "application/openmetrics-text"}),
    Case(200, "GET", "/web/{name}", given={"name": "app.js"}),
    Case(304, "GET", "/web/{name}", "", {"If-None-Match": "*"}, given={"name": "app.js"}),
    Case(404, "GET", "/web/{name}", given={"name": "unknown.js"}),
    *(
        case
        for path in ("/openapi.json", "/docs", "/")
        for case in (Case(200, "GET", path), Case(304, "GET", path, "", {"If-None-Match": "*"}))
    ),
]
CASES += [
    case._replace(method="HEAD")
    for case in CASES
    if case.method == "GET" and case.path != WEB_SOCKET and case.status not in {206, 416}
]
# They get 503 when the database is away. A stream that is open already goes on.
ASKING_THE_DATABASE = [
    (method, path)
    for method, path in OPERATIONS
    if {"database-unavailable", "not-ready"}
    & set(codes_of("GET" if method == "HEAD" else method, path))
]
NOT_ASKED = {
    # Thirty seconds, and hundreds of prompts at once.
    *((("POST", path, "408")) for path in ("/postchatt", "/llmprompt")),
    ("POST", "/llmprompt", "503"),
    # Hundreds of pictures at once, and a disk that fills between a picture and its thumbnail.
    *((method, "/media/{key}", status) for method in ("GET", "HEAD") for status in ("503", "507")),
    # It is what 404 is there, which the document does not have by itself.
    ("POST", "/llmprompt", "default"),
}
POSTS = {"/postchatt": CHATT, "/postimages": FORM, "/v1/chatts": CHATT}
FORMS = ["/postimages", "/v1/chatts"]
HANDSHAKE = [
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
]


@pytest.fixture(scope="module")
async def client(server: Server) -> AsyncIterator[httpx2.AsyncClient]:
    """A client that leaves what is there, unlike that of the other tests."""
    async with client_of(server) as client:
        yield client


@pytest.fixture(scope="module")
async def stock(client: httpx2.AsyncClient) -> dict[str, str]:
    """A chatt with a picture, what its author knows of it, and a chatt to delete."""
    used = uuid.uuid4().hex
    headers = form_type() | {"Idempotency-Key": used}
    chatt = (await client.post("/v1/chatts", content=FORM, headers=headers)).json()
    other = (await client.post("/v1/chatts", content=CHATT)).json()
    return {
        "id": chatt["id"],
        "key": chatt["image"]["url"].rpartition("/")[2],
        "used": used,
        "cursor": (await client.get("/v1/chatts")).json()["cursor"],
        "doomed": other["id"],
        "token": other["delete_token"],
    }


async def ask(client: httpx2.AsyncClient, case: Case, stock: Mapping[str, str]) -> httpx2.Response:
    names = {**stock, **{name: value.format_map(stock) for name, value in case.given.items()}}
    headers = {name: value.format_map(names) for name, value in case.headers.items()}
    target = (case.path + case.query).format_map(names)
    return await client.request(case.method, target, headers=headers, content=case.content)


def assert_documented(response: httpx2.Response | Answer, method: str, path: str) -> None:
    """Check the answer's status, each of its headers, and its body."""
    answers = DOCUMENT["paths"][path][method.lower()]["responses"]
    answer = answers.get(str(response.status_code)) or answers["default"]
    assert_headers_documented(response, answer["headers"])
    if "content" not in answer:
        assert response.content == b""
        return
    kind, _, _ = response.headers["content-type"].partition(";")
    assert kind in answer["content"]
    schema = answer["content"][kind].get("schema")
    if kind.endswith(("/json", "+json")) and schema is not None:
        validator(schema).validate(json.loads(response.content))


def assert_headers_documented(
    response: httpx2.Response | Answer, documented: Object, common: set[str] = COMMON_HEADERS
) -> None:
    headers = {name.lower(): resolved(header) for name, header in documented.items()}
    required = {name for name, header in headers.items() if header["required"]}
    given = {name.lower() for name in response.headers}
    assert required <= given <= headers.keys() | common
    for name in given & headers.keys():
        validator(headers[name]["schema"]).validate(response.headers[name])


def validator(schema: Object) -> jsonschema_rs.Draft202012Validator:
    whole = schema | {"components": DOCUMENT["components"]}
    return jsonschema_rs.Draft202012Validator(whole, validate_formats=True)


def resolved(component: Object) -> Object:
    if "$ref" not in component:
        return component
    _, _, kind, name = component["$ref"].split("/")
    found: Object = DOCUMENT["components"][kind][name]
    return found


def test_the_document_is_openapi_3_1() -> None:
    OPENAPI_31_VALIDATOR.validate(json.loads(json.dumps(DOCUMENT)))
    identifiers = [
        DOCUMENT["paths"][path][method.lower()]["operationId"] for method, path in OPERATIONS
    ]
    assert len(set(identifiers)) == len(identifiers)


async def test_the_server_answers_the_document(client: httpx2.AsyncClient) -> None:
    assert (await client.get("/openapi.json")).json() == json.loads(json.dumps(DOCUMENT))


def test_the_document_has_every_route_and_no_other() -> None:
    paths = {route.path for route in routes if isinstance(route, Route | WebSocketRoute)}
    assert len(paths) == len(routes)
    assert {path.removesuffix("/") or "/" for path in paths} == set(DOCUMENT["paths"])
    assert {f"{path.rstrip('/')}/" for path in DOCUMENT["paths"]} < paths


@pytest.mark.parametrize("slash", ["", "/"], ids=["no slash", "slash"])
@pytest.mark.parametrize("path", DOCUMENT["paths"])
async def test_a_path_answers_the_methods_of_the_document_and_no_other(
    client: httpx2.AsyncClient, path: str, slash: str
) -> None:
    response = await client.request("OPTIONS", path.rstrip("/") + slash)
    if path == WEB_SOCKET:
        assert response.status_code == 404
        return
    methods = {method for method, other in OPERATIONS if other == path}
    assert response.status_code == 405
    assert set(response.headers["allow"].split(", ")) == methods


def test_every_error_code_is_in_the_answers_of_an_operation() -> None:
    codes = {code for method, path in OPERATIONS for code in codes_of(method, path)}
    # It comes within a WebSocket, of which OpenAPI knows nothing.
    assert codes == CATALOGUE.keys() - {"frame-invalid"} - BY_NGINX


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case[:4])))
async def test_an_answer_is_as_the_document_says(
    client: httpx2.AsyncClient, stock: dict[str, str], case: Case
) -> None:
    response = await ask(client, case, stock)
    assert response.status_code == case.status, response.text
    assert_documented(response, case.method, case.path)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
async def test_a_refusal_that_any_request_may_meet_is_as_the_document_says(
    client: httpx2.AsyncClient, method: str, path: str
) -> None:
    response = await client.request(method, path, headers={"Host": "*"})
    assert response.status_code == 400
    assert_documented(response, method, path)
    if path != WEB_SOCKET and method != "HEAD":
        response = await client.request("PATCH", path)
        assert response.status_code == 405
        assert_documented(response, method, path)


async def test_what_is_answered_without_a_database_is_as_the_document_says(
    own_database: str, postgres_url: URL, start_server: StartServer
) -> None:
    server = start_server(DATABASE_URL=own_database)
    async with client_of(server) as client, database_away(own_database, postgres_url):
        for method, path in ASKING_THE_DATABASE:
            target = path.replace("{id}", UNKNOWN)
            headers = form_type() if path == "/postimages" else {}
            content = POSTS.get(path, b"")
            response = await client.request(method, target, headers=headers, content=content)
            assert response.status_code == 503, (method, path)
            assert_documented(response, method, path)


async def test_what_a_server_at_its_limits_answers_is_as_the_document_says(
    start_server: StartServer,
) -> None:
    server = start_server(
        UPLOADS_MAX="1",
        UPLOAD_TIMEOUT="2",
        MEDIA_TOTAL_SIZE="1",
        STREAM_MAX_SUBSCRIBERS="0",
        METRICS_ALLOWED="10.0.0.1",
    )
    async with client_of(server) as client:
        for method in ("GET", "HEAD"):
            response = await client.request(method, "/metrics")
            assert response.status_code == 403
            assert_documented(response, method, "/metrics")
        cursor = (await client.get("/v1/chatts")).json()["cursor"]
        await assert_full(client, "GET", "/v1/stream")
        await assert_full(client, "HEAD", "/v1/stream")
        await assert_full(client, "GET", "/v1/chatts", f"?since={cursor}&wait=1")
        await assert_full(client, "HEAD", "/v1/chatts", f"?since={cursor}&wait=1")
        async with connect(server.url) as wire:
            await wire.request("GET", WEB_SOCKET, *HANDSHAKE)
            answer = await wire.answer()
            assert answer.status_code == 503
            assert_documented(answer, "GET", WEB_SOCKET)
        for path in FORMS:
            response = await client.post(path, content=FORM, headers=form_type())
            assert response.status_code == 507
            assert_documented(response, "POST", path)
            async with half_posted(server, path) as one, half_posted(server, path) as other:
                refused, left = await first_answer(one, other)
                assert refused.status_code == 503
                assert_documented(refused, "POST", path)
                late = await left.answer()
            assert late.status_code == 408
            assert_documented(late, "POST", path)


async def assert_full(client: httpx2.AsyncClient, method: str, path: str, query: str = "") -> None:
    response = await client.request(method, path + query)
    assert response.status_code == 503
    assert_documented(response, method, path)


@asynccontextmanager
async def half_posted(server: Server, path: str, *lines: str) -> AsyncIterator[Wire]:
    """Begin a post, and leave it there."""
    async with connect(server.url) as wire:
        kind = f"Content-Type: {form_type()['Content-Type']}"
        await wire.request("POST", path, kind, f"Content-Length: {len(FORM)}", *lines)
        await wire.send(FORM[:20])
        yield wire


async def first_answer(one: Wire, other: Wire) -> tuple[Answer, Wire]:
    """Wait for the first answer on either; return it, and the wire that has none."""
    answers: list[tuple[Answer, Wire]] = []
    async with anyio.create_task_group() as group:

        async def listen(wire: Wire, left: Wire) -> None:
            answers.append((await wire.answer(), left))
            group.cancel_scope.cancel()

        group.start_soon(listen, one, other)
        group.start_soon(listen, other, one)
    return answers[0]


@pytest.mark.direct(reason="behind Nginx, a post is under way once all of it has arrived")
@pytest.mark.parametrize("path", POSTS)
async def test_the_answer_while_a_key_is_in_use_is_as_the_document_says(
    server: Server, path: str
) -> None:
    key = f"Idempotency-Key: {uuid.uuid4().hex}"
    async with half_posted(server, path, key) as one, half_posted(server, path, key) as other:
        answer, _ = await first_answer(one, other)
    assert answer.status_code == 409
    assert_documented(answer, "POST", path)


async def test_a_stream_and_a_web_socket_begin_as_the_document_says(
    server: Server, client: httpx2.AsyncClient
) -> None:
    async with client.stream("GET", "/v1/stream") as response:
        assert response.status_code == 200
        described = DOCUMENT["paths"]["/v1/stream"]["get"]["responses"]["200"]
        assert_headers_documented(response, described["headers"])
        assert [*described["content"]] == [response.headers["content-type"]]
    async with connect(server.url) as wire:
        await wire.request("GET", WEB_SOCKET, *HANDSHAKE)
        answer = await wire.answer("HEAD")  # there is no body, but frames
    assert answer.status_code == 101
    described = DOCUMENT["paths"][WEB_SOCKET]["get"]["responses"]["101"]
    common = COMMON_HEADERS | WEB_SOCKET_HEADERS
    assert_headers_documented(answer, described["headers"], common)


def test_every_status_of_the_document_is_asked_for_here() -> None:
    documented = {
        (method, path, status)
        for method, path in OPERATIONS
        for status in DOCUMENT["paths"][path][method.lower()]["responses"]
    }
    asked = {(case.method, case.path, str(case.status)) for case in CASES}
    asked |= {(*operation, status) for operation in OPERATIONS for status in ("400", "405")}
    asked |= {(*operation, "503") for operation in ASKING_THE_DATABASE}
    asked |= {("POST", path, "409") for path in POSTS}
    asked |= {(method, "/metrics", "403") for method in ("GET", "HEAD")}
    asked |= {("POST", path, status) for path in FORMS for status in ("408", "503", "507")}
    asked |= {("GET", "/v1/stream", "200"), ("GET", WEB_SOCKET, "101"), ("GET", WEB_SOCKET, "503")}
    # No request is known that meets a fault of the server.
    faults = {(*operation, "500") for operation in OPERATIONS}
    assert documented - asked - faults == NOT_ASKED
