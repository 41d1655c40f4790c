"""What the operations of `openapi` share: schemas, headers and parameters, each under its name."""

from inspect import cleandoc
from typing import Any, Final, TypeAlias

import msgspec

from chatterd import settings
from chatterd.chatts import Changes, Chatt, Chatts, Deleted, NewChatt
from chatterd.errors import CATALOGUE
from chatterd.paging import LIMIT_MAX, NEWEST, WAIT_MAX
from chatterd.web_http import WEB_FILES

Schema: TypeAlias = dict[str, Any]

_TEXT: Final[Schema] = {"type": "string"}
_UUID: Final[Schema] = {"type": "string", "format": "uuid"}
_ADDRESS: Final[Schema] = {"type": "string", "format": "uri"}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
_TIME: Final[Schema] = {
    "type": "string",
    "format": "date-time",
    "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$",
    "description": "UTC, with six digits of fraction.",
    "examples": ["2026-11-21T00:05:56.407672Z"],
}
_NAME: Final[Schema] = {
    "type": "string",
    "minLength": 1,
    "maxLength": settings.NAME_MAX_LENGTH,
    "pattern": r"\S",
    "description": "Who is posting: not blank, and without the character U+0000.",
    "examples": ["ann"],
}
_USERNAME: Final[Schema] = _NAME | {
    "description": "What older clients call name. Both at once must be the same."
}
_MESSAGE: Final[Schema] = {
    "type": "string",
    "maxLength": settings.MESSAGE_MAX_LENGTH,
    "description": "The text: it may be empty, and is without the character U+0000.",
    "examples": ["Hello!"],
}


def ref(kind: str, name: str) -> Schema:
    """Return a reference to a component: one of `kind`, under `name`."""
    return {"$ref": f"#/components/{kind}/{name}"}


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(description: str, /, **members: Schema) -> Schema:
    """Return the schema of an object that has these members, all of them and no other."""
    return {
        "description": description,
        "type": "object",
        "properties": members,
        "required": list(members),
        "additionalProperties": False,
    }


def _row(description: str, **elements: Schema) -> Schema:
    """Return the schema of an array of exactly these elements."""
    titled = [{"title": name, **schema} for name, schema in elements.items()]
    return {
        "description": description,
        "type": "array",
        "prefixItems": titled,
        "items": False,
        "minItems": len(titled),
    }


def _draft(description: str, **more: Schema) -> Schema:
    """Return the schema of what is posted: name or username, message, and `more`."""
    return {
        "description": description,
        "type": "object",
        "properties": {"name": _NAME, "username": _USERNAME, "message": _MESSAGE} | more,
        "required": ["message"],
        "anyOf": [{"required": ["name"]}, {"required": ["username"]}],
        "additionalProperties": False,
    }


def _file(description: str) -> Schema:
    limit = f"At most {settings.MEDIA_MAX_SIZE} bytes."
    # OpenAPI 3.0's name for raw bytes: 3.1 has no other, and programs still go by it.
    return {"type": "string", "format": "binary", "description": f"{description} {limit}"}


def _limit(description: str) -> Schema:
    return {"type": "integer", "minimum": 0, "description": description}


def _check(description: str) -> Schema:
    """Return the schema of a check's state, which is not known where another check failed first."""
    states = ["ok", "failed", "unknown", "newer"]
    return {"type": "string", "enum": states, "description": description}


# What the types that are encoded do not say of their members.
_MEMBERS: Final[Schema] = {
    "id": _UUID,
    "time": _TIME,
    "url": _ADDRESS | {"description": "`?thumb` behind a picture's leads to its thumbnail."},
    "type": _TEXT | {"description": "The media type.", "examples": ["image/jpeg"]},
    "size": _nullable(_COUNT | {"description": "Bytes; null where it is not known."}),
    "width": _nullable(_COUNT | {"description": "Pixels; null where it is not known."}),
    "height": _nullable(_COUNT | {"description": "Pixels; null where it is not known."}),
    "delete_token": _TEXT | {"description": "What deletes the chatt. Nobody else is told it."},
    "chatts": {"type": "array", "items": ref("schemas", "Chatt")},
    "deleted": {"type": "array", "items": _UUID, "description": "The ids of deleted chatts."},
    "reset": {"type": "boolean", "description": "Read the feed anew, then go on from `cursor`."},
    "cursor": _TEXT | {"description": "Where to go on: the `since` of the next request."},
}


