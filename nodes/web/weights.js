// Reward: another reward has other weights, so the file that was chosen for the one before is let go.

import { app } from "../../scripts/app.js";

const AUTOMATIC = "automatic";

app.registerExtension({
  name: "dgpo.weights",
  nodeCreated(node) {
    if (node.comfyClass !== "DGPO_Reward") return;
    const [reward, file] = ["name", "weights_file"].map((id) => node.widgets?.find(({ name }) => name === id));
    if (!reward || !file) return;
    let last = reward.value;
    const before = reward.callback;
    // A file in API format sets the reward first and then its weights: these stand.
    reward.callback = function (...values) {
      const result = before?.apply(this, values);
      if (reward.value !== last) file.value = AUTOMATIC;
      last = reward.value;
      return result;
    };
  },
});
