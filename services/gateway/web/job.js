// One job, live: the picture as soon as there is one, how far each stage is, and what can be done about it.

import { artifactPath, call, jobPath, post, referencePath } from "./api.js";
import { FINAL, STAGE, STATUS, announce, ago, duration, el, money, pace, setText, show, statusChip, titleOf, words } from "./dom.js";
import { Progress } from "./progress.js";

const KINDS = [
  "accepted", "rejected", "stage_started", "stage_completed", "stage_failed", "stage_released", "stage_cancelled",
  "cancel_requested", "retry_requested", "approved", "completed", "failed", "cancelled", "progress", "queue",
];
const LOST = "There is no news from the gateway: this is how it was. It is asked again and again.";
const MANY_STEPS = 40; // more are drawn as one bar
const TICK_MS = 500;
const AGAIN_MS = 2000; // between two looks for a gateway that is away
const LOST_MS = 4000; // a gateway that is started anew is back by then, or it is said

export function jobPage(id) {
  const page = new JobPage(id);
  page.open();
  return { title: "Job", node: page.node, leave: () => page.close() };
}

class JobPage {
  constructor(id) {
    this.id = id;
    this.source = null;
    this.progress = null;
    this.chosen = null; // the picture that somebody asked to see
    this.refused = ""; // by which code what was asked last
    this.usual = {}; // seconds that a stage takes, where that is known
    this.shown = ""; // what the screen shows
    this.drawing = 0;
    this.left = false;
    this.acting = false;
    this.lostAt = null; // since when nothing is heard of the gateway
    this.toldLost = false;
    this.timer = setInterval(() => this.draw(), TICK_MS);
    this.build();
  }

  build() {
    this.title = el("h1", { tabindex: "-1" }, "…");
    this.chip = el("div", { class: "state" });
    this.line = el("p", { class: "line" });
    this.screen = el("div", { class: "screen" });
    this.strip = el("div", { class: "strip", role: "group", "aria-label": "What to show" });
    this.stages = el("ol", { class: "stages" });
    this.trouble = el("div", { class: "problem", role: "alert", tabindex: "-1", hidden: true });
    this.review = el("section", { class: "review", "aria-label": "Candidates", hidden: true });
    this.actions = el("div", { class: "actions" });
    this.facts = el("dl", { class: "details" });
    this.cancelButton = el("button", { type: "button", class: "button", onclick: () => this.cancel() }, "Cancel");
    this.retryButton = el("button", { type: "button", class: "primary", onclick: () => this.retry() }, "Try again");
    this.download = el("a", { class: "primary", download: "" }, "Download");
    this.again = el("a", { class: "button", href: `#/?from=${encodeURIComponent(this.id)}` }, "Use again");
    this.actions.append(this.download, this.retryButton, this.again, this.cancelButton);
    for (const one of this.actions.children) one.hidden = true;
    this.more = el("details", { class: "more" }, el("summary", {}, "Details"), this.facts);
    this.node = el(
      "article",
      { class: "job" },
      el("div", { class: "show" }, this.screen, this.strip),
      el(
        "div", { class: "side" },
        el("header", {}, this.chip, this.title, this.line),
        this.stages, this.trouble, this.review, this.actions, this.more,
      ),
    );
  }

  // ── listening ──────────────────────────────────────────────────────────────────────────────────────────────────

  async open() {
    try {
      this.take(await call(jobPath(this.id)));
    } catch (problem) {
      if (this.left) return;
      const passes = problem.status === 0 || problem.status === 429 || problem.status >= 500;
      if (passes) this.reopen();
      if (passes && this.progress) return; // what is known of the job stays, and the line says that it is old
      this.complain(problem.message);
      if (this.progress) return;
      setText(this.title, problem.status === 404 ? "There is no such job" : "The job cannot be shown");
      this.screen.replaceChildren(el("p", { class: "waiting" }, "Nothing to show"));
      return;
    }
    if (this.left) return;
    if (this.progress.final) {
      announce(this.progress.ending());
      return;
    }
    this.listen();
    this.expect(this.progress.job);
  }

  reopen() {
    clearTimeout(this.reopening);
    this.reopening = setTimeout(() => this.open(), AGAIN_MS);
  }

