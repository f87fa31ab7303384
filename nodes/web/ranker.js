// Human Ranker in ComfyUI: the dialog is the engine's, which the headless page shows, too.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { el } from "../../dgpo/web/ranker_parts.js";
import { CLOSED, RankerQueue } from "../../dgpo/web/ranker_queue.js";

const host = {
  name: "ComfyUI",
  asker: ({ node_id }) => `Asked by node ${node_id}`,
  image: ({ filename, subfolder, type }) =>
    api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`),
  post: (path, body) => api.fetchApi(`/dgpo/questions/${path}`, { method: "POST", body }),
  warn: (detail) => app.extensionManager.toast.add({ severity: "warn", summary: "DGPO", detail, life: 8000 }),
};

app.registerExtension({
  name: "dgpo.humanRanker",
  async setup() {
    for (const name of ["ranker", "ranker_screens"]) {
      const href = new URL(`../../dgpo/web/${name}.css`, import.meta.url).href;
      document.head.append(el("link", { rel: "stylesheet", href }));
    }
    const queue = new RankerQueue(host);
    const open = async () => {
      const answer = await api.fetchApi("/dgpo/questions");
      if (!answer.ok) throw new Error(answer.statusText);
      return (await answer.json()).questions;
    };
    const catchUp = () => queue.catchUp(open).catch((error) => console.warn("DGPO asks later what is open:", error));
    api.addEventListener("dgpo.question", ({ detail }) => queue.arrive(detail));
    api.addEventListener("dgpo.question_closed", ({ detail }) => {
      queue.forget(detail.token, queue.rankers.get(detail.token)?.sending ? "" : CLOSED[detail.outcome]);
    });
    api.addEventListener("reconnected", catchUp);
    window.addEventListener("focus", catchUp); // another page was asked, and may be gone
    return catchUp();
  },
});
