"""GET /media/<key>, as contract §1 has it."""

from __future__ import annotations

import os
import re
import shutil
from typing import TYPE_CHECKING, NamedTuple

import psutil
import pytest

from tests.conftest import client_of
from tests.multipart import (
    connect,
    encode,
    fields,
    form_type,
    image,
    kept,
    problem,
    video,
)
from tests.samples import JPEG, MP4, longer_mp4

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import httpx2

    from tests.multipart import Server, StartServer

DATA = longer_mp4(len(MP4) + 2056, bytes(range(256)))
SIZE = len(DATA)
SECRET = b"the secret of the house"


class Stored(NamedTuple):
    path: str
    etag: str


@pytest.fixture
async def stored(client: httpx2.AsyncClient) -> Stored:
    """A video of SIZE bytes on the shared server."""
    form = encode(*fields(), video(DATA))
    assert (await client.post("/postimages", content=form, headers=form_type())).content == b"{}"
    (row,) = (await client.get("/getimages")).json()
    path = row[5].removeprefix(str(client.base_url).rstrip("/"))
    return Stored(path, (await client.get(path)).headers["etag"])


async def test_a_file_is_served_with_every_header_of_the_contract(
    client: httpx2.AsyncClient, stored: Stored
) -> None:
    response = await client.get(stored.path)
    assert (response.status_code, response.content) == (200, DATA)
    headers = response.headers
    assert headers["content-type"] == "video/mp4"
    assert headers["content-length"] == str(SIZE)
    assert headers["accept-ranges"] == "bytes"
    assert headers["cache-control"] == "public, max-age=31536000, immutable"
    assert headers["x-content-type-options"] == "nosniff"
    policy = [part.strip() for part in headers["content-security-policy"].split(";")]
    assert "sandbox" in policy
    assert "default-src 'none'" in policy
    assert re.fullmatch(r'"[\x21\x23-\x7e]+"', headers["etag"])
    assert "set-cookie" not in headers


async def test_a_server_stays_small_while_it_serves_a_large_file(start_server: StartServer) -> None:
    server = start_server()
    size = 200 * 2**20
    with (server.media / f"{'0' * 64}.mp4").open("wb") as file:
        file.truncate(size)
    process = psutil.Process(server.pid)
    async with client_of(server) as client:
        assert (await client.get("/v1/limits")).status_code == 200
        idle = most = process.memory_info().rss
        received = 0
        async with client.stream("GET", f"/media/{'0' * 64}.mp4") as response:
            async for chunk in response.aiter_raw():
                received += len(chunk)
                most = max(most, process.memory_info().rss)
    assert received == size
    assert most - idle < 16 * 2**20


async def test_both_slash_forms_answer_directly(client: httpx2.AsyncClient, stored: Stored) -> None:
    response = await client.get(stored.path + "/")
    assert (response.status_code, response.content) == (200, DATA)


async def test_head_has_the_headers_of_get_and_no_body(
    client: httpx2.AsyncClient, stored: Stored
) -> None:
    got, head = await client.get(stored.path), await client.head(stored.path)
    assert (head.status_code, head.content) == (200, b"")
    own = {"date", "x-request-id"}
    assert {name: value for name, value in head.headers.items() if name not in own} == {
        name: value for name, value in got.headers.items() if name not in own
    }


async def test_the_etag_is_of_the_bytes_and_not_of_the_files_date(
    server: Server, client: httpx2.AsyncClient, stored: Stored
) -> None:
    # A restored backup, or another node's copy, has another date.
    (name,) = kept(server.media)
    os.utime(server.media / name, (0, 0))
    assert (await client.get(stored.path)).headers["etag"] == stored.etag


