// Training Settings: a chosen preset shows its values in the widgets below, and editing one of them leaves the preset.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const AS_BELOW = "as set below";
let presets = {};

/** Values that come over a link are the other node's. */
function isLinked(node, widget) {
  return node.inputs?.some((input) => input.widget?.name === widget.name && input.link != null);
}

/** Puts the values of the chosen preset into the widgets; what it says nothing of stays. */
function fill(node, chosen) {
  for (const widget of node.widgets) {
    const value = presets[chosen.value]?.[widget.name];
    if (value !== undefined) widget.value = value;
  }
  node.setDirtyCanvas(true, true);
}

/** Whether a widget shows something else than the chosen preset says. */
function differs(chosen, widget) {
  const value = presets[chosen.value]?.[widget.name];
  return value !== undefined && value !== widget.value;
}

/** What the preset is, another node says. True: it was told. */
function warn() {
  const detail = `The preset comes from outside this node. Unless it is "${AS_BELOW}" there, it goes before what is set here.`;
  app.extensionManager.toast.add({ severity: "warn", summary: "Training Settings", detail, life: 8000 });
  return true;
}

function watch(node) {
  const chosen = node.widgets?.find(({ name }) => name === "preset");
  if (!chosen) return;
  let told = false;
  // Only a file in API format that is being loaded sets the preset and other widgets in one go: its values stand.
  let settingPreset = false;

  function changed(widget) {
    if (widget === chosen) {
      settingPreset = true;
      queueMicrotask(() => (settingPreset = false));
      fill(node, chosen);
    } else if (isLinked(node, chosen)) {
      told ||= settingPreset || warn();
    } else if (!settingPreset && !isLinked(node, widget) && differs(chosen, widget)) {
      chosen.value = AS_BELOW;
      node.setDirtyCanvas(true, true);
    }
  }

  for (const widget of node.widgets) {
    const before = widget.callback;
    widget.callback = function (...values) {
      const result = before?.apply(this, values);
      changed(widget);
      return result;
    };
  }
}

app.registerExtension({
  name: "dgpo.presets",
  async setup() {
    const answer = await api.fetchApi("/dgpo/presets");
    if (answer.ok) presets = await answer.json();
  },
  nodeCreated(node) {
    if (node.comfyClass === "DGPO_TrainingSettings") watch(node);
  },
});
