"""The API as an OpenAPI 3.1 document: every route, what it takes, and each answer it can give.

It is compared with the code: `tests/test_openapi.py` asks the server for the answers that stand
here, and `tests/test_schemathesis.py` asks for what nobody would think of.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeAlias

from chatterd import __version__, settings
from chatterd.errors import CATALOGUE, title_of
from chatterd.media import MEDIA_TYPES, SLOTS
from chatterd.openapi_parts import HEADERS, PARAMETERS, SCHEMAS, ref

_Object: TypeAlias = dict[str, Any]

_JSON: Final = "application/json"
# OpenAPI 3.1 says of raw bytes nothing but their media type.
_FILE: Final = dict.fromkeys(MEDIA_TYPES.values())
_FORM_ENCODING: Final = {
    slot: {"contentType": ", ".join(kind for kind in _FILE if kind.startswith(slot))}
    for slot in SLOTS
}

# The codes that operations share. `errors.CATALOGUE` has the status of each.
_EVERYWHERE: Final = ("host-not-allowed", "method-not-allowed", "internal-error")
_BODY: Final = ("request-timeout", "body-too-large")
_DRAFT: Final = (
    *("name-missing", "name-invalid", "name-blank", "name-ambiguous", "name-too-long"),
    *("message-missing", "message-invalid", "message-too-long", "field-unknown"),
)
_STORING: Final = ("chatt-refused", "too-many-posts", "database-unavailable")
_KEY: Final = ("idempotency-key-invalid", "idempotency-key-reused", "idempotency-key-in-use")
_JSON_POST: Final = (*_BODY, "json-invalid", *_DRAFT, *_STORING, *_KEY)
_FORM_POST: Final = (
    *(*_BODY, "form-invalid", "field-duplicate", *_DRAFT, *_STORING, *_KEY),
    *("image-invalid", "image-unsupported", "image-unclean", "image-undecodable"),
    *("image-too-large", "image-too-many-pixels"),
    *("video-invalid", "video-unsupported", "video-unclean", "video-too-large"),
    *("too-many-uploads", "storage-full"),
)
_PAGE: Final = ("limit-invalid", "bound-invalid", "chatt-not-found", "database-unavailable")
_PROBLEM_HEADERS: Final = {
    405: ["Allow"],
    409: ["Retry-After"],
    416: ["Content-Range"],
    503: ["Retry-After"],
}

_PAGE_PARAMETERS: Final = ("limit", "before", "after", "If-None-Match")
_FEED_HEADERS: Final = ("ETag", "Cache-Control", "Vary")
_STATIC_HEADERS: Final = ("ETag", "Cache-Control", "Vary")
_WEB_HEADERS: Final = (
    *_STATIC_HEADERS,
    *("Content-Security-Policy", "X-Content-Type-Options", "Referrer-Policy"),
)
_MEDIA_HEADERS: Final = (
    *("ETag", "Cache-Control", "Accept-Ranges"),
    *("X-Content-Type-Options", "Content-Security-Policy"),
)
# What RFC 9110 defines for GET alone.
_GET_ONLY: Final = frozenset({"206", "416", "Range", "If-Range"})


def _id(method: str, path: str) -> str:
    """Return the operation's name: one that a client's generator can make a function of."""
    return re.sub("[^a-z0-9]+", "_", f"{method} {path}").strip("_")


def _answer(
    description: str,
    headers: Iterable[str] = (),
    content: Mapping[str, _Object | None] | None = None,
) -> _Object:
    """Return an answer: `Link?` stands for a header that is not always there."""
    answer: _Object = {"description": description, "headers": {}}
    for header in ("X-Request-Id", *headers):
        name = header.removesuffix("?")
        optional = {**HEADERS[name], "required": False}
        answer["headers"][name] = ref("headers", name) if name == header else optional
    if content is not None:
        answer["content"] = {
            kind: {"schema": schema} if schema else {} for kind, schema in content.items()
        }
    return answer


def _problem(status: int, codes: list[str]) -> _Object:
    listed = ", ".join(f"`{code}`" for code in codes)
    narrowed = {"properties": {"status": {"const": status}, "code": {"enum": codes}}}
    return _answer(
        f"{title_of(status)}: {listed}.",
        _PROBLEM_HEADERS.get(status, ()),
        {"application/problem+json": {"allOf": [ref("schemas", "Problem"), narrowed]}},
    )


def _operation(  # noqa: PLR0913 - an operation has so many sides
    summary: str,
    description: str,
    curl: str,
    *,
    answers: Mapping[str, _Object],
    codes: Iterable[str] = (),
    parameters: Iterable[str] = (),
    body: Mapping[str, _Object] | None = None,
) -> _Object:
    """Return an operation that answers `answers`, by status, and the problems of `codes`."""
    problems: dict[int, list[str]] = {}
    for code in sorted({*codes, *_EVERYWHERE}):
        problems.setdefault(CATALOGUE[code].status, []).append(code)
    operation: _Object = {
        "summary": summary,
        "description": description,
        "parameters": [ref("parameters", name) for name in parameters],
        "responses": {
            **answers,
            **{str(status): _problem(status, problems[status]) for status in sorted(problems)},
        },
        "x-codeSamples": [{"lang": "Shell", "source": curl}],
    }
    if body is not None:
        content: _Object = {kind: {"schema": schema} for kind, schema in body.items()}
        if form := content.get("multipart/form-data"):
            form["encoding"] = _FORM_ENCODING
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _head_of(get: _Object) -> _Object:
    """Return the HEAD that goes with a GET: the same answers without their bodies."""
    return {
        "summary": f"{get['summary']}: the headers",
        "description": "What GET answers, without the body.",
        "parameters": [
            parameter
            for parameter in get["parameters"]
            if parameter["$ref"].rpartition("/")[2] not in _GET_ONLY
        ],
        "responses": {
            status: {key: value for key, value in answer.items() if key != "content"}
            for status, answer in get["responses"].items()
            if status not in _GET_ONLY
        },
    }


def _path(tag: str, **operations: _Object) -> _Object:
    """Return a path that answers these methods, and HEAD where it answers GET."""
    if "get" in operations:
        operations["head"] = _head_of(operations["get"])
    return {
        "parameters": [ref("parameters", "X-Request-Id")],
        **{method: {"tags": [tag], **operation} for method, operation in operations.items()},
    }


def _feed(summary: str, row: str, curl: str) -> _Object:
    rows = {"type": "array", "items": ref("schemas", row)}
    return _operation(
        summary,
        "The oldest first. Without `limit`, `before` and `after` it is the whole feed, however"
        " long; with any of them a page of it, and `Link` leads to the pages beside it.",
        curl,
        parameters=_PAGE_PARAMETERS,
        answers={
            "200": _answer(
                "The feed.", (*_FEED_HEADERS, "Link?", "Content-Encoding?"), {_JSON: rows}
            ),
            "304": _answer("The feed is still what the client has.", _FEED_HEADERS),
        },
        codes=_PAGE,
    )


def _static(
    summary: str,
    media_types: Iterable[str],
    curl: str,
    *,
    parameters: Iterable[str] = (),
    codes: Iterable[str] = (),
) -> _Object:
    is_json = _JSON in media_types
    kind, headers = ("object", _STATIC_HEADERS) if is_json else ("string", _WEB_HEADERS)
    content = {media_type: {"type": kind} for media_type in media_types}
    return _operation(
        summary,
        "It changes with the server's version and settings alone.",
        curl,
        parameters=[*parameters, "If-None-Match"],
        answers={
            "200": _answer("It.", (*headers, "Content-Encoding?"), content),
            "304": _answer("It is still what the client has.", headers),
        },
        codes=codes,
    )


def _prompt() -> _Object:
    post = _operation(
        "Ask the language model",
        "The body goes to the `/api/generate` of the operator's Ollama, and Ollama's answer comes"
        " back line by line as it is made. Ollama's own errors come back as they are.",
        """curl -d '{"model": "tinyllama", "prompt": "Why is the sky blue?"}' """
        "http://127.0.0.1:8000/llmprompt",
        body={
            _JSON: {
                "description": "What Ollama takes; it is passed on unchanged.",
                "examples": [{"model": "tinyllama", "prompt": "Why is the sky blue?"}],
            }
        },
        answers={
            "200": _answer(
                "Ollama's answer, an object in each line.",
                (),
                {"application/x-ndjson": {"type": "string"}},
            ),
            "default": _answer("Another error of Ollama's.", (), {_JSON: {"type": "object"}}),
        },
        codes=[*_BODY, "llm-unreachable", "llm-busy"],
    )
    for status, answer in post["responses"].items():
        if status in {"400", "404", "500"}:  # they may be either's
            answer["content"][_JSON] = {"schema": {"type": "object"}}
    return post


def _web_socket() -> _Object:
    get = _operation(
        "Follow and post over a WebSocket",
        "Frames are texts of JSON (RFC 6455). Nothing comes before the client has sent"
        ' `{"since": cursor}`, or `{"since": null}` for now. Then'
        ' `{"event": "ready", "id": cursor, "data": {}}` comes, and after it the events of'
        " `/v1/stream`, each with its cursor as `id` and its object as `data`."
        '\n\n`{"post": {"name": ..., "message": ...}, "key": ...}` posts at any time. The optional'
        " `key` is an `Idempotency-Key`. The answer is"
        ' `{"posted": a NewChatt, "key": ..., "replayed": false}` or'
        ' `{"error": a Problem, "key": ...}`. What is no such frame is answered with an error'
        " `frame-invalid`, and the connection goes on. It is closed with 1009 after a frame that is"
        " too large, with 1012 when the server stops, and with 1013 when the client is too slow.",
        "python -m websockets ws://127.0.0.1:8000/v1/ws",
        answers={"101": _answer("The WebSocket is open.")},
        codes=["not-found", "too-many-subscribers"],
    )
    # It answers no other request, and 404 to those that want no WebSocket.
    del get["responses"]["405"]
    item = _path("Chatts", get=get)
    del item["head"]
    return item


_DRAFT_BODY: Final = {_JSON: ref("schemas", "Draft")}
_FORM_BODY: Final = {"multipart/form-data": ref("schemas", "DraftForm")}
_DONE: Final = _answer(
    "The chatt is stored.",
    ("Chatterd-Delete-Token", "Location", "Idempotency-Replayed?"),
    {_JSON: ref("schemas", "Done")},
)
_POSTED: Final = _answer(
    "The chatt, and what deletes it.",
    ("Location", "Idempotency-Replayed?"),
    {_JSON: ref("schemas", "NewChatt")},
) | {
    "links": {
        "read": {
            "operationId": _id("get", "/v1/chatts/{id}"),
            "parameters": {"id": "$response.body#/id"},
        },
        "delete": {
            "operationId": _id("delete", "/v1/chatts/{id}"),
            "parameters": {
                "id": "$response.body#/id",
                "Chatterd-Delete-Token": "$response.body#/delete_token",
            },
        },
    }
}

_PATHS: Final[_Object] = {
    "/getchatts": _path(
        "Tutorial",
        get=_feed("Read the feed", "TextRow", "curl 'http://127.0.0.1:8000/getchatts?limit=10'"),
    ),
    "/postchatt": _path(
        "Tutorial",
        post=_operation(
            "Post a text",
            "The chatt is stored durably before the answer leaves. The body's media type is not"
            " looked at.",
            """curl -d '{"name": "ann", "message": "Hello!"}' http://127.0.0.1:8000/postchatt""",
            parameters=["Idempotency-Key"],
            body=_DRAFT_BODY,
            answers={"200": _DONE},
            codes=_JSON_POST,
        ),
    ),
    "/getimages": _path(
        "Tutorial",
        get=_feed(
            "Read the feed with pictures and videos",
            "ImageRow",
            "curl 'http://127.0.0.1:8000/getimages?limit=10'",
        ),
    ),
    "/postimages": _path(
        "Tutorial",
        post=_operation(
            "Post a text with a picture, a video or both",
            "What a file is, is told from its bytes. What it tells about place and person is taken"
            " out of it before it is stored.",
            "curl -F name=bob -F message=Look -F image=@photo.jpg http://127.0.0.1:8000/postimages",
            parameters=["Idempotency-Key"],
            body=_FORM_BODY,
            answers={"200": _DONE},
            codes=_FORM_POST,
        ),
    ),
    "/media/{key}": _path(
        "Media",
        get=_operation(
            "Fetch a picture or video",
            "Its address stands in the feed. What an address names never changes. With `?thumb` it"
            " is the picture's thumbnail, a WebP of at most 512 pixels on a side. Where a range"
            " cannot be understood, or several are asked for, the answer is the whole file.",
            "curl -O http://127.0.0.1:8000/media/KEY",
            parameters=["key", "thumb", "Range", "If-Range", "If-None-Match"],
            answers={
                "200": _answer("The file.", _MEDIA_HEADERS, _FILE),
                "206": _answer(
                    "The range of it that was asked for.",
                    (*_MEDIA_HEADERS, "Content-Range"),
                    _FILE,
                ),
                "304": _answer("The client has it already.", _MEDIA_HEADERS),
            },
            codes=["not-found", "range-not-satisfiable", "too-many-uploads", "storage-full"],
        ),
    ),
    "/llmprompt": _path("Tutorial", post=_prompt()),
    "/v1/chatts": _path(
        "Chatts",
        get=_operation(
            "Read chatts, or what has changed",
            "A page of the feed, the oldest first; the newest page where neither `before` nor"
            " `after` is given, and `Link` leads to the pages beside it. With `since` it is what"
            " has changed after that cursor, in the order in which it happened and at most `limit`"
            " of it; with `wait` the answer waits until there is something, or for so long. A"
            " cursor that cannot be gone on from is answered with `reset`.",
            "curl 'http://127.0.0.1:8000/v1/chatts?limit=10'",
            parameters=[*_PAGE_PARAMETERS, "since", "wait"],
            answers={
                "200": _answer(
                    "A page, with `ETag` and `Link`; or the changes after a cursor.",
                    ("Cache-Control", "ETag?", "Link?"),
                    {_JSON: {"anyOf": [ref("schemas", "Chatts"), ref("schemas", "Changes")]}},
                ),
                "304": _answer("The page is still what the client has.", ("ETag", "Cache-Control")),
            },
            codes=[*_PAGE, "wait-invalid", "too-many-subscribers"],
        ),
        post=_operation(
            "Post a chatt",
            "As JSON, or as a form where it has a picture, a video or both. What is no form is"
            " taken for JSON, whatever its media type says.",
            """curl -d '{"name": "ann", "message": "Hello!"}' http://127.0.0.1:8000/v1/chatts""",
            parameters=["Idempotency-Key"],
            body=_DRAFT_BODY | _FORM_BODY,
            answers={"201": _POSTED},
            codes=[*_JSON_POST, *_FORM_POST],
        ),
    ),
    "/v1/chatts/{id}": _path(
        "Chatts",
        get=_operation(
            "Read a chatt",
            "What was deleted is not there any more.",
            "curl http://127.0.0.1:8000/v1/chatts/ID",
            parameters=["id", "If-None-Match"],
            answers={
                "200": _answer(
                    "The chatt.", ("ETag", "Cache-Control"), {_JSON: ref("schemas", "Chatt")}
                ),
                "304": _answer("It is still what the client has.", ("ETag", "Cache-Control")),
            },
            codes=["chatt-not-found", "database-unavailable"],
        ),
        delete=_operation(
            "Delete a chatt",
            "Only who has its delete token can. The files that no other chatt has go with it.",
            "curl -X DELETE -H 'Chatterd-Delete-Token: TOKEN' http://127.0.0.1:8000/v1/chatts/ID",
            parameters=["id", "Chatterd-Delete-Token"],
            answers={"204": _answer("It is deleted.")},
            codes=["delete-token-wrong", "chatt-not-found", "database-unavailable"],
        ),
    ),
    "/v1/stream": _path(
        "Chatts",
        get=_operation(
            "Follow what happens",
            "Server-Sent Events (WHATWG HTML §9.2), as `EventSource` reads them: an event `chatt`"
            " with the chatt for each that is posted, `delete` with its `id` for each that is"
            " deleted, and `reset` where the cursor cannot be gone on from and the feed is to be"
            " read anew. Each has an `id`, the cursor behind it: who comes back with it misses"
            " nothing and gets nothing twice. Without a cursor the stream begins now. In silence"
            " there is a comment every 15 seconds.",
            "curl -N http://127.0.0.1:8000/v1/stream",
            parameters=["stream-since", "Last-Event-ID"],
            answers={
                "200": _answer(
                    "The stream, which ends when the server stops.",
                    ("Cache-Control", "X-Accel-Buffering"),
                    {"text/event-stream": {"type": "string"}},
                )
            },
            codes=["too-many-subscribers", "database-unavailable"],
        ),
    ),
    "/v1/ws": _web_socket(),
    "/v1/limits": _path(
        "Server",
        get=_operation(
            "Read the limits in force",
            "What clients may show before anything is sent.",
            "curl http://127.0.0.1:8000/v1/limits",
            answers={"200": _answer("The limits.", (), {_JSON: ref("schemas", "Limits")})},
        ),
    ),
    "/livez": _path(
        "Server",
        get=_operation(
            "Ask whether the process answers",
            "It does, also when it cannot do its work: a process that does not is to be restarted.",
            "curl http://127.0.0.1:8000/livez",
            answers={
                "200": _answer("It does.", ("Cache-Control",), {_JSON: ref("schemas", "Liveness")})
            },
        ),
    ),
    "/readyz": _path(
        "Server",
        get=_operation(
            "Ask whether the server can do its work",
            "Whether requests are to be sent to it: the database answers, its schema is the one of"
            " this version, the media folder can be written, its disk has `MEDIA_FREE_FLOOR` free,"
            " and the server is not stopping. Otherwise the problem's `detail` tells what is wrong,"
            " and its `checks` has the state of each. What was found is kept for a second.",
            "curl http://127.0.0.1:8000/readyz",
            answers={
                "200": _answer("It can.", ("Cache-Control",), {_JSON: ref("schemas", "Readiness")})
            },
            codes=["not-ready"],
        ),
    ),
    "/metrics": _path(
        "Server",
        get=_operation(
            "Read what is counted and measured",
            "In the text format of Prometheus, or as OpenMetrics where `Accept` asks for it. Only"
            " for the addresses in `METRICS_ALLOWED`. Of several processes one answers for all.",
            "curl http://127.0.0.1:8000/metrics",
            answers={
                "200": _answer(
                    "Everything.",
                    ("Cache-Control",),
                    {
                        "text/plain": {"type": "string"},
                        "application/openmetrics-text": {"type": "string"},
                    },
                )
            },
            codes=["address-not-allowed"],
        ),
    ),
    "/openapi.json": _path(
        "Server",
        get=_static(
            "Read this document",
            [_JSON],
            "curl http://127.0.0.1:8000/openapi.json",
        ),
    ),
    "/docs": _path(
        "Server",
        get=_static(
            "Read this document as a page",
            ["text/html"],
            "curl http://127.0.0.1:8000/docs",
        ),
    ),
    "/": _path(
        "Server",
        get=_static(
            "Open the web client",
            ["text/html"],
            "curl http://127.0.0.1:8000/",
        ),
    ),
    "/web/{name}": _path(
        "Server",
        get=_static(
            "Fetch a file of the web client or of the page",
            ["text/css", "text/javascript", "image/svg+xml"],
            "curl http://127.0.0.1:8000/web/app.js",
            parameters=["name"],
            codes=["not-found"],
        ),
    ),
}

