"""Passing a prompt to Ollama and its answer back (contract §1, llmprompt)."""

import logging

import anyio
import httpx2
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chatterd.errors import BrokenAnswer, Problem

logger = logging.getLogger(__name__)


class LLMResponse(Response):
    """Ollama's own answer, status and all, each line sent as it arrives.

    The client's leaving cancels the request to Ollama, also while Ollama is still thinking about
    its first word. Raises `Problem` 502 when Ollama cannot be reached.
    """

    def __init__(self, client: httpx2.AsyncClient, body: bytes) -> None:
        super().__init__()
        self._client = client
        self._prompt = body

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Ask Ollama and pass on what it says."""
        failure: Problem | BrokenAnswer | None = None
        async with anyio.create_task_group() as tasks:

            async def leave_with_client() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                tasks.cancel_scope.cancel()

            tasks.start_soon(leave_with_client)
            try:
                await self._pass_on(send)
            except (Problem, BrokenAnswer) as error:
                failure = error
            tasks.cancel_scope.cancel()
        # Raised here, because a task group would wrap it in an exception group.
        if failure is not None:
            raise failure

    async def _pass_on(self, send: Send) -> None:
        request = self._client.build_request(
            "POST",
            "/api/generate",
            content=self._prompt,
            headers={"content-type": "application/json", "accept-encoding": "identity"},
        )
        try:
            answer = await self._client.send(request, stream=True)
        except httpx2.PoolTimeout as error:
            raise Problem(
                "llm-busy", "Too many prompts at the moment; try again.", {"Retry-After": "10"}
            ) from error
        except httpx2.TransportError as error:
            logger.warning("Ollama cannot be reached: %s", type(error).__name__)
            raise Problem(
                "llm-unreachable", "The language model's server does not answer; is Ollama running?"
            ) from error
        try:
            content_type = answer.headers.get("content-type", "application/x-ndjson")
            await send(
                {
                    "type": "http.response.start",
                    "status": answer.status_code,
                    "headers": [(b"content-type", content_type.encode("latin-1"))],
                }
            )
            try:
                async for chunk in answer.aiter_raw():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except httpx2.TransportError as error:
                raise BrokenAnswer(f"Ollama broke off: {type(error).__name__}") from error
            await send({"type": "http.response.body", "body": b""})
        finally:
            await answer.aclose()
