// Which page is shown: `#/`, `#/jobs`, `#/jobs/<id>`, `#/workers`.

import { createPage } from "./create.js";
import { jobPage } from "./job.js";
import { jobsPage } from "./jobs.js";
import { showSession, signInPage } from "./session.js";
import { workersPage } from "./workers.js";

const main = document.getElementById("main");
let leave = () => {};
let first = true;
let signedOut = false;

function route() {
  const [path, query] = location.hash.slice(1).split("?", 2);
  if (signedOut) return ["", () => signInPage(signedIn)];
  const parts = path.split("/").filter(Boolean).map(decoded);
  const given = new URLSearchParams(query || "");
  if (parts[0] === "jobs" && parts[1]) return ["jobs", () => jobPage(parts[1])];
  if (parts[0] === "jobs") return ["jobs", () => jobsPage(given)];
  if (parts[0] === "workers") return ["workers", () => workersPage()];
  return ["create", () => createPage(given)];
}

// What was cut off in the middle of an escape is taken as it is: it names nothing that there is.
function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

function render() {
  const [name, open] = route();
  leave();
  const page = open();
  leave = page.leave || (() => {});
  document.title = `${page.title} · vidgen`;
  main.replaceChildren(page.node);
  for (const link of document.querySelectorAll(".top nav a")) {
    if (link.dataset.page === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  // Whoever does not see the page change hears the new one's heading; a first load begins at the top by itself.
  if (!first) {
    scrollTo(0, 0);
    (page.node.querySelector("h1") || main).focus({ preventScroll: true });
  }
  first = false;
}

function signedIn() {
  signedOut = false;
  render();
  showSession();
}

addEventListener("signed-out", () => {
  if (signedOut) return;
  signedOut = true;
  render();
});
document.getElementById("skip").addEventListener("click", () => main.focus());
// A photo that is dropped beside its place must not take the place of the page.
for (const kind of ["dragover", "drop"]) {
  addEventListener(kind, (event) => event.dataTransfer?.types.includes("Files") && event.preventDefault());
}
addEventListener("hashchange", render);
render();
showSession();