_DESCRIPTION: Final = """\
People post short texts under a name, with a picture or a video if they like, and everybody's app \
shows the feed.

A slash at the end of a path changes nothing, `HEAD` works wherever `GET` does, and every answer \
carries `X-Request-Id`. Whatever goes wrong is answered as `application/problem+json` (RFC 9457) \
with a `code` that never changes its meaning; an address that is not in this document answers 404 \
`not-found`."""


def _with_ids(path: str, item: _Object) -> _Object:
    shared = {"parameters": item["parameters"]}
    return shared | {
        method: {"operationId": _id(method, path), **operation}
        for method, operation in item.items()
        if method not in shared
    }


DOCUMENT: Final[_Object] = {
    "openapi": "3.1.1",
    "info": {
        "title": "chatterd",
        "version": __version__,
        "description": _DESCRIPTION,
        "license": {"name": "MIT", "identifier": "MIT"},
    },
    "servers": [{"url": settings.ROOT_PATH or "/"}],
    "tags": [
        {"name": "Chatts", "description": "Chatts as objects, for clients written from now on."},
        {"name": "Tutorial", "description": "What the tutorial's apps use: the same chatts."},
        {"name": "Media", "description": "Pictures and videos."},
        {"name": "Server", "description": "What the server tells about itself."},
    ],
    "paths": {path: _with_ids(path, item) for path, item in _PATHS.items()},
    "components": {"schemas": SCHEMAS, "headers": HEADERS, "parameters": PARAMETERS},
}
"""The whole document, as what its JSON decodes to."""
