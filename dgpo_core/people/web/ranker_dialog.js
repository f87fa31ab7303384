// The dialog of the Human Ranker: the images of one group after the other, to be marked by mouse, touch or keys.
// The same in ComfyUI and on the headless page; what differs between them is its `host`.

import { Marks } from "./ranker_marks.js";

const KEYS = "123456789abcdefghijklmnopqruvwxyz"; // of the images; S skips and T ties
const LONG_PRESS_MS = 500;
const LEAST_TILE = 150; // pixels
const LATE_S = 30;

/** An element with attributes, listeners (on...) and children. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

export const button = (label, onclick, attributes = {}) =>
  el("button", { type: "button", class: "dgpo-button", onclick, ...attributes }, ...[label].flat());

const icon = (name) => el("i", { class: `pi pi-${name}`, "aria-hidden": "true" });

/** The time that is left, as 9:41; nothing where there is no end to it. */
export function clock(deadline) {
  if (deadline === Infinity) return "";
  const left = Math.max(0, Math.ceil((deadline - performance.now()) / 1000));
  return `${Math.floor(left / 60)}:${String(left % 60).padStart(2, "0")} left`;
}

/** The dialog of one question. */
export class Ranker {
  /**
   * `host` is where the dialog runs: its `name`; `asker(question)` says who asks, `image(image)` is an image's address,
   * `answer(token, body)` sends an answer and gives the response.
   * `settled` is told the token of a question that is over, and why; `moved` that the dialog opened or closed.
   */
  constructor(question, host, { settled, moved }) {
    Object.assign(this, { question, host, settled, moved, at: 0, tie: false, enlarged: null });
    Object.assign(this, { held: false, sending: false });
    this.deadline = question.seconds_left === null ? Infinity : performance.now() + question.seconds_left * 1000;
    this.marks = this.restore();
    this.build();
    this.show(0);
  }

  get group() {
    return this.question.groups[this.at];
  }

  get mark() {
    return this.marks[this.at];
  }

  // What was marked survives a reload of the page.

  get draft() {
    return `dgpo.question.${this.question.token}`;
  }

  restore() {
    const { mode, groups } = this.question;
    const kept = JSON.parse(sessionStorage.getItem(this.draft) ?? "[]");
    return groups.map(({ images }, i) => new Marks(mode, images.length, kept[i]?.ranking, kept[i]?.thumbs));
  }

  keep() {
    const kept = this.marks.map(({ ranking, thumbs }) => ({ ranking, thumbs }));
    sessionStorage.setItem(this.draft, JSON.stringify(kept));
  }

  // The parts

  build() {
    const label = { "aria-modal": "true", "aria-labelledby": "dgpo-title", "aria-describedby": "dgpo-prompt" };
    this.grid = el("div", { class: "dgpo-grid", role: "group", "aria-label": "Images" });
    this.parts = [this.buildHead(), this.grid, this.buildFoot()];
    this.dialog = el("dialog", { class: "dgpo-ranker", tabindex: "-1", ...label }, ...this.parts, this.buildLightbox());
    this.dialog.addEventListener("cancel", (event) => (event.preventDefault(), this.close()));
    this.dialog.addEventListener("close", () => this.moved());
    new ResizeObserver(() => this.fit()).observe(this.grid);
    document.body.append(this.dialog);
  }

  buildHead() {
    const { groups, mode } = this.question;
    const title = mode === "rank" ? "Rank the images" : "Mark the images";
    this.progress = el("span");
    this.timer = el("span", { class: "dgpo-timer", role: "timer" });
    this.prompt = el("p", { class: "dgpo-prompt", id: "dgpo-prompt" });
    this.steps = el("div", { class: "dgpo-steps", "aria-hidden": "true" }, ...groups.map(() => el("span")));
    const aside = button([icon("times")], () => this.close(), {
      class: "dgpo-button dgpo-plain",
      "aria-label": "Put aside; the run goes on waiting",
      title: "Put aside (Esc); the run goes on waiting",
    });
    const heading = el("h2", { id: "dgpo-title", title: this.host.asker(this.question) }, title);
    const bar = el("div", { class: "dgpo-bar" }, heading, this.progress, this.timer, aside);
    return el("header", { class: "dgpo-head" }, bar, this.prompt, this.steps);
  }

