"""What proxies say of a request: believed of those that are trusted, ignored of all others."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import websockets

from chatterd import proxy, settings
from chatterd.settings import Peers
from tests.conftest import client_of
from tests.multipart import encode, fields, form_type, image
from tests.process import Server
from tests.samples import JPEG

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.ollama import FakeOllama

TRUSTED = "127.0.0.2"
HOSTS = "127.0.0.1,chatter.example"


@pytest.fixture(scope="module")
def behind(
    database_url: str, ollama: FakeOllama, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server below a path of a proxy that comes from 127.0.0.2."""
    with Server(
        tmp_path_factory.mktemp("behind"),
        DATABASE_URL=database_url,
        OLLAMA_URL=ollama.url,
        TRUSTED_PROXIES=TRUSTED,
        ALLOWED_HOSTS=HOSTS,
        ROOT_PATH="/chatter",
    ) as server:
        yield server
        assert server.stop() == 0, server.log


def client_from(address: str, server: Server) -> httpx2.AsyncClient:
    """A client whose connections come from this address."""
    transport = httpx2.AsyncHTTPTransport(local_address=address)
    return httpx2.AsyncClient(base_url=server.url, transport=transport, timeout=60)


SAID = {
    "X-Forwarded-For": "203.0.113.7",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "chatter.example",
}


async def posted_picture(client: httpx2.AsyncClient) -> str:
    """Post a picture; return its chatt's id."""
    form = encode(*fields("ann", "look"), image(JPEG))
    answer = await client.post("/postimages", content=form, headers=form_type())
    assert answer.status_code == 200
    return answer.headers["location"].rpartition("/")[2]


async def test_links_to_pictures_have_the_scheme_the_host_and_the_path_that_clients_use(
    behind: Server,
) -> None:
    async with client_from(TRUSTED, behind) as client:
        chatt_id = await posted_picture(client)
        rows = (await client.get("/chatter/getimages", headers=SAID)).json()
        url = next(row[4] for row in rows if row[2] == chatt_id)
        assert url.startswith("https://chatter.example/chatter/media/")
        path = url.removeprefix("https://chatter.example")
        assert (await client.get(path)).content == JPEG
        chatt = (await client.get(f"/chatter/v1/chatts/{chatt_id}", headers=SAID)).json()
        assert chatt["image"]["url"] == url


async def test_a_websocket_behind_the_proxy_has_the_same_links(behind: Server) -> None:
    async with client_from(TRUSTED, behind) as client:
        address = behind.url.replace("http", "ws", 1)
        async with websockets.connect(
            f"{address}/chatter/v1/ws", additional_headers=SAID, local_addr=(TRUSTED, 0)
        ) as socket:
            await socket.send('{"since": null}')
            assert '"ready"' in str(await socket.recv())
            await posted_picture(client)
            assert "https://chatter.example/chatter/media/" in str(await socket.recv())


@pytest.mark.parametrize("headers", [SAID, {"Forwarded": "for=203.0.113.7;proto=https;host=x"}])
async def test_what_anybody_else_says_of_a_proxy_changes_nothing(
    behind: Server, headers: dict[str, str]
) -> None:
    async with client_of(behind) as client:
        chatt_id = await posted_picture(client)
        plain = await client.get("/getimages")
        spoofed = await client.get("/getimages", headers=headers)
        assert spoofed.content == plain.content
        assert spoofed.headers["etag"] == plain.headers["etag"]
        url = next(row[4] for row in plain.json() if row[2] == chatt_id)
        assert url.startswith(f"{behind.url}/chatter/media/")


@pytest.mark.parametrize("address", [TRUSTED, "127.0.0.1"])
async def test_a_host_that_is_not_allowed_is_refused_wherever_it_is_said(
    behind: Server, address: str
) -> None:
    async with client_from(address, behind) as client:
        refused = await client.get("/getchatts", headers={"Host": "evil.example"})
        assert (refused.status_code, refused.json()["code"]) == (400, "host-not-allowed")
        said = await client.get("/getchatts", headers={"X-Forwarded-Host": "evil.example"})
        assert said.status_code == (400 if address == TRUSTED else 200)


async def test_the_header_of_the_other_kind_is_ignored(behind: Server) -> None:
    async with client_from(TRUSTED, behind) as client:
        plain = await client.get("/getimages")
        forwarded = {"Forwarded": "for=203.0.113.7;proto=https;host=chatter.example"}
        assert (await client.get("/getimages", headers=forwarded)).content == plain.content


async def test_addresses_in_answers_lie_below_the_path_and_both_forms_are_answered(
    behind: Server,
) -> None:
    async with client_of(behind) as client:
        for prefix in ("", "/chatter"):
            answer = await client.post(f"{prefix}/v1/chatts", json={"name": "ann", "message": "hi"})
            location = answer.headers["location"]
            assert location == f"/chatter/v1/chatts/{answer.json()['id']}"
            assert (await client.get(location)).status_code == 200
            for page in ("/getchatts?limit=1", "/v1/chatts?limit=1"):
                link = (await client.get(f"{prefix}{page}")).headers["link"]
                assert link.startswith(f"</chatter{page.partition('?')[0]}?limit=1&before=")
        assert (await client.get("/chatter/openapi.json")).json()["servers"] == [
            {"url": "/chatter"}
        ]
        docs = (await client.get("/chatter/docs")).text
        assert 'href="/chatter/web/docs.css"' in docs
        assert (await client.get("/chatter/web/docs.css")).status_code == 200
        for other in ("/chatterbox/getchatts", "/chatter/chatter/getchatts", "/chatter"):
            assert (await client.get(other)).status_code == 404