  // What the stages would take that have not begun, by what others took lately; without an answer nothing is said.
  async expect(job) {
    const asked = { lane: job.request?.lane };
    for (const { stage, work } of job.stages || []) {
      asked[stage] = { ...job.request[stage], width: work.width, height: work.height };
    }
    const found = await post("v1/estimate", asked).catch(() => null);
    for (const one of found?.stages || []) this.usual[one.stage] = one.seconds;
    this.soon();
  }

  take(job) {
    show(this.trouble, false);
    delete this.trouble.dataset.text; // what is in it now may be something else
    this.lostAt = null;
    this.progress = new Progress(job);
    this.draw();
  }

  // The log comes from its start, which is short; where the connection breaks, the browser goes on behind the last
  // event that it saw (`Last-Event-ID`).
  listen() {
    this.source?.close();
    const source = new EventSource(jobPath(this.id, "/events?place=true"));
    this.source = source;
    let begun = false;
    for (const kind of KINDS) {
      source.addEventListener(kind, (event) => {
        // A log that does not begin with its beginning has had its time: the record alone says what was before.
        if (!begun && kind === "accepted") this.progress.reset(this.progress.job, { replayed: true });
        begun = true;
        const told = this.progress.fold(kind, JSON.parse(event.data));
        if (told) announce(told);
        this.soon();
      });
    }
    source.addEventListener("job", (event) => {
      source.close();
      this.lostAt = null;
      this.progress.reset(JSON.parse(event.data));
      this.soon();
    });
    source.addEventListener("open", () => (this.lostAt = null));
    source.addEventListener("error", () => {
      this.lostAt ??= Date.now();
      if (source.readyState === EventSource.CLOSED && !this.left) this.reopen();
    });
  }

  close() {
    this.left = true;
    clearInterval(this.timer);
    clearTimeout(this.reopening);
    cancelAnimationFrame(this.drawing);
    this.source?.close();
  }

  // ── doing ──────────────────────────────────────────────────────────────────────────────────────────────────────

  // One thing at a time. The button is not disabled meanwhile: it would lose the focus.
  async act(what, body) {
    if (this.acting) return null;
    this.acting = true;
    this.refused = "";
    try {
      return await post(jobPath(this.id, what), body);
    } catch (problem) {
      this.refused = problem.code;
      this.complain(problem.message);
      return null;
    } finally {
      this.acting = false;
    }
  }

  async cancel() {
    if (this.progress.cancelling) return;
    this.progress.cancelling = true;
    this.draw();
    if ((await this.act("/cancel")) === null) this.progress.cancelling = false;
  }

  async retry() {
    const job = await this.act("/retry");
    if (job === null) {
      if (this.refused === "not_possible") await this.open(); // it goes on already: somebody else was first
      return;
    }
    this.title.focus();
    this.take(job);
    if (!this.progress.final) this.listen();
  }

  async approve(candidate) {
    if ((await this.act("/approve", { candidate })) !== null) this.title.focus();
  }

  complain(text) {
    // An alert that did not change is not read out again.
    if (this.trouble.hidden || this.trouble.textContent !== text) this.trouble.replaceChildren(el("p", {}, text));
    show(this.trouble, true);
    this.trouble.dataset.own = "";
  }

  // ── drawing ────────────────────────────────────────────────────────────────────────────────────────────────────

  soon() {
    this.drawing ||= requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.drawing = 0;
    const now = this.progress;
    if (!now || this.left) return;
    setText(this.title, titleOf(now.job));
    if (this.chip.dataset.status !== now.status) {
      this.chip.dataset.status = now.status;
      this.chip.replaceChildren(statusChip(now.status));
      document.title = `${this.chip.textContent} · vidgen`;
    }
    this.tellIfLost();
    setText(this.line, this.lost ? LOST : lineOf(now));
    this.drawStages(now);
    this.drawPictures(now);
    this.drawReview(now);
    this.drawEnd(now);
    this.drawDetails(now.job);
  }

  get lost() {
    return this.lostAt !== null && Date.now() - this.lostAt >= LOST_MS;
  }

