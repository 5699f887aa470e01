// The photos to be sent: dropped, chosen or pasted; looked at here as the gateway will look at them.

import { announce, bytes, el, setText, show } from "./dom.js";

export class Photos {
  constructor(form, limits, changed) {
    this.limits = limits;
    this.changed = changed;
    this.chosen = []; // {file, url, width, height}
    this.drop = form.querySelector(".drop");
    this.input = form.querySelector("#files");
    this.list = form.querySelector(".photos");
    this.error = form.querySelector("#photo-error");
    this.input.accept = limits.image_types.join(",");
    const kinds = limits.image_types.map((type) => type.split("/")[1].toUpperCase().replace("WEBP", "WebP"));
    setText(
      form.querySelector("#photo-limits"),
      `Up to ${limits.max_references} photos; ${kinds.slice(0, -1).join(", ")} or ${kinds.at(-1)}, at most ${bytes(limits.max_image_bytes)} each.`,
    );
    this.input.addEventListener("change", () => this.takeInput());
    this.listenForDrops();
    this.takeInput(); // what was chosen before the limits were known
  }

  get shape() {
    return this.chosen[0] || null;
  }

  takeInput() {
    const files = [...this.input.files];
    this.input.value = ""; // so that the same file can be chosen again
    if (files.length) this.add(files);
  }

  listenForDrops() {
    const over = (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      this.drop.classList.add("over");
    };
    this.drop.addEventListener("dragenter", over);
    this.drop.addEventListener("dragover", over);
    this.drop.addEventListener("dragleave", (event) => {
      if (!this.drop.contains(event.relatedTarget)) this.drop.classList.remove("over");
    });
    this.drop.addEventListener("drop", (event) => {
      event.preventDefault();
      this.drop.classList.remove("over");
      this.add([...event.dataTransfer.files]);
    });
  }

  async add(files) {
    const wrong = [];
    for (const file of files) {
      const fault = this.full() || (await this.take(file));
      if (fault) wrong.push(`${file.name}: ${fault}`);
    }
    this.say(wrong.join(" "));
    this.draw();
  }

  full() {
    const { max_references: most } = this.limits;
    return this.chosen.length < most ? "" : `there are ${most} photos already. Remove one first.`;
  }

  async take(file) {
    const { limits } = this;
    if (!limits.image_types.includes(await typeOf(file))) return "this is no PNG, JPEG, WebP or AVIF image.";
    if (!file.size) return "the file is empty.";
    if (file.size > limits.max_image_bytes) {
      return `${bytes(file.size)} is too large: at most ${bytes(limits.max_image_bytes)} are taken.`;
    }
    const url = URL.createObjectURL(file);
    const image = new Image();
    image.src = url;
    try {
      await image.decode();
    } catch {
      URL.revokeObjectURL(url);
      return "this image cannot be read: it may be damaged.";
    }
    const { naturalWidth: width, naturalHeight: height } = image;
    // Others that were given at the same time may have been added while this one was decoded.
    const fault = this.misshapen(width, height) || this.full();
    if (fault) URL.revokeObjectURL(url);
    else this.chosen.push({ file, url, width, height });
    return fault;
  }

  // What the browser can no longer read: it sends a file as it was chosen, or not at all.
  async unreadable() {
    const read = this.chosen.map(({ file }) => file.slice(0, 1).arrayBuffer().then(() => "", () => file.name));
    return (await Promise.all(read)).filter(Boolean);
  }

  misshapen(width, height) {
    const { limits } = this;
    if (width * height > limits.max_image_pixels) {
      return `${width} × ${height} are too many pixels: at most ${limits.max_image_pixels / 1e6} million are taken.`;
    }
    if (Math.min(width, height) < limits.min_image_side) {
      return `${width} × ${height} is too small: each side needs ${limits.min_image_side} pixels.`;
    }
    if (Math.max(width, height) > limits.max_image_aspect * Math.min(width, height)) return "this image is too narrow.";
    return "";
  }

  remove(photo) {
    const index = this.chosen.indexOf(photo);
    this.chosen.splice(index, 1);
    URL.revokeObjectURL(photo.url);
    this.say("");
    this.draw();
    const next = this.list.querySelectorAll("button")[Math.min(index, this.chosen.length - 1)];
    (next || this.input).focus();
    announce("The photo was removed.");
  }

  clear() {
    for (const photo of this.chosen.splice(0)) URL.revokeObjectURL(photo.url);
    this.draw();
  }

  say(text) {
    setText(this.error, text);
    show(this.error, Boolean(text));
    if (text) announce(text);
  }

  draw() {
    this.drop.dataset.photos = this.chosen.length;
    if (this.chosen.length) this.input.removeAttribute("aria-invalid");
    this.list.replaceChildren(
      ...this.chosen.map((photo, index) =>
        el(
          "li",
          {},
          el("img", { src: photo.url, alt: `Photo ${index + 1}: ${photo.file.name}` }),
          el(
            "button",
            { type: "button", class: "remove", "aria-label": `Remove photo ${index + 1}`, onclick: () => this.remove(photo) },
            "×",
          ),
        ),
      ),
    );
    const more = this.chosen.length && this.chosen.length < this.limits.max_references;
    setText(this.drop.querySelector("strong"), more ? "Add a photo" : "Drop a photo here");
    show(this.drop.querySelector(".drop-call"), this.chosen.length < this.limits.max_references);
    this.changed();
  }
}

// By what is in it, as the gateway looks at it: a file's name may say nothing.
async function typeOf(file) {
  const head = await file.slice(0, 12).arrayBuffer().catch(() => new ArrayBuffer(0));
  const text = String.fromCharCode(...new Uint8Array(head));
  if (text.startsWith("\x89PNG")) return "image/png";
  if (text.startsWith("\xff\xd8")) return "image/jpeg";
  if (text.startsWith("RIFF") && text.endsWith("WEBP")) return "image/webp";
  if (/^ftypavi[fs]$/.test(text.slice(4))) return "image/avif";
  return file.type;
}