# PROXY_HEADERS, headers, and what comes of them: client, scheme and host.
PEER = ("10.0.0.1", 4711)
LEFT_AS_IT_IS = (PEER, "http", b"inner")
TOLD = [
    ("x-forwarded", ["x-forwarded-for: 203.0.113.7"], (("203.0.113.7", 0), "http", b"inner")),
    ("x-forwarded", ["x-forwarded-for: [2001:db8::1]:99"], (("2001:db8::1", 0), "http", b"inner")),
    ("x-forwarded", ["x-forwarded-for: 2001:DB8::1"], (("2001:db8::1", 0), "http", b"inner")),
    ("x-forwarded", ["x-forwarded-for: 203.0.113.7:99"], (("203.0.113.7", 0), "http", b"inner")),
    # Behind a further proxy that is trusted, and with what the client itself wrote in front.
    (
        "x-forwarded",
        ["x-forwarded-for: 127.0.0.1, 203.0.113.7", "x-forwarded-for: 10.0.0.9"],
        (("203.0.113.7", 0), "http", b"inner"),
    ),
    ("x-forwarded", ["x-forwarded-for: 10.0.0.8, 10.0.0.9"], (("10.0.0.8", 0), "http", b"inner")),
    # Whoever hides is nobody: above all, not the proxy.
    ("x-forwarded", ["x-forwarded-for: 127.0.0.1, unknown"], (("", 0), "http", b"inner")),
    ("x-forwarded", ["x-forwarded-for: 127.0.0.1, 300.1.1.1"], (("", 0), "http", b"inner")),
    ("x-forwarded", ["x-forwarded-for: 127.0.0.1,"], (("", 0), "http", b"inner")),
    ("x-forwarded", ["x-forwarded-proto: HTTPS"], (PEER, "https", b"inner")),
    ("x-forwarded", ["x-forwarded-proto: http, https"], (PEER, "https", b"inner")),
    ("x-forwarded", ["x-forwarded-proto: gopher"], LEFT_AS_IT_IS),
    ("x-forwarded", ["x-forwarded-host: evil, a.example"], (PEER, "http", b"a.example")),
    ("x-forwarded", ["x-forwarded-host:"], LEFT_AS_IT_IS),
    ("x-forwarded", ["forwarded: for=203.0.113.7;proto=https;host=x"], LEFT_AS_IT_IS),
    ("forwarded", ["x-forwarded-for: 203.0.113.7", "x-forwarded-proto: https"], LEFT_AS_IT_IS),
    (
        "forwarded",
        ['forwarded: For="[2001:db8::1]:99" ; proto=https;host="chatter.example:8443";by=_x'],
        (("2001:db8::1", 0), "https", b"chatter.example:8443"),
    ),
    (
        "forwarded",
        [
            "forwarded: for=127.0.0.1;host=evil, for=203.0.113.7;proto=https;host=a",
            "forwarded: for=10.0.0.9;host=b",
        ],
        (("203.0.113.7", 0), "https", b"a"),
    ),
    ("forwarded", ["forwarded: for=_hidden;proto=https"], (("", 0), "https", b"inner")),
    ("forwarded", ["forwarded: proto=https"], (PEER, "https", b"inner")),
    ("forwarded", ['forwarded: for="\\"203.0.113.7"'], (("", 0), "http", b"inner")),
    # Malformed by the client, before the proxy added its own.
    ("forwarded", ['forwarded: for="127.0.0.1, for=203.0.113.7'], (("", 0), "http", b"inner")),
    ("forwarded", ["forwarded: for=a;for=b"], (("", 0), "http", b"inner")),
    ("forwarded", ["forwarded: ;,;"], LEFT_AS_IT_IS),
    ("forwarded", ["forwarded: " + "for=1;" * 2 + "x" * 60_000], (("", 0), "http", b"inner")),
]


@pytest.mark.parametrize(
    ("kind", "lines", "restored"), TOLD, ids=[f"{case[0]}: {case[1]}"[:70] for case in TOLD]
)
def test_a_trusted_proxys_headers_are_read_as_they_are_defined(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    lines: Sequence[str],
    restored: tuple[tuple[str, int], str, bytes],
) -> None:
    peers = Peers((ipaddress.ip_network("10.0.0.0/8"),), unix=False)
    monkeypatch.setattr(settings, "TRUSTED_PROXIES", peers)
    monkeypatch.setattr(settings, "PROXY_HEADERS", kind)
    scope: dict[str, Any] = {
        "type": "http",
        "client": PEER,
        "scheme": "http",
        "path": "/",
        "headers": [(b"host", b"inner")],
    }
    for line in lines:
        name, _, value = line.partition(":")
        scope["headers"].append((name.encode(), value.strip().encode()))
    proxy.restore(scope)
    hosts = [value for name, value in scope["headers"] if name == b"host"]
    assert (scope["client"], scope["scheme"], *hosts) == restored
