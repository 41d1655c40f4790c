"""The HTTP endpoints: each decodes, validates, does one unit of work, and responds."""

from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import Any, ClassVar, Final

import msgspec
from anyio import to_thread
from starlette.endpoints import HTTPEndpoint
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chatterd import docs_page, metrics, openapi, settings
from chatterd.bodies import PROMPT_MAX_SIZE, received_bytes, received_form
from chatterd.chatts import encoded_new, media_url_of
from chatterd.chatts_http import chatt_response, deleted, page_response
from chatterd.errors import Problem
from chatterd.feed_http import PartsResponse, feed_response
from chatterd.keys import Posted, key_in
from chatterd.lifespan import State
from chatterd.llm import LLMResponse
from chatterd.logs import WAITS
from chatterd.media_http import media_response
from chatterd.paging import wanted
from chatterd.schemas import Draft, draft_from_fields, draft_from_json
from chatterd.static import PAGE_HEADERS, Static
from chatterd.stream_http import StreamResponse, changes_response
from chatterd.web_http import WEB_FILES, WEB_PAGE

_LIMITS: Final = msgspec.json.encode(
    {
        "name_max_length": settings.NAME_MAX_LENGTH,
        "message_max_length": settings.MESSAGE_MAX_LENGTH,
        "json_max_size": settings.JSON_MAX_SIZE,
        "media_max_size": settings.MEDIA_MAX_SIZE,
        "media_max_pixels": settings.MEDIA_MAX_PIXELS,
        "media_total_size": settings.MEDIA_TOTAL_SIZE,
        "media_free_floor": settings.MEDIA_FREE_FLOOR,
        "uploads_max": settings.UPLOADS_MAX,
        "stream_max_subscribers": settings.STREAM_MAX_SUBSCRIBERS,
        "upload_timeout": settings.UPLOAD_TIMEOUT,
    }
)
_OPENAPI: Final = Static(msgspec.json.encode(openapi.DOCUMENT), "application/json")
_DOCS: Final = Static(docs_page.page(openapi.DOCUMENT), "text/html; charset=utf-8", PAGE_HEADERS)
_JSON: Final = (b"content-type", b"application/json")
_NO_STORE: Final = (b"cache-control", b"no-store")
_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Endpoint(HTTPEndpoint):
    """Starlette's, whose methods are found once and not again for each request.

    Finding them is 15 % of what the feed costs beside Hypercorn.
    """

    _handlers: ClassVar[dict[str, Callable[[Any, Request[State]], Awaitable[Response]]]]

    def __init_subclass__(cls) -> None:
        names = {method: "get" if method == "HEAD" else method.lower() for method in _METHODS}
        cls._handlers = {
            method: getattr(cls, name) for method, name in names.items() if hasattr(cls, name)
        }

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send

    async def dispatch(self) -> None:
        """Answer the request; raises `HTTPException` 405 for a method that is not here."""
        request: Request[State] = Request(self.scope, self.receive, self.send)
        handler = self._handlers.get(request.method)
        if handler is None:
            raise HTTPException(405, headers={"Allow": ", ".join(self._handlers)})
        response = await handler(self, request)
        await response(self.scope, self.receive, self.send)


class GetChatts(Endpoint):
    """The whole feed as rows of four (contract §1)."""

    async def get(self, request: Request[State]) -> Response:
        """Answer an array of `[name, message, id, time]`, oldest first."""
        return await feed_response(request, request.state["feed"], media_url=None)


class PostChatt(Endpoint):
    """Posting a text (contract §1)."""

    async def post(self, request: Request[State]) -> Response:
        """Store the chatt in the JSON body; answer `{}` once it is committed."""
        _, posted = await _posted_json(request, "postchatt")
        return _done(posted)


