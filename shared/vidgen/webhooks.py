"""Webhooks as Standard Webhooks has them: secrets, signatures, and when to try again. Pure.

https://github.com/standard-webhooks/standard-webhooks
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from datetime import datetime

from vidgen import errors

PREFIX = "whsec_"
LEAST_BYTES, MOST_BYTES = 24, 64
# Seconds after the first moment at which a delivery that failed is tried again.
TRIES_AT = (5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 72000.0, 86400.0)


class Secret:
    """A secret to sign with; never shown by `repr`."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def parse(cls, text: str) -> Secret:
        """From `whsec_<base64>`; raises FatalError `settings`."""
        try:
            key = base64.b64decode(text.removeprefix(PREFIX), validate=True) if text.startswith(PREFIX) else b""
        except (binascii.Error, ValueError):
            key = b""
        if not LEAST_BYTES <= len(key) <= MOST_BYTES:
            raise errors.FatalError(
                f"VIDGEN_WEBHOOK_SECRET: {PREFIX} and {LEAST_BYTES} to {MOST_BYTES} random bytes in base64 are needed: "
                f'make one with: echo "{PREFIX}$(openssl rand -base64 32)"',
                code="settings",
            )
        return cls(key)

    def of_tenant(self, tenant: str) -> Secret:
        """The secret of one tenant, which tells nothing of this one nor of any other tenant's."""
        return Secret(hmac.digest(self._key, b"vidgen webhooks of tenant " + tenant.encode(), hashlib.sha256))

    def reveal(self) -> str:
        """As the tenant needs it, to verify with any library of Standard Webhooks."""
        return PREFIX + base64.b64encode(self._key).decode()

    def sign(self, key: str, at: datetime, body: bytes) -> dict[str, str]:
        """The headers that go with a body under the id `key`, sent at `at`."""
        timestamp = str(int(at.timestamp()))
        signature = hmac.digest(self._key, f"{key}.{timestamp}.".encode() + body, hashlib.sha256)
        return {
            "webhook-id": key,
            "webhook-timestamp": timestamp,
            "webhook-signature": f"v1,{base64.b64encode(signature).decode()}",
        }


def next_try(age: float, give_up_after: float) -> float | None:
    """Seconds until the next try of a delivery that failed at this age, in seconds; None: it is given up.

    It depends on the age alone: nobody has to remember how often it was tried.
    """
    moments = (*(moment for moment in TRIES_AT if moment < give_up_after), give_up_after)
    return next((moment - age for moment in moments if moment > age), None)
