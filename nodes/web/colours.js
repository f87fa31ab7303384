// The pack's own types have colours of their own, on sockets and links, in every theme that names none for them.

import { app } from "../../scripts/app.js";

const COLOURS = {
  DGPO_POLICY: "#9b7fd4",
  DGPO_PROMPTS: "#d9a441",
  DGPO_CONDITIONINGS: "#d98041",
  DGPO_SAMPLER: "#4f9fc9",
  DGPO_GROUP: "#57b36a",
  DGPO_REWARD: "#e0697a",
  DGPO_TRAINING: "#b08a5e",
};

/** Themes are laid over the table and blank what they do not know; what one names goes before ours. */
function enter(table, type, ours) {
  let named = table[type];
  const entry = { get: () => named || ours, set: (colour) => (named = colour), enumerable: true, configurable: true };
  Object.defineProperty(table, type, entry);
}

app.registerExtension({
  name: "dgpo.colours",
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