async def test_two_files_have_two_etags(client: httpx2.AsyncClient) -> None:
    form = encode(*fields(), image(JPEG), video(MP4))
    assert (await client.post("/postimages", content=form, headers=form_type())).content == b"{}"
    (row,) = (await client.get("/getimages")).json()
    assert len({(await client.get(url)).headers["etag"] for url in row[4:]}) == 2


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        # AVPlayer asks for this first and refuses to play what does not answer 206.
        pytest.param("bytes=0-1", 0, 1, id="two bytes"),
        pytest.param("bytes=0-0", 0, 0, id="one byte"),
        pytest.param("bytes=-500", SIZE - 500, SIZE - 1, id="the last 500"),
        pytest.param("bytes=5-", 5, SIZE - 1, id="from the sixth"),
        pytest.param("bytes=0-", 0, SIZE - 1, id="all of it"),
        pytest.param(f"bytes=0-{SIZE - 1}", 0, SIZE - 1, id="all of it, both ends"),
        pytest.param(f"bytes={SIZE - 1}-", SIZE - 1, SIZE - 1, id="the last byte"),
        pytest.param("bytes=-1", SIZE - 1, SIZE - 1, id="the last byte, from the end"),
        pytest.param("bytes=100-999999999", 100, SIZE - 1, id="an end past the end"),
        pytest.param(f"bytes=-{SIZE}", 0, SIZE - 1, id="a suffix of the whole size"),
        pytest.param("bytes=-999999999", 0, SIZE - 1, id="a suffix over the size"),
        pytest.param("bytes=1000-1999", 1000, 1999, id="the middle"),
    ],
)
async def test_a_range_is_answered_with_those_bytes(
    client: httpx2.AsyncClient, stored: Stored, asked: str, first: int, last: int
) -> None:
    response = await client.get(stored.path, headers={"Range": asked})
    assert (response.status_code, response.content) == (206, DATA[first : last + 1])
    assert response.headers["content-range"] == f"bytes {first}-{last}/{SIZE}"
    assert response.headers["content-length"] == str(last + 1 - first)
    assert response.headers["content-type"] == "video/mp4"
    assert response.headers["etag"] == stored.etag
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in response.headers["content-security-policy"]


@pytest.mark.parametrize(
    "asked",
    [f"bytes={SIZE}-", f"bytes={SIZE}-{SIZE + 5}", "bytes=999999999-", "bytes=-0"],
)
async def test_a_range_past_the_end_cannot_be_satisfied(
    client: httpx2.AsyncClient, stored: Stored, asked: str
) -> None:
    response = await client.get(stored.path, headers={"Range": asked})
    problem(response, 416)
    assert response.headers["content-range"] == f"bytes */{SIZE}"
    # An error must not be kept for a year.
    assert "immutable" not in response.headers.get("cache-control", "")


@pytest.mark.parametrize(
    "asked",
    [
        "bytes=",
        "bytes=-",
        "bytes=abc",
        "bytes=a-b",
        "bytes=5-2",
        "bytes=--1",
        "bytes=1-2-3",
        "bytes=+0-+1",
        "bytes=1_0-2_0",
        "bytes=0x0-0x1",
        "bytes=0.0-1.0",
        "bytes 0-1",
        "0-1",
        "items=0-1",
        "",
    ],
)
async def test_a_malformed_range_is_ignored(
    client: httpx2.AsyncClient, stored: Stored, asked: str
) -> None:
    response = await client.get(stored.path, headers={"Range": asked})
    assert (response.status_code, response.content) == (200, DATA)
    assert "content-range" not in response.headers


async def test_several_ranges_are_all_in_the_answer(
    client: httpx2.AsyncClient, stored: Stored
) -> None:
    # RFC 9110 §14.2 leaves the choice: the parts asked for, or the whole file.
    response = await client.get(stored.path, headers={"Range": "bytes=0-9,1000-1009"})
    if response.status_code == 200:
        assert response.content == DATA
        return
    assert response.status_code == 206
    assert response.headers["content-type"].startswith("multipart/byteranges; boundary=")
    for first in (0, 1000):
        assert f"bytes {first}-{first + 9}/{SIZE}".encode() in response.content
        assert DATA[first : first + 10] in response.content