  tellIfLost() {
    const lost = this.lost;
    if (lost && !this.toldLost) announce(LOST);
    this.toldLost = lost;
  }

  drawStages(now) {
    if (this.stages.children.length !== now.stages.length) this.stages.replaceChildren(...now.stages.map(stageNode));
    now.stages.forEach((stage, index) => {
      const node = this.stages.children[index];
      const bar = node.querySelector("[role=progressbar]");
      if (node.dataset.state !== stage.state) node.dataset.state = stage.state;
      if (Number(bar.getAttribute("aria-valuemax")) !== stage.steps) {
        bar.setAttribute("aria-valuemax", stage.steps);
        const parts = stage.steps <= MANY_STEPS ? stage.steps : 1;
        bar.replaceChildren(...Array.from({ length: parts }, () => el("i")));
      }
      bar.setAttribute("aria-valuenow", stage.step);
      bar.setAttribute("aria-valuetext", `step ${stage.step} of ${stage.steps}`);
      if (bar.children.length === 1) bar.firstChild.style.setProperty("--share", stage.step / stage.steps);
      else [...bar.children].forEach((part, step) => part.classList.toggle("done", step < stage.step));
      setText(node.querySelector(".where"), whereOf(stage));
      setText(node.querySelector(".pace"), paceOf(stage, now, this.usual[stage.stage], this.lost));
    });
  }

  // The newest of photo, edited frame and video, unless another one was asked for.
  drawPictures(now) {
    const pictures = picturesOf(now);
    const newest = newestOf(pictures, now);
    const wanted = pictures.find((one) => one.caption === this.chosen) || newest;
    const key = wanted ? `${wanted.kind} ${wanted.source}` : "";
    const first = now.stages.at(-1)?.artifacts[0];
    const { width, height } = now.job.request?.i2v || first || {};
    if (width && height) this.screen.style.setProperty("--aspect", width / height);
    if (key !== this.shown || !this.screen.children.length) this.turnTo(wanted, key);
    this.screen.classList.toggle("working", !now.final && wanted?.kind !== "video" && now.status !== "awaiting_review");
    const captions = pictures.map((one) => one.caption).join();
    if (this.strip.dataset.captions !== captions) {
      this.strip.dataset.captions = captions;
      this.strip.replaceChildren(
        ...pictures.map(({ caption }) => el("button", { type: "button", class: "pill", onclick: () => this.choose(caption) }, caption)),
      );
    }
    for (const button of this.strip.children) button.setAttribute("aria-pressed", button.textContent === wanted?.caption);
    show(this.strip, pictures.length > 1);
    this.drawDownload(now, wanted?.kind === "photo" ? newest : wanted);
  }

  // What is looked at is what is taken home; a photo is at home already.
  drawDownload(now, picture) {
    const made = picture && picture.kind !== "photo" ? picture : null;
    show(this.download, now.status === "completed" && made !== null);
    if (!made) return;
    setText(this.download, made.kind === "video" ? "Download the video" : "Download the picture");
    this.download.href = made.source;
    this.download.download = `${this.id}-${made.name}`;
  }

  // The one before stays until the next one is here.
  turnTo(wanted, key) {
    this.shown = key;
    const node = wanted ? pictureNode(wanted) : el("p", { class: "waiting" }, "Nothing to show");
    const swap = (shown) => {
      if (this.shown === key) this.screen.replaceChildren(shown);
    };
    if (node.tagName !== "IMG") {
      swap(node);
      return;
    }
    node.addEventListener("load", () => swap(node));
    node.addEventListener("error", () => swap(el("p", { class: "waiting" }, "This picture is no longer there")));
    if (!this.screen.children.length) this.screen.replaceChildren(el("p", { class: "waiting" }, "…"));
  }

  choose(caption) {
    this.chosen = caption === newestOf(picturesOf(this.progress), this.progress).caption ? null : caption;
    this.draw();
  }

