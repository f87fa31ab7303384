// What the dialog is made of: elements, buttons, icons, keys, drafts, the time that is left, and where the images go.

const LEAST_TILE = 150; // pixels

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

/** The pictures that a group's images are made of, where there are any; each opens by itself. */
export function sourcesOf({ sources = [] }, host) {
  const title = "What the images are made of";
  const picture = (source, i) => el("img", { src: host.image(source), alt: `Source ${i + 1}`, title });
  return sources.map((source, i) => el("a", { href: host.image(source), target: "_blank" }, picture(source, i)));
}

/** A key's letter or digit on every keyboard: by its place where the layout has neither there (ы is S, & may be 1). */
export function meaning({ key, code = "" }) {
  if (key.length > 1 || /^[a-z0-9]$/i.test(key)) return key.toLowerCase();
  return code.match(/^(?:Digit|Key)(.)$/)?.[1].toLowerCase() ?? key;
}

/** What survives a reload of the page, where the browser lets it keep anything. */
export const drafts = {
  read: (name) => quietly(() => JSON.parse(sessionStorage.getItem(name))) ?? [],
  write: (name, value) => quietly(() => sessionStorage.setItem(name, JSON.stringify(value))),
  drop: (name) => quietly(() => sessionStorage.removeItem(name)),
};

function quietly(act) {
  try {
    return act();
  } catch {
    return null; // no storage: cookies are blocked, or it is full
  }
}

/** When there is no time left, on the page's clock. */
export const deadlineOf = ({ seconds_left }) =>
  seconds_left === null ? Infinity : performance.now() + seconds_left * 1000;

/** The time that is left, as 9:41; nothing where there is no end to it. */
export function clock(deadline) {
  if (deadline === Infinity) return "";
  const left = Math.max(0, Math.ceil((deadline - performance.now()) / 1000));
  return `${Math.floor(left / 60)}:${String(left % 60).padStart(2, "0")} left`;
}

/**
 * As many columns as make `count` images largest with all of them in view; it scrolls where they would be too small.
 * `width` and `height`: the room in pixels; `gap`: between images; `shape`: an image's height by its width; `below`:
 * what comes under each. Gives the columns and the width of a tile.
 */
export function layout(count, { width, height, gap, shape, below }) {
  const size = (columns) => {
    const rows = Math.ceil(count / columns);
    const across = (width - gap * (columns - 1)) / columns;
    return Math.min(across, ((height - gap * (rows - 1)) / rows - below) / shape);
  };
  const all = Array.from({ length: count }, (_, i) => i + 1);
  const columns = all.reduce((best, n) => (size(n) > size(best) ? n : best));
  if (size(columns) >= LEAST_TILE) return { columns, tile: size(columns) };
  const across = Math.max(2, Math.min(count, Math.floor((width + gap) / (LEAST_TILE + gap))));
  return { columns: across, tile: (width - gap * (across - 1)) / across };
}
