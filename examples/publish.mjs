// Publish a request on `vidgen.requests`, follow its events, fetch the video.
//
//     npm install                                    (beside this file, with the package.json here)
//     node publish.mjs portrait.jpg video.mp4
//
// The five VIDGEN_* variables that it reads are in the `environment` file that `vidgen up` names.

import { randomUUID } from "node:crypto";
import { env, exit, argv } from "node:process";
import { jetstream } from "@nats-io/jetstream";
import { connect } from "@nats-io/transport-node";
import { Client } from "minio";

const ENDS = ["completed", "failed", "cancelled", "rejected"];
const [image, video] = argv.slice(2);

const s3 = new URL(env.VIDGEN_S3_ENDPOINT);
const bucket = env.VIDGEN_S3_BUCKET;
const useSSL = s3.protocol === "https:";
const store = new Client({
  endPoint: s3.hostname,
  port: Number(s3.port || (useSSL ? 443 : 80)),
  useSSL,
  accessKey: env.VIDGEN_S3_ACCESS_KEY,
  secretKey: env.VIDGEN_S3_SECRET_KEY,
  region: "us-east-1",
});
const nats = new URL(env.VIDGEN_NATS_URL);
const bus = await connect({
  servers: nats.host,
  user: decodeURIComponent(nats.username),
  pass: decodeURIComponent(nats.password),
});
const stream = jetstream(bus);

// 1. The reference goes into the bucket, under uploads/.
const jobId = randomUUID();
const reference = `uploads/${jobId}.jpg`;
await store.fPutObject(bucket, reference, image, { "Content-Type": "image/jpeg" });

// 2. The request goes onto the bus. Once this returns it is durable; sent twice, it is still one job.
const request = {
  job_id: jobId,
  references: [reference],
  edit: { prompt: "in the golden hour", style: "golden-hour", quality: "draft" },
  i2v: { prompt: "the camera slowly zooms in", quality: "draft", num_frames: 33 },
};
await stream.publish("vidgen.requests", JSON.stringify(request), { msgID: jobId });
console.log("job", jobId);

// 3. What happens to the job is told on vidgen.events.<job_id>, from the beginning, in order.
const events = await stream.consumers.get("VIDGEN_EVENTS", { filter_subjects: [`vidgen.events.${jobId}`] });
let event;
for await (const message of await events.consume()) {
  event = message.json();
  console.log(event.type, event.stage ?? "");
  for (const artifact of event.artifacts ?? []) {
    if (artifact.name === "video.mp4") {
      // 4. The video is in the bucket.
      await store.fGetObject(bucket, artifact.key, video);
    }
  }
  if (ENDS.includes(event.type)) break;
}
await bus.close();
if (event.type !== "completed") {
  console.error(event.error ?? event.errors);
  exit(1);
}
