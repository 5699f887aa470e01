// The form: photos, prompts, presets, and what they would cost and take, before anything is sent.

import { call, post, randomKey, poll, jobPath, referencePath } from "./api.js";
import { PRESETS_ALONE, announce, duration, el, money, setText, show, words } from "./dom.js";
import { Photos } from "./photos.js";

const ESTIMATE_PAUSE_MS = 250;
const ESTIMATE_EVERY_S = 10;
const AGAIN_MS = 2000; // between two looks for what there is to choose from

let kept = null; // the form is kept while other pages are looked at

export function createPage(given) {
  kept ??= new Create();
  const from = given.get("from");
  if (from) kept.fillFrom(from);
  const stop = poll(() => kept.estimate(), ESTIMATE_EVERY_S);
  document.addEventListener("paste", kept.onPaste);
  return {
    title: "Create",
    node: kept.form,
    leave: () => {
      stop();
      document.removeEventListener("paste", kept.onPaste);
    },
  };
}

class Create {
  constructor() {
    const template = document.getElementById("create-template");
    this.form = template.content.cloneNode(true).querySelector("form");
    this.key = "";
    this.sent = []; // what went under that key
    this.timer = 0;
    this.asked = 0;
    this.photos = null;
    this.problem = this.form.querySelector(".problem");
    this.button = this.form.querySelector("button[type=submit]");
    this.onPaste = (event) => {
      const files = [...(event.clipboardData?.files || [])];
      if (!files.length || !this.photos) return;
      event.preventDefault();
      this.photos.add(files);
    };
    this.ready = this.load();
    this.form.addEventListener("submit", (event) => this.send(event));
    this.form.addEventListener("input", (event) => this.changed(event.target));
    for (const chip of this.form.querySelectorAll(".chip")) chip.addEventListener("click", () => this.suggest(chip));
    this.changed();
  }

  field(id) {
    return this.form.querySelector(`#${id}`);
  }

  async load({ again = false } = {}) {
    try {
      this.options = await call("v1/options");
    } catch (problem) {
      this.ready = null; // sending asks for them again
      const passes = problem.status === 0 || problem.status === 429 || problem.status >= 500;
      if (passes) setTimeout(() => (this.ready ??= this.load({ again: true })), AGAIN_MS);
      if (!again) this.complain(problem.message); // once: it takes the focus
      return;
    }
    if (again) show(this.problem, false);
    const { backgrounds, styles, viewpoints, qualities, limits } = this.options;
    for (const [id, presets] of Object.entries({ background: backgrounds, style: styles, viewpoint: viewpoints })) {
      this.field(id).append(
        ...Object.entries(presets).map(([name, told]) => el("option", { value: name, title: told }, words(name))),
      );
    }
    for (const [name, effort] of Object.entries(qualities)) {
      setText(this.form.querySelector(`[data-steps="${name}"]`), `${effort.edit.steps} steps`);
    }
    this.photos = new Photos(this.form, limits, () => this.changed());
  }

  suggest(chip) {
    const prompt = this.field("motion-prompt");
    prompt.value = chip.textContent;
    prompt.focus();
    this.changed(prompt);
  }

