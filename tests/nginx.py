"""A real Nginx in front of the tests' servers, with the configuration that `chatterd nginx` prints.

As a program, it writes deploy/nginx anew.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

import trustme

from chatterd import nginx
from tests.process import ROOT, STOP_SECONDS, run, wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

PROGRAM = "/usr/sbin/nginx"
DEPLOYED = ROOT / "deploy" / "nginx"
EXAMPLE = nginx.Site(
    ("chatter.example",),
    nginx.DEFAULT_UPSTREAMS,
    Path("/var/lib/chatterd/media"),
    Path("/etc/letsencrypt/live/chatter.example/fullchain.pem"),
    Path("/etc/letsencrypt/live/chatter.example/privkey.pem"),
)
"""What stands in deploy/nginx."""

# What it takes for critical: an instance that is being restarted.
_NOT_THERE = "failed (2: No such file or directory) while connecting to upstream"
# What else an Nginx needs; Debian's own nginx.conf has it, at places that are root's.
_MAIN = """\
{user}
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log info;
events {{ worker_connections 2000; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""


class Certificate:
    """A certificate for this machine, and the file of who has issued it."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        issued = authority.issue_cert("127.0.0.1", "localhost")
        self.authority = folder / "authority.pem"
        self.chain, self.key = folder / "chain.pem", folder / "key.pem"
        authority.cert_pem.write_to_path(str(self.authority))
        issued.private_key_pem.write_to_path(str(self.key))
        for pem in issued.cert_chain_pems:
            pem.write_to_path(str(self.chain), append=True)


class Nginx:
    """A running Nginx. It must end without having met a fault.

    `upstreams` are the addresses of servers, or their URLs, `media` is their folder, and `settings`
    are theirs as far as they are not the default ones.
    """

    def __init__(
        self,
        folder: Path,
        *upstreams: str,
        certificate: Certificate | None = None,
        media: Path = Path("/nowhere"),
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        port, http_port = free_ports(2)
        site = nginx.Site(
            ("127.0.0.1",),
            tuple(urlsplit(each).netloc or each for each in upstreams),
            media,
            None if certificate is None else certificate.chain,
            None if certificate is None else certificate.key,
            port,
            http_port,
        )
        self.http_url = f"http://127.0.0.1:{http_port}"
        self.url = self.http_url if certificate is None else f"https://127.0.0.1:{port}"
        text = printed(folder, site, settings) if settings else nginx.whole(site)
        write_configuration(folder, text)
        with (folder / "output").open("wb") as output:
            self.process = subprocess.Popen(
                [PROGRAM, "-p", str(folder), "-c", str(folder / "nginx.conf")],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            wait_until(lambda: self._listens(http_port))
        except BaseException:
            self.process.kill()
            self.process.wait(STOP_SECONDS)
            raise

    def _listens(self, port: int) -> bool:
        assert self.process.poll() is None, (self.folder / "output").read_text()
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    @property
    def log(self) -> str:
        return (self.folder / "error.log").read_text()

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(STOP_SECONDS) == 0, self.log
        # That an instance is away is no fault, although Nginx calls it critical.
        faults = [
            line
            for line in self.log.splitlines()
            if re.search(r"\[(emerg|alert|crit)\]", line) and _NOT_THERE not in line
        ]
        assert not faults, faults[:5]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def printed(folder: Path, site: nginx.Site, settings: Mapping[str, str]) -> str:
    """Return what the command prints for the site, with settings that are not the default ones."""
    words = [f"--upstream={each}" for each in site.upstreams]
    words += [f"--server-name={each}" for each in site.names]
    words += [f"--port={site.port}", f"--http-port={site.http_port}"]
    if site.certificate:
        words += [f"--certificate={site.certificate}", f"--certificate-key={site.certificate_key}"]
    done = run(folder, "nginx", *words, **{"MEDIA_ROOT": str(site.media_root), **settings})
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_configuration(folder: Path, site: str) -> None:
    """Write what Nginx is started with, around the part that is ours."""
    # As root, it would become another user, to whom pytest's folders are closed.
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(_MAIN.format(folder=folder, user=user))
    (folder / "site.conf").write_text(site)


def check(folder: Path) -> str:
    """Have Nginx read the configuration in the folder; return what it says."""
    done = subprocess.run(
        [PROGRAM, "-t", "-p", str(folder), "-c", str(folder / "nginx.conf")],
        capture_output=True,
        text=True,
        timeout=STOP_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


if __name__ == "__main__":
    for name, text in nginx.files(EXAMPLE).items():
        (DEPLOYED / name).parent.mkdir(parents=True, exist_ok=True)
        (DEPLOYED / name).write_text(text)