  buildFoot() {
    this.hint = el("p", { class: "dgpo-hint", role: "status" });
    this.back = button([icon("arrow-left")], () => this.show(this.at - 1), { "aria-label": "Previous group" });
    this.undo = button(["Undo", el("kbd", {}, "⌫")], () => this.change(() => this.mark.undo()));
    this.tied = button(["Tie", el("kbd", {}, "T")], () => this.toggleTie(), {
      title: "Put the next image into the same rank as the one before (or Shift+click)",
    });
    this.tied.hidden = this.question.mode !== "rank";
    const skip = button(["Skip group", el("kbd", {}, "S")], () => this.skip());
    this.confirm = button(["Confirm", el("kbd", {}, "⏎")], () => this.next(), { class: "dgpo-button dgpo-main" });
    const parts = [this.hint, this.back, this.undo, this.tied, skip, this.confirm];
    return el("footer", { class: "dgpo-foot" }, ...parts);
  }

  buildLightbox() {
    this.large = el("img", { alt: "", onclick: () => this.enlarge(null) });
    this.caption = el("p", { role: "status" });
    const before = button([icon("chevron-left")], () => this.turn(-1), { "aria-label": "Previous image" });
    const after = button([icon("chevron-right")], () => this.turn(1), { "aria-label": "Next image" });
    this.lightbox = el("div", { class: "dgpo-lightbox", role: "group", "aria-label": "Enlarged image", hidden: "" });
    this.lightbox.append(this.large, before, this.caption, after);
    this.lightbox.addEventListener("pointerdown", () => (this.held = false), true);
    this.lightbox.addEventListener("click", (event) => this.held && event.stopPropagation(), true); // its end is no click
    return this.lightbox;
  }

  tile(image, index) {
    const img = el("img", { src: this.host.image(image), alt: "", draggable: "false", onload: () => this.fit() });
    const badge = el("span", { class: "dgpo-badge" });
    const number = el("span", { class: "dgpo-number" }, `${index + 1}`);
    if (index > 8 && KEYS[index]) number.append(el("kbd", {}, KEYS[index].toUpperCase()));
    const presses = { type: "button", class: "dgpo-pick", "data-index": index, ...this.presses(index) };
    const label = { class: "dgpo-zoom", tabindex: "-1", "aria-label": `Enlarge image ${index + 1}` };
    const zoom = button([icon("search-plus")], () => this.enlarge(index), label);
    return el("div", { class: "dgpo-tile" }, el("button", presses, img, badge, number), zoom, ...this.thumbs(index));
  }

  thumbs(index) {
    if (this.question.mode !== "thumbs") return [];
    const toggle = (value) => this.mark.thumb(index, this.mark.thumbs[index] === value ? 0 : value);
    const thumb = (name, value, word) =>
      button([icon(name)], () => this.change(() => toggle(value)), { "aria-label": `Image ${index + 1} is ${word}` });
    return [el("div", { class: "dgpo-thumbs" }, thumb("thumbs-up", 1, "good"), thumb("thumbs-down", -1, "bad"))];
  }

  /** A click picks; a long press enlarges instead. */
  presses(index) {
    let timer = 0;
    const stop = () => clearTimeout(timer);
    return {
      onpointerdown: ({ button }) => {
        this.held = false;
        if (button) return;
        timer = setTimeout(() => ((this.held = true), this.enlarge(index)), LONG_PRESS_MS);
      },
      onpointerup: stop,
      onpointerleave: stop,
      onpointercancel: stop,
      oncontextmenu: (event) => event.preventDefault(),
      onclick: (event) => this.held || this.pick(index, event.shiftKey),
    };
  }

  // What can be done

  change(edit) {
    edit();
    this.keep();
    this.update();
  }