  drawReview(now) {
    const waits = now.status === "awaiting_review";
    show(this.review, waits);
    if (!waits || this.review.children.length) return;
    const frames = framesOf(now);
    this.review.append(
      el("h2", {}, frames.length > 1 ? "Which one shall move?" : "Shall this one move?"),
      el(
        "ul", { class: "candidates" },
        ...frames.map((frame, index) => {
          const name = frames.length > 1 ? `Use number ${index + 1}` : "Make the video";
          const button = el("button", { type: "button", class: "primary", onclick: () => this.approve(index) }, name);
          return el("li", {}, el("img", { src: artifactPath(this.id, frame.name), alt: `Candidate ${index + 1}` }), button);
        }),
      ),
    );
  }

  drawEnd(now) {
    const failed = (now.status === "failed" || now.status === "rejected") && now.error;
    if (failed) {
      const where = now.error.stage ? `The ${now.error.stage === "edit" ? "edit" : "video"} failed` : "It failed";
      const text = [where, now.error.message, now.error.code].join("\n");
      if (this.trouble.dataset.text !== text) {
        this.trouble.dataset.text = text;
        this.trouble.replaceChildren(el("strong", {}, where), el("p", {}, now.error.message), el("code", {}, now.error.code));
      }
      delete this.trouble.dataset.own;
    }
    if (failed || this.trouble.dataset.own === undefined) show(this.trouble, Boolean(failed));
    const focused = document.activeElement;
    show(this.cancelButton, !now.final);
    this.cancelButton.setAttribute("aria-disabled", now.cancelling && !now.final);
    setText(this.cancelButton, now.cancelling && !now.final ? "Cancelling …" : "Cancel");
    show(this.retryButton, now.status === "failed" || now.status === "cancelled");
    show(this.again, now.final && Boolean(now.job.request));
    // What would fail in the same way again is better changed first.
    const hopeless = now.status === "failed" && now.error?.retryable === false;
    this.retryButton.className = hopeless ? "button" : "primary";
    this.again.className = hopeless ? "primary" : "button";
    // A button that goes must not take the place of whoever stands on it along.
    if (this.actions.contains(focused) && focused.hidden) {
      const next = [...this.actions.children].find((one) => !one.hidden);
      (now.final && next ? next : this.title).focus({ preventScroll: true });
    }
  }

