// The pack's own types have colours of their own, on sockets and links, in every theme that names none for them; and
// the pack's nodes have the colour of what they give, in the title. A colour that somebody chose for a node goes before.

import { app } from "../../scripts/app.js";

const COLOURS = {
  DGPO_POLICY: "#9b7fd4",
  DGPO_PROMPTS: "#b8862b",
  DGPO_CONDITIONINGS: "#c9743a",
  DGPO_SAMPLER: "#4795bf",
  DGPO_GROUP: "#41a058",
  DGPO_REWARD: "#e0697a",
  DGPO_TRAINING: "#b08a5e",
};

/** Themes are laid over the table and blank what they do not know; what one names goes before ours. */
function enter(table, type, ours) {
  let named = table[type];
  const entry = { get: () => named || ours, set: (colour) => (named = colour), enumerable: true, configurable: true };
  Object.defineProperty(table, type, entry);
}

const DARK = 0x22;

/** So dark that a title is read on it; the light theme makes it lighter by itself. */
function darkened(colour, share) {
  const parts = [1, 3, 5].map((at) => Number.parseInt(colour.slice(at, at + 2), 16));
  const mixed = parts.map((part) => Math.round(share * part + (1 - share) * DARK));
  return `#${mixed.map((part) => part.toString(16).padStart(2, "0")).join("")}`;
}

app.registerExtension({
  name: "dgpo.colours",
  beforeRegisterNodeDef(nodeType, nodeData) {
    const given = nodeData.name.startsWith("DGPO_") ? nodeData.output?.[0] : undefined;
    if (!COLOURS[given]) return;
    // of the class, not of a node: nothing of it is saved in a workflow
    nodeType.color = darkened(COLOURS[given], 0.45);
    nodeType.bgcolor = darkened(COLOURS[given], 0.12);
  },
  setup() {
    const tables = [app.canvas?.default_connection_color_byType, globalThis.LGraphCanvas?.link_type_colors];
    for (const table of tables.filter(Boolean)) {
      for (const [type, colour] of Object.entries(COLOURS)) enter(table, type, colour);
    }
    // nodes that are not drawn on the canvas
    const rules = Object.entries(COLOURS).map(([type, colour]) => `--color-datatype-${type}: ${colour}`);
    const style = document.createElement("style");
    style.textContent = `:root { ${rules.join("; ")} }`;
    document.head.append(style);
  },
});
