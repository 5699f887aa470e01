"""Publish a request on `vidgen.requests`, follow its events, fetch the video.

    pip install nats-py minio
    python publish.py portrait.jpg video.mp4

The five VIDGEN_* variables that it reads are in the `environment` file that `vidgen up` names.
"""

import asyncio
import json
import os
import sys
import uuid
from urllib.parse import urlsplit

import nats
from minio import Minio
from nats.js.api import AckPolicy, ConsumerConfig

PATIENCE_S = 600
ENDS = {"completed", "failed", "cancelled", "rejected"}


async def main(image: str, video: str) -> int:
    env = os.environ
    s3, bucket = urlsplit(env["VIDGEN_S3_ENDPOINT"]), env["VIDGEN_S3_BUCKET"]
    store = Minio(
        endpoint=s3.netloc,
        access_key=env["VIDGEN_S3_ACCESS_KEY"],
        secret_key=env["VIDGEN_S3_SECRET_KEY"],
        secure=s3.scheme == "https",
        region="us-east-1",
    )
    bus = await nats.connect(env["VIDGEN_NATS_URL"])
    stream = bus.jetstream()

    # 1. The reference goes into the bucket, under uploads/.
    job_id = str(uuid.uuid4())
    reference = f"uploads/{job_id}.jpg"
    store.fput_object(bucket, reference, image, content_type="image/jpeg")

    # 2. The request goes onto the bus. Once this returns it is durable; sent twice, it is still one job.
    request = {
        "job_id": job_id,
        "references": [reference],
        "edit": {"prompt": "in the golden hour", "style": "golden-hour", "quality": "draft"},
        "i2v": {"prompt": "the camera slowly zooms in", "quality": "draft", "num_frames": 33},
    }
    await stream.publish("vidgen.requests", json.dumps(request).encode(), headers={"Nats-Msg-Id": job_id})
    print("job", job_id, flush=True)

    # 3. What happens to the job is told on vidgen.events.<job_id>, from the beginning, in order.
    events = await stream.pull_subscribe(
        f"vidgen.events.{job_id}",
        stream="VIDGEN_EVENTS",
        config=ConsumerConfig(ack_policy=AckPolicy.NONE, inactive_threshold=PATIENCE_S),
    )
    event = {"type": "published"}
    while event["type"] not in ENDS:
        (message,) = await events.fetch(1, timeout=PATIENCE_S)
        event = json.loads(message.data)
        print(event["type"], event.get("stage", ""), flush=True)
        for artifact in event.get("artifacts", []):
            if artifact["name"] == "video.mp4":
                # 4. The video is in the bucket.
                store.fget_object(bucket, artifact["key"], video)
    await bus.close()
    if event["type"] == "completed":
        return 0
    print(event.get("error") or event.get("errors"), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main(*sys.argv[1:3])))
