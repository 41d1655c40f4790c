"""The API's table of contents."""

from starlette.routing import Route

from chatterd import views

_ENDPOINTS = {
    "/getchatts": views.GetChatts,
    "/postchatt": views.PostChatt,
    "/getimages": views.GetImages,
    "/postimages": views.PostImages,
    "/media/{key}": views.Media,
    "/llmprompt": views.LLMPrompt,
    "/v1/chatts": views.Chatts,
    "/v1/chatts/{id}": views.Chatt,
    "/v1/limits": views.Limits,
    "/web/{name}": views.WebFile,
}

# Both forms answer directly: some clients do not follow a redirect of a POST (contract §1).
routes = [
    Route("/", views.WebPage),
    *(Route(path + slash, endpoint) for slash in ("", "/") for path, endpoint in _ENDPOINTS.items()),
]