  changed(target) {
    const video = this.field("with-video").checked;
    for (const id of ["motion-prompt", "size", "frames", "fps", "review"]) this.field(id).disabled = !video;
    for (const chip of this.form.querySelectorAll(".chip")) chip.disabled = !video;
    const [frames, fps] = [Number(this.field("frames").value), Number(this.field("fps").value)];
    setText(this.field("length"), frames > 0 && fps > 0 ? `${duration(frames / fps)} of video.` : "");
    if (!this.button.disabled) setText(this.button, video ? "Make the video" : "Edit the photo");
    if (target?.matches("[aria-invalid]")) this.accept(target);
    if (!this.form.querySelector("[aria-invalid]")) show(this.problem, false);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.estimate(), ESTIMATE_PAUSE_MS);
  }

  // What is asked for, without its photos.
  request() {
    const value = (id) => this.field(id).value.trim();
    const quality = this.form.elements.quality.value;
    const seed = value("seed") === "" ? {} : { seed: Number(value("seed")) };
    const presets = {};
    for (const id of ["background", "style", "viewpoint"]) if (value(id)) presets[id] = value(id);
    const video = this.field("with-video").checked;
    const asked = { lane: value("lane") };
    if (value("edit-prompt") || Object.keys(presets).length) {
      const prompt = value("edit-prompt") || PRESETS_ALONE;
      asked.edit = { prompt, quality, candidates: Number(value("candidates")), ...presets, ...seed };
    }
    if (video) {
      const [width, height] = this.size();
      const [num_frames, fps] = [Number(value("frames")), Number(value("fps"))];
      asked.i2v = { prompt: value("motion-prompt"), quality, num_frames, fps, width, height, ...seed };
      if (asked.edit && this.field("review").checked) asked.review = true;
    }
    return asked;
  }

  size() {
    const chosen = this.field("size").value;
    if (chosen) return chosen.split("x").map(Number);
    const photo = this.photos?.shape;
    const aspect = photo ? photo.width / photo.height : 16 / 9;
    if (aspect > 1.2) return [832, 480];
    return aspect < 0.83 ? [480, 832] : [640, 640];
  }

  // ── before it is sent ──────────────────────────────────────────────────────────────────────────────────────────

  async estimate() {
    const number = ++this.asked;
    if (this.wrongNumbers().length) return this.tell(null); // the server would refuse it
    const asked = this.request();
    delete asked.review;
    if (!asked.edit && !asked.i2v) asked.edit = { prompt: PRESETS_ALONE, quality: this.form.elements.quality.value };
    const photo = this.photos?.shape;
    if (photo) [asked.reference_width, asked.reference_height] = [photo.width, photo.height];
    let found = null;
    try {
      found = await post("v1/estimate", asked);
    } catch (problem) {
      if (problem.status === 0) setText(this.field("estimate-note"), problem.message);
    }
    if (number === this.asked) this.tell(found);
  }

  tell(found) {
    const figure = (name, text) => setText(this.form.querySelector(`[data-figure="${name}"]`), text);
    if (found === null) {
      for (const name of ["seconds", "cost", "ahead"]) figure(name, "–");
      return;
    }
    figure("seconds", found.seconds === null ? "not known yet" : `about ${duration(found.seconds)}`);
    const unpriced = found.gpu_seconds !== null && found.cost_usd === null;
    const cost = found.cost_usd === null ? "not known yet" : `about ${money(found.cost_usd)}`;
    figure("cost", unpriced ? "no price set" : cost);
    const ahead = found.stages[0].ahead;
    figure("ahead", ahead ? `${ahead}` : "nobody");
    setText(this.field("estimate-note"), noteOf(found));
  }

  // ── sending ────────────────────────────────────────────────────────────────────────────────────────────────────

  async send(event) {
    event.preventDefault();
    await (this.ready ??= this.load());
    if (this.button.disabled || !this.photos) return;
    this.forgive();
    const asked = this.request();
    if (!this.valid(asked)) return;
    const parts = [...this.photos.chosen.map((photo) => photo.file), JSON.stringify(asked)];
    const form = new FormData();
    parts.forEach((part, index) => form.append(index < parts.length - 1 ? "image" : "request", part));
    // The same again, behind an answer that was lost, is the same job; what was changed since is another.
    if (parts.length !== this.sent.length || parts.some((part, index) => part !== this.sent[index])) this.key = randomKey();
    this.sent = parts;
    this.busy(true);
    try {
      const job = await call("v1/jobs", { method: "POST", body: form, headers: { "Idempotency-Key": this.key } });
      this.sent = [];
      announce("Sent.");
      location.hash = `#/jobs/${encodeURIComponent(job.id)}`;
    } catch (problem) {
      const unreadable = problem.status === 0 ? await this.photos.unreadable() : [];
      if (unreadable.length) this.refuseFiles(unreadable);
      else this.refuse(problem);
    } finally {
      this.busy(false);
    }
  }

  busy(sending) {
    this.button.disabled = sending;
    this.form.setAttribute("aria-busy", sending);
    setText(this.button, sending ? "Sending …" : this.field("with-video").checked ? "Make the video" : "Edit the photo");
  }

  valid(asked) {
    const wrong = [];
    if (!this.photos.chosen.length) wrong.push(["image", "Choose a photo first."]);
    if (!asked.edit && !asked.i2v) wrong.push(["edit.prompt", "Say what should change, or pick a preset."]);
    if (!asked.edit && this.photos.chosen.length > 1) {
      wrong.push(["edit.prompt", "A video without an edit starts from one photo: say what should change, or remove the others."]);
    }
    for (const input of this.wrongNumbers()) wrong.push([input.dataset.field, input.validationMessage]);
    for (const [field, message] of wrong) this.mark(field, message);
    if (wrong.length) this.complain(wrong.map(([, message]) => message).join(" "));
    return !wrong.length;
  }

  wrongNumbers() {
    return ["frames", "fps", "seed"].map((id) => this.field(id)).filter((input) => !input.disabled && !input.validity.valid);
  }

  refuse(problem) {
    for (const { field, message } of problem.fields) this.mark(field, message);
    this.complain(problem.message);
  }

  refuseFiles(names) {
    const message = `${names.join(", ")}: changed or moved since it was chosen. Remove it, and choose it again.`;
    this.mark("image", message);
    this.complain(message);
  }

  mark(field, message) {
    const name = field.startsWith("image") ? "image" : field.split(".")[0];
    const input = name === "image" ? this.field("files") : this.form.querySelector(`[data-field="${field}"]`);
    input?.setAttribute("aria-invalid", "true");
    const folded = input?.closest("details");
    if (folded) folded.open = true;
    const place = this.placeOf(input) || this.form.querySelector(`[data-error="${name}"]`);
    if (!place) return;
    setText(place, folded ? `${input.labels[0].textContent}: ${message}` : message);
    show(place, true);
  }

  // Where it is said what is wrong with an input: the place that the input is described by.
  placeOf(input) {
    const told = (input?.getAttribute("aria-describedby") || "").split(" ");
    return told.map((id) => id && this.field(id)).find((place) => place?.dataset.error) || null;
  }

  complain(text) {
    setText(this.problem, text);
    show(this.problem, true);
    const wrong = this.form.querySelector("[aria-invalid]");
    (wrong || this.problem).focus();
  }

  accept(input) {
    input.removeAttribute("aria-invalid");
    const place = this.placeOf(input);
    if (place) unsay(place);
  }

  forgive() {
    show(this.problem, false);
    for (const input of this.form.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
    for (const place of this.form.querySelectorAll("[data-error]")) unsay(place);
  }

  // ── once more ──────────────────────────────────────────────────────────────────────────────────────────────────

  async fillFrom(id) {
    history.replaceState(null, "", "#/");
    await (this.ready ??= this.load());
    if (!this.photos) return;
    let job;
    try {
      job = await call(jobPath(id));
    } catch (problem) {
      this.complain(problem.message);
      return;
    }
    this.photos.clear(); // those of before belong to what was asked before
    let missing = "";
    try {
      await this.photos.add(await Promise.all((job.inputs || []).map((_, index) => fetchPhoto(id, index))));
    } catch (problem) {
      missing = problem.message;
    }
    const { edit, i2v } = job.request || {};
    const set = (field, value) => (this.field(field).value = value ?? "");
    set("edit-prompt", edit && edit.prompt !== PRESETS_ALONE ? edit.prompt : "");
    for (const preset of ["background", "style", "viewpoint"]) set(preset, edit?.[preset]);
    set("candidates", edit?.candidates ?? 1);
    set("motion-prompt", i2v?.prompt);
    this.field("with-video").checked = Boolean(i2v);
    this.field("review").checked = Boolean(job.request?.review);
    if (edit || i2v) this.form.elements.quality.value = (i2v || edit).quality;
    if (i2v) {
      set("frames", i2v.num_frames);
      set("fps", i2v.fps);
      const size = `${i2v.width}x${i2v.height}`;
      set("size", [...this.field("size").options].some((option) => option.value === size) ? size : "");
    }
    this.changed();
    if (!missing) return;
    this.mark("image", missing);
    this.complain(missing);
  }
}

