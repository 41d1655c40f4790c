"""What Starlette on our Hypercorn can do at most: constant answers, and no database.

Its headers are those that chatterd's answers must have as well.

    python -m bench.peers.ceiling PORT FILE

FILE holds the bytes that GET /getchatts answers. GET /media/... answers files of MEDIA_ROOT.
"""

import asyncio
import gzip
import os
import sys
from pathlib import Path

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from chatterd import server
from chatterd.edge import Edge
from chatterd.listener import Address, Listener


def main() -> None:
    """Serve until SIGTERM."""
    port, file = sys.argv[1:]
    address = Address("127.0.0.1", int(port))
    app = _Bare(_constants(Path(file).read_bytes()), ("*",), asyncio.Event(), {})
    with Listener(address) as listener:
        server.run(app, listener, lambda: None)


class _Bare(Edge):
    """What `server.serve` takes, without the work that our own outermost layer does."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


def _constants(feed: bytes) -> Starlette:
    compressed = gzip.compress(feed, mtime=0)
    validators = {"ETag": '"constant"', "Cache-Control": "no-cache"}
    encoded = validators | {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}

    async def get_chatts(request: Request) -> Response:
        if "if-none-match" in request.headers:
            return Response(status_code=304, headers=validators)
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(compressed, media_type="application/json", headers=encoded)
        return Response(feed, media_type="application/json", headers=validators)

    async def post_chatt(request: Request) -> Response:
        msgspec.json.decode(await request.body())
        return Response(b"{}", media_type="application/json")

    media = Path(os.environ["MEDIA_ROOT"])

    async def get_file(request: Request) -> Response:
        return FileResponse(media / request.path_params["key"])

    return Starlette(
        routes=[
            Route("/getchatts", get_chatts, methods=["GET"]),
            Route("/media/{key}", get_file, methods=["GET"]),
            Route("/postchatt", post_chatt, methods=["POST"]),
        ]
    )


if __name__ == "__main__":
    main()
