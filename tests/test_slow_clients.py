"""Clients that send a byte a second keep nobody else from an answer, directly and behind Nginx."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from bench.slow import slow_clients
from tests.live import connect
from tests.multipart import encode, fields, form_type, image
from tests.nginx import Nginx
from tests.samples import JPEG

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import StartServer
    from tests.live import Answer, Line

SLOW, NORMAL, REQUESTS_EACH = 500, 32, 10
# What an upload has when less than a KiB a second comes.
PATIENCE_SECONDS = 30


async def ask(url: str, number: int) -> list[Answer]:
    """Read, post and upload in turn, on one connection."""
    form = encode(*fields("ann", "look"), image(JPEG))
    answers = []
    async with connect(url) as line:
        for _ in range(REQUESTS_EACH):
            body = json.dumps({"name": "ann", "message": f"from {number}"}).encode()
            answers += [
                await line.ask("GET", "/getchatts?limit=10"),
                await line.ask("POST", "/postchatt", body),
            ]
        # One place for uploads is all it takes, while the slow ones have come and gone.
        answers.append(await line.ask("POST", "/postimages", form, Content_Type=FORM_TYPE))
    return answers


FORM_TYPE = form_type()["Content-Type"]


@pytest.mark.parametrize("way", ["direct", "nginx"])
async def test_beside_500_clients_that_send_a_byte_a_second_32_others_get_all_their_answers(
    start_server: StartServer, tmp_path: Path, way: str
) -> None:
    # Each slow upload has a place until it is given up; the others need one, too.
    server = start_server(UPLOADS_MAX=str(SLOW))
    if way == "direct":
        await _beside_slow_clients(server.url)
    else:
        with Nginx(tmp_path, server.url, media=server.media) as nginx:
            await _beside_slow_clients(nginx.url)


async def _beside_slow_clients(url: str) -> None:
    port = int(url.rpartition(":")[2])
    with slow_clients(port, SLOW):
        users = await asyncio.gather(*(ask(url, number) for number in range(NORMAL)))
    for answers in users:
        assert [answer.status for answer in answers] == [200] * (2 * REQUESTS_EACH + 1)


async def test_an_upload_that_trickles_in_is_given_up_and_its_place_is_free_again(
    start_server: StartServer,
) -> None:
    server = start_server(UPLOADS_MAX="1")
    form = encode(*fields("ann", "look"), image(JPEG))
    async with connect(server.url) as line, connect(server.url) as other:
        begun = time.monotonic()
        headers = {"Content_Type": FORM_TYPE, "Content_Length": str(len(form))}
        await line.begin("POST", "/postimages", **headers)
        trickling = asyncio.create_task(_trickle(line, form))
        async with asyncio.timeout(2 * PATIENCE_SECONDS):
            while (
                b"\nchatterd_uploads_in_flight 1.0\n"
                not in (await other.ask("GET", "/metrics")).body
            ):
                pass
            answer = await _upload(other, form)
            assert answer.json["code"] == "too-many-uploads"
            while answer.status != 200:
                assert answer.status == 503
                await asyncio.sleep(0.1)
                answer = await _upload(other, form)
        assert time.monotonic() - begun >= PATIENCE_SECONDS
        assert answer.body == b"{}"
        trickling.cancel()
        await asyncio.gather(trickling, return_exceptions=True)


async def _trickle(line: Line, form: bytes) -> None:
    """Send a form byte by byte, as long as the server takes it."""
    with suppress(ConnectionError):
        for place in range(len(form)):
            await line.body(form[place : place + 1])
            await asyncio.sleep(0.2)


async def _upload(line: Line, form: bytes) -> Answer:
    return await line.ask("POST", "/postimages", form, Content_Type=FORM_TYPE)
