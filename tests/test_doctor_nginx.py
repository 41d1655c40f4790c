"""The check `nginx`: what Nginx's configuration is found to say, and where that is wrong."""

from __future__ import annotations

import socket
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import pytest

from chatterd import settings
from chatterd.bodies import FORM_MAX_SIZE
from chatterd.doctor.nginx import (
    certificate_files,
    location_of,
    nginx_check,
    read_configuration,
)
from tests.process import run, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chatterd.doctor import Finding

SITE = f"""\
upstream chatterd {{
    server unix:/run/chatterd/1.sock;
    keepalive 16;  # "idle" ones
    keepalive_timeout 60s;
}}
server {{
    listen 80;
    return 308 https://chatter.example$request_uri;
}}
server {{
    listen 443 ssl;
    ssl_certificate '/etc/ssl/chatter example.pem';
    ssl_certificate_key "/etc/ssl/key.pem";
    set $media {settings.MEDIA_ROOT};
    client_max_body_size {settings.JSON_MAX_SIZE};
    proxy_read_timeout 1m30s;
    location ~ "^/(?:postimages|v1/chatts)/?$" {{
        client_max_body_size {FORM_MAX_SIZE};
        proxy_pass http://chatterd;
    }}
    location /v1/stream {{
        proxy_read_timeout 1h;
        proxy_pass http://chatterd;
    }}
    location ~ "^/media/(?<key>[0-9a-f]{{64}}[.][a-z]+)$" {{
        alias $media/$key;
    }}
    location / {{
        proxy_pass http://chatterd;
    }}
}}
"""


def found(folder: Path, text: str) -> list[Finding]:
    path = folder / "chatterd.conf"
    path.write_text(text)
    return nginx_check(path, read_configuration(path))


def test_a_configuration_with_the_servers_limits_agrees(tmp_path: Path) -> None:
    (finding,) = found(tmp_path, SITE)
    assert finding.level == "ok", finding


def test_the_configuration_that_the_command_prints_agrees(tmp_path: Path) -> None:
    printed = run(tmp_path, "nginx", MEDIA_ROOT=str(settings.MEDIA_ROOT.resolve()))
    (finding,) = found(tmp_path, printed.stdout)
    assert finding.level == "ok", finding


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        (f"{FORM_MAX_SIZE}", f"{FORM_MAX_SIZE - 1}", "for /postimages from"),
        (f"client_max_body_size {FORM_MAX_SIZE};", "", "/postimages from 65536 on"),
        (f"{FORM_MAX_SIZE}", "20m", "from 20m on"),
        (f"{FORM_MAX_SIZE}", "0", "any size for /postimages"),
        (f"client_max_body_size {settings.JSON_MAX_SIZE}", "client_max_body_size 1k", "/postchatt"),
        ("keepalive_timeout 60s", "keepalive_timeout 75s", "keeps idle connections"),
        ("keepalive_timeout 60s", "keepalive_timeout 1h", "keeps idle connections"),
        ("set $media ", "set $media /elsewhere", "looks for pictures in /elsewhere"),
        ("proxy_read_timeout 1m30s", "proxy_read_timeout 30s", "proxy_read_timeout is 30s"),
        ("proxy_read_timeout 1h", "proxy_read_timeout 10", "is 10 for /v1/stream"),
        ("    set $media", "    proxy_request_buffering off; set $media", "buffering is off"),
        ("proxy_pass", "#", "no server that passes requests on"),
    ],
)
def test_where_nginx_and_the_server_disagree_is_a_warning(
    tmp_path: Path, was: str, now: str, words: str
) -> None:
    assert was in SITE
    findings = found(tmp_path, SITE.replace(was, now))
    assert {finding.level for finding in findings} == {"warning"}
    assert any(words in finding.found for finding in findings), findings
    assert all(finding.mend and finding.commands for finding in findings)


