"""The HTTP app, put together."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

import vidgen
from gateway.api import (
    artifacts,
    dead,
    estimate,
    events,
    jobs,
    ops,
    page,
    problems,
    session,
    uploads,
    workers,
)
from gateway.api.door import SCHEMES, Door, is_open
from gateway.api.edge import Edge
from gateway.api.limits import BodyLimit
from gateway.api.parts import Parts
from gateway.api.references import References

ROUTERS = (
    jobs.router, events.router, artifacts.router, uploads.router, estimate.router, workers.router, dead.router,
    session.router, ops.router, page.router,
)  # fmt: skip
DESCRIPTION = "Reference image + prompt to edited frame to video. Errors are RFC 9457 problem documents."


class _App(FastAPI):
    """FastAPI whose documentation knows the problem document."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is not None:
            return self.openapi_schema
        schema = super().openapi()
        _drop_default_errors(schema)
        _tell_who_may(schema)
        problem = problems.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        problem.pop("$defs", None)  # FieldError: the job record brings it along
        schema["components"]["schemas"].setdefault("Problem", problem)
        return schema


def _drop_default_errors(schema: dict[str, Any]) -> None:
    """FastAPI documents its own form of validation error wherever a route has a parameter; ours is the problem."""
    for operations in schema["paths"].values():
        for operation in operations.values():
            if problems.MEDIA_TYPE not in operation["responses"].get("422", {}).get("content", ()):
                operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)


def _tell_who_may(schema: dict[str, Any]) -> None:
    """What the door does, on each route that is behind it."""
    schema["components"]["securitySchemes"] = SCHEMES
    for path, operations in schema["paths"].items():
        for operation in () if is_open(path) else operations.values():
            operation["security"] = [{name: []} for name in SCHEMES]
            told = {str(status): said for status, said in problems.responses(401, 403, 429, 503).items()}
            operation["responses"] = told | operation["responses"]


def create_app(parts: Parts) -> FastAPI:
    """The gateway's HTTP app on the given parts; it owns none of them."""
    # FastAPI's own pages of documentation run scripts from elsewhere, as whoever is signed in: ours is `page.docs`.
    app = _App(
        title="vidgen gateway", version=vidgen.__version__, description=DESCRIPTION, redirect_slashes=False,
        docs_url=None, redoc_url=None,
    )  # fmt: skip
    app.state.parts = parts
    app.state.references = References(parts.store, parts.intake.decoding)
    app.state.store_reach = ops.StoreReach(parts.store)
    problems.install(app)
    routers = ROUTERS if parts.settings.serves_api else (ops.router,)
    app.state.routes = (*app.routes, *(route for router in routers for route in router.routes))
    for router in routers:
        app.include_router(router)
    app.add_middleware(Door, keyring=parts.keyring, quotas=parts.quotas, wanted=parts.settings.asks_for_keys)
    app.add_middleware(BodyLimit, max_image_bytes=parts.settings.max_upload_bytes)
    app.add_middleware(Edge, metrics=parts.metrics)
    return app
