"""What an Nginx in front of the server does by itself, and that it changes nothing else.

That it changes nothing, the contract's tests show, run with TEST_THROUGH (tests/conftest.py).
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import ssl
import statistics
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

import httpx2
import pytest

from chatterd.media import MEDIA_TYPES
from tests.multipart import Part, connect, encode, fields, form_type, problem
from tests.nginx import (
    DEPLOYED,
    EXAMPLE,
    Certificate,
    Nginx,
    check,
    free_ports,
    printed,
    write_configuration,
)
from tests.process import Server, assert_refused, run
from tests.streams import has_place, http_2, place_is_free, stream_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.multipart import Connection

# Small, so that what is too large need not be large.
JSON_MAX, MEDIA_MAX = 1024, 2000
FORM_MAX = 2 * MEDIA_MAX + 4 * JSON_MAX
LIMITS = {"JSON_MAX_SIZE": str(JSON_MAX), "MEDIA_MAX_SIZE": str(MEDIA_MAX)}
KEY = f"{'ab' * 32}.jpeg"
TAG = f'"{"ab" * 16}"'
DATA = bytes(range(256)) * 8
# What is a connection's or a moment's own, and what Nginx says of itself.
OWN = {"date", "server", "connection", "x-request-id"}
HTTP = [pytest.param(False, id="HTTP/1.1"), pytest.param(True, id="HTTP/2")]


class Pair(NamedTuple):
    """A server and an Nginx in front of it."""

    server: Server
    nginx: Nginx


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module", autouse=True)
def _trusting(certificate: Certificate) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(certificate.authority))
        yield


@pytest.fixture(scope="module")
def pair(
    database_url: str, certificate: Certificate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    settings = {"DATABASE_URL": database_url, "TRUSTED_PROXIES": "127.0.0.1"} | LIMITS
    folder = tmp_path_factory.mktemp("nginx")
    settings["STREAM_MAX_SUBSCRIBERS"] = "1"
    with (
        Server(tmp_path_factory.mktemp("server"), **settings) as server,
        Nginx(
            folder, server.url, certificate=certificate, media=server.media, settings=LIMITS
        ) as nginx,
    ):
        yield Pair(server, nginx)


def client_of(url: str, *, http2: bool = False) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=url, timeout=30, http2=http2)


def without_own(response: httpx2.Response) -> list[tuple[str, str]]:
    return sorted(
        (name, value) for name, value in response.headers.multi_items() if name not in OWN
    )


# The configuration. -------------------------------------------------------------------------------


def test_deploy_holds_what_the_command_prints(tmp_path: Path) -> None:
    site = (DEPLOYED / "site.conf").read_text()
    for name in ("chatterd/http.conf", "chatterd/server.conf"):
        text = (DEPLOYED / name).read_text()
        line = re.search(rf"^( *)include {name};\n", site, re.MULTILINE)
        assert line
        indented = re.sub(r"^(?=.)", line[1], text, flags=re.MULTILINE)
        site = site.replace(line[0], indented)
    assert printed(tmp_path, EXAMPLE, {}) == site


def test_nginx_takes_the_files_of_deploy(tmp_path: Path, certificate: Certificate) -> None:
    shutil.copytree(DEPLOYED, tmp_path, dirs_exist_ok=True)
    site = (tmp_path / "site.conf").read_text()
    site = site.replace(str(EXAMPLE.certificate), str(certificate.chain))
    site = site.replace(str(EXAMPLE.certificate_key), str(certificate.key))
    # Below 1024, ports are root's.
    for port, free in zip(("80", "443"), free_ports(2), strict=True):
        site = re.sub(rf"(listen (?:\[::\]:)?){port}\b", rf"\g<1>{free}", site)
    write_configuration(tmp_path, site)
    assert "warn" not in check(tmp_path)


@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "TLS"])
def test_nginx_takes_what_is_printed(
    tmp_path: Path, certificate: Certificate, *, is_tls: bool
) -> None:
    odd = {
        "MEDIA_ROOT": '/a b/"c"\\d;{}#',
        "PUBLIC_URL": "https://bücher.example:8443/x",
        "ROOT_PATH": "/a.b/~c",
        "METRICS_ALLOWED": "10.0.0.0/8,::1,unix",
    }
    port, http_port = free_ports(2)
    words = ["--upstream=127.0.0.1:8000", "--upstream=[::1]:8000"]
    words += [f"--port={port}", f"--http-port={http_port}"]
    if is_tls:
        words += [f"--certificate={certificate.chain}", f"--certificate-key={certificate.key}"]
    done = run(tmp_path, "nginx", *words, **odd)
    assert "server_name xn--bcher-kva.example;" in done.stdout
    write_configuration(tmp_path, done.stdout)
    assert "warn" not in check(tmp_path)


@pytest.mark.parametrize(
    ("options", "settings", "words"),
    [
        ([], {"MEDIA_ROOT": "/a$b"}, ["/a$b", "Nginx"]),
        (["--certificate=a.pem"], {}, ["--certificate-key"]),
        ([], {"PROXY_HEADERS": "forwarded"}, ["PROXY_HEADERS", "x-forwarded"]),
    ],
)
def test_what_cannot_be_configured_is_said(
    tmp_path: Path, options: list[str], settings: dict[str, str], words: list[str]
) -> None:
    assert_refused(run(tmp_path, "nginx", *options, **settings), *words)


# Errors. ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        ("NONSENSE", 400, "request-malformed"),
        ("GET /getchatts HTTP/1.1", 400, "request-malformed"),  # names no host
        ("GET /getchatts HTTP/1.1\r\nHost: a b", 400, "request-malformed"),
        ("GET /getchatts HTTP/9.9\r\nHost: a", 400, "request-malformed"),
        ("POST /postchatt HTTP/1.1\r\nHost: a\r\nContent-Length: x", 400, "request-malformed"),
        ("POST /postchatt HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: y", 400, "request-malformed"),
        (f"GET /{'x' * 9000} HTTP/1.1\r\nHost: a", 414, "address-too-long"),
        (f"GET / HTTP/1.1\r\nHost: a\r\nX: {'x' * 9000}", 431, "headers-too-large"),
        ("GET /../getchatts HTTP/1.1\r\nHost: a", 404, "not-found"),
        ("GET /.chatterd/problem HTTP/1.1\r\nHost: a", 404, "not-found"),
    ],
)
async def test_what_nginx_refuses_is_a_problem(
    pair: Pair, head: str, status: int, code: str
) -> None:
    async with connect(pair.nginx.url) as wire:
        await wire.send(head.encode() + b"\r\n\r\n")
        answer = await wire.answer()
    problem(answer, status)
    assert json.loads(answer.content)["code"] == code


async def test_plain_http_on_the_port_of_tls_is_a_problem(pair: Pair) -> None:
    async with connect(pair.nginx.url.replace("https:", "http:")) as wire:
        await wire.request("GET", "/getchatts")
        answer = await wire.answer()
    problem(answer, 400)


async def test_plain_http_is_sent_on_to_tls(pair: Pair) -> None:
    async with client_of(pair.nginx.http_url) as client:
        response = await client.post("/v1/chatts?a=%20b", json={})
    assert response.status_code == 308
    assert response.headers["location"] == f"{pair.nginx.url}/v1/chatts?a=%20b"


@pytest.mark.parametrize("http2", HTTP)
@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("a.B-9_:x", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ('"', False)],
)
async def test_the_request_id_is_the_clients_where_it_is_sane(
    pair: Pair, given: str, *, is_kept: bool, http2: bool
) -> None:
    # One answer of the server's, and one of Nginx's own.
    async with client_of(pair.nginx.url, http2=http2) as client:
        headers = {"X-Request-Id": given}
        for response in (
            await client.get("/nowhere", headers=headers),
            await client.post("/postchatt", headers=headers, content=b"x" * (JSON_MAX + 1)),
        ):
            problem(response, response.status_code)
            assert (response.headers["x-request-id"] == given) is is_kept


# Bodies. ------------------------------------------------------------------------------------------

JSON = {"Content-Type": "application/json"}
LONG_JSON = b" " * (JSON_MAX + 1)
# A form that is whole, and goes on.
LONG_FORM = encode(*fields()) + b"\r\n" * FORM_MAX
OVER_LIMIT = [
    ("/postchatt", JSON, LONG_JSON),
    ("/postimages", form_type(), LONG_FORM),
    ("/v1/chatts", JSON, LONG_JSON),
    ("/v1/chatts", JSON, b" " * (FORM_MAX + 1)),
    ("/v1/chatts", form_type(), LONG_FORM),
    ("/llmprompt", JSON, b" " * (MEDIA_MAX + 1)),
]


@pytest.mark.parametrize("http2", HTTP)
@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("is_chunked", [False, True], ids=["declared", "chunked"])
@pytest.mark.parametrize(("path", "headers", "body"), OVER_LIMIT)
async def test_a_body_over_the_limit_gets_the_same_problem_with_nginx_and_without(  # noqa: PLR0913 - a table
    pair: Pair,
    path: str,
    headers: dict[str, str],
    body: bytes,
    slash: str,
    *,
    is_chunked: bool,
    http2: bool,
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 500):
            yield body[start : start + 500]

    answers = []
    for url in (pair.server.url, pair.nginx.url):
        async with client_of(url, http2=http2) as client:
            content = chunks() if is_chunked else body
            named = headers | {"X-Request-Id": "same"}
            response = await client.post(path + slash, headers=named, content=content)
        problem(response, 413)
        answers.append((response.content, without_own(response)))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("http2", HTTP)
async def test_a_body_of_the_limit_comes_through(pair: Pair, *, http2: bool) -> None:
    text = json.dumps({"name": "ann", "message": "hi"}).encode()
    form = encode(*fields(), Part("image", b"x" * MEDIA_MAX, "a"), boundary="b")
    async with client_of(pair.nginx.url, http2=http2) as client:
        for path in ("/postchatt", "/v1/chatts"):
            response = await client.post(path, content=text.ljust(JSON_MAX), headers=JSON)
            assert response.status_code in {200, 201}, response.text
        for path in ("/postimages", "/v1/chatts"):
            response = await client.post(path, content=form, headers=form_type("b"))
            problem(response, 415)  # the server has looked into it


# Media. -------------------------------------------------------------------------------------------


@pytest.fixture
def media(pair: Pair) -> Path:
    folder = pair.server.media
    (folder / KEY).write_bytes(DATA)
    return folder


RANGES = ("bytes=0-1", "bytes=0-", "bytes=-5", "bytes=7-", "bytes=7-9", "bytes=0-9,20-")
CONDITIONS = (
    *({"If-Range": tag} for tag in (TAG, '"x"', f"W/{TAG}", "Thu, 01 Jan 2099 00:00:00 GMT")),
    {"If-None-Match": TAG},
)
ODD_RANGES = (
    *("bytes=0-0", "bytes=0-99999", f"bytes=0-{'9' * 30}", f"bytes=-{'9' * 30}", "bytes=99999-"),
    *("bytes=-0", "bytes=-000", "bytes=-007", "bytes=00-1", "bytes=5-2", "bytes=", "bytes=-"),
    *("bytes=x", "bytes=0-x", "BYTES=0-1", "bytes= 0-1", "items=0-1"),
)
ASKED = (
    {},
    {"If-None-Match": TAG},
    {"If-None-Match": f'W/"x", W/{TAG}'},
    {"If-None-Match": "*"},
    {"If-None-Match": '"x"'},
    {"If-Match": '"x"'},
    {"If-Modified-Since": "Thu, 01 Jan 2099 00:00:00 GMT"},
    {"If-Unmodified-Since": "Thu, 01 Jan 1970 00:00:00 GMT"},
    {"Accept-Encoding": "gzip"},
    *({"Range": asked} for asked in (*RANGES, *ODD_RANGES)),
    *({"Range": asked} | condition for asked in RANGES for condition in CONDITIONS),
)


@pytest.mark.parametrize("http2", HTTP)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_nginx_serves_a_file_as_the_server_does(
    pair: Pair, media: Path, method: str, *, http2: bool
) -> None:
    assert (media / KEY).is_file()
    async with (
        client_of(pair.server.url) as direct,
        client_of(pair.nginx.url, http2=http2) as through,
    ):
        for headers in ASKED:
            # Not httpx2's own, which names what it can unpack.
            named = {"Accept-Encoding": "identity", "X-Request-Id": "same"} | headers
            expected = await direct.request(method, f"/media/{KEY}", headers=named)
            response = await through.request(method, f"/media/{KEY}", headers=named)
            assert response.status_code == expected.status_code, headers
            assert response.content == expected.content, headers
            assert response.headers["x-request-id"] == "same", headers
            assert without_own(response) == without_own(expected), headers


@pytest.mark.parametrize("extension", sorted(MEDIA_TYPES))
async def test_nginx_knows_the_types_that_the_server_knows(pair: Pair, extension: str) -> None:
    path = f"/media/{'cd' * 32}{extension}"
    (pair.server.media / path[7:]).write_bytes(DATA)
    async with client_of(pair.server.url) as direct, client_of(pair.nginx.url) as through:
        expected, response = await direct.get(path), await through.get(path)
    assert (response.content, without_own(response)) == (expected.content, without_own(expected))
    assert response.headers["content-type"] == MEDIA_TYPES[extension]


async def test_nginx_serves_files_also_while_no_server_answers(media: Path, tmp_path: Path) -> None:
    with Nginx(tmp_path, f"unix:{tmp_path}/absent.sock", media=media) as nginx:
        async with client_of(nginx.url) as client:
            response = await client.get(f"/media/{KEY}")
            assert (response.status_code, response.content) == (200, DATA)
            assert response.headers["x-request-id"]
            # What only looks like a file, the server is asked about.
            link = media / f"{'ef' * 32}.jpeg"
            link.symlink_to(media / KEY)
            try:
                for target in (link.name, f"{'00' * 32}.jpeg", f"{KEY}?thumb", f"{KEY}/", "x.jpeg"):
                    problem(await client.get(f"/media/{target}"), 502)
            finally:
                link.unlink()


# The servers behind it. ---------------------------------------------------------------------------


class Upstream:
    """Takes requests on a unix socket, keeps their heads, and says the same to each."""

    def __init__(self, address: str, answer: bytes) -> None:
        self.address = address
        self.heads: list[bytes] = []
        self._answer = answer

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        length = re.search(rb"\ncontent-length: (\d+)", head.lower())
        await reader.readexactly(int(length[1]) if length else 0)
        writer.write(self._answer)
        writer.close()

    @property
    def lines(self) -> list[str]:
        """The last request's, with the names of its headers in lower case."""
        first, *lines = self.heads[-1].decode().split("\r\n")
        return [first, *(re.sub("^[^:]*", lambda name: name[0].lower(), line) for line in lines)]


