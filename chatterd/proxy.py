"""Proxies in front of the server: what trusted ones say of a request, and how long they are kept.

They say who sent it, to which host, by which scheme. Only the peer's own word counts, and that of
proxies it names as far as these are trusted, too: what stands further left, anybody may have
written (RFC 7239 §8.1).
"""

import ipaddress
import re
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from starlette.types import Scope

from chatterd import settings

KEEP_ALIVE_SECONDS: Final = 75
"""How long an idle connection is kept. Proxies keep theirs for 60 seconds, which must be less: one
that we close a moment before a request comes on it costs the request."""

_FORWARDED: Final = b"forwarded"
_X_FORWARDED: Final = (b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host")
_SCHEMES: Final = ("http", "https")

# An address as proxies write it: bare, or with a port, an IPv6 one in brackets then.
_NODE: Final = re.compile(
    r"\[([0-9A-Fa-f:.]+)\](?::\d{1,5})?|([0-9.]+)(?::\d{1,5})?|([0-9A-Fa-f:.]+)"
)
# RFC 7239 §4: a pair, whose value is a token or a quoted string, and what separates it.
_PAIR: Final = re.compile(
    r"""[ \t]*(?:([\w!#$%&'*+.^`|~-]+)=([\w!#$%&'*+.^`|~-]+|"(?:[^"\\]|\\.)*"))?[ \t]*([;,]|$)""",
    re.ASCII,
)


class _Hop(NamedTuple):
    """What one proxy has said of what came to it; None is what it has not said.

    client: an address; empty where it does not tell, or what it tells is none.
    """

    client: str | None
    scheme: str | None
    host: str | None


def restore(scope: Scope) -> None:
    """Make of a request what it was before it came to proxies that are trusted.

    Sets the scope's client, scheme and Host header where a peer in TRUSTED_PROXIES tells them, in
    the way of PROXY_HEADERS, and takes ROOT_PATH off the path.
    """
    client = scope.get("client")
    if settings.TRUSTED_PROXIES.have(client[0] if client else None):
        _believe(scope)
    root = settings.ROOT_PATH
    if root and scope["path"].startswith(f"{root}/"):
        scope["path"] = scope["path"][len(root) :]


def _believe(scope: Scope) -> None:
    names = (_FORWARDED,) if settings.PROXY_HEADERS == "forwarded" else _X_FORWARDED
    said = {
        name: ",".join(value.decode("latin-1") for key, value in scope["headers"] if key == name)
        for name in names
    }
    if not any(said.values()):
        return
    hops = _forwarded(said[_FORWARDED]) if _FORWARDED in said else _x_forwarded(*said.values())
    believed = None
    for hop in reversed(hops):
        believed = hop
        if hop.client is None or not settings.TRUSTED_PROXIES.have(hop.client):
            break
    if believed is None:
        return
    if believed.client is not None:
        scope["client"] = (believed.client, 0)  # its port, nobody tells
    if believed.scheme is not None:
        is_websocket = scope["type"] == "websocket"
        scope["scheme"] = believed.scheme.replace("http", "ws") if is_websocket else believed.scheme
    if believed.host is not None:
        host = believed.host.encode("latin-1")
        others = [pair for pair in scope["headers"] if pair[0] != b"host"]
        scope["headers"] = [(b"host", host), *others]


def _x_forwarded(clients: str, schemes: str, hosts: str) -> Sequence[_Hop]:
    """Return the hops of X-Forwarded-*, of which only the nearest tells scheme and host.

    Proxies add themselves to the clients, but mostly put their own scheme and host in place.
    """
    scheme, host = _last(schemes).lower(), _last(hosts)
    known = scheme if scheme in _SCHEMES else None
    named = clients.split(",") if clients else [None]
    return [_Hop(name and _address(name), known, host or None) for name in named]


def _last(values: str) -> str:
    return values.rpartition(",")[2].strip()


def _forwarded(value: str) -> Sequence[_Hop]:
    """Return the hops of RFC 7239's header; one that tells nothing for a header that is malformed.

    Anybody can make it so, behind a proxy that adds to it, and is no more trusted for that.
    """
    try:
        return [
            _Hop(
                _address(pairs["for"]) if "for" in pairs else None,
                pairs["proto"].lower() if pairs.get("proto", "").lower() in _SCHEMES else None,
                pairs.get("host"),
            )
            for pairs in _elements(value)
        ]
    except ValueError:
        return [_Hop("", None, None)]


def _elements(value: str) -> Iterator[dict[str, str]]:
    """Yield the pairs of each element, by lower-case name; raises `ValueError`."""
    pairs: dict[str, str] = {}
    place = 0
    while place <= len(value):
        match = _PAIR.match(value, place)
        if match is None:
            raise ValueError(value)
        name, said, end = match.groups()
        if name is not None:
            text = re.sub(r"\\(.)", r"\1", said[1:-1]) if said[0] == '"' else said
            if name.lower() in pairs:
                raise ValueError(value)
            pairs[name.lower()] = text
        if end != ";":
            if pairs:
                yield pairs
            pairs = {}
        place = match.end() + (not end)


def _address(text: str) -> str:
    """Return the address that a proxy names; an empty one where it hides it, or names none."""
    match = _NODE.fullmatch(text.strip())
    try:
        return str(ipaddress.ip_address(match[1] or match[2] or match[3])) if match else ""
    except ValueError:
        return ""
