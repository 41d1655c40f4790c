"""The application: plain ASGI, for Hypercorn or any other server."""

import asyncio
from collections.abc import Awaitable

from sqlalchemy.engine import URL
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from chatterd import settings
from chatterd.edge import Edge
from chatterd.lifespan import lifespan
from chatterd.routes import TEMPLATES, routes


class _Starlette(Starlette):
    """Does without what would be around every request and take a tenth of our own time.

    Errors are left to `Edge` instead of two layers of Starlette's. A path without parameters is
    looked up, where the router would try one route after the other.
    """

    def build_middleware_stack(self) -> ASGIApp:
        """Return the router, and a short cut past it."""
        endpoints = {
            route.path: route.endpoint
            for route in self.routes
            if isinstance(route, Route) and not route.param_convertors
        }

        def find(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
            endpoint = endpoints.get(scope["path"]) if scope["type"] == "http" else None
            if endpoint:
                scope["endpoint"] = endpoint  # as the router does
            found: Awaitable[None] = (endpoint or self.router)(scope, receive, send)
            return found

        return find


async def _not_found(_scope: Scope, _receive: Receive, _send: Send) -> None:
    """Raise 404 for a WebSocket, too, which Starlette would close without a word."""
    raise HTTPException(404)


def create_app(database_url: URL | None) -> Edge:
    """Return the application, which opens nothing before its lifespan begins."""
    stopping = asyncio.Event()
    starlette = _Starlette(routes=routes, lifespan=lifespan(database_url, stopping))
    # 404 and not a redirect for a path that differs by a slash: every route has both forms.
    starlette.router.redirect_slashes = False
    starlette.router.default = _not_found
    return Edge(starlette, settings.ALLOWED_HOSTS, stopping, TEMPLATES)


app = create_app(settings.DATABASE_URL)
