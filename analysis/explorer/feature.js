"use strict";
// A feature's page: its numbers, its histogram, its phones, features like it, its examples at every level of activation.
(function () {
  const { el, capital, number, shortNumber, percent, count } = hearsae;
  const KEPT_BLOCKS = 6;

  const blockOf = hearsae.cache(KEPT_BLOCKS, async (name) => {
    const block = await hearsae.load(name);
    block.columns = unpackExamples(await hearsae.inflate(block.examples), block.starts.at(-1));
    return block;
  });
  const clipTable = hearsae.cache(1, (name) => hearsae.load(name));

  /** Columns as analysis/explorer/export.py packs them. */
  function unpackExamples(bytes, n) {
    let at = 0;
    const take = (Type, length = n) => {
      const column = new Type(bytes.buffer, at, length);
      at += column.byteLength;
      return column;
    };
    const columns = {
      value: take(Float32Array), lo: take(Float32Array), hi: take(Float32Array), clip: take(Uint32Array), frame: take(Uint32Array),
      first: take(Uint16Array), stop: take(Uint16Array), bin: take(Uint16Array), kind: take(Uint8Array),
    };
    const width = n ? (bytes.length - at) / n : 0;
    const levels = take(Uint8Array, n * width);
    return { ...columns, levels, width };
  }

  function examplesOf(block, at, clips) {
    const { columns } = block, { width } = columns;
    const examples = [];
    for (let i = block.starts[at]; i < block.starts[at + 1]; i++) {
      const lo = columns.lo[i], hi = columns.hi[i];
      const values = Float32Array.from(columns.levels.subarray(i * width, (i + 1) * width), (level) => lo + (hi - lo) * level / 255);
      const clip = columns.clip[i];
      examples.push({ value: columns.value[i], lo, hi, clip, frame: columns.frame[i], first: columns.first[i], stop: columns.stop[i],
        bin: columns.bin[i], kind: columns.kind[i], values, text: i in block.texts ? block.texts[i] : clips.text[clip], token: tokenOf(block.tokens, i) });
    }
    return examples;
  }

  /** What a decoder's position reads: null on the frame axis. Places are in characters, times in seconds within the source; null if unknown. */
  const tokenOf = (tokens, i) => tokens &&
    { token: tokens.token[i], start: tokens.token_start[i], end: tokens.token_end[i], start_s: tokens.start_s[i], end_s: tokens.end_s[i] };

  // Switches keep their positions from feature to feature.
  const options = { lift: true, common: true };

  hearsae.renderFeature = async (page, scan, feature) => {
    const view = await hearsae.listView(scan);
    const position = view.list.feature.indexOf(feature);
    if (position < 0) throw new Error(`This page holds no ${scan.noun} ${feature}.`);
    const [block, clips] = await Promise.all([blockOf(`${scan.name}/block${Math.floor(position / scan.block)}`), clipTable("clips")]);
    const at = position % scan.block, facts = block.features[at];
    const examples = examplesOf(block, at, clips);
    const lowest = examples.reduce((lo, example) => Math.min(lo, example.lo), 0);
    const cardView = { scan, clips, options, scale: [lowest, facts.max ?? 1] };

    const heading = el("h1", { tabindex: "-1" }, `${capital(scan.noun)} ${feature}`);
    page.replaceChildren(
      el("div", { class: "bar" },
        el("a", { href: `#${scan.name}${hearsae.viewAddress(view)}`, class: "back" }, `‹ ${hearsae.scanTitle(scan)}`), heading, neighbours(scan, view, position)),
      el("div", { class: "overview" }, numbersOf(facts, scan), el("div", {}, hearsae.histogram(facts.histogram, scan.axis),
        el("p", { class: "quiet" }, "Activation over all ", `${scan.axis}s, log counts`, facts.density < 0.5 && facts.histogram.lo >= 0 ? "; zeros are not drawn" : ""))),
      ...hearsae.phoneSection(facts, scan), ...hearsae.relatedSection(facts, scan, view),
      switches(page, scan, examples),
      ...sections(examples, facts, cardView));
    window.scrollTo(0, 0);
    heading.focus({ preventScroll: true });
  };

  function numbersOf(facts, scan) {
    const rows = [
      ["Density", percent(facts.density)], [`Active ${scan.axis}s`, `${count(facts.active)} of ${count(facts.rows)}`], ["Max", number(facts.max)],
      ["Mean active", number(facts.mean_active)], ["Mean", number(facts.mean)], ["Standard deviation", number(facts.std)], ["Min", number(facts.min)],
      ...runs(facts, scan),
    ];
    return el("dl", { class: "numbers" }, ...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  }

  /** Of the runs, the stretches of consecutive rows above zero. */
  function runs(facts, scan) {
    if (!facts.runs) return [];
    const long = (frames) => scan.axis === "frame" ? `${(1000 * scan.frame_s * frames).toFixed(0)} ms` : `${shortNumber(frames)} tokens`;
    return [["Runs above zero", count(facts.runs)], ["Run, median", long(facts.run_frames_median)], ["Run, mean", long(facts.run_frames_mean)],
      ["Start to peak, mean", long(facts.rise_frames_mean)], ["Peak to end, mean", long(facts.fall_frames_mean)]];
  }

  /** The features before and after, in the list's order. */
  hearsae.neighbour = (view, position, step) => {
    const at = view.rows.indexOf(position);
    const row = at < 0 ? undefined : view.rows[at + step];
    return row === undefined ? null : view.list.feature[row];
  };

  function neighbours(scan, view, position) {
    const link = (step, text, key) => {
      const feature = hearsae.neighbour(view, position, step);
      const name = `${step < 0 ? "Previous" : "Next"} ${scan.noun}`;
      return feature === null
        ? el("span", { class: "step", "aria-disabled": "true" }, text)
        : el("a", { class: "step", href: `#${scan.name}/feature/${feature}${hearsae.viewAddress(view)}`, "aria-label": `${name}: ${feature}`, title: `${name} (${key})` }, text);
    };
    return el("nav", { class: "steps", "aria-label": `Other ${scan.noun}s` }, link(-1, "‹ previous", "k"), link(1, "next ›", "j"));
  }

  function switches(page, scan, examples) {
    const redraw = () => page.querySelectorAll(".example").forEach((card) => card.hearsaeDraw());
    const box = (key, label, hint, after) => {
      const input = el("input", { type: "checkbox", checked: options[key], onchange: () => { options[key] = input.checked; after?.(); } });
      return el("label", { title: hint }, input, label);
    };
    const hasSound = scan.axis === "frame";
    return el("div", { class: "switches" },
      !hasSound ? null : box("lift", "Lift the peak", "Sound away from the peak is played at a quarter of its loudness"),
      box("common", "One scale", "All traces on the feature's own scale, up to its maximum; otherwise each fills its box", redraw),
      el("span", { class: "quiet" }, hasSound
        ? `Each picture spans ${shortNumber(scan.context * scan.frame_s)} s to either side of the peak, the line in the middle.`
        : `Each picture spans ${scan.context} tokens to either side of the peak.`),
      el("span", { class: "quiet keys" }, ...(hasSound || examples.some(({ token }) => token && token.start_s !== null) ? [el("kbd", {}, "space"), " play "] : []), el("kbd", {}, "j"), " next ", el("kbd", {}, "k"), " previous ", el("kbd", {}, "?"), " keys"));
  }

  function sections(examples, facts, view) {
    const top = examples.filter((example) => example.kind === 0);
    const section = (kind, title, hint, ...content) => el("section", { class: kind }, el("h2", {}, title, " ", el("small", {}, hint)), ...content);
    const shown = [];
    if (!facts.active) shown.push(el("p", { class: "quiet" }, `It was never active: its value is above zero in no ${view.scan.axis}.`));
    if (top.length) shown.push(section("top", "Strongest", "at most one a clip", grid(top, view)));
    const bottom = examples.filter((example) => example.kind === 3);
    if (bottom.length) shown.push(section("bottom", "Lowest", "the most negative values, at most one a clip", grid(bottom, view)));
    const ranges = bins(examples, 1, facts.range_edges, view, (bin, edges) => `${number(edges[bin])} to ${number(edges[bin + 1])}`);
    if (ranges.length) shown.push(section("ranges", "Ranges", "of equal width, from high to low", ...ranges));
    const quantiles = bins(examples, 2, facts.quantile_edges, view, (bin, edges) => {
      const n = edges.length - 1, share = (k) => shortNumber(100 * k / n);
      return `${share(bin)} to ${share(bin + 1)} % (${number(edges[bin])} to ${number(edges[bin + 1])})`;
    });
    if (quantiles.length) shown.push(section("quantiles", "Quantiles", "of the active rows, from high to low", ...quantiles));
    return shown;
  }

  function bins(examples, kind, edges, view, name) {
    const groups = new Map();
    for (const example of examples) {
      if (example.kind !== kind) continue;
      if (!groups.has(example.bin)) groups.set(example.bin, []);
      groups.get(example.bin).push(example);
    }
    return [...groups].sort(([a], [b]) => b - a).map(([bin, members]) => el("div", { class: "bin" },
      el("h3", {}, edges.length > bin + 1 ? name(bin, edges) : `bin ${bin}`), grid(members, view)));
  }

  const grid = (examples, view) => el("div", { class: "grid" }, ...examples.map((example) => hearsae.exampleCard(example, view)));
})();
