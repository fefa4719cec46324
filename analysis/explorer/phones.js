"use strict";
// What a feature has to do with phones: its best phone's scores in words, and what is said while its activation is in each of its ranges.
(function () {
  const { el, number, shortNumber, percent, count } = hearsae;
  const MOST_NAMED = 3;
  const narrow = window.matchMedia("(max-width: 34rem)");

  const two = (value) => value === null ? "–" : value.toFixed(2).replace("-", "−");
  /** [value, low, high] -> 0.93 (0.91 to 0.95) */
  const between = ([value, low, high], show = two) => low === null || high === null ? show(value) : `${show(value)} (${show(low)} to ${show(high)})`;

  /** The section as a list of elements; empty where the scan has no phones. facts: {scores, mix}. */
  hearsae.phoneSection = ({ scores, mix }, scan) => {
    if (!scan.phones) return [];
    return [el("section", { class: "phones" }, el("h2", {}, "Phones ", el("small", {}, "over all labelled frames")),
      el("div", { class: "beside" }, el("div", { class: "scores" }, ...sentences(scores)), el("div", {}, ...mixChart(mix, scan.phones))))];
  };

  function sentences(scores) {
    if (scores.phone === null) return [el("p", {}, "No phone activates it more often than the others do.")];
    const text = [
      el("p", {}, "It tells ", el("b", {}, scores.phone), ` from all else with an AUC of ${between(scores.auc)}; under shuffled labels its best phone has ${two(scores.auc_shuffled)}`,
        scores.p_value === null ? "." : ` (p\u00a0${scores.p_value < 0.001 ? "<\u00a00.001" : `=\u00a0${shortNumber(scores.p_value)}`}).`),
    ];
    if (scores.f1[0] !== null) text.push(el("p", {}, `Values of ${number(scores.threshold)} and more detect it with an F1 of ${between(scores.f1)}, precision ${two(scores.precision)}, recall ${two(scores.recall)}.`,
      scores.onset_ms[0] === null ? "" : ` Detection begins ${between(scores.onset_ms, (ms) => ms.toFixed(0).replace("-", "−"))} ms from the phone’s start.`));
    if (scores.pmi[0] !== null && scores.selectivity[0] !== null) text.push(el("p", {}, `PMI ${between(scores.pmi)} bits, selectivity d′ ${between(scores.selectivity)}.`));
    if (scores.phone_class !== null) text.push(el("p", {}, "Best class: ", el("b", {}, scores.phone_class), `, AUC ${between(scores.class_auc)}.`));
    if (scores.polysemanticity[0] !== null) text.push(el("p", {}, `Polysemanticity ${between(scores.polysemanticity)}: how much the phones change between ranges of activation, 0 to 1.`));
    if (scores.auc[1] !== null) text.push(el("p", { class: "quiet" }, "In brackets: 95 % intervals over speakers."));
    return text;
  }

  function mixChart({ edges, frames }, phones) {
    const part = (phone, share, n) => ({ name: phones.labels[phone], share, colour: phones.colour[phone], dark: phones.dark[phone],
      title: `${phones.labels[phone]}: ${n === null ? "" : `${count(n)} frames, `}${percent(share)}${n === null ? " of all frames" : ` (base rate ${percent(phones.base[phone])})`}` });
    const ranges = frames.map((flat, i) => {
      const pairs = [];
      for (let at = 0; at < flat.length; at += 2) pairs.push([flat[at], flat[at + 1]]);
      const all = pairs.reduce((sum, [, n]) => sum + n, 0);
      return { name: `${number(edges[i])} to ${number(edges[i + 1])}`, note: count(all), pale: all < phones.few, all,
        parts: pairs.map(([phone, n]) => part(phone, n / all, n)) };
    }).reverse();
    const base = { name: "any value", note: narrow.matches ? "base" : "base rate", parts: phones.base.map((share, phone) => part(phone, share, null)) };
    if (!ranges.some((range) => range.all)) return [el("p", { class: "quiet" }, "It is above zero in no labelled frame.")];

    const inWords = [...ranges, base].map(({ name, note, parts, all }) => {
      const most = [...parts].sort((a, b) => b.share - a.share).slice(0, MOST_NAMED).map(({ name, share }) => `${name} ${percent(share)}`);
      return `${name}: ${all === undefined ? "" : `${note} frame${all === 1 ? "" : "s"}${most.length ? ", " : ""}`}${most.join(", ")}`;
    });
    const there = new Set(phones.group);
    const pale = ranges.some((range) => range.all && range.pale);
    return [
      hearsae.stackedBars([...ranges, null, base], `Phones in each range of activation, from high to low. ${inWords.join(". ")}.`, narrow.matches),
      el("ul", { class: "legend", "aria-hidden": "true" }, ...phones.groups.map(({ colour, name }, i) => {
        if (!there.has(i)) return null;
        const patch = el("span", { class: "patch" });
        patch.style.background = colour;
        return el("li", {}, patch, name);
      })),
      el("p", { class: "quiet" }, `Share of the labelled frames in each range of activation; right, their number${pale ? ` (pale: fewer than ${phones.few})` : ""}`),
      el("details", {}, el("summary", {}, "In words"), el("ul", {}, ...inWords.map((line) => el("li", {}, line)))),
    ];
  }
})();
