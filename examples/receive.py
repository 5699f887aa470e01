"""Take webhooks in: verify who sent them, pass over what came before, print what happened.

    WEBHOOK_SECRET=whsec_… python receive.py 8000      (behind something that speaks TLS)

Nothing but the standard library is needed; any library of Standard Webhooks does the same.
"""

import base64
import hashlib
import hmac
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOLERANCE_S = 300
SECRET = base64.b64decode(os.environ["WEBHOOK_SECRET"].removeprefix("whsec_"))
seen = set()


def verified(headers, body):
    """Whether we know the sender, and it spoke now: an old post that somebody kept is refused."""
    key, timestamp = headers["webhook-id"], headers["webhook-timestamp"]
    expected = hmac.digest(SECRET, f"{key}.{timestamp}.".encode() + body, hashlib.sha256)
    given = [part.removeprefix("v1,") for part in headers["webhook-signature"].split(" ")]
    recent = abs(time.time() - int(timestamp)) <= TOLERANCE_S
    return recent and any(hmac.compare_digest(base64.b64encode(expected).decode(), one) for one in given)


class Hooks(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        try:
            good = verified(self.headers, body)
        except (AttributeError, TypeError, ValueError):  # a header is missing, or is no number
            good = False
        if good and self.headers["webhook-id"] not in seen:  # the same one may come twice
            seen.add(self.headers["webhook-id"])
            event = json.loads(body)
            print(event["type"], event["data"]["id"], event["data"]["status"], flush=True)
        self.send_response(204 if good else 400)
        self.end_headers()

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Hooks)
    print("listening on port", server.server_port, flush=True)
    server.serve_forever()