@asynccontextmanager
async def upstream(
    path: Path, answer: bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
) -> AsyncIterator[Upstream]:
    found = Upstream(f"unix:{path}", answer)
    async with await asyncio.start_unix_server(found.serve, path):
        yield found


async def test_an_instance_that_is_away_is_passed_by(
    pair: Pair, database: Connection, tmp_path: Path
) -> None:
    await database.execute("TRUNCATE chatts")
    with Nginx(tmp_path, f"unix:{tmp_path}/absent.sock", pair.server.url) as nginx:
        async with client_of(nginx.url) as client:
            for number in range(10):
                post = {"name": "ann", "message": str(number)}
                assert (await client.post("/postchatt", json=post)).status_code == 200
            rows = (await client.get("/getchatts")).json()
    assert [row[1] for row in rows] == [str(number) for number in range(10)]


async def test_where_no_instance_is_there_nginx_says_so_until_one_is(
    database_url: str, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    (tmp_path / "server").mkdir()
    with Nginx(tmp_path, f"127.0.0.1:{port}", f"unix:{tmp_path}/absent.sock") as nginx:
        async with client_of(nginx.url) as client:
            for _ in range(5):
                response = await client.get("/getchatts")
                problem(response, 502)
                assert response.headers["retry-after"] == "1"
            with Server(tmp_path / "server", f"--port={port}", DATABASE_URL=database_url):
                assert (await client.get("/getchatts")).status_code == 200


async def test_a_post_that_may_have_arrived_is_not_sent_again(tmp_path: Path) -> None:
    async with (
        upstream(tmp_path / "1.sock", b"") as broken,
        upstream(tmp_path / "2.sock", b"") as other,
    ):
        with Nginx(tmp_path, broken.address, other.address) as nginx:
            async with client_of(nginx.url) as client:
                problem(await client.post("/postchatt", json={"name": "ann", "message": "hi"}), 502)
                assert len(broken.heads) + len(other.heads) == 1
                problem(await client.get("/getchatts"), 502)
                assert len(broken.heads) + len(other.heads) == 3


async def test_nginx_tells_who_asks_and_nobody_else_does(
    tmp_path: Path, certificate: Certificate
) -> None:
    lies = {
        "X-Forwarded-For": "192.0.2.1",
        "X-Forwarded-Proto": "ftp",
        "X-Forwarded-Host": "evil.example",
        "Forwarded": "for=192.0.2.1",
        "Connection": "Upgrade, HTTP2-Settings",
        "Upgrade": "h2c",
    }
    async with upstream(tmp_path / "1.sock") as server:
        with Nginx(tmp_path, server.address, certificate=certificate) as nginx:
            async with client_of(nginx.url) as client:
                headers = lies | {"Host": "chatter.example:8443"}
                assert (await client.get("/a%2Fb//c?d=%20", headers=headers)).content == b"{}"
    first, *lines = server.lines
    assert first == "GET /a%2Fb//c?d=%20 HTTP/1.1"
    told = [line for line in lines if re.match("(x-)?forwarded|host|connection|upgrade", line)]
    assert sorted(told) == [
        "host: chatter.example:8443",
        "x-forwarded-for: 127.0.0.1",
        "x-forwarded-host: chatter.example:8443",
        "x-forwarded-proto: https",
    ]


async def test_a_slow_client_takes_no_connection_to_the_server(tmp_path: Path) -> None:
    async with upstream(tmp_path / "1.sock") as server:
        with Nginx(tmp_path, server.address) as nginx:
            async with connect(nginx.url) as slow, client_of(nginx.url) as client:
                await slow.request("POST", "/postchatt", "Content-Length: 1000")
                await slow.send(b"x" * 999)
                assert (await client.get("/getchatts")).content == b"{}"
                assert len(server.heads) == 1
                await slow.send(b"x")
                assert (await slow.answer()).content == b"{}"
    assert len(server.heads) == 2


async def test_below_a_path_everything_is_below_it(tmp_path: Path) -> None:
    (tmp_path / KEY).write_bytes(DATA)
    settings = {"ROOT_PATH": "/a.b/c"} | LIMITS
    async with upstream(tmp_path / "1.sock") as server:
        with Nginx(tmp_path, server.address, media=tmp_path, settings=settings) as nginx:
            async with client_of(nginx.url) as client:
                for target in ("/a.b/c", "/a.b/c/", "/a.b/c/getchatts?x", "/a.b/c/v1/stream"):
                    assert (await client.get(target)).content == b"{}"
                    # The server takes the path off.
                    assert server.lines[0] == f"GET {target} HTTP/1.1"
                assert (await client.get("/a.b/c/metrics")).content == b"{}"
                assert server.lines[0] == "GET /metrics HTTP/1.1"
                assert (await client.get(f"/a.b/c/media/{KEY}")).content == DATA
                ranged = {"Range": "bytes=0-1", "If-Range": TAG}
                response = await client.get(f"/a.b/c/media/{KEY}", headers=ranged)
                assert (response.status_code, response.headers["accept-ranges"]) == (206, "bytes")
                body = b"x" * FORM_MAX
                response = await client.post("/a.b/c/postimages", content=body)
                assert response.status_code == 200
                detail = problem(await client.post("/a.b/c/postimages", content=body + b"x"), 413)
                assert str(FORM_MAX) in detail
                for target in ("/", "/getchatts", "/a.b/cd", "/aXb/c/", f"/media/{KEY}"):
                    problem(await client.get(target), 404)


async def test_the_numbers_of_each_instance_are_told_to_those_who_may_read_them(
    tmp_path: Path,
) -> None:
    async with upstream(tmp_path / "1.sock") as one, upstream(tmp_path / "2.sock") as two:
        with Nginx(tmp_path, one.address, two.address) as nginx:
            async with client_of(nginx.url) as client:
                for target in ("/metrics/2?name=x", "/metrics/2/?name=x"):
                    assert (await client.get(target)).content == b"{}"
                    assert two.lines[0] == "GET /metrics?name=x HTTP/1.1"
                assert (await client.get("/metrics")).content == b"{}"
                problem(await client.get("/metrics/3"), 404)
        assert (len(one.heads), len(two.heads)) in {(1, 2), (0, 3)}
    (folder := tmp_path / "closed").mkdir()
    with Nginx(folder, one.address, settings={"METRICS_ALLOWED": "192.0.2.0/24"}) as nginx:
        async with client_of(nginx.url) as client:
            for target in ("/metrics", "/metrics/", "/metrics/1", "/./metrics", "/%6detrics"):
                response = await client.get(target)
                problem(response, 403)
                assert response.json()["code"] == "address-not-allowed"


# Streams and what is compressed. ------------------------------------------------------------------


@pytest.mark.parametrize("http2", HTTP)
async def test_a_stream_brings_an_event_within_200_ms(pair: Pair, *, http2: bool) -> None:
    async with client_of(pair.server.url) as client:
        await place_is_free(client)
    async with (
        client_of(pair.nginx.url, http2=http2) as reader,
        client_of(pair.nginx.url, http2=http2) as writer,
        stream_of(reader) as stream,
    ):
        await stream.begin()
        seconds = []
        for number in range(11):
            begun = time.monotonic()
            post = {"name": "ann", "message": str(number)}
            answering = asyncio.create_task(writer.post("/postchatt", json=post))
            assert (await stream.event()).json()["message"] == str(number)
            seconds.append(time.monotonic() - begun)
            assert (await answering).status_code == 200
    assert statistics.median(seconds) < 0.2


async def test_who_leaves_a_stream_of_http_2_gives_its_place_free(pair: Pair) -> None:
    async with (
        client_of(pair.server.url) as client,
        http_2(pair.nginx.url, ssl.create_default_context()) as connection,
    ):
        await place_is_free(client)
        number = await connection.stream()
        await connection.until(number, b"retry: 2000")
        assert not await has_place(client)
        await connection.leave(number)
        await place_is_free(client)


@pytest.mark.parametrize("http2", HTTP)
@pytest.mark.parametrize("path", ["/getchatts", "/getchatts?limit=5", "/web/app.js", "/docs"])
async def test_nginx_compresses_nothing_and_leaves_alone_what_is_compressed(
    pair: Pair, path: str, *, http2: bool
) -> None:
    for accepted in ("gzip", "identity"):
        headers = {"Accept-Encoding": accepted}
        async with client_of(pair.server.url) as direct:
            expected = await direct.get(path, headers=headers)
        async with client_of(pair.nginx.url, http2=http2) as through:
            response = await through.get(path, headers=headers)
        assert response.content == expected.content
        assert without_own(response) == without_own(expected)
        assert response.headers["etag"].startswith('"')
