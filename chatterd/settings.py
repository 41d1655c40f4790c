"""Every setting, read once from the environment and from `.env` in the working directory.

The environment wins over the file. What each one means stands in `.env.example`. A wrong value
stops the program with one line.
"""

import ipaddress
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar
from urllib.parse import urlsplit

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from starlette.config import Config

T = TypeVar("T")


class SettingError(SystemExit):
    """A setting has a value that cannot be used.

    An exit and not an error, so that whoever imports the settings (chatterd, hypercorn or
    alembic) ends with the one line that matters instead of a traceback.
    """


try:
    _config = Config(".env" if Path(".env").is_file() else None)
except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
    raise SettingError(f"chatterd: The file .env cannot be read: {reason}.") from None


def _setting(name: str, cast: Callable[[str], T], default: str, *, right: str) -> T:
    """Return the setting `name`, cast from text; `right` says what a right value looks like."""

    def checked(text: str) -> T:
        if re.search(r"\s#", text):
            raise ValueError("has a comment behind its value; a comment needs a line of its own")
        return cast(text.strip())

    try:
        return _config(name, cast=checked, default=default)
    except ValueError as error:
        # Starlette's own message repeats the value, which may hold a password.
        fault = error.__context__ or error
        raise SettingError(f"chatterd: {name} {fault}. It must be {right}.") from None


def _optional(cast: Callable[[str], T]) -> Callable[[str], T | None]:
    return lambda text: cast(text) if text else None


def _integer(least: int, most: int) -> Callable[[str], int]:
    def cast(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text):
            raise ValueError(f"is {text!r}, which is no whole number")
        if not least <= int(text) <= most:
            raise ValueError(f"is {text}, which is out of range")
        return int(text)

    return cast


_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


def _database_url(text: str) -> URL:
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ValueError("cannot be read as a URL") from None
    if url.drivername not in {"postgres", "postgresql", "postgresql+asyncpg"}:
        raise ValueError(f"names the database {url.drivername!r}")
    if not url.database:
        raise ValueError("names no database")
    if url.port is not None and not 0 < url.port < 65536:
        raise ValueError(f"names the port {url.port}")
    if unknown := sorted(set(url.query) - {"host", "port", "ssl", "sslmode"}):
        raise ValueError(f"has {unknown[0]} behind its question mark, which chatterd does not know")
    for name in {"ssl", "sslmode"} & set(url.query):
        if url.query[name] not in _SSL_MODES:
            raise ValueError(
                f"has {name}={url.query[name]}, which is none of {', '.join(_SSL_MODES)}"
            )
    # libpq's spelling, which most hosting services print; asyncpg calls it `ssl`.
    if sslmode := url.query.get("sslmode"):
        url = url.difference_update_query(["sslmode"]).update_query_dict({"ssl": sslmode})
    return url.set(drivername="postgresql+asyncpg")


def _web_url(text: str) -> str:
    try:
        url = urlsplit(text)
        right = url.scheme in {"http", "https"} and url.hostname and url.port != 0
    except ValueError:
        right = False
    if not right:
        raise ValueError(f"is {text!r}, which is no address of a web server")
    if url.query or url.fragment or url.username is not None:
        raise ValueError("holds more than scheme, host, port and path")
    return text.rstrip("/")


def _hosts(text: str) -> tuple[str, ...]:
    hosts = tuple(host.strip().lower() for host in text.split(",") if host.strip())
    if not hosts:
        raise ValueError("names no host")
    for host in hosts:
        if not re.fullmatch(r"\*|(\*\.)?[a-z0-9_]([a-z0-9._-]*[a-z0-9_])?", host):
            try:
                ipaddress.ip_address(host.strip("[]"))
            except ValueError:
                raise ValueError(f"holds {host!r}, which is no host name") from None
    return hosts


Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


class Peers(NamedTuple):
    """Who a connection may come from: addresses in `networks`, and unix sockets if `unix`."""

    networks: tuple[Network, ...]
    unix: bool

    def have(self, address: str | None) -> bool:
        """Tell whether the peer at `address`, None for one at a unix socket, is among them."""
        if address is None:
            return self.unix
        if not self.networks:  # as mostly, and for each request: without a look at the address
            return False
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return False
        mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
        return any((mapped or found) in network for network in self.networks)


def _peers(text: str) -> Peers:
    words = [word.strip() for word in text.split(",") if word.strip()]
    networks = []
    for word in words:
        if word != "unix":
            try:
                networks.append(ipaddress.ip_network(word))
            except ValueError:
                raise ValueError(f"holds {word!r}, which is no address or network") from None
    return Peers(tuple(networks), "unix" in words)


def _one_of(*words: str) -> Callable[[str], str]:
    def cast(text: str) -> str:
        if text not in words:
            raise ValueError(f"is {text!r}")
        return text

    return cast


def _path_prefix(text: str) -> str:
    path = text.rstrip("/")
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)*", path) or {".", ".."} & set(path.split("/")):
        raise ValueError(f"is {text!r}, which is no path of letters, digits and ._~-")
    return path


def _folder(text: str) -> Path:
    path = Path(text).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"is {text!r}, which is a file")
    return path


