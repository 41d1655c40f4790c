"""What Schemathesis cannot read in the document: it loads this module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import schemathesis
from hypothesis import strategies

from tests.samples import IMAGES, VIDEOS

if TYPE_CHECKING:
    from schemathesis import Case, HookContext

# It would make up bytes that are no file of the kind.
for sample in (*IMAGES, *VIDEOS):
    for media_type in sample.types:
        schemathesis.openapi.media_type(media_type, strategies.just(sample.data))


@schemathesis.hook
def before_call(_context: HookContext, case: Case[Any], _kwargs: dict[str, Any]) -> None:
    """Leave of parameters that exclude each other the last; wait for nothing."""
    is_good = case.meta and all(part.mode.is_positive for part in case.meta.components.values())
    query = case.query
    if not is_good or not isinstance(query, dict):
        return
    bounds = [name for name in ("before", "after", "since") if name in query]
    for name in bounds[:-1]:
        del query[name]
    if "wait" in query:
        query["wait"] = 0
        if "since" not in query:
            del query["wait"]


@schemathesis.hook
def filter_body(_context: HookContext, body: Any) -> bool:  # noqa: ANN401 - whatever JSON is
    """Send one of two names: both are refused where they differ, as those made up here do."""
    return not isinstance(body, dict) or not {"name", "username"} <= body.keys()
