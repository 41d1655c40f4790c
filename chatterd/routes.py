"""The API's table of contents."""

from collections.abc import Mapping

from starlette.routing import BaseRoute, Route, WebSocketRoute

from chatterd import views, ws

_ENDPOINTS = {
    "/getchatts": views.GetChatts,
    "/postchatt": views.PostChatt,
    "/getimages": views.GetImages,
    "/postimages": views.PostImages,
    "/media/{key}": views.Media,
    "/llmprompt": views.LLMPrompt,
    "/v1/chatts": views.Chatts,
    "/v1/chatts/{id}": views.Chatt,
    "/v1/stream": views.Stream,
    "/v1/limits": views.Limits,
    "/livez": views.LiveZ,
    "/readyz": views.ReadyZ,
    "/metrics": views.Metrics,
    "/openapi.json": views.OpenAPI,
    "/docs": views.Docs,
    "/web/{name}": views.WebFile,
}

# Both forms answer directly: some clients do not follow a redirect of a POST (contract §1).
routes: list[BaseRoute] = [
    Route(path + slash, endpoint) for slash in ("", "/") for path, endpoint in _ENDPOINTS.items()
]
routes += [WebSocketRoute(path, ws.LiveSocket) for path in ("/v1/ws", "/v1/ws/")]
routes += [Route("/", views.WebPage)]

TEMPLATES: Mapping[object, str] = {
    **{endpoint: path for path, endpoint in _ENDPOINTS.items()},
    ws.LiveSocket: "/v1/ws",
    views.WebPage: "/",
}
"""What the logs and metrics call the route of each endpoint."""