  pick(index, shift = false) {
    this.change(() => this.mark.pick(index, shift || this.tie));
  }

  toggleTie() {
    this.tie = !this.tie;
    this.update();
  }

  skip() {
    this.marks[this.at] = new Marks(this.question.mode, this.group.images.length);
    this.keep();
    this.leave();
  }

  next() {
    if (this.mark.empty) this.say("Mark at least one image, or skip the group.", true);
    else this.leave();
  }

  leave() {
    if (this.at + 1 < this.marks.length) this.show(this.at + 1);
    else this.send();
  }

  async send() {
    if (this.sending) return;
    this.sending = true;
    this.say("Sending…");
    const { token } = this.question;
    const body = JSON.stringify({ token, groups: this.marks.map((marks) => marks.answer) });
    try {
      const answer = await this.host.answer(token, body);
      if (answer.ok) return this.settled(token);
      const { error } = await answer.json();
      if (answer.status === 404) return this.settled(token, error);
      this.say(error, true);
    } catch {
      this.say(`${this.host.name} did not answer. Your marks are kept: confirm again to send them.`, true);
    }
    this.sending = false;
  }

  enlarge(index) {
    const left = this.enlarged;
    this.enlarged = index;
    this.lightbox.hidden = index === null;
    this.parts.forEach((part) => (part.inert = index !== null));
    if (index === null) this.grid.querySelectorAll(".dgpo-pick")[left]?.focus();
    else this.lightbox.querySelector("button:last-of-type").focus();
    this.update();
  }

  turn(by) {
    const { length } = this.group.images;
    this.enlarge((this.enlarged + by + length) % length);
  }

  open() {
    if (!this.dialog.open) this.dialog.showModal();
    this.dialog.focus();
    this.fit();
    this.moved();
  }

  close() {
    this.dialog.close();
  }

  remove() {
    sessionStorage.removeItem(this.draft);
    this.dialog.remove();
  }

  /** True where the key meant something here. */
  key({ key, shiftKey, repeat, ctrlKey, metaKey, altKey }) {
    const focused = this.dialog.contains(document.activeElement) ? document.activeElement : this.dialog;
    const image = focused.dataset.index === undefined ? null : Number(focused.dataset.index);
    const letter = key.toLowerCase();
    const picked = key.length === 1 ? KEYS.slice(0, this.group.images.length).indexOf(letter) : -1;
    if (ctrlKey || metaKey || altKey) return false;
    if (key === "Tab") return this.tab(focused, shiftKey);
    if (key.startsWith("Arrow")) this.arrow(key, image);
    else if (repeat) return true;
    else if (this.enlarged !== null && (key === "Escape" || key === " ")) this.enlarge(null);
    else if (key === "Escape") this.close();
    else if (key === " " && image !== null) this.enlarge(image);
    else if (key === "Enter" && (image !== null || focused === this.dialog)) this.next();
    else if (key === "Backspace") this.change(() => this.mark.undo());
    else if (letter === "s") this.skip();
    else if (letter === "t" && !this.tied.hidden) this.toggleTie();
    else if (picked >= 0) this.pick(picked, shiftKey);
    else return false;
    return true;
  }

  /** Tab stays within the dialog: from the last button to the first, and back. */
  tab(focused, back) {
    const buttons = [...this.dialog.querySelectorAll("button:not([tabindex])")];
    const reachable = buttons.filter((one) => one.offsetParent && !one.closest("[inert]"));
    const [first, last] = [reachable[0], reachable.at(-1)];
    const leaves = back ? focused === first || focused === this.dialog : focused === last;
    if (leaves) (back ? last : first).focus();
    return leaves;
  }

