"use strict";
// The words and phones of a clip, below a picture and on its time axis.
(function () {
  const { el } = hearsae;
  const LETTER_PX = 6.6, PADDING_PX = 3;
  const TIERS = { words: "Words", phones: "Phones" };

  /** Clip table -> {words, phones}: each (clip) => [{label, start, end}], seconds from the clip's start; null where the page has no times. */
  const unpacked = new WeakMap();
  hearsae.said = (clips) => {
    if (!unpacked.has(clips)) unpacked.set(clips, clips.said ? unpack(clips.said, clips.source.length) : Promise.resolve(null));
    return unpacked.get(clips);
  };

  async function unpack(said, clips) {
    const tier = async ({ count, columns }) => {
      const { buffer } = await hearsae.inflate(columns);
      const first = new Uint32Array(buffer, 0, clips + 1), [later, length, label] = [0, 1, 2].map((k) => new Uint32Array(buffer, 4 * (clips + 1 + k * count), count));
      const start = new Uint32Array(count);
      later.forEach((ms, i) => { start[i] = (i ? start[i - 1] : 0) + ms; });  // modulo 2^32, as an element of this array is
      return (clip) => Array.from({ length: first[clip + 1] - first[clip] }, (_, i) => first[clip] + i)
        .map((i) => ({ label: said.labels[label[i]], start: start[i] / 1000, end: (start[i] + length[i]) / 1000 }));
    };
    const [words, phones] = await Promise.all([tier(said.words), tier(said.phones)]);
    return { words, phones };
  }

  /**
   * A tier of intervals [{label, start, end}] over the span {start, end, peak?}, as wide as its place; widthPx: that width, for which labels
   * find room. What holds the peak stands out. Null where the span holds none.
   */
  hearsae.tier = (kind, intervals, span, widthPx) => {
    const whole = span.end - span.start, inside = intervals.filter(({ start, end }) => end > span.start && start < span.end);
    if (!inside.length) return null;
    const tier = el("div", { class: `tier ${kind}-tier`, role: "img", "aria-label": `${TIERS[kind]}: ${inside.map(({ label }) => label).join(" ")}` });
    for (const { label, start, end } of inside) {
      const from = Math.max(start, span.start), share = (Math.min(end, span.end) - from) / whole;
      const isPeak = kind === "phones" && start <= span.peak && span.peak < end;
      const hasRoom = isPeak || label.length * LETTER_PX + PADDING_PX <= share * widthPx;
      const box = el("span", { class: isPeak ? "said at-peak" : "said", dir: "auto", title: `${label}, ${start.toFixed(2)} to ${end.toFixed(2)} s` }, hasRoom ? el("bdi", {}, label) : "");
      box.style.left = `${100 * (from - span.start) / whole}%`;
      box.style.width = `${100 * share}%`;
      tier.append(box);
    }
    return tier;
  };

  /** Both tiers of `said` {words: [...], phones: [...]} as one element; null where there is nothing. */
  hearsae.tiers = (said, span, widthPx) => {
    const shown = Object.keys(TIERS).map((kind) => hearsae.tier(kind, said[kind], span, widthPx)).filter(Boolean);
    return shown.length ? el("div", { class: "tiers" }, ...shown) : null;
  };
})();