def test_the_certificate_is_that_of_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "chatterd.conf"
    path.write_text(SITE)
    files = certificate_files(read_configuration(path))
    assert files == (Path("/etc/ssl/chatter example.pem"), Path("/etc/ssl/key.pem"))
    path.write_text(SITE.replace("ssl_certificate", "#"))
    assert certificate_files(read_configuration(path)) is None


def test_what_a_configuration_includes_belongs_to_it_and_may_include_itself(
    tmp_path: Path,
) -> None:
    (tmp_path / "parts").mkdir()
    _, marker, rest = SITE.partition("    set $media")
    (tmp_path / "parts" / "1.conf").write_text(marker + rest.rpartition("}")[0])
    (tmp_path / "parts" / "2.conf").write_text(f"include {tmp_path}/parts/*.conf; }} }} }}")
    (finding,) = found(tmp_path, SITE.replace(marker + rest, "include parts/*.conf;\n}\n"))
    assert finding.level == "ok", finding


@pytest.mark.parametrize(
    "text",
    ["", "{", "}", "}}}{{{", "server { location", "a 'b", '"', "\\", "${", "location {}", "; ;"],
)
def test_what_is_no_configuration_is_passed_over(tmp_path: Path, text: str) -> None:
    (finding,) = found(tmp_path, text)
    assert finding.level == "warning"
    assert "no server that passes requests on" in finding.found


LOCATIONS = (
    "/",
    "= /",
    "/a",
    "/a/",
    "/a/b",
    "= /a/b",
    "^~ /fixed/",
    "/fixed/a",
    "~ ^/(?:postimages|v1/chatts)/?$",
    "~* \\.JPE?G$",
    "~ ^/media/(?<key>[0-9a-f]{4})$",
    "~ /b$",
)
PATHS = (
    *("/", "/a", "/a/", "/ab", "/a/b", "/a/b/", "/a/c/b", "/b"),
    *("/fixed/", "/fixed/a", "/fixed/a/b", "/fixed/x.jpg", "/x.jpg", "/X.JPEG", "/other/x.png"),
    *("/postimages", "/postimages/", "/postimagesx", "/v1/chatts", "/v1/chatts/1"),
    *("/media/0a1b", "/media/0a1x"),
)


def test_the_location_that_answers_is_the_one_that_nginx_takes(tmp_path: Path) -> None:
    site = tmp_path / "site.conf"
    with nginx(tmp_path, site) as port, httpx2.Client() as client:
        (server,) = read_configuration(site).all_blocks("server")
        for path in PATHS:
            location = location_of(server, path)
            said = client.get(f"http://127.0.0.1:{port}{path}").text
            assert location is not None, path
            assert " ".join(location.words[1:]) == said, path


@contextmanager
def nginx(folder: Path, site: Path) -> Iterator[int]:
    """Run an Nginx whose locations each answer with their own names."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    blocks = []
    for location in LOCATIONS:
        modifier, _, name = location.rpartition(" ")
        said = location.replace("$", "${dollar}").replace("\\", "\\\\")
        blocks.append(f'location {modifier} "{name}" {{ return 200 "{said}"; }}')
    site.write_text("\n".join([f"server {{ listen 127.0.0.1:{port};", *blocks, "}"]))
    main = folder / "nginx.conf"
    main.write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;\n"
        f"events {{}}\nhttp {{ access_log off; client_body_temp_path {folder}/body;\n"
        + "".join(
            f"{kind}_temp_path {folder}/{kind};" for kind in ("proxy", "fastcgi", "uwsgi", "scgi")
        )
        + f'geo $dollar {{ default "$"; }} include {site}; }}\n'
    )
    process = subprocess.Popen(["/usr/sbin/nginx", "-c", str(main), "-p", str(folder)])
    try:
        wait_until(lambda: answers(port) or process.poll() is not None)
        assert process.poll() is None, (folder / "error.log").read_text()
        yield port
    finally:
        process.terminate()
        process.wait(10)


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
