// What a person thinks of a group of images, while it is being said, and what the model learns of that.

const NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"];
const touch = matchMedia("(hover: none)").matches;
const TO_RANK = touch
  ? "Tap the best image, then the next best. Hold one that is the worst. A few are enough."
  : "Click the best image, then the next best; right click the worst. A few are enough.";
const TO_THUMB = touch
  ? "Tap an image once for good, twice for bad, a third time for neither."
  : "Click an image once for good, twice (or right) for bad, a third time for neither.";

/** In words, what is learned of an image's score each: "1 > 3 = 4 > the other two". `named(i)`: i was spoken of. */
export function learned(scores, named) {
  const levels = [...new Set(scores)].sort((a, b) => b - a);
  if (levels.length < 2) return "The model learns nothing: all images count the same.";
  const rank = (level) => {
    const images = [...scores.keys()].filter((i) => scores[i] === level);
    const rest = images.filter((i) => !named(i)).length;
    const others = rest ? [`the other ${NUMBERS[rest] ?? rest}`] : [];
    return [...images.filter(named).map((i) => i + 1), ...others].join(" = ");
  };
  return `The model learns ${levels.map(rank).join(" > ")}.`;
}

/** A ranking with the worst images, or thumbs. */
export class Marks {
  constructor(mode, size, kept = {}) {
    const { ranking = [], worst = [], thumbs = Array(size).fill(0) } = kept;
    Object.assign(this, { mode, size, ranking, worst, thumbs, past: [] });
  }

  /** Ranks the image next (or, with `tie`, beside the one before), or takes it back; a thumb goes up, down, away. */
  pick(image, tie) {
    if (this.mode === "thumbs") return this.thumb(image, { 0: 1, 1: -1, "-1": 0 }[this.thumbs[image]]);
    this.remember();
    const ranked = this.rankOf(image);
    this.drop(image);
    if (ranked) return;
    if (tie && this.ranking.length) this.ranking.at(-1).push(image);
    else this.ranking.push([image]);
  }

  /** One of the worst images, or no more; or a thumb down. */
  bad(image) {
    if (this.mode === "thumbs") return this.thumb(image, this.thumbs[image] < 0 ? 0 : -1);
    this.remember();
    const worst = this.worst.includes(image);
    this.drop(image);
    if (!worst) this.worst.push(image);
  }

  drop(image) {
    const others = (rank) => rank.filter((i) => i !== image);
    this.ranking = this.ranking.map(others).filter((rank) => rank.length);
    this.worst = others(this.worst);
  }

  thumb(image, value) {
    this.remember();
    this.thumbs[image] = value;
  }

  /** What a reload of the page must not lose. */
  get kept() {
    return { ranking: this.ranking, worst: this.worst, thumbs: this.thumbs };
  }

  remember() {
    this.past.push(structuredClone(this.kept));
  }

  undo() {
    Object.assign(this, this.past.pop());
  }

  get undoable() {
    return this.past.length > 0;
  }

  /** 1 for the best; 0 for an image without a rank. */
  rankOf(image) {
    return this.ranking.findIndex((rank) => rank.includes(image)) + 1;
  }

  /** 1 for what is shown as good, -1 for bad, 0 for neither. */
  signOf(image) {
    return this.worst.includes(image) ? -1 : this.thumbs[image];
  }

  get empty() {
    return ![...this.ranking, ...this.worst].length && !this.thumbs.some(Boolean);
  }

  get answer() {
    if (this.empty) return { skip: true };
    if (this.mode === "thumbs") return { thumbs: this.thumbs };
    return this.worst.length ? { ranking: this.ranking, worst: this.worst } : { ranking: this.ranking };
  }

  describe(image) {
    if (this.mode === "thumbs") return ["thumb down", "no thumb", "thumb up"][this.thumbs[image] + 1];
    if (this.worst.includes(image)) return "worst";
    return this.rankOf(image) ? `rank ${this.rankOf(image)}` : "no rank";
  }

  get hint() {
    if (this.mode === "thumbs") return this.empty ? TO_THUMB : learned(this.thumbs, (i) => this.thumbs[i]);
    if (this.empty) return TO_RANK;
    const places = Array.from({ length: this.size }, (_, i) => this.rankOf(i));
    const scores = places.map((rank, i) => (rank ? this.size + 1 - rank : this.signOf(i)));
    return learned(scores, (i) => scores[i] !== 0);
  }
}

/** What was said about pairs, as [i, ">", j], [i, "=", j] or [i, "?", j]; the pair that is shown; the scores so far. */
export class PairMarks {
  constructor(size, wanted, kept = {}) {
    Object.assign(this, { size, wanted, pairs: kept.pairs ?? [], pair: null, scores: Array(size).fill(0) });
    this.stacked = false; // or one above the other
  }

  /** Of the pair that is shown: `better` is one of its images, or null with `how` "=" or "?". */
  say(better, how = ">") {
    const [left, right] = this.pair;
    this.pairs.push(better === right ? [right, how, left] : [left, how, right]);
  }

  get kept() {
    return { pairs: this.pairs };
  }

  undo() {
    this.pairs.pop();
  }

  get undoable() {
    return this.pairs.length > 0;
  }

  /** The images that something was said about. */
  get named() {
    return new Set(this.pairs.filter(([, how]) => how !== "?").flatMap(([i, , j]) => [i, j]));
  }

  get empty() {
    return !this.named.size;
  }

  get answer() {
    return this.empty ? { skip: true } : { pairs: this.pairs };
  }

  describe(image) {
    const { pair } = this;
    const sides = this.stacked ? ["upper", "lower"] : ["left", "right"];
    return pair ? sides[pair.indexOf(image)] : `place ${this.placeOf(image)}`;
  }

  /** 1 for the highest score. */
  placeOf(image) {
    return this.scores.filter((score) => score > this.scores[image]).length + 1;
  }

  get hint() {
    const { named } = this;
    if (!named.size) return `Which one is better? ${touch ? "Tap" : "Click"} it.`;
    return learned(this.scores, (i) => named.has(i));
  }
}
