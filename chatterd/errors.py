"""Every error a client can meet, and the one place that turns them into answers.

An error is a `Problem` with a stable code from `CATALOGUE`; its answer is
`application/problem+json` (RFC 9457, contract §3).
"""

import errno
import http
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

logger = logging.getLogger(__name__)


class Kind(NamedTuple):
    """A kind of error: the status that its code always has, and when it is answered."""

    status: int
    meaning: str


CATALOGUE: Final[Mapping[str, Kind]] = {
    "request-malformed": Kind(400, "Nginx: the request is no HTTP that it understands"),
    "host-not-allowed": Kind(
        400, "the request names a host that is not in `ALLOWED_HOSTS`, or none"
    ),
    "name-too-long": Kind(400, "the name has more characters than `NAME_MAX_LENGTH`"),
    "message-too-long": Kind(400, "the message has more characters than `MESSAGE_MAX_LENGTH`"),
    "delete-token-wrong": Kind(
        403,
        (
            "`Chatterd-Delete-Token` is missing, or not the one that posting the chatt was "
            "answered with"
        ),
    ),
    "address-not-allowed": Kind(403, "the client's address is not in `METRICS_ALLOWED`"),
    "not-found": Kind(404, "there is nothing at this address"),
    "chatt-not-found": Kind(
        404, "there is no chatt with the id in the address, in `before` or in `after`"
    ),
    "method-not-allowed": Kind(
        405, "the address does not answer this method; `Allow` names those it does"
    ),
    "request-timeout": Kind(408, "the body took too long to arrive"),
    "idempotency-key-in-use": Kind(
        409,
        (
            "the first request with this `Idempotency-Key` is still under way; `Retry-After` says"
            " when to try again"
        ),
    ),
    "body-too-large": Kind(413, "the body, or a text in a form, is larger than its limit"),
    "image-too-large": Kind(413, "the picture is larger than `MEDIA_MAX_SIZE`"),
    "video-too-large": Kind(413, "the video is larger than `MEDIA_MAX_SIZE`"),
    "image-too-many-pixels": Kind(413, "the picture has more pixels than `MEDIA_MAX_PIXELS`"),
    "image-unsupported": Kind(
        415, "the bytes in `image` are no picture of a kind that is accepted"
    ),
    "video-unsupported": Kind(415, "the bytes in `video` are no video of a kind that is accepted"),
    "image-unclean": Kind(
        415, "what the picture tells about place and person cannot be taken out of it"
    ),
    "video-unclean": Kind(
        415, "what the video tells about place and person cannot be taken out of it"
    ),
    "image-undecodable": Kind(
        415, "the picture is damaged, or decoding it takes too much memory or time"
    ),
    "address-too-long": Kind(414, "Nginx: the address of the request is longer than it takes"),
    "range-not-satisfiable": Kind(
        416, "the range begins behind the file's end; `Content-Range` tells its size"
    ),
    "json-invalid": Kind(422, "the body is not a JSON object"),
    "form-invalid": Kind(422, "the body is not a complete multipart form"),
    "field-unknown": Kind(422, "there is a field that no chatt has"),
    "field-duplicate": Kind(422, "the form has a field twice"),
    "name-missing": Kind(422, "neither `name` nor `username` is there"),
    "name-invalid": Kind(
        422, "the name is not a string, not UTF-8, or has a character U+0000 in it"
    ),
    "name-blank": Kind(422, "the name is empty or white space"),
    "name-ambiguous": Kind(422, "`name` and `username` are there and differ"),
    "message-missing": Kind(422, "there is no `message`"),
    "message-invalid": Kind(
        422, "the message is not a string, not UTF-8, or has a character U+0000 in it"
    ),
    "image-invalid": Kind(422, "`image` is an empty file, or a text"),
    "video-invalid": Kind(422, "`video` is an empty file, or a text"),
    "chatt-refused": Kind(
        422, "the database does not take this chatt, for a rule that its operator added"
    ),
    "limit-invalid": Kind(422, "`limit` is no number from 1 to 500"),
    "bound-invalid": Kind(
        422,
        (
            "`before` or `after` is no UUID, two of `before`, `after` and `since` are given, "
            "`wait` without `since`, or a parameter is unknown or there twice"
        ),
    ),
    "wait-invalid": Kind(422, "`wait` is no number of seconds from 0 to 55"),
    "idempotency-key-invalid": Kind(
        422, "`Idempotency-Key` is not 1 to 255 visible ASCII characters"
    ),
    "idempotency-key-reused": Kind(422, "`Idempotency-Key` was used for another post"),
    "frame-invalid": Kind(422, "what came over the WebSocket is not what it takes"),
    "headers-too-large": Kind(431, "Nginx: the headers of the request are larger than it takes"),
    "internal-error": Kind(500, "a fault of the server; its log has the rest"),
    "llm-unreachable": Kind(502, "Ollama does not answer at `OLLAMA_URL`"),
    "bad-gateway": Kind(
        502, "Nginx: no server answers behind it; `Retry-After` says when to try again"
    ),
    "llm-busy": Kind(503, "too many prompts at once; `Retry-After` says when to try again"),
    "too-many-posts": Kind(
        503, "too many posts wait for the database; `Retry-After` says when to try again"
    ),
    "too-many-uploads": Kind(
        503,
        (
            "`UPLOADS_MAX` uploads are under way, or too many pictures wait to be decoded; "
            "`Retry-After` says when to try again"
        ),
    ),
    "too-many-subscribers": Kind(
        503,
        (
            "`STREAM_MAX_SUBSCRIBERS` streams, WebSockets and waiting requests are open; "
            "`Retry-After` says when to try again"
        ),
    ),
    "database-unavailable": Kind(
        503, "the database does not answer; `Retry-After` says when to try again"
    ),
    "not-ready": Kind(
        503, "`/readyz`: a check has failed, which `checks` names, or the server stops"
    ),
    "gateway-timeout": Kind(504, "Nginx: the server behind it takes too long to answer"),
    "storage-full": Kind(507, "there is no room for the file"),
}
"""Each code a problem can carry. Codes never change their meaning."""