// Hidden text that an input is described by would be read out all the same.
function unsay(place) {
  setText(place, "");
  show(place, false);
}

async function fetchPhoto(id, index) {
  const answer = await fetch(referencePath(id, index)).catch(() => null);
  if (answer?.status === 404) throw new Error("The photo of that job is no longer in the store: choose it again.");
  if (!answer?.ok) throw new Error("The photo of that job cannot be fetched now: choose it again, or try later.");
  const body = await answer.blob();
  return new File([body], `photo-${index + 1}.${body.type.split("/")[1]}`, { type: body.type });
}

function noteOf(found) {
  const idle = found.stages.filter((stage) => !stage.workers);
  if (idle.length) {
    const names = idle.map((stage) => (stage.stage === "edit" ? "edits" : "videos")).join(" and ");
    return `No worker for ${names} is there now: the job would wait for one.`;
  }
  if (found.stages.some((stage) => stage.basis === "unknown")) return "Nothing like it has been made here lately.";
  const parts = found.stages.map(
    (stage) => `${stage.stage === "edit" ? "edit" : "video"} ${stage.steps} × ${stage.seconds_per_step < 0.1 ? "<0.1" : stage.seconds_per_step.toPrecision(2)}\u00a0s`,
  );
  const basis = found.stages.some((stage) => stage.basis === "scaled") ? "Reckoned from jobs of another size" : "Measured on recent jobs";
  return `${basis}: ${parts.join(", ")}.`;
}
