// What a node will not look at is greyed: a text that is not the source, a model whose place another one takes.

import { app } from "../../scripts/app.js";

const TEXT = "the text below";
const isConnected = (node, name) => node.inputs?.some((input) => input.name === name && input.link != null);
const valueOf = (node, name) => node.widgets?.find((widget) => widget.name === name)?.value;
const textUnused = (node) => !isConnected(node, "source") && valueOf(node, "source") !== TEXT;
// by kind of node: each widget with whether it is of no use now
const UNUSED = {
  DGPO_Prompts: { text: textUnused },
  DGPO_Teach: {
    text: textUnused,
    model: (node) => isConnected(node, "policy"),
    run: (node) => isConnected(node, "policy"),
    run_seed: (node) => isConnected(node, "policy"),
    judge: (node) => isConnected(node, "reward"),
    mode: (node) => isConnected(node, "reward") || valueOf(node, "judge") !== "I choose",
  },
};

function grey(node) {
  for (const [name, unused] of Object.entries(UNUSED[node.comfyClass])) {
    const widget = node.widgets?.find((widget) => widget.name === name);
    if (!widget) continue;
    const off = Boolean(unused(node));
    const box = widget.inputEl ?? widget.element;
    if (box) Object.assign(box, { readOnly: off, title: off ? "Not used now" : "" }).style.opacity = off ? 0.4 : "";
    widget.disabled = off && !(box && !globalThis.LiteGraph?.vueNodesMode); // on the canvas such a box would vanish
  }
  node.setDirtyCanvas?.(true, true);
}

/** The renderer was changed: what greys a box in one does not in the other. */
function greyAll() {
  for (const graph of [app.rootGraph ?? app.graph, ...((app.rootGraph ?? app.graph)?.subgraphs?.values() ?? [])]) {
    for (const node of graph?.nodes ?? []) if (UNUSED[node.comfyClass]) grey(node);
  }
}

app.registerExtension({
  name: "dgpo.unused",
  setup: () => app.ui.settings.addEventListener("Comfy.VueNodes.Enabled.change", () => setTimeout(greyAll)),
  nodeCreated(node) {
    if (!UNUSED[node.comfyClass]) return;
    const later = () => queueMicrotask(() => grey(node));
    for (const widget of node.widgets ?? []) {
      const before = widget.callback;
      widget.callback = function (...values) {
        const result = before?.apply(this, values);
        later();
        return result;
      };
    }
    for (const event of ["onConnectionsChange", "onConfigure", "onAdded"]) {
      const before = node[event];
      node[event] = function (...values) {
        const result = before?.apply(this, values);
        later();
        return result;
      };
    }
    later();
  },
});
