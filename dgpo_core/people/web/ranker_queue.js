// The questions that waiting runs ask, in the order in which they came: one is shown, or put aside behind a button.

import { Ranker } from "./ranker_dialog.js";
import { PairRanker } from "./ranker_pairs.js";
import { button, clock, deadlineOf } from "./ranker_parts.js";

const PAUSE_MS = 1000; // without a key: who was typing has seen the dialog

export const CLOSED = {
  answered: "The question was answered elsewhere.",
  timeout: "Time ran out: the run has gone on without an answer.",
  cancelled: "The run was cancelled.",
  finished: "The training was told to finish: nothing is asked any more.",
  gone: "The question is closed.",
};

export class RankerQueue {
  /** `host` is as for Ranker, and `warn(text)` says what happened. */
  constructor(host) {
    this.host = host;
    this.rankers = new Map();
    this.over = new Set(); // the tokens of what is closed: a list that was on its way may still have them
    this.typed = -Infinity;
    this.waiting = button("", () => this.current?.open(), { class: "dgpo-waiting", hidden: "" });
    document.body.append(this.waiting);
    window.addEventListener("keydown", (event) => this.onKey(event), true);
    window.addEventListener("keyup", (event) => this.onKey(event), true);
    setInterval(() => this.refresh(), 500);
  }

  get current() {
    return this.rankers.values().next().value;
  }

  arrive(question) {
    if (this.rankers.has(question.token) || this.over.has(question.token)) return;
    const told = { settled: (token, why) => this.forget(token, why), moved: () => this.refresh() };
    const Dialog = question.mode === "pairs" ? PairRanker : Ranker;
    this.rankers.set(question.token, new Dialog(question, this.host, told));
    if (this.rankers.size === 1) this.appear();
    this.refresh();
  }

  /** Opens by itself: what somebody is typing elsewhere is no answer. */
  appear() {
    const { activeElement: at } = document;
    if (at?.matches("input, textarea") || at?.isContentEditable) this.typed = performance.now();
    this.current.open();
  }

  /** The question is closed; `why` is said where that was not this page's doing. */
  forget(token, why = "") {
    const ranker = this.rankers.get(token);
    this.over.add(token);
    if (!ranker) return;
    const shown = ranker.dialog.open;
    this.rankers.delete(token);
    ranker.remove();
    if (why) this.host.warn(why);
    if (shown) this.current?.open();
    this.refresh();
  }

  /** Shows what is open by now, as `list` gets it from the server; those that come meanwhile stay. Gives it back. */
  async catchUp(list) {
    const known = [...this.rankers.keys()];
    const questions = await list();
    const open = new Map(questions.map((question) => [question.token, question]));
    for (const token of known) {
      const ranker = this.rankers.get(token);
      if (!ranker) continue;
      if (open.has(token)) ranker.deadline = deadlineOf(open.get(token));
      else this.forget(token, ranker.sending ? "" : CLOSED.gone);
    }
    questions.forEach((question) => this.arrive(question));
    return questions;
  }

  refresh() {
    const ranker = this.current;
    this.waiting.hidden = !ranker || ranker.dialog.open;
    const more = this.rankers.size > 1 ? ` (${this.rankers.size})` : "";
    const left = ranker ? clock(ranker.deadline) : "";
    this.waiting.textContent = ["DGPO is waiting for you" + more, left].filter(Boolean).join(" · ");
    ranker?.tick();
  }

  /** Keys are the open dialog's alone: none of them reaches what is behind it. */
  onKey(event) {
    const ranker = this.current;
    if (!ranker?.dialog.open) return;
    event.stopImmediatePropagation();
    if (performance.now() - this.typed < PAUSE_MS) return this.overhear(event);
    const toImage = document.activeElement?.dataset.index !== undefined;
    if (event.type === "keydown" ? ranker.key(event) : event.key === " " && toImage) event.preventDefault();
  }

  /** A key that was meant for the text somebody was typing. */
  overhear(event) {
    if (event.ctrlKey || event.metaKey) return;
    if (event.type === "keydown") this.typed = performance.now();
    event.preventDefault();
    this.current.say("Keys count here once you have stopped typing for a moment.", true);
  }
}
