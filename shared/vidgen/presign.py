"""A presigned request that is bound to its headers, too: the `minio` client signs method, host and key alone.

Signature Version 4 of AWS, in the query (docs.aws.amazon.com: "Authenticating Requests: Using Query Parameters").
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, urlencode, urlsplit


def url_with_headers(
    method: str, address: str, headers: Mapping[str, str], keys: tuple[str, str], region: str, expires: timedelta,
    now: datetime | None = None,
) -> str:  # fmt: skip
    """A URL for one object's `address` (without a query) that is good for a request with exactly these headers."""
    at = now or datetime.now(UTC)
    scope = f"{at:%Y%m%d}/{region}/s3/aws4_request"
    parts = urlsplit(address)
    signed = {"host": parts.netloc, **{name.lower(): value for name, value in headers.items()}}
    names = ";".join(sorted(signed))
    query = {
        "X-Amz-Algorithm": "AWS4-HMAC-SHA256", "X-Amz-Credential": f"{keys[0]}/{scope}",
        "X-Amz-Date": f"{at:%Y%m%dT%H%M%SZ}", "X-Amz-Expires": str(int(expires.total_seconds())),
        "X-Amz-SignedHeaders": names,
    }  # fmt: skip
    asked = urlencode(sorted(query.items()), quote_via=quote, safe="~")
    lines = [f"{name}:{signed[name]}" for name in sorted(signed)]
    request = "\n".join([method, parts.path, asked, *lines, "", names, "UNSIGNED-PAYLOAD"])
    to_sign = "\n".join(["AWS4-HMAC-SHA256", query["X-Amz-Date"], scope, hashlib.sha256(request.encode()).hexdigest()])
    key = f"AWS4{keys[1]}".encode()
    for step in scope.split("/"):
        key = hmac.digest(key, step.encode(), "sha256")
    return f"{address}?{asked}&X-Amz-Signature={hmac.digest(key, to_sign.encode(), 'sha256').hex()}"
