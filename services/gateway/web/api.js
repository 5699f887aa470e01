// The gateway's API, at the page's own address.

export class Problem extends Error {
  constructor(status, document) {
    super(document.detail || document.title || `The gateway answered ${status}.`);
    this.status = status;
    this.code = document.code || "error";
    this.fields = document.errors || [];
  }
}

export async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, { detail: "The gateway does not answer. Is the network there?", code: "gateway_unreachable" });
  }
  const body = await answer.json().catch(() => ({}));
  if (answer.status === 401) dispatchEvent(new Event("signed-out"));
  if (!answer.ok) throw new Problem(answer.status, body);
  return body;
}

export function post(path, body, options = {}) {
  return call(path, {
    method: "POST",
    ...(body === undefined ? {} : { body: JSON.stringify(body), headers: { "Content-Type": "application/json" } }),
    ...options,
  });
}

export const jobPath = (id, rest = "") => `v1/jobs/${encodeURIComponent(id)}${rest}`;
export const artifactPath = (id, name) => jobPath(id, `/artifacts/${encodeURIComponent(name)}?proxy=1`);
export const referencePath = (id, index) => jobPath(id, `/references/${index}?proxy=1`);

// `randomUUID` is for secure contexts alone, and a gateway in a private network has no certificate.
export function randomKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Calls `look` now and every `seconds` while the page is to be seen, one call at a time; returns what ends it.
export function poll(look, seconds) {
  let timer = 0;
  let ended = false;
  const again = async () => {
    clearTimeout(timer);
    if (!document.hidden) await look();
    if (!ended) timer = setTimeout(again, seconds * 1000);
  };
  again();
  return () => {
    ended = true;
    clearTimeout(timer);
  };
}