class GetImages(Endpoint):
    """The whole feed as rows of six, with the addresses of pictures and videos (contract §1)."""

    async def get(self, request: Request[State]) -> Response:
        """Answer an array of `[name, message, id, time, imageurl, videourl]`, oldest first."""
        return await feed_response(request, request.state["feed"], _media_url(request))


class PostImages(Endpoint):
    """Posting a text with a picture, a video or both (contract §1)."""

    async def post(self, request: Request[State]) -> Response:
        """Store the multipart form's files and chatt; answer `{}` once both are durable."""
        _, posted = await _posted_form(request, "postimages")
        return _done(posted)


class Chatts(Endpoint):
    """Chatts as objects, and posting them (contract §2)."""

    async def get(self, request: Request[State]) -> Response:
        """Answer a page of the feed, or what has changed after a cursor."""
        page = wanted(request.scope["query_string"], with_changes=True)
        state, media_url = request.state, _media_url(request)
        if page is not None and page.since is not None:
            if page.wait:
                request.scope[WAITS] = "long poll"
            return await changes_response(state["live"], page, media_url, request.receive)
        return await page_response(request, state["database"], state["feed"], page, media_url)

    async def post(self, request: Request[State]) -> Response:
        """Store the chatt in the JSON body or the form; answer it with its delete token."""
        is_form = request.headers.get("content-type", "").lower().startswith("multipart/form-data")
        received = _posted_form if is_form else _posted_json
        draft, posted = await received(request, "chatts")
        headers = [_JSON, _location(posted), *_replayed(posted)]
        return PartsResponse(201, headers, [encoded_new(draft, posted, _media_url(request))])


class Chatt(Endpoint):
    """One chatt (contract §2)."""

    async def get(self, request: Request[State]) -> Response:
        """Answer it."""
        database, chatt_id = request.state["database"], request.path_params["id"]
        return await chatt_response(request, database, chatt_id, _media_url(request))

    async def delete(self, request: Request[State]) -> Response:
        """Delete it for whoever has its delete token."""
        token = request.headers.get("chatterd-delete-token")
        keys = await deleted(request.state["database"], request.path_params["id"], token)
        request.state["leavings"].remove_soon(keys)
        return Response(status_code=204)


class Stream(Endpoint):
    """What happens, as it happens (contract §2)."""

    async def get(self, request: Request[State]) -> Response:
        """Answer with Server-Sent Events, behind a cursor or from now on."""
        request.scope[WAITS] = "stream"
        cursor = request.headers.get("last-event-id") or request.query_params.get("since")
        return StreamResponse(request.state["live"], cursor, _media_url(request))


class Media(Endpoint):
    """The stored pictures and videos (contract §1)."""

    async def get(self, request: Request[State]) -> Response:
        """Answer the file, or the range of it that is asked for; its thumbnail for `?thumb`."""
        media, key = request.state["media"], request.path_params["key"]
        is_thumbnail = "thumb" in request.query_params
        path = await media.thumbnail_path(key) if is_thumbnail else media.path(key)
        return await media_response(path, request.method, request.headers)


class Limits(Endpoint):
    """How large what is sent may be."""

    async def get(self, _request: Request[State]) -> Response:
        """Answer an object of the limits in force; null where there is none."""
        return PartsResponse(200, [_JSON], [_LIMITS])


class LiveZ(Endpoint):
    """Whether the process answers: it does."""

    async def get(self, _request: Request[State]) -> Response:
        """Answer 200, whatever else is wrong."""
        return PartsResponse(200, [_JSON, _NO_STORE], [b'{"status":"ok"}'])


class ReadyZ(Endpoint):
    """Whether the server can do its work."""

    async def get(self, request: Request[State]) -> Response:
        """Answer what has been checked; raises `Problem` 503 when a check has failed."""
        checks = await request.state["health"].checks()
        body = msgspec.json.encode({"status": "ok", "checks": checks})
        return PartsResponse(200, [_JSON, _NO_STORE], [body])