  arrow(key, image) {
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns }[key];
    if (this.enlarged !== null) this.turn(Math.sign(by));
    else if (image === null) this.grid.querySelector(".dgpo-pick").focus();
    else this.grid.querySelectorAll(".dgpo-pick")[image + by]?.focus();
  }

  // What is to be seen

  /** Goes to a group. */
  show(at) {
    if (this.enlarged !== null) this.enlarge(null);
    Object.assign(this, { at, tie: false });
    const { prompt, images } = this.group;
    this.prompt.textContent = prompt;
    this.grid.replaceChildren(...images.map((image, index) => this.tile(image, index)));
    this.grid.scrollTop = 0;
    this.progress.textContent = `Group ${at + 1} of ${this.marks.length}`;
    [...this.steps.children].forEach((step, i) => {
      step.classList.toggle("dgpo-done", i < at);
      step.classList.toggle("dgpo-now", i === at);
    });
    this.back.hidden = at === 0;
    this.dialog.focus();
    this.update();
  }

  /** Shows the marks. */
  update() {
    [...this.grid.children].forEach((tile, index) => {
      const { mark } = this;
      const thumb = mark.thumbs[index];
      tile.classList.toggle("dgpo-picked", mark.rankOf(index) > 0 || thumb !== 0);
      tile.classList.toggle("dgpo-up", thumb > 0);
      tile.classList.toggle("dgpo-down", thumb < 0);
      const badge = thumb ? [icon(thumb > 0 ? "thumbs-up-fill" : "thumbs-down-fill")] : [mark.rankOf(index) || ""];
      tile.querySelector(".dgpo-badge").replaceChildren(...badge);
      tile.querySelector(".dgpo-pick").setAttribute("aria-label", `Image ${index + 1}, ${mark.describe(index)}`);
      const [up, down] = tile.querySelectorAll(".dgpo-thumbs button");
      up?.setAttribute("aria-pressed", thumb > 0);
      down?.setAttribute("aria-pressed", thumb < 0);
    });
    this.tied.setAttribute("aria-pressed", this.tie);
    this.undo.setAttribute("aria-disabled", !this.mark.past.length);
    this.confirm.setAttribute("aria-disabled", this.mark.empty);
    if (this.enlarged !== null) {
      this.large.src = this.host.image(this.group.images[this.enlarged]);
      const [number, count] = [this.enlarged + 1, this.group.images.length];
      this.caption.textContent = `Image ${number} of ${count}, ${this.mark.describe(this.enlarged)}`;
    }
    this.say(this.mark.hint);
  }

  say(text, problem = false) {
    this.hint.textContent = text;
    this.hint.classList.toggle("dgpo-problem", problem);
  }

  /** As many columns as make the images largest with all of them in view; scrolls where they would be too small. */
  fit() {
    const count = this.group.images.length;
    const first = this.grid.querySelector("img");
    const style = getComputedStyle(this.grid);
    const gap = parseFloat(style.rowGap);
    const width = this.grid.clientWidth - 2 * parseFloat(style.paddingLeft);
    const height = this.grid.clientHeight - 2 * parseFloat(style.paddingTop);
    const shape = first?.naturalWidth ? first.naturalHeight / first.naturalWidth : 1;
    const below = (this.grid.querySelector(".dgpo-thumbs")?.offsetHeight ?? -6) + 6;
    const size = (columns) => {
      const rows = Math.ceil(count / columns);
      const across = (width - gap * (columns - 1)) / columns;
      return Math.min(across, ((height - gap * (rows - 1)) / rows - below) / shape);
    };
    const all = Array.from({ length: count }, (_, i) => i + 1);
    let columns = all.reduce((best, n) => (size(n) > size(best) ? n : best));
    let tile = size(columns);
    if (tile < LEAST_TILE) {
      columns = Math.max(2, Math.min(count, Math.floor((width + gap) / (LEAST_TILE + gap))));
      tile = (width - gap * (columns - 1)) / columns;
    }
    this.columns = columns;
    this.grid.style.gridTemplateColumns = `repeat(${columns}, ${Math.max(tile, 1)}px)`;
  }

  tick() {
    this.timer.textContent = clock(this.deadline);
    this.timer.classList.toggle("dgpo-late", this.deadline - performance.now() < LATE_S * 1000);
  }
}
