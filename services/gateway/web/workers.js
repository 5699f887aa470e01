// The workers and their GPUs, with what they do now.

import { call, jobPath, poll } from "./api.js";
import { STAGE, ago, bytes, duration, el, pace, setText, show, titleOf, words } from "./dom.js";

const EVERY_S = 2;

export function workersPage() {
  const note = el("p", { class: "empty", hidden: true });
  const grid = el("ul", { class: "grid workers" });
  const node = el("section", { class: "wide" }, el("h1", { tabindex: "-1" }, "Workers"), note, grid);
  const cards = new Map();
  const titles = new Map(); // what the jobs that run were asked for

  // A job of which the gateway tells nothing keeps its number.
  function link(id) {
    const node = el("a", { href: `#/jobs/${encodeURIComponent(id)}` }, shortId(id));
    if (!titles.has(id)) titles.set(id, call(jobPath(id)).then(titleOf, () => shortId(id)));
    titles.get(id).then((title) => setText(node, title));
    return node;
  }

  async function look() {
    let found;
    try {
      found = (await call("v1/workers")).workers;
    } catch (problem) {
      setText(note, problem.message);
      show(note, true);
      return;
    }
    const alive = new Set(found.map((worker) => `${worker.stage}.${worker.id}`));
    for (const [key, one] of cards) {
      if (alive.has(key)) continue;
      one.node.remove();
      cards.delete(key);
    }
    for (const worker of found) {
      const key = `${worker.stage}.${worker.id}`;
      if (!cards.has(key)) {
        cards.set(key, card(link));
        grid.append(cards.get(key).node);
      }
      cards.get(key).update(worker);
    }
    setText(note, "No worker is there: what is sent waits until one comes.");
    show(note, !found.length);
  }

  return { title: "Workers", node, leave: poll(look, EVERY_S) };
}

function card(link) {
  const title = el("h2");
  const state = el("span", { class: "status" });
  const model = el("p", { class: "facts" });
  const doing = el("p", { class: "doing" });
  const devices = el("div", { class: "devices" });
  const figures = el("p", { class: "facts" });
  const node = el("li", { class: "card worker" }, el("div", { class: "card-head" }, title, state), model, doing, devices, figures);
  let running = null;
  return {
    node,
    update(worker) {
      setText(title, STAGE[worker.stage] ?? words(worker.stage));
      setText(state, words(worker.state));
      state.dataset.status = worker.state;
      setText(model, [worker.engine === worker.model ? worker.engine : `${worker.engine} · ${worker.model}`, worker.profile, worker.host].filter(Boolean).join(" · "));
      const ids = worker.running || [];
      if (ids.join() !== running) {
        running = ids.join();
        doing.replaceChildren(
          ...(ids.length
            ? ["Works on ", ...ids.flatMap((id, index) => [index ? ", " : "", link(id)])]
            : ["Waits for work"]),
        );
      }
      drawDevices(devices, worker.gpus || []);
      const parts = [`${worker.tasks_done || 0} done`];
      if (worker.seconds_per_step) parts.push(`${pace(worker.seconds_per_step)} a step`);
      if (worker.busy_seconds) parts.push(`busy ${duration(worker.busy_seconds)}`);
      parts.push(`started ${ago(worker.started_at)}`);
      setText(figures, parts.join(" · "));
    },
  };
}

const shortId = (id) => (id.length > 14 ? `…${id.slice(-8)}` : id);

function drawDevices(place, gpus) {
  if (place.children.length !== gpus.length) place.replaceChildren(...gpus.map(() => device()));
  gpus.forEach((gpu, index) => {
    const [name, load, memory, rest] = place.children[index].children;
    setText(name, gpu.uuid === "cpu" ? "CPU" : `${gpu.name} · GPU ${gpu.index}`);
    gauge(load, gpu.utilization, gpu.utilization === undefined ? "" : `${Math.round(gpu.utilization * 100)} %`);
    const share = gpu.memory_total ? gpu.memory_used / gpu.memory_total : undefined;
    gauge(memory, share, share === undefined ? "" : `${bytes(gpu.memory_used)} of ${bytes(gpu.memory_total)}`);
    const parts = [];
    if (gpu.power_watts !== undefined) parts.push(`${Math.round(gpu.power_watts)} W`);
    if (gpu.temperature_celsius !== undefined) parts.push(`${Math.round(gpu.temperature_celsius)} °C`);
    setText(rest, parts.join(" · "));
  });
}

function device() {
  const meter = (label) =>
    el("div", { class: "gauge", role: "meter", "aria-label": label, "aria-valuemin": "0", "aria-valuemax": "100" }, el("span", {}, label), el("span", { class: "value" }), el("i"));
  return el("div", { class: "device" }, el("h3"), meter("Load"), meter("Memory"), el("p", { class: "facts" }));
}

function gauge(node, share, text) {
  show(node, share !== undefined);
  if (share === undefined) return;
  const percent = Math.round(Math.min(1, Math.max(0, share)) * 100);
  node.setAttribute("aria-valuenow", percent);
  node.setAttribute("aria-valuetext", text);
  node.style.setProperty("--share", percent / 100);
  setText(node.querySelector(".value"), text);
}
