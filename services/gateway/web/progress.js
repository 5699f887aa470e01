// What is known of a job while it runs: its record, and what the log tells after it. Knows nothing of the page.

import { FINAL } from "./dom.js";

// The record of a job that was cancelled keeps the state in which the cancel found a stage.
const UNDER_WAY = new Set(["queued", "running"]);

export class Progress {
  constructor(job) {
    this.reset(job);
  }

  // Begin from a record; the log is told from its start again.
  reset(job, { replayed = false } = {}) {
    this.job = job;
    this.status = job.status;
    this.error = job.error || null;
    this.place = null;
    this.cancelling = false;
    this.stages = (job.stages || []).map((record) => ({
      stage: record.stage,
      steps: record.work.steps,
      state: replayed || (FINAL.has(job.status) && UNDER_WAY.has(record.state)) ? "pending" : record.state,
      step: !replayed && record.state === "completed" ? record.work.steps : 0,
      artifacts: replayed ? [] : record.artifacts || [],
      seconds: replayed ? null : busy(record.timings),
      perStep: replayed || !record.timings?.denoise ? null : record.timings.denoise / record.work.steps,
      etaAt: null,
      phase: "",
      trouble: "",
    }));
    this.approved = job.approved ?? null;
    this.run = replayed ? 1 : job.run || 1;
  }

  get final() {
    return FINAL.has(this.status);
  }

  get artifacts() {
    return this.stages.flatMap((stage) => stage.artifacts);
  }

  get current() {
    return this.stages.find((stage) => stage.state !== "completed") || null;
  }

  stage(name) {
    return this.stages.find((stage) => stage.stage === name) || null;
  }

  // Take in one server-sent event; returns what is worth telling aloud, else "".
  fold(kind, data) {
    const told = this.take(kind, data);
    if (!this.final && !this.reviewing() && this.current?.state === "pending") this.current.state = "queued";
    return told;
  }

  take(kind, data) {
    const stage = data.stage ? this.stage(data.stage) : null;
    if (data.run !== undefined && data.run < this.run && kind !== "stage_completed") return "";
    const name = data.stage === "edit" ? "edit" : "video";
    switch (kind) {
      case "queue":
        this.place = data;
        return "";
      case "progress":
        if (stage && stage.state !== "completed") this.onProgress(stage, data);
        return "";
      case "stage_started":
        if (!stage || stage.state === "completed") return "";
        Object.assign(stage, { state: "running", trouble: "", phase: "preparing", step: data.checkpoint?.step || 0, etaAt: null });
        [this.status, this.place] = ["in_progress", null];
        return name === "edit" ? "Your photo is being edited." : "The video is being made.";
      case "stage_completed":
        if (!stage) return "";
        Object.assign(stage, {
          state: "completed", trouble: "", step: stage.steps, etaAt: null, artifacts: data.artifacts || [],
          seconds: busy(data.timings), perStep: data.timings?.denoise ? data.timings.denoise / stage.steps : stage.perStep,
        });
        this.place = null;
        this.status = this.reviewing() ? "awaiting_review" : this.current ? "in_progress" : this.status;
        if (this.status === "awaiting_review") return "The edited frame is ready. Choose whether the video is made of it.";
        return name === "edit" ? "The edited frame is ready." : "";
      case "stage_failed":
        if (!stage || stage.state === "completed") return "";
        Object.assign(stage, { state: data.final ? "failed" : "queued", etaAt: null, trouble: data.error?.message || "" });
        return data.final ? "" : `The ${name} ran into trouble and is tried again.`;
      case "stage_released":
        if (!stage || stage.state === "completed") return "";
        Object.assign(stage, { state: "queued", etaAt: null });
        return "";
      case "cancel_requested":
        this.cancelling = true;
        return "";
      case "approved":
        this.approved = data.candidate ?? 0;
        this.status = "in_progress";
        return "";
      case "retry_requested":
        this.onRetry(data.run);
        return "It is tried again.";
      case "completed":
      case "failed":
      case "cancelled":
      case "rejected":
        return this.onEnd(kind, data);
      default:
        return "";
    }
  }

  reviewing() {
    return Boolean(this.job.request?.review) && this.approved === null && this.current?.stage === "i2v" && this.stage("edit") !== null;
  }

  onProgress(stage, data) {
    Object.assign(stage, { state: "running", phase: data.phase, step: data.step || 0, steps: data.steps || stage.steps });
    stage.perStep = data.seconds_per_step ?? stage.perStep;
    stage.etaAt = data.eta_s === undefined || data.eta_s === null ? null : Date.now() + data.eta_s * 1000;
    [this.status, this.place] = ["in_progress", null];
  }

  onRetry(run) {
    this.run = run;
    [this.status, this.error, this.cancelling] = ["queued", null, false];
    for (const stage of this.stages) {
      if (stage.state !== "completed") Object.assign(stage, { state: "pending", step: 0, etaAt: null, trouble: "" });
    }
  }

  onEnd(kind, data) {
    [this.status, this.place] = [kind, null];
    this.error = data.error || null;
    for (const stage of this.stages) {
      stage.etaAt = null;
      if (UNDER_WAY.has(stage.state)) stage.state = "pending";
    }
    return this.ending();
  }

  // What is told aloud of a job that has ended.
  ending() {
    if (this.status === "completed") return this.stage("i2v") ? "Done. The video is ready." : "Done. The picture is ready.";
    return this.status === "cancelled" ? "It was cancelled." : `It failed: ${this.error?.message || "the reason is not known"}`;
  }
}

// Seconds of work, without waiting.
function busy(timings) {
  if (!timings) return null;
  const seconds = Object.entries(timings).reduce((sum, [phase, value]) => (phase === "queued" ? sum : sum + value), 0);
  return seconds || null;
}
