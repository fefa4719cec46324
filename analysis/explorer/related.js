"use strict";
// Features like this one: linked, with their best phone where the scan has phones.
(function () {
  const { el, number, count } = hearsae;

  /** The section as a list of elements; empty where nothing is known. facts: {nearest: [[feature, cosine]], together: [[feature, both, jaccard, lift]]}. */
  hearsae.relatedSection = ({ nearest, together }, scan, view) => {
    const rowOf = new Map(view.list.feature.map((feature, row) => [feature, row]));
    const link = (feature) => rowOf.has(feature)
      ? el("a", { href: `#${scan.name}/feature/${feature}${hearsae.viewAddress(view)}`, "aria-label": `${scan.noun} ${feature}` }, String(feature))
      : el("span", { title: "not on this page" }, String(feature));
    const phone = (feature) => scan.phones?.labels[view.list.phone[rowOf.get(feature)]] ?? "";
    const table = (title, heads, rows) => el("table", { class: "related" }, el("caption", {}, title),
      el("thead", {}, el("tr", {}, ...heads.map(([name, hint]) => el("th", { scope: "col", title: hint }, name)))),
      el("tbody", {}, ...rows.map(([feature, ...values]) => el("tr", {}, el("th", { scope: "row" }, link(feature)),
        scan.phones ? el("td", { class: "phone" }, phone(feature)) : null, ...values.map((value) => el("td", {}, value))))));
    const first = [[hearsae.capital(scan.noun)], ...(scan.phones ? [["Phone", "The phone that it tells best"]] : [])];
    const tables = [];
    if (nearest?.length) tables.push(table("Writes alike", [...first, ["Cosine", "Of the decoder rows"]], nearest.map(([feature, cosine]) => [feature, cosine.toFixed(2).replace("-", "−")])));
    if (together.length) tables.push(table("Active together", [...first, [`${hearsae.capital(scan.axis)}s`, "In which both are above zero"], ["Jaccard", "Of those in which either is, the share"],
      ["Lift", "How much more often than if they were independent"]], together.map(([feature, both, jaccard, lift]) => [feature, count(both), number(jaccard), number(lift)])));
    return tables.length ? [el("section", {}, el("h2", {}, `${hearsae.capital(scan.noun)}s like it`), el("div", { class: "tables" }, ...tables))] : [];
  };
})();