def _encoded_types() -> Schema:
    """Return the schemas of the types that are encoded, of which `_MEMBERS` tells more."""
    types = [Chatt, NewChatt, Chatts, Changes, Deleted]
    _, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    return {
        name: {
            "description": cleandoc(schema["description"]),
            "type": "object",
            "properties": {
                member: _MEMBERS.get(member, kind) for member, kind in schema["properties"].items()
            },
            "required": schema["required"],
            "additionalProperties": False,
        }
        for name, schema in schemas.items()
    }


SCHEMAS: Final[Schema] = {
    **_encoded_types(),
    "Problem": _object(
        "An error (RFC 9457).",
        type={"const": "about:blank"},
        title=_TEXT | {"description": "The status in words."},
        status={"type": "integer", "minimum": 400, "maximum": 599},
        detail=_TEXT | {"description": "For people: what was wrong, and what would be right."},
        code={
            "description": "For programs: a code never changes its meaning.",
            "type": "string",
            "oneOf": [
                {"const": code, "description": f"{kind.status}: {kind.meaning}."}
                for code, kind in CATALOGUE.items()
            ],
        },
        request_id=_TEXT | {"description": "The value of the answer's `X-Request-Id`."},
    ),
    "Done": _object("An empty object: the chatt is stored."),
    "Draft": _draft("A chatt to be posted: `name` or `username` must be there."),
    "DraftForm": _draft(
        "A chatt to be posted as a form: `name` or `username` must be there.",
        image=_file("A JPEG, PNG, GIF, WebP or HEIC picture."),
        video=_file("An MP4, QuickTime or WebM video."),
    ),
    "TextRow": _row("A chatt as a row of four.", name=_TEXT, message=_TEXT, id=_UUID, time=_TIME),
    "ImageRow": _row(
        "A chatt as a row of six.",
        name=_TEXT,
        message=_TEXT,
        id=_UUID,
        time=_TIME,
        imageurl=_nullable(_ADDRESS),
        videourl=_nullable(_ADDRESS),
    ),
    "Liveness": _object("The process answers.", status={"const": "ok"}),
    "Readiness": _object(
        "The server can do its work.", status={"const": "ok"}, checks=ref("schemas", "Checks")
    ),
    "Checks": _object(
        "What was checked.",
        database=_check("The database answers."),
        schema=_check("Its schema is the one of this version, or `newer` and still usable."),
        media=_check("The media folder can be written."),
        disk=_check("The media folder's disk has `MEDIA_FREE_FLOOR` free."),
        stopping=_check("The server is not stopping."),
    ),
    "Limits": _object(
        "The limits in force.",
        name_max_length=_limit("Characters in a name."),
        message_max_length=_limit("Characters in a message."),
        json_max_size=_limit("Bytes in a JSON body, and in a text of a form."),
        media_max_size=_limit("Bytes in a picture or video."),
        media_max_pixels=_limit("Pixels in a picture."),
        media_total_size=_nullable(_limit("Bytes of all media together.")),
        media_free_floor=_limit("Bytes of the disk that stay free."),
        uploads_max=_limit("Uploads that a process takes at once."),
        stream_max_subscribers=_limit("Streams, WebSockets and waits that a process has open."),
        upload_timeout=_limit("Seconds that an upload may take."),
    ),
}


# Of `not-ready` alone.
SCHEMAS["Problem"]["properties"]["checks"] = ref("schemas", "Checks")


def _header(description: str, example: str, **schema: object) -> Schema:
    return {
        "description": description,
        "required": True,
        "schema": {"type": "string", **schema},
        "example": example,
    }


