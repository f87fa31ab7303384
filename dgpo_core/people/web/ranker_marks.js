// What a person thinks of a group of images, while it is being said.

/** What the person thinks of one group so far: a ranking, or thumbs. */
export class Marks {
  constructor(mode, size, ranking = [], thumbs = Array(size).fill(0)) {
    Object.assign(this, { mode, size, ranking, thumbs, past: [] });
  }

  /** Ranks the image next (or, with `tie`, beside the one before), or takes it back; a thumb goes up, down, away. */
  pick(image, tie) {
    if (this.mode === "thumbs") return this.thumb(image, { 0: 1, 1: -1, "-1": 0 }[this.thumbs[image]]);
    this.remember();
    if (this.rankOf(image)) {
      this.ranking = this.ranking.map((rank) => rank.filter((i) => i !== image)).filter((rank) => rank.length);
    } else if (tie && this.ranking.length) {
      this.ranking.at(-1).push(image);
    } else {
      this.ranking.push([image]);
    }
  }

  thumb(image, value) {
    this.remember();
    this.thumbs[image] = value;
  }

  remember() {
    this.past.push(structuredClone({ ranking: this.ranking, thumbs: this.thumbs }));
  }

  undo() {
    Object.assign(this, this.past.pop());
  }

  /** 1 for the best; 0 for an image without a rank. */
  rankOf(image) {
    return this.ranking.findIndex((rank) => rank.includes(image)) + 1;
  }

  get empty() {
    return !this.ranking.length && !this.thumbs.some(Boolean);
  }

  get answer() {
    if (this.empty) return { skip: true };
    return this.mode === "rank" ? { ranking: this.ranking } : { thumbs: this.thumbs };
  }

  describe(image) {
    if (this.mode === "thumbs") return ["thumb down", "no thumb", "thumb up"][this.thumbs[image] + 1];
    return this.rankOf(image) ? `rank ${this.rankOf(image)}` : "no rank";
  }

  get hint() {
    if (this.mode === "thumbs") return this.thumbsHint;
    const names = (rank) => rank.map((i) => i + 1).join(" = ");
    const ranked = this.ranking.flat().length;
    if (!ranked) return "Click the images from best to worst. A few are enough: those left out count as middling.";
    if (this.ranking.length === 1) return `Best: ${names(this.ranking[0])}. Go on with the next best, or confirm.`;
    const [best, worst] = [this.ranking[0], this.ranking.at(-1)].map(names);
    const rest = ranked < this.size ? ", the others are middling" : "";
    return `${ranked} of ${this.size} ranked: best ${best}, worst ${worst}${rest}.`;
  }

  get thumbsHint() {
    if (this.empty) return "Click an image once for good, twice for bad, a third time for neither.";
    const [good, bad] = [1, -1].map((value) => this.thumbs.filter((thumb) => thumb === value).length);
    return `${good} good, ${bad} bad, ${this.size - good - bad} neither.`;
  }
}
