// Who is signed in, and the page on which a key is given. The key goes into a cookie that no script can read.

import { call } from "./api.js";
import { el, setText, show } from "./dom.js";

const place = document.getElementById("session");

// Says who is signed in, and offers to sign out; nothing where the gateway asks for no keys.
export async function showSession() {
  const session = await call("v1/session").catch(() => null);
  if (!session?.keys) {
    place.replaceChildren();
    return;
  }
  const leave = el("button", { type: "button", class: "button", onclick: signOut }, "Sign out");
  place.replaceChildren(el("span", {}, session.admin ? "Operator" : session.tenant), leave);
}

async function signOut() {
  await call("v1/session", { method: "DELETE" }).catch(() => null);
  location.reload();
}

export function signInPage(done) {
  const key = el("input", { id: "key", type: "password", autocomplete: "current-password", spellcheck: "false", "aria-describedby": "key-error" });
  const error = el("p", { class: "error", id: "key-error", role: "alert", hidden: true });
  const form = el(
    "form",
    { class: "sign-in", novalidate: true },
    el("h1", { tabindex: "-1" }, "Sign in"),
    el("p", {}, "This gateway wants an API key. Whoever runs it makes one with ", el("code", {}, "vidgen keys create"), "."),
    el("div", { class: "field" }, el("label", { for: "key" }, "API key"), key, error),
    el("button", { class: "primary" }, "Sign in"),
  );
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      await call("v1/session", { method: "POST", headers: { Authorization: `Bearer ${key.value.trim()}` } });
    } catch (problem) {
      setText(error, problem.message);
      show(error, true);
      key.setAttribute("aria-invalid", "true");
      key.focus();
      return;
    }
    key.value = "";
    done();
  });
  return { title: "Sign in", node: form };
}
