"""API keys: shown once when they are made, kept as hashes, each the key of one tenant."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationError

from vidgen import errors
from vidgen.bus import Records
from vidgen.contracts import DEFAULT_TENANT, Message, TenantId

FORM = re.compile(r"vg_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
NOBODY = "0" * 64  # what a key that is not there is compared with, so that it takes as long


class Key(Message):
    """What is known of a key. Its secret is not among it."""

    schema_version: Literal[1] = 1
    id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12}$")]
    tenant: TenantId = DEFAULT_TENANT
    name: Annotated[str, StringConstraints(max_length=100)] = ""
    admin: bool = Field(False, description="The operator's: sees every tenant, and the dead letters.")
    hash: str = Field(description="SHA-256 of the whole key: with 256 random bits in it there is nothing to guess.")
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None

    def state(self, at: datetime) -> Literal["active", "revoked", "expired"]:
        """Whether it opens anything at that time."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= at else "active"


def issue(
    tenant: str, at: datetime, *, name: str = "", admin: bool = False, expires_at: datetime | None = None
) -> tuple[Key, str]:  # fmt: skip
    """A new key: its record, and the text that is shown once. Raises RejectedError for a tenant that cannot have it."""
    if admin and tenant != DEFAULT_TENANT:
        raise errors.RejectedError(f"an operator's key belongs to the tenant {DEFAULT_TENANT}", field="tenant")
    key_id = secrets.token_hex(6)
    text = f"vg_{key_id}_{secrets.token_urlsafe(32)}"
    key = Key(
        id=key_id, tenant=tenant, name=name, admin=admin, hash=hash_of(text), created_at=at, expires_at=expires_at
    )  # fmt: skip
    return key, text


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def id_of(text: str) -> str | None:
    """The id that a key names, None for what has not the form of one."""
    match = FORM.fullmatch(text)
    return match[1] if match else None


def opens(key: Key | None, text: str) -> bool:
    """Whether the text is this very key, in a time that does not tell how near it comes."""
    return hmac.compare_digest(hash_of(text), key.hash if key is not None else NOBODY)


class UnreadableError(errors.VidgenError):
    """What is stored of a key is of another version."""

    code = "key_unreadable"


def read(key_id: str, record: bytes) -> Key:
    """What is stored of a key; raises UnreadableError."""
    try:
        return Key.model_validate_json(record)
    except ValidationError as exc:
        raise UnreadableError(
            f"what is stored of the key {key_id} cannot be read: use the version of vidgen that made it"
        ) from exc


async def find(records: Records, key_id: str) -> Key | None:
    """A key by its id; raises BusError and UnreadableError."""
    found = await records.get(key_id)
    return read(key_id, found[0]) if found else None


async def revoke(records: Records, key_id: str, at: datetime) -> Key:
    """End a key; one that has ended stays as it is. Raises NotFoundError, UnreadableError and BusError."""
    while True:
        found = await records.get(key_id)
        if found is None:
            raise errors.NotFoundError(f"there is no key {key_id}: `vidgen keys list` shows those that there are")
        key = read(key_id, found[0])
        if key.revoked_at is not None:
            return key
        key = key.model_copy(update={"revoked_at": at})
        try:
            await records.put(key_id, key.to_bytes(), revision=found[1])
        except errors.ConflictError:
            continue
        return key