BY_NGINX: Final = frozenset(
    {"request-malformed", "address-too-long", "headers-too-large", "bad-gateway", "gateway-timeout"}
)
"""The codes that only an Nginx in front of the server answers with (deploy/nginx)."""

# RFC 9110's; until 3.13, Python's phrases are those of earlier RFCs.
_TITLES: Final = {
    413: "Content Too Large",
    414: "URI Too Long",
    416: "Range Not Satisfiable",
    422: "Unprocessable Content",
}


class Problem(Exception):  # noqa: N818 - RFC 9457 names it so
    """Raised anywhere below a view to answer with an error.

    `code` is one of `CATALOGUE` and decides the status; `detail` is a sentence for the person
    who wrote the request: which field, what is wrong, what would be right. `members` are further
    ones of its JSON (RFC 9457 §3.2).
    """

    def __init__(
        self,
        code: str,
        detail: str,
        headers: Mapping[str, str] | None = None,
        members: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.status = CATALOGUE[code].status
        self.detail = detail
        self.headers = headers
        self.members = members


class DatabaseUnavailable(Problem):
    """The database is away, overloaded or shutting down.

    `maybe_committed` tells that the connection broke while a commit was under way: the rows may
    be there.
    """

    def __init__(self, *, maybe_committed: bool = False) -> None:
        super().__init__(
            "database-unavailable",
            "The database does not answer at the moment; try again in a moment.",
            {"Retry-After": "1"},
        )
        self.maybe_committed = maybe_committed


class BrokenAnswer(Exception):  # noqa: N818 - named for what it leaves
    """An answer that has begun cannot be finished. The message is for the log.

    The connection is closed, so that the client does not take the part for the whole.
    """


def problem_response(problem: Problem, request_id: str) -> Response:
    """Return `problem` as the client sees it (contract §3)."""
    return Response(
        problem_body(problem, request_id),
        problem.status,
        problem.headers,
        media_type="application/problem+json",
    )


def problem_body(problem: Problem, request_id: str) -> bytes:
    """Return the JSON of `problem`."""
    body = {
        "type": "about:blank",
        "title": title_of(problem.status),
        "status": problem.status,
        "detail": problem.detail,
        "code": problem.code,
        "request_id": request_id,
        **problem.members,
    }
    return msgspec.json.encode(body)


def title_of(status: int) -> str:
    """Return the status in words, as RFC 9110 has them."""
    return _TITLES.get(status) or http.HTTPStatus(status).phrase


def problem_of(error: Exception, method: str) -> Problem:
    """Return what a client is told of an error that its request, of this method, has met."""
    match error:
        case Problem():
            return error
        case HTTPException(status_code=405):
            allowed = (error.headers or {}).get("Allow", "")
            detail = f"This address does not answer {method}; it answers {allowed}."
            return Problem("method-not-allowed", detail, error.headers)
        case HTTPException(status_code=404):
            return Problem("not-found", "There is nothing at this address.")
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            logger.error("No room left in the media folder: %s", error.strerror)
            return Problem("storage-full", "The server has no room for this file.")
        case _:
            detail = "Something went wrong on the server; its log tells more under this request_id."
            return Problem("internal-error", detail)
