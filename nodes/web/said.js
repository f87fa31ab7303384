// What a node says it has done, under its widgets; and "Finish now" on the nodes that train.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { ComfyWidgets } from "../../scripts/widgets.js";
import { fitted, recalled, whenSeen } from "./recall.js";

const TRAIN = ["DGPO_Teach", "DGPO_TrainingLoop"];
const SAY = { DGPO_SaveLoRA: (text) => `Saved as output/loras/${text}` };
for (const type of [...TRAIN, "DGPO_LoRATrainer"]) SAY[type] = (text) => text;
const KEEPS = "It keeps what was learned, and goes on to save and compare.";
const LINE = 18, LETTERS = 48; // pixels, about

/** A widget that is the page's alone: neither the file nor the queue has it. */
function apart(widget) {
  widget.serialize = false;
  widget.options = { ...widget.options, serialize: false };
  return widget;
}

function addFinish(node) {
  const button = node.addWidget("button", "Finish now", null, async () => {
    const body = JSON.stringify({ node: String(node.id) });
    const answer = await api.fetchApi("/dgpo/finish", { method: "POST", body }).catch(() => null);
    const { finishing } = answer?.ok ? await answer.json() : {};
    const detail = !answer ? "ComfyUI did not answer: try again." : finishing ? KEEPS : "This node is not training now.";
    app.extensionManager.toast.add({ severity: "info", summary: "Finish now", detail, life: 5000 });
  });
  button.tooltip = "Ends this training here: keeps what was learned, and goes on to save and compare. Run goes on.";
  apart(button);
}

function show(node, text, again) {
  let widget = node.widgets?.find(({ name }) => name === "said");
  const progress = node.widgets?.findIndex(({ name }) => name === "$$node-text-preview") ?? -1;
  if (progress >= 0) {
    node.widgets[progress].onRemove?.(); // how far it was is of no interest any more
    node.widgets.splice(progress, 1);
    widget = node.widgets.find(({ name }) => name === "said");
  }
  if (!widget) {
    widget = apart(ComfyWidgets.STRING(node, "said", ["STRING", { multiline: true }], app).widget);
    if (widget.inputEl) Object.assign(widget.inputEl, { readOnly: true, ariaLabel: "said", tabIndex: -1 });
  }
  widget.value = text;
  const lines = text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / LETTERS)), 0);
  const height = 24 + LINE * lines;
  widget.options.getMinHeight = widget.options.getMaxHeight = () => height;
  fitted(node, again);
  node.setDirtyCanvas(true, true);
}

const sheet = document.createElement("style"); // of this graph's nodes that have been run

/** Nodes 2.0 shows the last picture of the way a second time, with its size, below the one that stays. */
function showOnce(node) {
  const body = `[data-testid="node-body-${CSS.escape(node.id)}"]`;
  const rule = `${body}:has(.image-preview) > :is(img, img + .text-center) { display: none }\n`;
  if (!sheet.textContent.includes(rule)) sheet.textContent += rule;
}

function tell(node, output, again = false) {
  const say = SAY[node.comfyClass];
  if (!say) return;
  showOnce(node);
  const text = output?.text?.[0];
  if (text) whenSeen(node, () => show(node, say(text), again));
}

app.registerExtension({
  name: "dgpo.said",
  ...recalled(tell),
  setup: () => document.head.append(sheet),
  beforeConfigureGraph: () => void (sheet.textContent = ""),
  nodeCreated(node) {
    if (TRAIN.includes(node.comfyClass)) addFinish(node);
    if (!SAY[node.comfyClass]) return;
    const before = node.onExecuted;
    node.onExecuted = function (output) {
      before?.apply(this, arguments);
      tell(this, output);
    };
  },
});
