"""The HTTP endpoints: each decodes, validates, does one unit of work, and responds."""

from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, Final

import msgspec
from starlette.endpoints import HTTPEndpoint
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chatterd import settings
from chatterd.bodies import received_bytes, received_form
from chatterd.feed_http import PartsResponse, feed_response
from chatterd.lifespan import State
from chatterd.llm import LLMResponse
from chatterd.media_http import media_response
from chatterd.schemas import draft_from_fields, draft_from_json
from chatterd.web_http import web_response

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
        "upload_timeout": settings.UPLOAD_TIMEOUT,
    }
)
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
        limit = settings.JSON_MAX_SIZE
        draft = draft_from_json(await received_bytes(request.headers, request.receive, limit))
        await request.state["writer"].post(draft)
        return _done()


class GetImages(Endpoint):
    """The whole feed as rows of six, with the addresses of pictures and videos (contract §1)."""

    async def get(self, request: Request[State]) -> Response:
        """Answer an array of `[name, message, id, time, imageurl, videourl]`, oldest first."""
        base = settings.PUBLIC_URL or f"{request.url.scheme}://{request.headers['host']}"
        return await feed_response(request, request.state["feed"], media_url=f"{base}/media/")


class PostImages(Endpoint):
    """Posting a text with a picture, a video or both (contract §1)."""

    async def post(self, request: Request[State]) -> Response:
        """Store the multipart form's files and chatt; answer `{}` once both are durable."""
        media = request.state["media"]
        async with received_form(request.headers, request.stream(), media) as form:
            draft = draft_from_fields(form.fields)
            # The files come first: a chatt never names one that is not there. Should the chatt
            # fail after all, the sweep takes them: another chatt may name them by now.
            keys = await media.keep(form.files)
            await request.state["writer"].post(draft, keys.get("image"), keys.get("video"))
        return _done()


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
        return PartsResponse(200, [(b"content-type", b"application/json")], [_LIMITS])


class WebPage(Endpoint):
    """The web client."""

    async def get(self, request: Request[State]) -> Response:
        """Answer the page."""
        return web_response("index.html", request.headers)


class WebFile(Endpoint):
    """What the web client's page consists of."""

    async def get(self, request: Request[State]) -> Response:
        """Answer the file."""
        return web_response(request.path_params["name"], request.headers)


class LLMPrompt(Endpoint):
    """Asking the language model that the operator runs (contract §1)."""

    async def post(self, request: Request[State]) -> Response:
        """Pass the body to Ollama, and its answer back line by line as it arrives."""
        limit = settings.MEDIA_MAX_SIZE  # prompts may hold pictures
        prompt = await received_bytes(request.headers, request.receive, limit)
        return LLMResponse(request.state["llm"], prompt)


def _done() -> Response:
    return PartsResponse(200, [(b"content-type", b"application/json")], [b"{}"])
