// What a node shows of its last run: when its graph is looked at, and again after an undo or when its tab is reopened.

import { app } from "../../scripts/app.js";

/** The node of an output, by its id; one inside a subgraph has that of the subgraph before it. */
function nodeOf(locator) {
  const [id, inside] = locator.split(":").reverse();
  const root = app.rootGraph ?? app.graph;
  const graph = inside ? root.subgraphs?.get(inside) : root;
  return graph?.getNodeById(id);
}

const waiting = new Map();

/** Lets `act` put elements on the node once the graph it is in is looked at: they would lie over any other graph. */
export function whenSeen(node, act) {
  if (node.graph === app.canvas.graph) act();
  else waiting.set(node, act);
}

app.registerExtension({
  name: "dgpo.recall",
  beforeConfigureGraph: () => waiting.clear(),
  setup() {
    app.canvas.canvas.addEventListener("litegraph:set-graph", () => {
      const seen = [...waiting].filter(([node]) => node.graph === app.canvas.graph);
      for (const [node, act] of seen) {
        waiting.delete(node);
        act();
      }
    });
  },
});

/** The node as high as its widgets need, where it has just been run: one that comes back has the size it was given. */
export function fitted(node, again) {
  if (again) return;
  const [width, least] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], least)]);
}

/** The hooks of an extension that give what nodes put out to `show(node, output, true)`, as often as they are loaded. */
export function recalled(show) {
  const all = (outputs) => {
    for (const [locator, output] of Object.entries(outputs ?? {})) {
      const node = nodeOf(locator);
      if (node && output) show(node, output, true);
    }
  };
  return { onNodeOutputsUpdated: all, afterConfigureGraph: () => all(app.nodeOutputs) };
}
