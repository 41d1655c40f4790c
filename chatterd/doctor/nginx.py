"""The check `nginx`: whether Nginx lets through what the server takes.

A configuration is read as Nginx reads it, as far as the check needs it: blocks, what they inherit,
and which location answers a path. What is not understood is passed over.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from chatterd import settings
from chatterd.bodies import FORM_MAX_SIZE
from chatterd.doctor import Finding, ok, warning
from chatterd.doctor.certificate import CertificateFiles
from chatterd.proxy import KEEP_ALIVE_SECONDS

DEFAULT_FILES: Final = (
    Path("/etc/nginx/sites-enabled/chatterd"),
    Path("/etc/nginx/conf.d/chatterd.conf"),
)
"""Where it is looked for."""

_SIZE_MAX: Final = 2**20
_FILES_MAX: Final = 100
# What relative paths in a configuration start from.
_FOLDER: Final = Path("/etc/nginx")
_TOKEN: Final = re.compile(
    r"""\s+|\#[^\n]*|([{};])|"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'|((?:[^\s{};\\]|\\.|\$\{\w+\})+)""",
    re.DOTALL,
)
_RELOAD: Final = "sudo nginx -t && sudo systemctl reload nginx"
# Nginx's own defaults.
_BODY_SIZE, _READ_TIMEOUT, _UPSTREAM_KEEPALIVE = "1m", "60s", "60s"
# A waiting request is answered after 55 seconds at most, a stream has a comment every 15.
_LONGEST_SILENCE: Final = 55.0
_FORM_PATHS: Final = ("/postimages", "/v1/chatts")
_JSON_PATHS: Final = ("/postchatt",)
_MEDIA_PATH: Final = f"/media/{'0' * 64}.jpeg"


@dataclass
class Block:
    """A block: its name with arguments, its directives in order, and the blocks in it."""

    words: list[str]
    parent: "Block | None" = None
    directives: list[list[str]] = field(default_factory=list)
    blocks: list["Block"] = field(default_factory=list)

    def value(self, name: str, default: str) -> str:
        """Return the directive's first argument, also as it is inherited."""
        block: Block | None = self
        while block is not None:
            for words in block.directives:
                if words[0] == name and len(words) > 1:
                    return words[1]
            block = block.parent
        return default

    def expanded(self, text: str) -> str:
        """Return `text` with the variables that `set` has set, up to the first that it has not."""

        def replaced(match: re.Match[str]) -> str:
            block: Block | None = self
            while block is not None:
                for words in block.directives:
                    if words[0] == "set" and words[1:2] == ["$" + (match[1] or match[2])]:
                        return "".join(words[2:])
                block = block.parent
            return match[0]

        return re.sub(r"\$(?:(\w+)|\{(\w+)\})", replaced, text).partition("$")[0]

    def all_blocks(self, name: str) -> Iterator["Block"]:
        """Yield the blocks of this name in it, at any depth, as they stand."""
        for block in self.blocks:
            if block.words[0] == name:
                yield block
            yield from block.all_blocks(name)


def read_configuration(path: Path) -> Block:
    """Read a file and what it includes; raises `OSError`, `UnicodeDecodeError`."""
    root = Block([])
    _Reader().read(path, root)
    return root


class _Reader:
    """Reads a file and those that it includes, up to some number: they may include themselves."""

    def __init__(self) -> None:
        self._files_left = _FILES_MAX

    def read(self, path: Path, block: Block) -> None:
        """Add to `block` what stands in the file."""
        if not self._files_left:
            return
        self._files_left -= 1
        with path.open("rb") as file:
            text = file.read(_SIZE_MAX).decode()
        outside = block
        words: list[str] = []
        for match in _TOKEN.finditer(text):
            mark, *texts = match.groups()
            if mark is None:
                words += [word for word in texts if word is not None]
                continue
            if mark == "{":
                inner = Block(words or [""], block)
                block.blocks.append(inner)
                block = inner
            elif mark == "}":
                # One too many does not end what the file stands in.
                block = block.parent if block is not outside and block.parent else block
            elif words:
                self._add(words, block, path)
            words = []

    def _add(self, words: list[str], block: Block, path: Path) -> None:
        if words[0] == "include" and len(words) > 1:
            for included in _included(words[1], path):
                self.read(included, block)
        else:
            block.directives.append(words)


def _included(pattern: str, including: Path) -> list[Path]:
    for folder in (_FOLDER, including.parent):  # the latter where it is not installed yet
        path = folder / pattern
        if found := sorted(each for each in path.parent.glob(path.name) if each.is_file()):
            return found
    return []


def certificate_files(configuration: Block) -> CertificateFiles | None:
    """Return the first certificate that it names, with its key."""
    for server in configuration.all_blocks("server"):
        certificate = server.value("ssl_certificate", "")
        if certificate and "$" not in certificate:
            key = server.value("ssl_certificate_key", "")
            return CertificateFiles(_FOLDER / certificate, _FOLDER / key if key else None)
    return None


def nginx_check(path: Path, configuration: Block) -> list[Finding]:
    """Look at where Nginx and the server disagree."""
    servers = [
        server
        for server in configuration.all_blocks("server")
        if any(each.value("proxy_pass", "") for each in server.all_blocks("location"))
    ]
    if not servers:
        return [
            warning(
                f"{path} has no server that passes requests on (proxy_pass).",
                "Name the right file with --nginx, or make one:",
                "chatterd nginx | sudo tee /etc/nginx/sites-available/chatterd",
            )
        ]
    findings: dict[str, Finding] = {}  # once each, however many servers have it
    for server in servers:
        for finding in (*_bodies(server), *_silence(server), *_media(server)):
            findings.setdefault(finding.found, finding)
    for finding in _upstreams(configuration):
        findings.setdefault(finding.found, finding)
    return list(findings.values()) or [ok(f"{path} agrees with the settings")]