  drawDetails(job) {
    const told = JSON.stringify([job.updated_at, job.status]);
    if (this.facts.dataset.told === told) return;
    this.facts.dataset.told = told;
    this.facts.replaceChildren(...detailsOf(job).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  }
}

function stageNode(stage) {
  return el(
    "li", {},
    el("div", { class: "stage-head" }, el("h2", {}, STAGE[stage.stage] ?? words(stage.stage)), el("span", { class: "where" })),
    el("div", { class: "bar", role: "progressbar", "aria-label": `${STAGE[stage.stage]}: steps`, "aria-valuemin": "0", "aria-valuemax": "0" }),
    el("p", { class: "pace" }),
  );
}

function whereOf(stage) {
  switch (stage.state) {
    case "completed":
      return stage.seconds ? `done in ${duration(stage.seconds)}` : "done";
    case "running":
      if (stage.phase === "finishing") return "finishing";
      return stage.step ? `step ${stage.step} of ${stage.steps}` : "preparing";
    case "failed":
      return "failed";
    case "queued":
      return "waits";
    default:
      return "";
  }
}

function paceOf(stage, now, usual, lost) {
  if (now.final && stage.state !== "completed") return "";
  const parts = [];
  if (stage.perStep && stage.state !== "pending" && stage.state !== "queued") parts.push(`${pace(stage.perStep)} a step`);
  if (stage.state === "running" && stage.etaAt && !lost) parts.push(`about ${duration(Math.max(0, (stage.etaAt - Date.now()) / 1000))} left`);
  if (stage.state === "queued" && now.place?.stage === stage.stage) parts.push(placeOf(now.place));
  if (usual && (stage.state === "pending" || stage.state === "queued")) parts.push(`takes about ${duration(usual)}`);
  if (stage.trouble && stage.state === "queued") parts.push(`tried again: ${stage.trouble}`);
  return parts.join(" · ");
}

function placeOf(place) {
  if (!place.workers) return "no worker is there yet: it waits for one";
  const turn = place.ahead ? `at most ${place.ahead} ahead of you` : "next in line";
  return place.wait_s ? `${turn}, begins in about ${duration(place.wait_s)}` : turn;
}

function lineOf(now) {
  if (now.cancelling && !now.final) return "Is being cancelled …";
  switch (now.status) {
    case "queued":
      return now.place ? `In the queue: ${placeOf(now.place)}.` : "In the queue.";
    case "in_progress": {
      const stage = now.current;
      if (stage?.state !== "running") return stage?.stage === "i2v" ? "The video is next." : "In the queue.";
      if (stage.stage === "edit") return "Your photo is being edited.";
      return `The ${now.stage("edit") ? "edited frame" : "photo"} is being set in motion.`;
    }
    case "awaiting_review":
      return "The edited frame waits for you.";
    case "completed": {
      const took = (Date.parse(now.job.completed_at) - Date.parse(now.job.created_at)) / 1000;
      const cost = now.job.cost_usd ? ` for ${money(now.job.cost_usd)}` : "";
      return Number.isFinite(took) ? `Made in ${duration(took)}${cost}, ${ago(now.job.completed_at)}.` : "";
    }
    default:
      return now.job.completed_at && FINAL.has(now.job.status) ? `${STATUS[now.status]} ${ago(now.job.completed_at)}.` : "";
  }
}

function framesOf(now) {
  return (now.stage("edit")?.artifacts || []).filter((one) => one.content_type === "image/png");
}

function picturesOf(now) {
  const { job } = now;
  const found = [];
  const numbered = (word, index, all) => (all.length > 1 ? `${word} ${index + 1}` : word);
  (job.inputs || []).forEach((_, index, all) => {
    found.push({ kind: "photo", caption: numbered("Photo", index, all), source: referencePath(job.id, index) });
  });
  framesOf(now).forEach(({ name }, index, all) => {
    found.push({ kind: "frame", caption: numbered("Edited frame", index, all), name, source: artifactPath(job.id, name) });
  });
  const made = now.stage("i2v")?.artifacts || [];
  const video = made.find((one) => one.content_type === "video/mp4");
  const poster = made.find((one) => one.name === "poster.jpg");
  if (video) {
    const source = artifactPath(job.id, video.name);
    found.push({ kind: "video", caption: "Video", name: video.name, source, poster: poster && artifactPath(job.id, poster.name) });
  }
  return found;
}

// The video, else the frame that it is made of, else the first photo.
function newestOf(pictures, now) {
  const of = (kind) => pictures.filter((one) => one.kind === kind);
  return of("video")[0] || of("frame")[now.approved ?? 0] || of("frame")[0] || of("photo")[0];
}

function pictureNode(picture) {
  if (picture.kind !== "video") {
    return el("img", { src: picture.source, alt: picture.caption, class: picture.kind });
  }
  const video = el("video", { src: picture.source, poster: picture.poster, controls: true, loop: true, playsinline: true, "aria-label": "The video" });
  video.muted = true;
  video.autoplay = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  return video;
}

function detailsOf(job) {
  const { edit, i2v } = job.request || {};
  const found = [["Job", job.id], ["Sent", new Date(job.created_at).toLocaleString()]];
  if (edit) {
    found.push(["Edit", edit.prompt]);
    const presets = [edit.background, edit.style, edit.viewpoint].filter(Boolean).map(words);
    if (presets.length) found.push(["Presets", presets.join(", ")]);
  }
  if (i2v) {
    found.push(["Motion", i2v.prompt || "–"]);
    found.push(["Video", `${i2v.width} × ${i2v.height}, ${i2v.num_frames} frames at ${i2v.fps} a second`]);
  }
  for (const stage of job.stages || []) {
    if (!stage.engine) continue;
    const engine = stage.engine === stage.model ? stage.engine : `${stage.engine}, ${stage.model}`;
    found.push([`${STAGE[stage.stage]} made by`, `${engine}, seed ${stage.seed ?? stage.work.seed}${stage.attempt > 1 ? `, attempt ${stage.attempt}` : ""}`]);
  }
  if (job.gpu_seconds) found.push(["GPU time", duration(job.gpu_seconds)]);
  if (job.cost_usd) found.push(["Cost", money(job.cost_usd)]);
  return found;
}
