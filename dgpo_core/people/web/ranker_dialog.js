// The dialog of the Human Ranker: the images of one group after the other, to be marked by mouse, touch or keys.
// The same in ComfyUI and on the headless page; what differs between them is its `host`.

import { Marks } from "./ranker_marks.js";
import { button, clock, deadlineOf, drafts, el, icon, layout, meaning, sourcesOf } from "./ranker_parts.js";

const KEYS = "123456789abcdefghijklmnopqruvwyz"; // of the images; S skips, T ties, X marks the worst
const LONG_PRESS_MS = 500;
const LATE_S = 30;
const TITLES = { rank: "Rank the images", thumbs: "Mark the images", pairs: "Choose the better image" };

/** The dialog of one question. */
export class Ranker {
  /**
   * `host` is where the dialog runs: its `name`; `asker(question)` says who asks, `image(image)` is an image's address,
   * `post(path, body)` sends to a question's token, or to what is below it, and gives the response.
   * `settled` is told the token of a question that is over, and why; `moved` that the dialog opened or closed.
   */
  constructor(question, host, { settled, moved }) {
    Object.assign(this, { question, host, settled, moved, at: 0, once: "", enlarged: null });
    Object.assign(this, { held: false, sending: false, keyed: false });
    this.deadline = deadlineOf(question);
    this.draft = `dgpo.question.${question.token}`;
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

  restore() {
    const kept = drafts.read(this.draft);
    return this.question.groups.map((group, i) => this.blank(group, kept[i]));
  }

  keep() {
    drafts.write(this.draft, this.marks.map(({ kept }) => kept));
  }

  /** The marks of a group before anything is said, or as they were kept. */
  blank({ images }, kept) {
    return new Marks(this.question.mode, images.length, kept);
  }

  // The parts

  build() {
    const label = { "aria-modal": "true", "aria-labelledby": "dgpo-title", "aria-describedby": "dgpo-prompt" };
    this.grid = el("div", { class: "dgpo-grid", role: "group", "aria-label": "Images" });
    this.parts = [this.buildHead(), this.grid, this.buildFoot()];
    this.dialog = el("dialog", { class: "dgpo-ranker", tabindex: "-1", ...label }, ...this.parts, this.buildLightbox());
    this.dialog.addEventListener("cancel", (event) => (event.preventDefault(), this.close()));
    this.dialog.addEventListener("close", () => this.moved());
    this.dialog.addEventListener("pointerdown", () => (this.keyed = false), true);
    new ResizeObserver(() => this.fit()).observe(this.grid);
    document.body.append(this.dialog);
  }

  buildHead() {
    const { groups, mode } = this.question;
    this.progress = el("span");
    this.timer = el("span", { class: "dgpo-timer", role: "timer" });
    this.prompt = el("p", { class: "dgpo-prompt", id: "dgpo-prompt", dir: "auto" });
    this.sources = el("div", { class: "dgpo-sources" });
    this.steps = el("div", { class: "dgpo-steps", "aria-hidden": "true" }, ...groups.map(() => el("span")));
    const aside = button([icon("times")], () => this.close(), {
      class: "dgpo-button dgpo-plain",
      "aria-label": "Put aside; the run goes on waiting",
      title: "Put aside (Esc); the run goes on waiting",
    });
    const heading = el("h2", { id: "dgpo-title", title: this.host.asker(this.question) }, TITLES[mode]);
    const bar = el("div", { class: "dgpo-bar" }, heading, this.progress, this.timer, aside);
    return el("header", { class: "dgpo-head" }, bar, this.prompt, this.sources, this.steps);
  }

  buildFoot() {
    this.hint = el("p", { class: "dgpo-hint", role: "status" });
    this.back = button([icon("arrow-left")], () => this.show(this.at - 1), { "aria-label": "Previous group" });
    this.undo = button(["Undo", el("kbd", {}, "⌫")], () => this.takeBack());
    this.confirm = button(["Confirm", el("kbd", {}, "⏎")], () => this.next(), { class: "dgpo-button dgpo-main" });
    return el("footer", { class: "dgpo-foot" }, this.hint, this.back, this.undo, ...this.buildWays(), this.confirm);
  }

  /** What else can be said than by a click. */
  buildWays() {
    const ranks = this.question.mode === "rank";
    const way = (name, label, key, title) =>
      button([label, el("kbd", {}, key)], () => this.toggle(name), { "data-once": name, title });
    const tie = way("tie", "Tie", "T", "The next image gets the same rank as the one before (or Shift+click)");
    const bad = way("bad", ranks ? "Worst" : "Bad", "X", "The next image is bad (or right click, or hold it)");
    this.ways = ranks ? [tie, bad] : [bad];
    return [...this.ways, button(["Skip group", el("kbd", {}, "S")], () => this.skip())];
  }

  buildLightbox() {
    this.large = el("img", { alt: "", onclick: () => this.enlarge(null) });
    this.caption = el("p", { role: "status" });
    const before = button([icon("chevron-left")], () => this.turn(-1), { "aria-label": "Previous image" });
    const after = button([icon("chevron-right")], () => this.turn(1), { "aria-label": "Next image" });
    const label = { class: "dgpo-lightbox", role: "group", "aria-label": "Enlarged image", hidden: "" };
    return (this.lightbox = el("div", label, this.large, before, this.caption, after));
  }

  tile(image, index) {
    const img = el("img", { src: this.host.image(image), alt: "", draggable: "false", onload: () => this.fit() });
    const badge = el("span", { class: "dgpo-badge" });
    const number = el("span", { class: "dgpo-number" }, `${index + 1}`, ...this.keyOf(index));
    const presses = { type: "button", class: "dgpo-pick", "data-index": index, ...this.presses(index) };
    const label = { class: "dgpo-zoom", tabindex: "-1", "aria-label": `Enlarge image ${index + 1}` };
    const zoom = button([icon("search-plus")], () => this.enlarge(index), label);
    return el("div", { class: "dgpo-tile" }, el("button", presses, img, badge, number), zoom, ...this.thumbs(index));
  }

  /** The key of an image, where it is not its number. */
  keyOf(index) {
    return index > 8 && KEYS[index] ? [el("kbd", {}, KEYS[index].toUpperCase())] : [];
  }

  thumbs(index) {
    if (this.question.mode !== "thumbs") return [];
    const toggle = (value) => this.mark.thumb(index, this.mark.thumbs[index] === value ? 0 : value);
    const thumb = (name, value, word) =>
      button([icon(name)], () => this.change(() => toggle(value)), { "aria-label": `Image ${index + 1} is ${word}` });
    return [el("div", { class: "dgpo-thumbs" }, thumb("thumbs-up", 1, "good"), thumb("thumbs-down", -1, "bad"))];
  }

  /** A click picks; the other button, or a long press, marks as bad. */
  presses(index) {
    let timer = 0;
    const stop = () => {
      clearTimeout(timer);
      timer = 0;
    };
    const bad = () => {
      this.held = timer > 0; // a finger is still down: its end is no click
      stop();
      this.bad(index);
    };
    return {
      onpointerdown: ({ button }) => {
        this.held = false;
        if (!button) timer = setTimeout(bad, LONG_PRESS_MS);
      },
      onpointerup: stop,
      onpointerleave: stop,
      onpointercancel: stop,
      oncontextmenu: (event) => (event.preventDefault(), this.held || bad()), // some browsers' for a long press
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
    const { once } = this;
    this.once = "";
    this.change(() => (once === "bad" ? this.mark.bad(index) : this.mark.pick(index, shift || once === "tie")));
  }

  bad(index) {
    this.change(() => this.mark.bad(index));
  }

  /** The next image is tied, or bad; the one after it is not. */
  toggle(name) {
    this.once = this.once === name ? "" : name;
    this.update();
  }

  takeBack() {
    if (this.mark.undoable) this.change(() => this.mark.undo());
  }

  /** After the last group nothing is forgotten before it is sent. */
  skip() {
    if (this.at + 1 === this.marks.length) return this.send(this.at);
    this.marks[this.at] = this.blank(this.group);
    this.keep();
    this.leave();
  }

  next() {
    if (this.mark.empty) this.say(this.nothingSaid, true);
    else this.leave();
  }

  get nothingSaid() {
    return "Mark at least one image, or skip the group.";
  }

  leave() {
    if (this.at + 1 < this.marks.length) this.show(this.at + 1);
    else this.send();
  }

  /** `skipped`: the group of which nothing is to be said, whatever is marked. */
  async send(skipped = -1) {
    if (this.sending) return;
    this.sending = true;
    this.say("Sending…");
    const { token } = this.question;
    const groups = this.marks.map((marks, i) => (i === skipped ? { skip: true } : marks.answer));
    const body = JSON.stringify({ token, groups });
    try {
      const answer = await this.host.post(token, body);
      if (answer.ok) return this.settled(token);
      const { error } = await answer.json();
      if (answer.status === 404) return this.settled(token, error);
      this.say(error, true);
    } catch {
      this.say(`${this.host.name} did not answer. Your marks are kept: confirm or skip again to send them.`, true);
    }
    this.sending = false;
  }

  enlarge(index) {
    const left = this.enlarged;
    this.enlarged = index;
    this.lightbox.hidden = index === null;
    this.parts.forEach((part) => (part.inert = index !== null));
    if (index === null) this.grid.querySelector(`[data-index="${left}"]`)?.focus();
    else this.lightbox.querySelector("button:last-of-type").focus();
    this.update();
  }

  turn(by) {
    const { shown } = this;
    this.enlarge(shown.at((shown.indexOf(this.enlarged) + by) % shown.length));
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
    drafts.drop(this.draft);
    this.dialog.close(); // gives the focus back
    this.dialog.remove();
  }

  /** True where the key meant something here. */
  key({ key, code, shiftKey, repeat, ctrlKey, metaKey, altKey }) {
    const focused = this.dialog.contains(document.activeElement) ? document.activeElement : this.dialog;
    const image = focused.dataset.index === undefined ? null : Number(focused.dataset.index);
    if (ctrlKey || metaKey || altKey) return false;
    if (key === "Tab" || key.startsWith("Arrow")) this.keyed = true;
    if (key === "Tab") return this.tab(focused, shiftKey);
    if (key.startsWith("Arrow")) this.arrow(key, image);
    else if (repeat) return true;
    else if (this.enlarged !== null && (key === "Escape" || key === " ")) this.enlarge(null);
    else if (key === "Escape") this.close();
    else if (key === " " && (image !== null || focused === this.dialog)) this.enlarge(image ?? this.shown[0]);
    else if (key === "Enter" && (image !== null || focused === this.dialog)) this.next();
    else if (key === "Backspace") this.takeBack();
    else return this.letter(meaning({ key, code }), this.enlarged ?? (this.keyed ? image : null));
    return true;
  }

  /** `image`: the one that is enlarged, or that keys have gone to. */
  letter(letter, image) {
    const picked = letter.length === 1 ? KEYS.slice(0, this.group.images.length).indexOf(letter) : -1;
    if (letter === "s") this.skip();
    else if (letter === "t" && this.question.mode === "rank") this.toggle("tie");
    else if (letter === "x" && image !== null) this.bad(image);
    else if (letter === "x") this.toggle("bad");
    else if (picked >= 0) this.pick(picked); // Shift types the digits of some keyboards: it says nothing
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

  /** The images that are on the screen. */
  get shown() {
    return [...this.grid.querySelectorAll(".dgpo-pick")].map((pick) => Number(pick.dataset.index));
  }

  /** Goes to a group. */
  show(at) {
    if (this.enlarged !== null) this.enlarge(null);
    Object.assign(this, { at, once: "", keyed: false });
    const { prompt, images } = this.group;
    this.prompt.textContent = prompt;
    this.sources.replaceChildren(...sourcesOf(this.group, this.host));
    this.tiles = images.map((image, index) => this.tile(image, index));
    this.fill();
    this.grid.scrollTop = this.dialog.scrollTop = 0;
    this.progress.textContent = `Group ${at + 1} of ${this.marks.length}`;
    [...this.steps.children].forEach((step, i) => {
      step.classList.toggle("dgpo-done", i < at);
      step.classList.toggle("dgpo-now", i === at);
    });
    this.back.hidden = at === 0;
    this.dialog.focus();
    this.update();
  }

  /** Puts the group's tiles into the grid. */
  fill() {
    this.grid.replaceChildren(...this.tiles);
  }

  /** Shows the marks. */
  update() {
    this.tiles.forEach((tile, index) => this.dress(tile, index));
    this.ways.forEach((way) => way.setAttribute("aria-pressed", this.once === way.dataset.once));
    this.undo.setAttribute("aria-disabled", !this.mark.undoable);
    this.confirm.setAttribute("aria-disabled", this.mark.empty);
    if (this.enlarged !== null) {
      this.large.src = this.host.image(this.group.images[this.enlarged]);
      const [number, count] = [this.enlarged + 1, this.group.images.length];
      this.caption.textContent = `Image ${number} of ${count}, ${this.mark.describe(this.enlarged)}`;
    }
    this.say(this.mark.hint);
  }

  /** A tile as its image is marked. */
  dress(tile, index) {
    const { mark } = this;
    const [sign, rank] = [mark.signOf(index), mark.rankOf(index)];
    tile.classList.toggle("dgpo-picked", rank > 0 || sign !== 0);
    tile.classList.toggle("dgpo-up", sign > 0);
    tile.classList.toggle("dgpo-down", sign < 0);
    const bad = this.question.mode === "rank" ? "times" : "thumbs-down-fill";
    const badge = sign ? icon(sign > 0 ? "thumbs-up-fill" : bad) : rank || "";
    tile.querySelector(".dgpo-badge").replaceChildren(badge);
    tile.querySelector(".dgpo-pick").setAttribute("aria-label", `Image ${index + 1}, ${mark.describe(index)}`);
    const [up, down] = tile.querySelectorAll(".dgpo-thumbs button");
    up?.setAttribute("aria-pressed", sign > 0);
    down?.setAttribute("aria-pressed", sign < 0);
  }

  say(text, problem = false) {
    this.hint.textContent = text;
    this.hint.classList.toggle("dgpo-problem", problem);
  }

  /** Lays the tiles out so that the images are as large as can be. */
  fit() {
    const count = this.grid.children.length;
    if (!count) return;
    const style = getComputedStyle(this.grid);
    const { naturalHeight = 1, naturalWidth = 1 } = [...this.grid.querySelectorAll("img")].find((i) => i.naturalWidth) ?? {};
    const shape = naturalHeight / naturalWidth;
    this.grid.style.setProperty("--dgpo-shape", 1 / shape); // of those, too, that have not come, or never will
    const { columns, tile } = layout(count, {
      gap: parseFloat(style.rowGap),
      width: this.grid.clientWidth - 2 * parseFloat(style.paddingLeft),
      height: this.grid.clientHeight - 2 * parseFloat(style.paddingTop),
      shape,
      below: (this.grid.querySelector(".dgpo-thumbs")?.offsetHeight ?? -6) + 6,
    });
    this.columns = columns;
    this.grid.style.gridTemplateColumns = `repeat(${columns}, ${Math.max(tile, 1)}px)`;
  }

  tick() {
    this.timer.textContent = clock(this.deadline);
    this.timer.classList.toggle("dgpo-late", this.deadline - performance.now() < LATE_S * 1000);
  }
}
