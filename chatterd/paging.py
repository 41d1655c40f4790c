"""Which part of the feed a query asks for, and the way to the parts beside it (contract §2)."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, quote
from uuid import UUID

from chatterd import settings
from chatterd.errors import Problem

LIMIT_MAX: Final = 500
"""The most chatts on a page."""
WAIT_MAX: Final = 55
"""The most seconds that a request may wait for changes."""
_LIMIT_DEFAULT: Final = 50
_UUID: Final = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE | re.ASCII)


class Wanted(NamedTuple):
    """A page: `limit` rows before or after a chatt, or the newest.

    Where `since` is given, it is the first changes after that cursor instead, and `wait` the
    seconds to wait for one.
    """

    limit: int
    before: UUID | None = None
    after: UUID | None = None
    since: str | None = None
    wait: int = 0


@lru_cache(256)
def wanted(query: bytes, *, with_changes: bool = False) -> Wanted | None:
    """Return the page that a query string asks for, if any; raises `Problem` 422.

    `with_changes` allows since and wait.
    """
    allowed = {"limit", "before", "after"} | ({"since", "wait"} if with_changes else set())
    fields: dict[str, str] = {}
    for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name not in allowed or name in fields:
            raise Problem(
                "bound-invalid",
                f"The parameter {name[:64]!r} is unknown or there twice;"
                f" a page is asked for by {', '.join(sorted(allowed))}.",
            )
        fields[name] = value
    if not fields:
        return None
    limit = fields.get("limit", str(_LIMIT_DEFAULT))
    if not re.fullmatch("[0-9]{1,9}", limit) or not 1 <= int(limit) <= LIMIT_MAX:
        raise Problem("limit-invalid", f"limit must be a number from 1 to {LIMIT_MAX}.")
    if len({"before", "after", "since"} & fields.keys()) > 1:
        raise Problem("bound-invalid", "before, after and since exclude each other.")
    return Wanted(
        int(limit),
        _bound(fields, "before"),
        _bound(fields, "after"),
        fields.get("since"),
        _wait(fields),
    )


NEWEST: Final = Wanted(_LIMIT_DEFAULT)
"""The page for those who ask for none."""


def chatt_id(text: str) -> UUID | None:
    """Return the id that a text is, or None."""
    # UUID() alone takes more than UUIDs.
    return UUID(text) if _UUID.fullmatch(text) else None


def _bound(fields: Mapping[str, str], name: str) -> UUID | None:
    if name not in fields:
        return None
    bound = chatt_id(fields[name])
    if bound is None:
        raise Problem("bound-invalid", f"{name} must be the id of a chatt, a UUID.")
    return bound


def _wait(fields: Mapping[str, str]) -> int:
    if "wait" not in fields:
        return 0
    if "since" not in fields:
        raise Problem("bound-invalid", "wait goes with since: without a cursor, nothing is new.")
    if not re.fullmatch("[0-9]{1,2}", fields["wait"]) or int(fields["wait"]) > WAIT_MAX:
        raise Problem("wait-invalid", f"wait must be a number of seconds from 0 to {WAIT_MAX}.")
    return int(fields["wait"])


def links(path: str, page: Wanted, first: str | None, last: str | None) -> bytes:
    """Return the Link header: the pages before the chatt `first` and after `last` (RFC 8288).

    An empty page has neither.
    """
    if (bound := page.before or page.after) is not None:
        first, last = first or str(bound), last or str(bound)
    address = f"{settings.ROOT_PATH}{quote(path)}?limit={page.limit}"
    if first is None:  # nothing has been posted yet
        return f'<{address}>; rel="next"'.encode()
    return (
        f'<{address}&before={first}>; rel="prev", <{address}&after={last}>; rel="next"'
    ).encode()