HEADERS: Final[Schema] = {
    "X-Request-Id": _header(
        "The request's own `X-Request-Id` where that is sane, else one made by the server.",
        "0f6cd8a3b5c94c70-2a",
        pattern="^[A-Za-z0-9._:-]{1,128}$",
    ),
    "ETag": _header("Names this content (RFC 9110 §8.8.3).", '"5c1d-e9"', pattern='^"[^"]+"$'),
    "Cache-Control": _header("Who may keep the answer (RFC 9111).", "no-cache"),
    "Vary": _header("What the answer depends on besides its address.", "Accept-Encoding"),
    "Content-Encoding": _header("`gzip`, to those who accept it.", "gzip", const="gzip"),
    "Link": _header(
        "The pages before and after this one (RFC 8288).",
        '</getchatts?limit=50&before=7401355b-fc63-458a-bddc-f90d2da400d3>; rel="prev"',
    ),
    "Allow": _header("The methods that this address answers.", "GET, HEAD"),
    "Retry-After": _header("Seconds after which to try again.", "1", pattern="^[0-9]+$"),
    "Location": _header(
        "The address of the chatt.", "/v1/chatts/7401355b-fc63-458a-bddc-f90d2da400d3"
    ),
    "Chatterd-Delete-Token": _header(
        "What deletes the chatt. Nobody else is told it.", "kJ2s0Xq1YvR8mZ4tW6uB3nEa"
    ),
    "Idempotency-Replayed": _header(
        "The answer is that of the first request with this key.", "true", const="true"
    ),
    "X-Accel-Buffering": _header("Always `no`: Nginx is to pass it on at once.", "no", const="no"),
    "Accept-Ranges": _header("Parts of a file may be asked for.", "bytes", const="bytes"),
    "Content-Range": _header(
        "Which bytes these are, and of how many; after 416 only of how many.",
        "bytes 0-1/48213",
        pattern=r"^bytes ([0-9]+-[0-9]+|\*)/[0-9]+$",
    ),
    "X-Content-Type-Options": _header("Always `nosniff`.", "nosniff", const="nosniff"),
    "Content-Security-Policy": _header(
        "Nothing may run but what is the server's own.", "default-src 'none'; sandbox"
    ),
    "Referrer-Policy": _header("Always `no-referrer`.", "no-referrer", const="no-referrer"),
}


def _parameter(
    name: str, where: str, description: str, example: object = None, **schema: object
) -> Schema:
    return {
        "name": name,
        "in": where,
        "description": description,
        "schema": {"type": "string", **schema},
    } | ({} if example is None else {"example": example})


PARAMETERS: Final[Schema] = {
    "limit": _parameter(
        "limit",
        "query",
        "How many chatts a page has.",
        type="integer",
        minimum=1,
        maximum=LIMIT_MAX,
        default=NEWEST.limit,
    ),
    "before": _parameter(
        "before", "query", "The id of a chatt: the page before it. Not with `after`.", format="uuid"
    ),
    "after": _parameter(
        "after", "query", "The id of a chatt: the page after it. Not with `before`.", format="uuid"
    ),
    "since": _parameter(
        "since",
        "query",
        "A cursor: what has changed after it, instead of a page. Not with `before` or `after`.",
    ),
    "stream-since": _parameter(
        "since", "query", "A cursor: what has happened after it comes first."
    ),
    "Last-Event-ID": _parameter(
        "Last-Event-ID", "header", "The same, and it wins: `EventSource` sends it by itself."
    ),
    "wait": _parameter(
        "wait",
        "query",
        "Seconds to wait for a change where there is none yet. Only with `since`.",
        type="integer",
        minimum=0,
        maximum=WAIT_MAX,
        default=0,
    ),
    "id": _parameter("id", "path", "The id of a chatt.", format="uuid") | {"required": True},
    "Chatterd-Delete-Token": _parameter(
        "Chatterd-Delete-Token", "header", "What posting the chatt was answered with."
    )
    | {"required": True},
    "Idempotency-Key": _parameter(
        "Idempotency-Key",
        "header",
        "Makes it safe to send a post again: for 24 hours, the same post with the same key is"
        " stored once and answered the same. In quotation marks or not.",
        pattern=r'^("[!#-\[\]-~]{1,255}"|[!#-~]{1,255})$',
    ),
    "key": _parameter("key", "path", "What the file is called; the feed has its whole address.")
    | {"required": True},
    "name": _parameter("name", "path", "What the file is called.", enum=sorted(WEB_FILES))
    | {"required": True},
    "thumb": _parameter(
        "thumb", "query", "There, with or without a value: the picture's thumbnail."
    ),
    "If-None-Match": _parameter(
        "If-None-Match", "header", "ETags of what the client has (RFC 9110 §13.1.2).", '"5c1d-e9"'
    ),
    "Range": _parameter(
        "Range", "header", "Which bytes are wanted (RFC 9110 §14.2), one range.", "bytes=0-1"
    ),
    "If-Range": _parameter(
        "If-Range", "header", "The range only of what has this ETag, else the whole.", '"5c1d-e9"'
    ),
    "X-Request-Id": _parameter(
        "X-Request-Id", "header", "An id for the request, which the answer and the log repeat."
    ),
}
