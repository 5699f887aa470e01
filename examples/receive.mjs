// Take webhooks in: verify who sent them, pass over what came before, print what happened.
//
//     WEBHOOK_SECRET=whsec_… node receive.mjs 8000      (behind something that speaks TLS)
//
// Nothing but Node is needed; any library of Standard Webhooks does the same.

import { createHmac, timingSafeEqual } from "node:crypto";
import { createServer } from "node:http";
import { argv, env } from "node:process";

const TOLERANCE_S = 300;
const secret = Buffer.from(env.WEBHOOK_SECRET.replace(/^whsec_/, ""), "base64");
const seen = new Set();

// Whether we know the sender, and it spoke now: an old post that somebody kept is refused.
function verified(headers, body) {
  const { "webhook-id": id, "webhook-timestamp": timestamp, "webhook-signature": signatures = "" } = headers;
  const expected = createHmac("sha256", secret).update(`${id}.${timestamp}.`).update(body).digest();
  const recent = Math.abs(Date.now() / 1000 - Number(timestamp)) <= TOLERANCE_S;
  return recent && signatures.split(" ").some((one) => {
    const given = Buffer.from(one.replace(/^v1,/, ""), "base64");
    return given.length === expected.length && timingSafeEqual(given, expected);
  });
}

const server = createServer(async (request, response) => {
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  const body = Buffer.concat(chunks);
  const good = verified(request.headers, body);
  const id = request.headers["webhook-id"];
  if (good && !seen.has(id)) {  // the same one may come twice
    seen.add(id);
    const event = JSON.parse(body);
    console.log(event.type, event.data.id, event.data.status);
  }
  response.writeHead(good ? 204 : 400).end();
});
server.listen(Number(argv[2]), "127.0.0.1", () => console.log("listening on port", server.address().port));