@pytest.mark.parametrize(
    "asked",
    ["bytes=" + ",".join(["0-"] * 1000), "bytes=" + ",".join(f"{n}-{n}" for n in range(0, 999, 3))],
    ids=["overlapping", "tiny"],
)
async def test_many_ranges_do_not_make_a_larger_answer_than_the_file(
    client: httpx2.AsyncClient, stored: Stored, asked: str
) -> None:
    # RFC 9110 §17.15: small requests for large answers are an attack.
    response = await client.get(stored.path, headers={"Range": asked})
    assert response.status_code in {200, 206, 416}
    assert len(response.content) <= SIZE


async def test_a_range_is_honoured_while_the_file_is_the_one_meant(
    client: httpx2.AsyncClient, stored: Stored
) -> None:
    headers = {"Range": "bytes=0-1", "If-Range": stored.etag}
    response = await client.get(stored.path, headers=headers)
    assert (response.status_code, response.content) == (206, DATA[:2])


@pytest.mark.parametrize(
    "condition",
    ['"another"', "W/{etag}", "Thu, 01 Jan 1970 00:00:00 GMT", "nonsense", '{etag}, "another"'],
)
async def test_a_range_of_another_file_is_answered_with_the_whole(
    client: httpx2.AsyncClient, stored: Stored, condition: str
) -> None:
    headers = {"Range": "bytes=0-1", "If-Range": condition.format(etag=stored.etag)}
    response = await client.get(stored.path, headers=headers)
    assert (response.status_code, response.content) == (200, DATA)


@pytest.mark.parametrize("asked", ["bytes=0-1", "bytes=999999999-"])
async def test_head_ignores_a_range(client: httpx2.AsyncClient, stored: Stored, asked: str) -> None:
    # RFC 9110 §14.2: ranges are defined for GET alone.
    head = await client.head(stored.path, headers={"Range": asked})
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(SIZE)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("condition", ["{etag}", "W/{etag}", '"another", {etag}', "*"])
async def test_a_reader_who_has_the_file_is_told_so(
    client: httpx2.AsyncClient, stored: Stored, condition: str, method: str
) -> None:
    headers = {"If-None-Match": condition.format(etag=stored.etag)}
    response = await client.request(method, stored.path, headers=headers)
    assert (response.status_code, response.content) == (304, b"")
    assert response.headers["etag"] == stored.etag
    assert response.headers["cache-control"] == "public, max-age=31536000, immutable"


async def test_a_reader_who_has_the_file_gets_no_range_of_it(
    client: httpx2.AsyncClient, stored: Stored
) -> None:
    headers = {"If-None-Match": stored.etag, "Range": "bytes=0-1"}
    response = await client.get(stored.path, headers=headers)
    assert (response.status_code, response.content) == (304, b"")


@pytest.mark.parametrize("condition", ['"another"', 'W/"another"', "nonsense", ""])
async def test_a_reader_who_has_another_file_gets_this_one(
    client: httpx2.AsyncClient, stored: Stored, condition: str
) -> None:
    response = await client.get(stored.path, headers={"If-None-Match": condition})
    assert (response.status_code, response.content) == (200, DATA)


