"""The check `server`: what the servers say that run here."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import httpx2
import psutil

from chatterd import settings
from chatterd.doctor import Finding, fault, ok, warning

DEFAULT_URL: Final = "http://127.0.0.1:8000"
SOCKETS: Final = Path("/run/chatterd")
"""Where the servers of deploy/systemd have their sockets."""

_SECONDS: Final = 5.0
_START: Final = "sudo systemctl start chatterd.target"
_RESTART: Final = "sudo /opt/chatterd/deploy/rolling-restart"


async def server_check(address: str | None) -> list[Finding]:
    """Ask the server at `address`, a URL or unix:PATH; without one, those that may be here."""
    addresses = (
        [address] if address else [f"unix:{path}" for path in sorted(SOCKETS.glob("*.sock"))]
    )
    findings, ready = [], []
    for each in addresses or [DEFAULT_URL]:
        finding = await _ask(each)
        if finding is None:
            ready.append(each)
        elif addresses:
            findings.append(finding)
        else:
            return [ok(f"none at {DEFAULT_URL}; --url names another")]
    return findings or [ok(f"ready at {', '.join(ready)}")]


async def _ask(address: str) -> Finding | None:
    """Return what is wrong with a server, or None. Where nobody answers, that is a fault."""
    socket = address.removeprefix("unix:")
    transport = httpx2.AsyncHTTPTransport(uds=socket) if socket != address else None
    base_url = "http://localhost" if transport else address
    try:
        async with httpx2.AsyncClient(
            base_url=base_url, transport=transport, timeout=_SECONDS, trust_env=False
        ) as client:
            headers = {"host": host} if (host := _host()) else {}
            ready = await client.get("/readyz", headers=headers)
            limits = await client.get("/v1/limits", headers=headers)
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        return fault(
            f"The server at {address} does not answer: {error or type(error).__name__}.",
            "See why, and start it:",
            "sudo journalctl -u 'chatterd@*' -n 50",
            _START,
        )
    if ready.status_code == 503:
        return fault(
            f"The server at {address} is not ready: {_failed(ready)}.",
            "Mend what the other checks find. If they find nothing, start it anew:",
            _RESTART,
        )
    if ready.status_code != 200:
        return warning(
            f"{address} answers /readyz with {ready.status_code}: it is no chatterd of this"
            " version.",
            "Name the right address with --url; after an update, start the servers anew:",
            _RESTART,
        )
    return _other_limits(address, limits)


def _host() -> str | None:
    """Return a name that ALLOWED_HOSTS allows; None where it allows any."""
    if "*" in settings.ALLOWED_HOSTS:
        return None
    public = urlsplit(settings.PUBLIC_URL or "").hostname
    named = (host for host in settings.ALLOWED_HOSTS if not host.startswith("*"))
    return public or next(named, settings.ALLOWED_HOSTS[0].replace("*", "doctor"))


def _failed(ready: httpx2.Response) -> str:
    """Return what a server says is not ready, in its own words."""
    try:
        said = json.loads(ready.content)
        return str(said.get("detail") or said).removeprefix("Not ready: ").rstrip(".")
    except (ValueError, AttributeError):
        return f"it says {ready.text[:100]!r}"


def _other_limits(address: str, limits: httpx2.Response) -> Finding | None:
    """Compare the limits that a server runs with to those that are set here."""
    try:
        theirs = dict(json.loads(limits.content))
    except (ValueError, TypeError):
        theirs = {}
    for name, value in theirs.items():
        ours = getattr(settings, name.upper(), value)
        if ours != value:
            return warning(
                f"The server at {address} has {name.upper()}={value}, the settings here say"
                f" {ours}.",
                "Look from the server's folder and with its environment; if these are its"
                " settings, start it anew:",
                _RESTART,
            )
    return None


def processes_here() -> int:
    """Return how many processes of this user serve here; at least 1."""
    lines = []
    for process in psutil.process_iter(["cmdline", "uids"]):
        words, uids = process.info["cmdline"], process.info["uids"]
        if words and uids and uids.effective == os.geteuid():
            lines.append(words)
    return max(1, processes_of(lines))


def processes_of(command_lines: Iterable[list[str]]) -> int:
    """Return how many processes serve, by the command lines of all that run."""
    return sum(
        _workers(words)
        for words in command_lines
        # A worker of one that is counted has its socket from there.
        if "chatterd" in (Path(word).name for word in words[:4])
        and "serve" in words
        and "--fd" not in words
    )


def _workers(words: list[str]) -> int:
    text = " ".join(words)
    match = re.search(r"--workers[= ](\d+)", text)
    return int(match[1]) if match else 1
