// The list of jobs: thumbnails, a filter by status, page by page.

import { artifactPath, call, poll, referencePath } from "./api.js";
import { FINAL, STATUS, ago, duration, el, money, setText, show, statusChip, titleOf } from "./dom.js";

const PER_PAGE = 24;
const EVERY_S = 3;

const address = (given) => `#/jobs${given.toString() ? `?${given}` : ""}`;

export function jobsPage(given) {
  const status = STATUS[given.get("status")] ? given.get("status") : "";
  const cursor = given.get("cursor") || "";
  const grid = el("ul", { class: "grid" });
  const note = el("p", { class: "empty", hidden: true });
  const older = el("a", { class: "button", hidden: true }, "Older jobs");
  const newest = el("a", { class: "button", href: address(only({ status })), hidden: !cursor }, "Newest jobs");
  const filters = [["", "All"], ...Object.entries(STATUS)].map(([value, label]) =>
    el("a", { class: "pill", href: address(only({ status: value })), "aria-current": value === status && "true" }, label),
  );
  const node = el(
    "section",
    { class: "wide" },
    el("h1", { tabindex: "-1" }, "Jobs"),
    el("nav", { class: "pills", "aria-label": "Filter by status" }, ...filters),
    note,
    grid,
    el("nav", { class: "paging", "aria-label": "More jobs" }, newest, older),
  );
  const cards = new Map();

  async function look() {
    let page;
    try {
      page = await call(`v1/jobs?${only({ status, cursor, limit: PER_PAGE })}`);
    } catch (problem) {
      setText(note, problem.message);
      show(note, true);
      return;
    }
    for (const job of page.jobs) if (!cards.has(job.id)) cards.set(job.id, card(job));
    const wanted = page.jobs.map((job) => cards.get(job.id));
    page.jobs.forEach((job, index) => wanted[index].update(job));
    // Cards that stay are not touched: whoever stands on one stays there.
    const nodes = wanted.map((one) => one.node);
    if (nodes.length !== grid.children.length || nodes.some((one, index) => grid.children[index] !== one)) {
      const focused = document.activeElement;
      grid.replaceChildren(...nodes);
      if (grid.contains(focused)) focused.focus({ preventScroll: true });
    }
    setText(note, status ? `No job is “${STATUS[status]}” here.` : "No job yet.");
    show(note, !page.jobs.length);
    show(older, Boolean(page.next_cursor));
    older.href = address(only({ status, cursor: page.next_cursor || "" }));
  }

  return { title: "Jobs", node, leave: poll(look, EVERY_S) };
}

function only(parts) {
  return new URLSearchParams(Object.entries(parts).filter(([, value]) => value !== ""));
}

function card(job) {
  const picture = el("img", { alt: "", loading: "lazy", decoding: "async" });
  picture.addEventListener("error", () => picture.removeAttribute("src"));
  const chip = el("span", { class: "chip-place" });
  const facts = el("p", { class: "facts" });
  const title = titleOf(job);
  const node = el(
    "li",
    { class: "card" },
    el(
      "a",
      { href: `#/jobs/${encodeURIComponent(job.id)}` },
      el("div", { class: "thumb" }, picture, chip),
      el("h2", {}, title),
      facts,
    ),
  );
  let shown = "";
  let told = "";
  return {
    node,
    update(now) {
      const source = thumbnail(now);
      if (source && source !== shown) picture.src = shown = source;
      if (now.status !== told) chip.replaceChildren(statusChip((told = now.status)));
      setText(facts, factsOf(now));
    },
  };
}

function thumbnail(job) {
  const made = (job.artifacts || []).find((one) => one.name === "poster.jpg") || (job.artifacts || []).find((one) => one.content_type.startsWith("image/"));
  if (made) return artifactPath(job.id, made.name);
  return (job.inputs || []).length ? referencePath(job.id, 0) : "";
}

function factsOf(job) {
  const parts = [ago(job.created_at)];
  if (FINAL.has(job.status) && job.completed_at && job.status === "completed") {
    parts.push(`took ${duration((Date.parse(job.completed_at) - Date.parse(job.created_at)) / 1000)}`);
  }
  if (job.cost_usd) parts.push(money(job.cost_usd));
  if (job.error) parts.push(job.error.code.replaceAll("_", " "));
  return parts.join(" · ");
}
