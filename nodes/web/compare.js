// Before / After as a slider on the node: the same prompt and seed, left of the line before, right of it after.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { fitted, recalled, whenSeen } from "./recall.js";

const HEIGHT = 280; // pixels at least, the line below included
const STYLE = `
.dgpo-compare { display: flex; flex-direction: column; gap: 4px; height: 100%; min-height: 0; font: 12px sans-serif; color: var(--input-text, #ddd) }
.dgpo-compare .pictures { position: relative; flex: 1; min-height: 220px; cursor: ew-resize; touch-action: none; overflow: hidden }
.dgpo-compare img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; user-select: none }
.dgpo-compare .line { position: absolute; top: 0; bottom: 0; width: 2px; background: #fff; box-shadow: 0 0 3px #000; pointer-events: none }
.dgpo-compare .mark { position: absolute; top: 4px; padding: 1px 5px; border-radius: 3px; background: #000a; color: #fff; pointer-events: none }
.dgpo-compare .turn { display: flex; align-items: center; gap: 6px }
.dgpo-compare .turn span { flex: 1; overflow: hidden; white-space: nowrap; text-overflow: ellipsis }
.dgpo-compare button { border: 1px solid var(--border-color, #555); border-radius: 4px; background: none; color: inherit; padding: 1px 8px }
.dgpo-compare input { width: 100%; margin: 0 }`;

const address = (image) => api.apiURL(`/view?${new URLSearchParams(image)}`);

function make(tag, parent, more = {}) {
  const made = Object.assign(document.createElement(tag), more);
  parent.append(made);
  return made;
}

/** The element, and how it is given other pictures. */
function slider() {
  const root = document.createElement("div");
  root.className = "dgpo-compare";
  make("style", root, { textContent: STYLE });
  const pictures = make("div", root, { className: "pictures" });
  const before = make("img", pictures, { draggable: false, alt: "before" });
  const after = make("img", pictures, { draggable: false, alt: "after" });
  const line = make("div", pictures, { className: "line" });
  make("div", pictures, { className: "mark", textContent: "before" }).style.left = "4px";
  make("div", pictures, { className: "mark", textContent: "after" }).style.right = "4px";
  const range = make("input", root, { type: "range", min: 0, max: 100, value: 50, ariaLabel: "before and after" });
  const turn = make("div", root, { className: "turn" });
  const back = make("button", turn, { textContent: "‹", ariaLabel: "the picture before this one" });
  const caption = make("span", turn);
  const next = make("button", turn, { textContent: "›", ariaLabel: "the next picture" });
  let shown = 0;
  let pairs = [];

  function divide() {
    after.style.clipPath = `inset(0 0 0 ${range.value}%)`;
    line.style.left = `calc(${range.value}% - 1px)`;
  }

  function show(place) {
    if (!pairs.length) return;
    shown = (place + pairs.length) % pairs.length;
    const pair = pairs[shown];
    [before.src, after.src] = [address(pair.before), address(pair.after)];
    caption.textContent = `${shown + 1} of ${pairs.length}: ${pair.caption}`;
    caption.title = pair.caption;
  }

  function follow(event) {
    if (event.type === "pointermove" && event.pointerType !== "mouse" && !event.buttons) return;
    const { left, width } = pictures.getBoundingClientRect();
    range.value = (100 * (event.clientX - left)) / width;
    divide();
  }

  for (const kind of ["pointerdown", "pointermove"]) pictures.addEventListener(kind, follow);
  for (const part of [pictures, range, turn]) part.addEventListener("pointerdown", (event) => event.stopPropagation());
  range.addEventListener("input", divide);
  back.addEventListener("click", () => show(shown - 1));
  next.addEventListener("click", () => show(shown + 1));
  divide();
  return { root, give: (found) => { pairs = found; show(Math.min(shown, found.length - 1)); } };
}

function widgetOf(node, again) {
  if (!node.dgpoCompare) {
    const { root, give } = slider();
    const options = { serialize: false, hideOnZoom: false, getMinHeight: () => HEIGHT };
    const widget = node.addDOMWidget("compare", "dgpo_compare", root, options);
    widget.serialize = false;
    widget.options.serialize = false;
    node.dgpoCompare = give;
    fitted(node, again);
  }
  return node.dgpoCompare;
}

function compare(node, output, again = false) {
  const { before = [], after = [], captions = [] } = output ?? {};
  const pairs = before.map((image, i) => ({ before: image, after: after[i], caption: captions[i] ?? "" }));
  if (pairs.length) whenSeen(node, () => widgetOf(node, again)(pairs));
  node.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "dgpo.compare",
  ...recalled((node, ...more) => node.comfyClass === "DGPO_BeforeAfter" && compare(node, ...more)),
  nodeCreated(node) {
    if (node.comfyClass !== "DGPO_BeforeAfter") return;
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.apply(this, arguments);
      compare(this, output);
    };
  },
});
