// The headless page: asks the training for its questions, and shows them in the ranking dialog.

import { RankerQueue } from "./ranker_queue.js";

const POLL_MS = 1000;
const token = new URLSearchParams(location.search).get("token") ?? "";
const address = (path) => `${path}?${new URLSearchParams({ token })}`; // relative: ports are forwarded
const status = document.getElementById("status");
const notes = document.getElementById("notes");

const queue = new RankerQueue({
  name: "The training",
  asker: () => "",
  image: ({ filename }) => address(`images/${encodeURIComponent(filename)}`),
  post: (path, body) => fetch(address(`questions/${path}`), { method: "POST", body }),
  warn: (text) => (notes.textContent = text),
});

async function open() {
  const answer = await fetch(address("questions"));
  const said = await answer.json();
  if (!answer.ok) throw new Error(said.error);
  return said.questions;
}

async function poll() {
  try {
    const questions = await queue.catchUp(open);
    const drawing = "The training is at work. The next images come by themselves; leave this page open.";
    status.textContent = questions.length ? "The training waits for your answer." : drawing;
    document.title = questions.length ? "● DGPO asks" : "DGPO";
  } catch (error) {
    const lost = "The training has ended, or cannot be reached.";
    status.textContent = error instanceof TypeError ? lost : error.message;
    document.title = "DGPO";
  }
  setTimeout(poll, POLL_MS);
}

poll();