def location_of(server: Block, path: str) -> Block | None:
    """Return the location that answers `path` in a server, by Nginx's rules.

    https://nginx.org/en/docs/http/ngx_http_core_module.html#location
    """
    best: Block | None = None
    length, is_final = -1, False
    patterns = []
    for location in _locations(server):
        *modifier, prefix = location.words[1:] or [""]
        match modifier:
            case ["="]:
                if path == prefix:
                    return location
            case ["~"] | ["~*"]:
                patterns.append((prefix, re.IGNORECASE if modifier == ["~*"] else 0, location))
            case _:
                if path.startswith(prefix) and len(prefix) > length:
                    best, length, is_final = location, len(prefix), modifier == ["^~"]
    if not is_final:
        for pattern, flags, location in patterns:
            if _matches(pattern, flags, path):
                return location
    return best


def _locations(server: Block) -> Iterator[Block]:
    return (block for block in server.blocks if block.words[0] == "location")


def _matches(pattern: str, flags: int, path: str) -> bool:
    try:
        # PCRE names groups with or without the P.
        return bool(re.search(re.sub(r"\(\?<(?=[A-Za-z_])", "(?P<", pattern), path, flags))
    except re.error:
        return False


def _passing(server: Block, path: str) -> Block | None:
    """Return the location of a route if its requests are passed on."""
    location = location_of(server, settings.ROOT_PATH + path)
    return location if location is not None and location.value("proxy_pass", "") else None


def _bodies(server: Block) -> Iterator[Finding]:
    for paths, limit in ((_FORM_PATHS, FORM_MAX_SIZE), (_JSON_PATHS, settings.JSON_MAX_SIZE)):
        for path in paths:
            if (location := _passing(server, path)) is None:
                continue
            text = location.value("client_max_body_size", _BODY_SIZE)
            size = _bytes(text)
            if size is None:
                continue
            right = f"client_max_body_size {limit};"
            if 0 < size < limit:
                yield warning(
                    f"Nginx refuses bodies for {path} from {text} on, with 413; the server takes"
                    f" {limit} bytes.",
                    f"Let it take as much, in the location of {path}: {right} Then:",
                    _RELOAD,
                )
            elif size == 0:
                yield warning(
                    f"Nginx takes bodies of any size for {path}, and keeps them on its disk; the"
                    f" server takes {limit} bytes.",
                    f"Give it the server's limit, in the location of {path}: {right} Then:",
                    _RELOAD,
                )
    for path in _FORM_PATHS:
        location = _passing(server, path)
        if location is not None and location.value("proxy_request_buffering", "on") == "off":
            yield warning(
                f"proxy_request_buffering is off for {path}: who is refused while sending gets 502"
                " and not the reason.",
                f"In the location of {path}: proxy_request_buffering on; Then:",
                _RELOAD,
            )


def _silence(server: Block) -> Iterator[Finding]:
    for path in ("/v1/chatts", "/v1/stream", "/v1/ws"):
        if (location := _passing(server, path)) is None:
            continue
        text = location.value("proxy_read_timeout", _READ_TIMEOUT)
        seconds = _seconds(text)
        if seconds is not None and seconds <= _LONGEST_SILENCE:
            yield warning(
                f"proxy_read_timeout is {text} for {path}: Nginx ends requests that wait for"
                " longer.",
                f"In the location of {path}: proxy_read_timeout 75s; Then:",
                _RELOAD,
            )


def _media(server: Block) -> Iterator[Finding]:
    root = settings.MEDIA_ROOT.resolve()
    asked = location_of(server, settings.ROOT_PATH + _MEDIA_PATH)
    # The server may answer which file it is (X-Accel-Redirect).
    internal = (each for each in server.all_blocks("location") if ["internal"] in each.directives)
    for location in (*([asked] if asked else []), *internal):
        alias = location.expanded(location.value("alias", ""))
        if alias and Path(alias).resolve() != root:
            yield warning(
                f"Nginx looks for pictures in {alias}, the server keeps them in {root}.",
                "Name that folder in Nginx's configuration, and:",
                _RELOAD,
            )


def _upstreams(configuration: Block) -> Iterator[Finding]:
    for upstream in configuration.all_blocks("upstream"):
        # Of its own: the directive of the same name outside is about clients.
        values = {words[0]: words[1] for words in upstream.directives if len(words) > 1}
        text = values.get("keepalive_timeout", _UPSTREAM_KEEPALIVE)
        seconds = _seconds(text)
        if "keepalive" in values and seconds is not None and seconds >= KEEP_ALIVE_SECONDS:
            yield warning(
                f"Nginx keeps idle connections to the server for {text}; the server closes them"
                f" after {KEEP_ALIVE_SECONDS} s: now and then a request gets 502.",
                f"In upstream {' '.join(upstream.words[1:])}: keepalive_timeout 60s; Then:",
                _RELOAD,
            )


def _bytes(text: str) -> int | None:
    match = re.fullmatch(r"(\d{1,15})([kmg]?)", text.lower())
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[match[2]] if match else None


def _seconds(text: str) -> float | None:
    units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}
    parts = re.findall(r"(\d{1,15})(ms|[smhd]?)", text)
    if "".join(number + unit for number, unit in parts) != text or not parts:
        return None
    return sum(int(number) * units[unit] for number, unit in parts)
