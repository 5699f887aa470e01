"""The page's session: the key itself in a cookie that no script can read, so that no gateway has to remember it."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from gateway.api import bodies, problems
from gateway.api.door import COOKIE
from gateway.api.parts import CallerHere, PartsHere
from gateway.api.problems import HttpError
from gateway.keyring import Caller

router = APIRouter(prefix="/v1/session", tags=["session"])

LIFE_S = 7 * 86400


class Session(BaseModel):
    """Whom the gateway takes the caller for."""

    tenant: str
    admin: bool = Field(description="The operator: sees every tenant, and the dead letters.")
    name: str = Field(description="What the key was called.")
    keys: bool = Field(description="Whether this gateway asks for keys at all.")


@router.get("", responses=problems.responses(503))
async def show(caller: CallerHere, parts: PartsHere) -> Session:
    """Who am I?"""
    return _session(caller, parts.settings.asks_for_keys)


@router.post("", response_model=Session, responses=problems.responses(403, 503))
async def begin(request: Request, caller: CallerHere, parts: PartsHere) -> Response:
    """Sign in: keep the key of this request's `Authorization` header in a cookie of this browser."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    # By a session one comes in with what is no key there, too: a password for a proxy, say.
    if parts.settings.asks_for_keys and (scheme.lower() != "bearer" or not key):
        raise HttpError(403, "no_key", "sign in with the key itself: Authorization: Bearer vg_…")
    answer = Response(
        _session(caller, parts.settings.asks_for_keys).model_dump_json(), media_type=bodies.JSON,
        headers={"Cache-Control": "no-store"},
    )  # fmt: skip
    if parts.settings.asks_for_keys:
        answer.set_cookie(
            COOKIE, key.strip(), max_age=LIFE_S, path="/", httponly=True, samesite="strict",
            secure="https" in (request.url.scheme, request.headers.get("origin", "").partition(":")[0]),
        )  # fmt: skip
    return answer


@router.delete("", status_code=204, response_class=Response, responses=problems.responses(403, 503))
async def end(_caller: CallerHere) -> Response:
    """Sign out: forget the key in this browser."""
    answer = Response(status_code=204)
    answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return answer


def _session(caller: Caller, keys: bool) -> Session:
    return Session(tenant=caller.tenant, admin=caller.admin, name=caller.name, keys=keys)