class Metrics(Endpoint):
    """What is counted and measured, for Prometheus."""

    async def get(self, request: Request[State]) -> Response:
        """Answer it in the format that is asked for; raises `Problem` 403 for strangers."""
        if not settings.METRICS_ALLOWED.have(request.client and request.client.host):
            raise Problem("address-not-allowed", "METRICS_ALLOWED does not name this address.")
        request.state["readings"].refresh()
        accept = request.headers.get("accept", "")
        body, media_type = await to_thread.run_sync(metrics.exposition, accept)
        headers = [(b"content-type", media_type.encode("latin-1")), _NO_STORE]
        return PartsResponse(200, headers, [body])


class WebPage(Endpoint):
    """The web client."""

    async def get(self, request: Request[State]) -> Response:
        """Answer the page."""
        return WEB_PAGE.response(request)


class WebFile(Endpoint):
    """What the web client's page consists of."""

    async def get(self, request: Request[State]) -> Response:
        """Answer the file."""
        file = WEB_FILES.get(request.path_params["name"])
        if file is None:
            raise HTTPException(404)
        return file.response(request)


class LLMPrompt(Endpoint):
    """Asking the language model that the operator runs (contract §1)."""

    async def post(self, request: Request[State]) -> Response:
        """Pass the body to Ollama, and its answer back line by line as it arrives."""
        request.scope[WAITS] = "prompt"
        prompt = await received_bytes(request.headers, request.receive, PROMPT_MAX_SIZE)
        return LLMResponse(request.state["llm"], prompt)


class OpenAPI(Endpoint):
    """The description of the API for programs."""

    async def get(self, request: Request[State]) -> Response:
        """Answer the OpenAPI document."""
        return _OPENAPI.response(request)


class Docs(Endpoint):
    """The description of the API for people."""

    async def get(self, request: Request[State]) -> Response:
        """Answer the OpenAPI document as a page."""
        return _DOCS.response(request)


async def _posted_json(request: Request[State], route: str) -> tuple[Draft, Posted]:
    headers, writer = request.headers, request.state["writer"]
    if (key := key_in(headers)) is None:  # written out: posting is fast
        draft = draft_from_json(
            await received_bytes(headers, request.receive, settings.JSON_MAX_SIZE)
        )
        return draft, await writer.post(draft)
    async with request.state["keys"].claimed(key, route) as claim:
        draft = draft_from_json(
            await received_bytes(headers, request.receive, settings.JSON_MAX_SIZE)
        )
        return draft, await writer.post(draft, claim=claim)


async def _posted_form(request: Request[State], route: str) -> tuple[Draft, Posted]:
    media, key = request.state["media"], key_in(request.headers)
    claimed = nullcontext() if key is None else request.state["keys"].claimed(key, route)
    async with (
        claimed as claim,
        received_form(request.headers, request.stream(), media) as form,
    ):
        draft = draft_from_fields(form.fields)
        keys = {slot: upload.key for slot, upload in form.files.items()}
        if claim is not None and (replay := claim.replayed(draft, keys)) is not None:
            return draft, replay
        # The files come first: a chatt never names one that is not there. Should the chatt fail
        # after all, the sweep takes them: another chatt may name them by now.
        files = await media.keep(form.files)
        return draft, await request.state["writer"].post(draft, files, claim)


def _media_url(request: Request[State]) -> str:
    return media_url_of(request.url.scheme, request.headers["host"])


def _done(posted: Posted) -> Response:
    token = (b"chatterd-delete-token", posted.delete_token.encode())
    return PartsResponse(200, [_JSON, token, _location(posted), *_replayed(posted)], [b"{}"])


def _location(posted: Posted) -> tuple[bytes, bytes]:
    return b"location", f"{settings.ROOT_PATH}/v1/chatts/{posted.id}".encode()


def _replayed(posted: Posted) -> list[tuple[bytes, bytes]]:
    return [(b"idempotency-replayed", b"true")] if posted.is_replay else []
