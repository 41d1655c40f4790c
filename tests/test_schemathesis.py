"""Schemathesis reads /openapi.json and asks the server for what the document says, and against it.

It asks the same each time: its examples are derived from the document, not drawn.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import anyio.to_thread

from tests.multipart import encode, fields, form_type, image
from tests.process import ROOT
from tests.samples import JPEG

if TYPE_CHECKING:
    from pathlib import Path

    import httpx2

    from tests.process import Server

SECONDS = 110
CONFIGURATION = """
hooks = "tests.schemathesis_hooks"
continue-on-failure = true

[generation]
deterministic = true
max-examples = 20

[warnings]
fail-on = true

# JSON Schema cannot say which requests are refused for more than one of their parts.
[checks.positive_data_acceptance]
enabled = false

[[operations]]
include-path = "/media/{{key}}"
parameters = {{ "path.key" = "{key}" }}

# It sends a picture as a video, too, and wonders about the answer.
[[operations]]
include-path = "/postimages"
warnings = false

# It never ends.
[[operations]]
include-name = "GET /v1/stream"
enabled = false

# It is no HTTP any more.
[[operations]]
include-path = "/v1/ws"
enabled = false
"""


async def test_the_server_answers_as_the_document_says_whatever_is_asked(
    server: Server, client: httpx2.AsyncClient, tmp_path: Path
) -> None:
    form = encode(*fields(), image(JPEG))
    posted = await client.post("/v1/chatts", content=form, headers=form_type())
    key = posted.json()["image"]["url"].rpartition("/")[2]
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION.format(key=key))
    done = await anyio.to_thread.run_sync(run_schemathesis, f"{server.url}/openapi.json", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def run_schemathesis(url: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", url],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
