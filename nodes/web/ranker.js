// Human Ranker: the questions that waiting runs ask, in the order in which they came.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { Ranker, button, clock, el } from "./ranker_dialog.js";

const rankers = new Map();
const current = () => rankers.values().next().value;
const waiting = button("", () => current()?.open(), { class: "dgpo-waiting", hidden: "" });

function arrive(question) {
  if (rankers.has(question.token)) return;
  rankers.set(question.token, new Ranker(question, { settled: forget, moved: refreshWaiting }));
  if (rankers.size === 1) current().open();
  refreshWaiting();
}

/** The question is closed; `why` is said where that was not this page's doing. */
function forget(token, why = "") {
  const ranker = rankers.get(token);
  if (!ranker) return;
  const shown = ranker.dialog.open;
  rankers.delete(token);
  ranker.remove();
  if (why) app.extensionManager.toast.add({ severity: "warn", summary: "Human Ranker", detail: why, life: 8000 });
  if (shown) current()?.open();
  refreshWaiting();
}

function refreshWaiting() {
  const ranker = current();
  waiting.hidden = !ranker || ranker.dialog.open;
  const more = rankers.size > 1 ? ` (${rankers.size})` : "";
  const left = ranker ? clock(ranker.deadline) : "";
  waiting.textContent = ["DGPO is waiting for you" + more, left].filter(Boolean).join(" · ");
  ranker?.tick();
}

async function catchUp() {
  const answer = await api.fetchApi("/dgpo/questions");
  if (!answer.ok) return;
  const { questions } = await answer.json();
  const open = new Set(questions.map(({ token }) => token));
  [...rankers.keys()].filter((token) => !open.has(token)).forEach((token) => forget(token, "The question is closed."));
  questions.forEach(arrive);
}

const CLOSED = {
  answered: "The question was answered elsewhere.",
  timeout: "Time ran out: the run has gone on without an answer.",
  cancelled: "The run was cancelled.",
};

/** Keys are the open dialog's alone: none of them reaches the graph. */
function onKey(event) {
  const ranker = current();
  if (!ranker?.dialog.open) return;
  event.stopImmediatePropagation();
  const toImage = document.activeElement?.dataset.index !== undefined;
  if (event.type === "keydown" ? ranker.key(event) : event.key === " " && toImage) event.preventDefault();
}

app.registerExtension({
  name: "dgpo.humanRanker",
  setup() {
    document.head.append(el("link", { rel: "stylesheet", href: new URL("ranker.css", import.meta.url).href }));
    document.body.append(waiting);
    window.addEventListener("keydown", onKey, true);
    window.addEventListener("keyup", onKey, true);
    api.addEventListener("dgpo.question", ({ detail }) => arrive(detail));
    api.addEventListener("dgpo.question_closed", ({ detail }) => {
      forget(detail.token, rankers.get(detail.token)?.sending ? "" : CLOSED[detail.outcome]);
    });
    api.addEventListener("reconnected", catchUp);
    setInterval(refreshWaiting, 500);
    return catchUp();
  },
});
