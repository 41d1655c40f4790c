"""The log and posting over a WebSocket, as JSON texts (contract §2)."""

import asyncio
from contextlib import ExitStack, nullcontext, suppress
from typing import Any, Final

import msgspec
from starlette.endpoints import WebSocketEndpoint
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from chatterd.chatts import Deleted, encoded, encoded_new, media_url_of
from chatterd.errors import DatabaseUnavailable, Problem, problem_body, problem_of
from chatterd.events import Batch
from chatterd.keys import checked_key
from chatterd.lifespan import State
from chatterd.live import StreamEnd, Subscription
from chatterd.schemas import draft_from_fields

_SERVICE_RESTART: Final = 1012  # IANA, WebSocket Close Code Number Registry
_TRY_AGAIN_LATER: Final = 1013
_GOODBYE_SECONDS: Final = 5.0
_NOTHING: Final = msgspec.Raw(b"{}")


class _Event(msgspec.Struct):
    event: str
    id: str
    data: msgspec.Raw


class _Posted(msgspec.Struct):
    posted: msgspec.Raw
    key: str | None
    replayed: bool


class _Error(msgspec.Struct):
    error: msgspec.Raw
    key: str | None


class LiveSocket(WebSocketEndpoint):
    """Follows the log after `{"since": cursor}`; posts for `{"post": {...}, "key": "..."}`."""

    encoding = None  # what is no text is answered, not a reason to hang up

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        super().__init__(scope, receive, send)
        self._stack = ExitStack()
        self._sending = asyncio.Lock()

    async def dispatch(self) -> None:
        """Serve the connection until the client leaves or is left."""
        with self._stack, suppress(TimeoutError):
            async with asyncio.timeout(None) as self._deadline:
                await super().dispatch()

    async def on_connect(self, websocket: WebSocket[Any]) -> None:
        """Accept it; raises `Problem` 503 when there are too many."""
        live = websocket.state["live"]
        self._subscription = self._stack.enter_context(live.subscribed())
        self._media_url = media_url_of(websocket.url.scheme, websocket.headers["host"])
        await websocket.accept()
        following = asyncio.create_task(self._follow(websocket, self._subscription))
        self._stack.callback(following.cancel)

    async def on_receive(self, websocket: WebSocket[Any], data: Any) -> None:  # noqa: ANN401 - Starlette's signature
        """Take one frame. What is wrong with it is answered, and the connection goes on."""
        key: str | None = None
        try:
            frame = _frame(data)
            if "since" in frame:
                await self._begin(websocket, frame["since"])
                return
            key = _key(frame)
            answer = await self._posted(websocket.state, frame["post"], key)
        except WebSocketDisconnect:
            raise
        except Exception as error:
            problem = problem_of(error, "it")
            body = problem_body(problem, self.scope["request_id"])
            await self._send(websocket, _Error(msgspec.Raw(body), key))
            if problem.status == 500:
                raise  # the server logs it with its traceback
        else:
            await self._send(websocket, answer)

    async def _begin(self, websocket: WebSocket[Any], cursor: object) -> None:
        if cursor is not None and not isinstance(cursor, str):
            raise _invalid("since must be a cursor, or null for now.")
        if self._subscription.position is not None:
            raise _invalid("since was there already; for another cursor, connect anew.")
        async with self._sending:  # nothing comes before this is said
            position = await self._subscription.start(cursor)
            await websocket.send_text(_text(_Event("ready", str(position), _NOTHING)))
        self._subscription.wake()

    async def _posted(self, state: State, post: object, key: str | None) -> _Posted:
        if not isinstance(post, dict):
            raise _invalid("post must be an object with name and message.")
        draft = draft_from_fields(post)
        claimed = nullcontext() if key is None else state["keys"].claimed(key, "chatts")
        async with claimed as claim:
            posted = await state["writer"].post(draft, claim=claim)
        new = encoded_new(draft, posted, self._media_url)
        return _Posted(msgspec.Raw(new), key, posted.is_replay)

    async def _follow(self, websocket: WebSocket[Any], subscription: Subscription) -> None:
        """Send events until the subscription ends; then say goodbye."""
        with suppress(StreamEnd, DatabaseUnavailable, WebSocketDisconnect):
            async with subscription.sending():
                while True:
                    if (batch := await subscription.take()) is not None:
                        await self._send_batch(websocket, subscription, batch)
        # Who does not answer to a goodbye is left all the same.
        self._deadline.reschedule(asyncio.get_running_loop().time() + _GOODBYE_SECONDS)
        stopping = websocket.state["live"].is_stopping
        with suppress(RuntimeError, WebSocketDisconnect):  # the client was faster
            await websocket.close(_SERVICE_RESTART if stopping else _TRY_AGAIN_LATER)

    async def _send_batch(
        self, websocket: WebSocket[Any], subscription: Subscription, batch: Batch
    ) -> None:
        texts = batch.encoded(self._media_url, _texts)
        if batch.is_reset:
            texts = [_text(_Event("reset", str(subscription.position), _NOTHING))]
        subscription.begin_sending()
        for text in texts:
            async with self._sending:
                await websocket.send_text(text)
        subscription.end_sending()

    async def _send(self, websocket: WebSocket[Any], answer: msgspec.Struct) -> None:
        async with self._sending:
            with suppress(RuntimeError):  # it is being closed
                await websocket.send_text(_text(answer))


def _frame(data: object) -> dict[str, Any]:
    """Return what a client says; raises `Problem` 422."""
    if not isinstance(data, str):
        raise _invalid("A frame must be a text, not bytes.")
    try:
        frame = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _invalid("A frame must be JSON.") from error
    if not isinstance(frame, dict) or set(frame) not in ({"since"}, {"post"}, {"post", "key"}):
        raise _invalid('A frame must be {"since": cursor} or {"post": {...}, "key": "..."}.')
    return frame


def _key(frame: dict[str, Any]) -> str | None:
    key = frame.get("key")
    if key is None:
        return None
    if not isinstance(key, str):
        raise _invalid("key must be a string.")
    return checked_key(key)


def _invalid(detail: str) -> Problem:
    return Problem("frame-invalid", detail)


def _texts(batch: Batch, media_url: str) -> list[str]:
    texts = []
    for event in batch.events:
        kind, data = "chatt", encoded(event.chatt, media_url)
        if event.is_deleted:
            kind, data = "delete", msgspec.json.encode(Deleted(event.chatt.id))
        texts.append(_text(_Event(kind, batch.cursor_of(event), msgspec.Raw(data))))
    return texts


def _text(message: msgspec.Struct) -> str:
    return msgspec.json.encode(message).decode()