DATABASE_URL: URL | None = _setting(
    "DATABASE_URL",
    _optional(_database_url),
    "",
    right="postgresql://user:password@host:5432/database, or empty for the embedded PostgreSQL",
)
DATABASE_POOL_SIZE: int = _setting(
    "DATABASE_POOL_SIZE", _integer(5, 1000), "10", right="a number of connections, 5 to 1000"
)
DATABASE_TIMEOUT: int = _setting(
    "DATABASE_TIMEOUT", _integer(1, 600), "5", right="a number of seconds, 1 to 600"
)
PG_BIN: Path | None = _setting(
    "PG_BIN",
    _optional(_folder),
    "",
    right="the folder that holds initdb and postgres, or empty for the ones that come along",
)
MEDIA_ROOT: Path = _setting("MEDIA_ROOT", _folder, "var/media", right="a folder")
PUBLIC_URL: str | None = _setting(
    "PUBLIC_URL",
    _optional(_web_url),
    "",
    right="an address like https://chatter.example, or empty for the address of each request",
)
ALLOWED_HOSTS: tuple[str, ...] = _setting(
    "ALLOWED_HOSTS",
    _hosts,
    "*",
    right="host names with commas between, like chatter.example,*.chatter.example, or * for any",
)
ROOT_PATH: str = _setting(
    "ROOT_PATH", _path_prefix, "", right="a path like /chatter, or empty for the root of the host"
)
TRUSTED_PROXIES: Peers = _setting(
    "TRUSTED_PROXIES",
    _peers,
    "unix",
    right="addresses and networks with commas between, unix for whoever connects to a unix socket",
)
PROXY_HEADERS: str = _setting(
    "PROXY_HEADERS",
    _one_of("x-forwarded", "forwarded"),
    "x-forwarded",
    right="x-forwarded, for X-Forwarded-For and the like, or forwarded, for the header of RFC 7239",
)
METRICS_ALLOWED: Peers = _setting(
    "METRICS_ALLOWED",
    _peers,
    "127.0.0.1,::1,unix",
    right="addresses and networks with commas between, unix for whoever connects to a unix socket",
)
OLLAMA_URL: str = _setting(
    "OLLAMA_URL", _web_url, "http://localhost:11434", right="an address like http://localhost:11434"
)
NAME_MAX_LENGTH: int = _setting(
    "NAME_MAX_LENGTH", _integer(1, 10_000), "255", right="a number of characters, 1 to 10000"
)
MESSAGE_MAX_LENGTH: int = _setting(
    "MESSAGE_MAX_LENGTH",
    _integer(1, 1_000_000),
    "4096",
    right="a number of characters, 1 to 1000000",
)
JSON_MAX_SIZE: int = _setting(
    "JSON_MAX_SIZE", _integer(1024, 2**30), "65536", right="a number of bytes, 1024 to 1073741824"
)
MEDIA_MAX_SIZE: int = _setting(
    "MEDIA_MAX_SIZE",
    _integer(1, 2**40),
    "10485760",
    right="a number of bytes, 1 to 1099511627776",
)
MEDIA_MAX_PIXELS: int = _setting(
    "MEDIA_MAX_PIXELS",
    _integer(1, 10**9),
    "50000000",
    right="a number of pixels, 1 to 1000000000",
)
MEDIA_TOTAL_SIZE: int | None = _setting(
    "MEDIA_TOTAL_SIZE",
    _optional(_integer(1, 2**50)),
    "",
    right="a number of bytes, 1 to 1125899906842624, or empty for no limit",
)
MEDIA_FREE_FLOOR: int = _setting(
    "MEDIA_FREE_FLOOR",
    _integer(0, 2**50),
    "268435456",
    right="a number of bytes, 0 to 1125899906842624",
)
UPLOADS_MAX: int = _setting(
    "UPLOADS_MAX", _integer(1, 10_000), "64", right="a number of uploads, 1 to 10000"
)
STREAM_MAX_SUBSCRIBERS: int = _setting(
    "STREAM_MAX_SUBSCRIBERS",
    _integer(0, 1_000_000),
    "1000",
    right="a number of connections, 0 to 1000000",
)
FEED_CACHE_BYTES: int = _setting(
    "FEED_CACHE_BYTES",
    _integer(2**20, 2**40),
    "67108864",
    right="a number of bytes, 1048576 to 1099511627776",
)
UPLOAD_TIMEOUT: int = _setting(
    "UPLOAD_TIMEOUT", _integer(1, 86_400), "300", right="a number of seconds, 1 to 86400"
)
SHUTDOWN_TIMEOUT: int = _setting(
    "SHUTDOWN_TIMEOUT", _integer(0, 3600), "30", right="a number of seconds, 0 to 3600"
)
LOG_LEVEL: str = _setting(
    "LOG_LEVEL",
    _one_of("debug", "info", "warning", "error"),
    "info",
    right="debug, info, warning or error",
)
LOG_FORMAT: str = _setting(
    "LOG_FORMAT",
    _one_of("auto", "text", "json"),
    "auto",
    right="text, json, or auto for text on a terminal and JSON elsewhere",
)
SLOW_QUERY_MILLISECONDS: int = _setting(
    "SLOW_QUERY_MILLISECONDS",
    _integer(0, 600_000),
    "500",
    right="a number of milliseconds, 0 to 600000",
)
