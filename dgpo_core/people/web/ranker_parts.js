// What the dialog is made of: elements, buttons, icons, and the time that is left.

/** An element with attributes, listeners (on...) and children. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

export const button = (label, onclick, attributes = {}) =>
  el("button", { type: "button", class: "dgpo-button", onclick, ...attributes }, ...[label].flat());

export const icon = (name) => el("i", { class: `pi pi-${name}`, "aria-hidden": "true" });

/** The time that is left, as 9:41; nothing where there is no end to it. */
export function clock(deadline) {
  if (deadline === Infinity) return "";
  const left = Math.max(0, Math.ceil((deadline - performance.now()) / 1000));
  return `${Math.floor(left / 60)}:${String(left % 60).padStart(2, "0")} left`;
}
