// The dialog that shows two images at a time: which one is better? What comes next is said by who asks.

import { Ranker } from "./ranker_dialog.js";
import { PairMarks } from "./ranker_marks.js";
import { button, el } from "./ranker_parts.js";

const RETRY_MS = 2000;

export class PairRanker extends Ranker {
  blank({ images, pairs }, kept) {
    return new PairMarks(images.length, pairs, kept);
  }

  buildWays() {
    const way = (label, key, how) => button([label, el("kbd", {}, key)], () => this.choose(null, how));
    this.ways = [];
    this.neither = [way("Tie", "T", "="), way("Skip pair", "S", "?")];
    return [...this.neither, button("Skip group", () => this.skip())];
  }

  keyOf() {
    return [];
  }

  /** A click chooses the image; there is no other meaning of it. */
  presses(index) {
    return { onclick: () => this.choose(index) };
  }

  get nothingSaid() {
    return "Choose in at least one pair, or skip the group.";
  }

  // What can be done

  choose(image, how = ">") {
    if (!this.mark.pair || this.asking) return;
    this.mark.say(image, how);
    this.keep();
    this.ask(true);
  }

  takeBack() {
    if (!this.mark.undoable || this.asking) return;
    this.mark.undo();
    this.keep();
    this.ask();
  }

  arrow(key) {
    const upright = this.mark.stacked ? { ArrowUp: 0, ArrowDown: 1 } : {};
    const by = { ArrowLeft: 0, ArrowRight: 1, ...upright }[key];
    if (this.enlarged !== null) return by === undefined || this.turn(by || -1);
    if (by === undefined) this.choose(null, key === "ArrowUp" ? "=" : "?");
    else if (this.mark.pair) this.choose(this.mark.pair[by]);
  }

  letter(letter) {
    if (letter === "t") this.choose(null, "=");
    else if (letter === "s") this.choose(null, "?");
    else return false;
    return true;
  }

  // What is to be seen

  fill() {
    this.grid.replaceChildren();
    this.ask();
  }

  /** Asks for the pair that comes next, again until it is told. After the last one the next group follows, if `go`. */
  async ask(go = false) {
    const { at, mark } = this;
    const left = () => this.at !== at || this.mark !== mark;
    this.asking = true;
    try {
      const body = JSON.stringify({ group: at, pairs: mark.pairs });
      const answer = await this.host.post(`${this.question.token}/next`, body);
      const said = await answer.json();
      if (answer.status === 404) return this.settled(this.question.token, said.error);
      if (!answer.ok) throw new Error(said.error);
      Object.assign(mark, said);
    } catch (error) {
      if (left()) return;
      const silent = `${this.host.name} did not answer. What you said is kept; asking again…`;
      this.say(error instanceof TypeError ? silent : error.message, true);
      return setTimeout(() => left() || this.ask(go), RETRY_MS);
    }
    if (left()) return;
    this.asking = false;
    if (go && !mark.pair && at + 1 < this.marks.length) this.show(at + 1);
    else this.lay();
  }

  /** The two images, or after the last pair all of them, the best first. */
  lay() {
    const { mark, tiles } = this;
    const order = [...tiles.keys()].sort((a, b) => mark.scores[b] - mark.scores[a]);
    this.grid.replaceChildren(...(mark.pair ?? order).map((index) => tiles[index]));
    if (this.enlarged !== null) this.enlarge(null);
    if (!this.dialog.contains(document.activeElement)) this.dialog.focus();
    this.update();
    this.fit();
  }

  /** Where there is room for one column, one is above the other, and the arrows mean that. */
  fit() {
    super.fit();
    const stacked = this.columns === 1;
    if (this.mark.stacked === stacked) return;
    this.mark.stacked = stacked;
    this.update();
  }

  update() {
    super.update();
    this.neither.forEach((way) => way.setAttribute("aria-disabled", !this.mark.pair));
    if (this.asking) return this.say("");
    const { pairs, wanted, pair, hint } = this.mark;
    const end = this.at + 1 < this.marks.length ? "Confirm to go on" : "Confirm to send";
    this.say(pair ? `Pair ${pairs.length + 1} of ${wanted}. ${hint}` : `That was the last pair. ${hint} ${end}, or undo.`);
  }

  dress(tile, index) {
    const { pair } = this.mark;
    const badge = pair ? (this.mark.stacked ? "↑↓" : "←→")[pair.indexOf(index)] : this.mark.placeOf(index);
    tile.querySelector(".dgpo-badge").replaceChildren(badge ?? "");
    tile.querySelector(".dgpo-pick").setAttribute("aria-label", `Image ${index + 1}, ${this.mark.describe(index)}`);
  }
}
