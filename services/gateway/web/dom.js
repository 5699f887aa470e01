// Elements and figures. Whatever comes from people or from the API becomes text, never markup.

export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// Text that did not change is left alone, so that nothing is selected, focused or read out anew.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function show(node, shown) {
  if (node.hidden === shown) node.hidden = !shown;
}

export function announce(text) {
  setText(document.getElementById("announcer"), text);
}

// No line ends between a figure and its unit.
const together = (text) => text.replaceAll(" ", "\u00a0");

export function duration(seconds) {
  if (seconds < 0.095) return together("0 s");
  if (seconds < 9.95) return together(`${seconds.toFixed(1)} s`);
  if (seconds < 90) return together(`${Math.round(seconds)} s`);
  const whole = Math.round(seconds);
  const minutes = Math.floor(whole / 60);
  if (minutes < 10) return together(`${minutes} min ${whole % 60} s`);
  if (minutes < 90) return together(`${Math.round(whole / 60)} min`);
  return together(`${Math.floor(minutes / 60)} h ${minutes % 60} min`);
}

export function pace(seconds) {
  return together(seconds < 0.1 ? `${Math.max(1, Math.round(seconds * 1000))} ms` : `${seconds.toPrecision(2)} s`);
}

export function money(dollars) {
  if (dollars >= 0.1) return `$${dollars.toFixed(2)}`;
  return dollars > 0 ? `$${Number(dollars.toPrecision(2)).toFixed(Math.min(6, 1 - Math.floor(Math.log10(dollars))))}` : "$0";
}

export function bytes(size) {
  const units = ["B", "kB", "MB", "GB"];
  let unit = 0;
  while (size >= 1024 && unit < 3) {
    size /= 1024;
    unit += 1;
  }
  return together(`${size < 10 && unit ? size.toFixed(1) : Math.round(size)} ${units[unit]}`);
}

export function ago(iso) {
  const seconds = Math.max(0, (Date.now() - Date.parse(iso)) / 1000);
  if (seconds < 45) return "just now";
  if (seconds < 3600) return `${Math.max(1, Math.round(seconds / 60))} min ago`;
  if (seconds < 36 * 3600) return `${Math.round(seconds / 3600)} h ago`;
  return new Date(iso).toLocaleDateString(undefined, { dateStyle: "medium" });
}

export function words(name) {
  const text = name.replaceAll("-", " ").replaceAll("_", " ");
  return text[0].toUpperCase() + text.slice(1);
}

export const STATUS = {
  queued: "Waiting",
  in_progress: "Working",
  awaiting_review: "Your choice",
  completed: "Done",
  failed: "Failed",
  cancelled: "Cancelled",
  rejected: "Rejected",
};
export const FINAL = new Set(["completed", "failed", "cancelled", "rejected"]);
export const STAGE = { edit: "Edit", i2v: "Video" };

export function statusChip(status) {
  return el("span", { class: "status", "data-status": status }, STATUS[status] ?? words(status));
}

export function titleOf(job) {
  const request = job.request;
  const told = request?.edit?.prompt && request.edit.prompt !== PRESETS_ALONE ? request.edit.prompt : "";
  const presets = [request?.edit?.style, request?.edit?.background, request?.edit?.viewpoint].filter(Boolean).map(words);
  return told || presets.join(", ") || request?.i2v?.prompt || (request ? "A photo in motion" : "An unreadable request");
}

// What the edit's prompt says where only presets were chosen: their sentences follow it.
export const PRESETS_ALONE = "Change the photo as follows";
