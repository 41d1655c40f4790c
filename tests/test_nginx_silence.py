"""A stream through Nginx in which nothing happens for long: minutes that take no processor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import httpx2
import pytest

from tests.nginx import Certificate, Nginx
from tests.process import Server
from tests.streams import EventStream, stream_of

if TYPE_CHECKING:
    from pathlib import Path

SILENCE_SECONDS = 180


async def silence(stream: EventStream) -> None:
    """Read nothing but comments for so long."""
    await stream.begin()
    end = anyio.current_time() + SILENCE_SECONDS
    while anyio.current_time() < end:
        assert await stream.block(SILENCE_SECONDS) == b":\n\n"


@pytest.mark.timeout(SILENCE_SECONDS + 60)
async def test_a_stream_through_nginx_survives_three_minutes_of_silence(
    own_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = Certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.authority))
    (tmp_path / "nginx").mkdir()
    with (
        Server(tmp_path, DATABASE_URL=own_database) as server,
        Nginx(tmp_path / "nginx", server.url, certificate=certificate) as nginx,
    ):
        async with (
            httpx2.AsyncClient(base_url=nginx.url, timeout=60) as http_1,
            httpx2.AsyncClient(base_url=nginx.url, timeout=60, http2=True) as http_2,
            stream_of(http_1) as one,
            stream_of(http_2) as two,
        ):
            async with anyio.create_task_group() as group:
                group.start_soon(silence, one)
                group.start_soon(silence, two)
            post = {"name": "ann", "message": "still there?"}
            assert (await http_2.post("/postchatt", json=post)).status_code == 200
            for stream in (one, two):
                assert (await stream.event()).json()["message"] == "still there?"
