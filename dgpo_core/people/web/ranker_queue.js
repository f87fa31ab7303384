// The questions that waiting runs ask, in the order in which they came: one is shown, or put aside behind a button.

import { Ranker } from "./ranker_dialog.js";
import { PairRanker } from "./ranker_pairs.js";
import { button, clock } from "./ranker_parts.js";

export const CLOSED = {
  answered: "The question was answered elsewhere.",
  timeout: "Time ran out: the run has gone on without an answer.",
  cancelled: "The run was cancelled.",
  gone: "The question is closed.",
};

export class RankerQueue {
  /** `host` is as for Ranker, and `warn(text)` says what happened. */
  constructor(host) {
    this.host = host;
    this.rankers = new Map();
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
    if (this.rankers.has(question.token)) return;
    const told = { settled: (token, why) => this.forget(token, why), moved: () => this.refresh() };
    const Dialog = question.mode === "pairs" ? PairRanker : Ranker;
    this.rankers.set(question.token, new Dialog(question, this.host, told));
    if (this.rankers.size === 1) this.current.open();
    this.refresh();
  }

  /** The question is closed; `why` is said where that was not this page's doing. */
  forget(token, why = "") {
    const ranker = this.rankers.get(token);
    if (!ranker) return;
    const shown = ranker.dialog.open;
    this.rankers.delete(token);
    ranker.remove();
    if (why) this.host.warn(why);
    if (shown) this.current?.open();
    this.refresh();
  }

  /** What is open by now, as the server lists it. */
  catchUp(questions) {
    const open = new Set(questions.map(({ token }) => token));
    const gone = [...this.rankers.keys()].filter((token) => !open.has(token));
    gone.forEach((token) => this.forget(token, this.rankers.get(token).sending ? "" : CLOSED.gone));
    questions.forEach((question) => this.arrive(question));
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
    const toImage = document.activeElement?.dataset.index !== undefined;
    if (event.type === "keydown" ? ranker.key(event) : event.key === " " && toImage) event.preventDefault();
  }
}
