"""The application: plain ASGI, for Hypercorn or any other server."""

from sqlalchemy.engine import URL
from starlette.applications import Starlette

from chatterd import settings
from chatterd.edge import Edge
from chatterd.errors import exception_handlers
from chatterd.lifespan import lifespan
from chatterd.routes import routes


def create_app(database_url: URL | None) -> Edge:
    """Return the application, which opens nothing before its lifespan begins."""
    starlette = Starlette(
        routes=routes,
        exception_handlers=exception_handlers,
        lifespan=lifespan(database_url),
    )
    # 404 and not a redirect for a path that differs by a slash: every route has both forms.
    starlette.router.redirect_slashes = False
    return Edge(starlette, settings.ALLOWED_HOSTS)


app = create_app(settings.DATABASE_URL)
