"use strict";
// Two SAEs against each other on one sound.
(function () {
  const { el, number, capital } = hearsae;

  /** A table of the strongest latents of `a` with the nearest of `b`, or the word why there is none. */
  hearsae.liveMatches = (a, b, { why, matches }) => {
    const heading = el("h2", {}, "Matched latents ", el("small", {}, "by the cosine of their decoder rows"));
    if (why) return el("section", { class: "live-matches" }, heading, el("p", { class: "quiet" }, `${capital(why)}.`));
    const link = (scan, feature) => el("a", { href: `./#${scan.name}/feature/${feature}` }, `${capital(scan.noun)} ${feature}`);
    return el("section", { class: "live-matches" }, heading,
      el("p", { class: "quiet about" }, "For each of the strongest latents of A the one of B that writes most nearly the same. Correlation is over the frames of this sound; – where one of the two is silent."),
      el("table", { class: "live-table" },
        el("thead", {}, el("tr", {}, ...["A", "B", "cosine", "correlation"].map((name) => el("th", { scope: "col" }, name)))),
        el("tbody", {}, ...matches.feature.map((feature, i) => el("tr", {}, el("th", { scope: "row" }, link(a, feature)), el("td", {}, link(b, matches.other[i])),
          el("td", {}, number(matches.cosine[i])), el("td", {}, number(matches.correlation[i])))))));
  };
})();