@pytest.fixture
def traps(server: Server, stored: Stored) -> Iterator[Path]:
    """What a traversal would find: a file beside the media, a hidden one, a folder with one.

    Also a link to it, and a pipe, at which whoever opens it would wait.
    """
    assert stored
    secret = server.media.parent / "secret.jpg"
    hidden = server.media / ".hidden.jpg"
    folder = server.media / "sub"
    folder.mkdir()
    link, pipe = server.media / "link.jpg", server.media / "pipe.jpg"
    for trap in (secret, hidden, folder / "inside.jpg"):
        trap.write_bytes(JPEG + SECRET)
    link.symlink_to(secret)
    os.mkfifo(pipe)
    try:
        yield secret
    finally:
        for trap in (secret, hidden, link, pipe):
            trap.unlink()
        shutil.rmtree(folder)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "target",
    [
        pytest.param("/media", id="the folder"),
        pytest.param("/media/", id="the folder with a slash"),
        pytest.param("/media/.", id="dot"),
        pytest.param("/media/..", id="dots"),
        pytest.param("/media/%2e", id="dot escaped"),
        pytest.param("/media/%2e%2e", id="dots escaped"),
        pytest.param("/media/unknown.jpg", id="unknown"),
        pytest.param("/media/7401355b-fc63-458a-bddc-f90d2da400d3.jpg", id="unknown UUID"),
        pytest.param("/media/../secret.jpg", id="up"),
        pytest.param("/media/../../stderr", id="up twice"),
        pytest.param("/media/..%2fsecret.jpg", id="up, slash escaped"),
        pytest.param("/media/%2e%2e/secret.jpg", id="up, dots escaped"),
        pytest.param("/media/%2e%2e%2fsecret.jpg", id="up, escaped"),
        pytest.param("/media/%2E%2E%2Fsecret.jpg", id="up, escaped in capitals"),
        pytest.param("/media/%252e%252e%252fsecret.jpg", id="up, escaped twice"),
        pytest.param("/media/..%5csecret.jpg", id="up, backslash"),
        pytest.param("/media/..\\secret.jpg", id="up, raw backslash"),
        pytest.param("/media/sub/../../secret.jpg", id="down and up"),
        pytest.param("/media/.%00./secret.jpg", id="up with a NUL"),
        pytest.param("/media/..%c0%afsecret.jpg", id="up, overlong slash"),
        pytest.param("/media//etc/passwd", id="absolute"),
        pytest.param("/media/%2fetc%2fpasswd", id="absolute, escaped"),
        pytest.param("/media/{secret}", id="absolute secret"),
        pytest.param("/media/file:%2f%2f{secret}", id="file URL"),
        pytest.param("/media/.hidden.jpg", id="hidden"),
        pytest.param("/media/%2ehidden.jpg", id="hidden, escaped"),
        pytest.param("/media/./.hidden.jpg", id="hidden behind a dot"),
        pytest.param("/media/sub", id="a folder"),
        pytest.param("/media/sub/", id="a folder with a slash"),
        pytest.param("/media/sub/inside.jpg", id="in a folder"),
        pytest.param("/media/sub%2finside.jpg", id="in a folder, escaped"),
        pytest.param("/media/link.jpg", id="a link"),
        pytest.param("/media/pipe.jpg", id="a pipe"),
        pytest.param("/media/link.jpg?thumb", id="the thumbnail of a link"),
        pytest.param("/media/pipe.jpg?thumb", id="the thumbnail of a pipe"),
        pytest.param("/media/%00", id="NUL"),
        pytest.param("{path}%00", id="the key and NUL"),
        pytest.param("{path}%00.jpg", id="the key, NUL and an extension"),
        pytest.param("{path}.", id="the key and a dot"),
        pytest.param("{path}%20", id="the key and a blank"),
        pytest.param("{path}%0a", id="the key and a line feed"),
        pytest.param("{path}/x", id="below the key"),
        pytest.param("{path}/..", id="below the key and up"),
        pytest.param("/media/" + "a" * 255 + ".jpg", id="overlong"),
        pytest.param("/media/" + "a" * 5000, id="longer than a path"),
        pytest.param("/media/" + "a" * 244 + ".jpg?thumb", id="an overlong thumbnail"),
        pytest.param("/media/" + "a" * 5000 + ".jpg?thumb", id="a thumbnail longer than a path"),
        pytest.param("/media/%ff%fe.jpg", id="not UTF-8"),
        pytest.param("/media/%ed%a0%80.jpg", id="surrogate"),
        pytest.param("/media/%E6%97%A5.jpg", id="Chinese"),
        pytest.param("/media/~root", id="home"),
        pytest.param("/media/*", id="glob"),
    ],
)
async def test_nothing_but_a_key_is_served(
    server: Server, stored: Stored, traps: Path, target: str, method: str
) -> None:
    async with connect(server.url) as wire:
        await wire.request(method, target.format(path=stored.path, secret=traps))
        answer = await wire.answer(method)
    assert SECRET not in answer.content
    if method == "GET":
        problem(answer, 404)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert "etag" not in answer.headers
    assert "immutable" not in answer.headers.get("cache-control", "")
