"use strict";
// The list of a scan's features: searched, sorted, and with only the rows on screen in the document.
(function () {
  const { el, number, percent, count } = hearsae;
  const ROW_PX = 36, SPARE_ROWS = 12;
  const COLUMNS = [
    { key: "feature", label: "Feature", show: (value) => String(value) },
    { key: "density", label: "Density", show: percent, hint: "Share of rows in which the feature is above zero" },
    { key: "max", label: "Max", show: number, hint: "Greatest activation" },
    { key: "mean_active", label: "Mean active", show: number, hint: "Mean over the rows in which it is above zero" },
  ];

  /** The features in the order in which the list shows them: rows of data/SCAN/list.js. */
  function ordered(list, view) {
    const query = view.query.trim().toLowerCase().replace(/^#/, "");
    let rows = Array.from(list.feature.keys());
    if (/^\d+$/.test(query)) rows = rows.filter((row) => String(list.feature[row]).startsWith(query));
    else if (query) {
      const matches = list.texts.map((text) => text.toLowerCase().includes(query));
      rows = rows.filter((row) => matches[list.text[row]]);
    }
    const values = list[view.sort], sign = view.descending ? -1 : 1;
    const rank = (row) => values[row] ?? -Infinity;
    return rows.sort((a, b) => sign * (rank(a) - rank(b)) || a - b);
  }

  /** What a scan's list shows; kept while the page is open, and walked by j and k. */
  hearsae.listView = hearsae.cache(Infinity, async (scanName) => {
    const list = await hearsae.load(`${scanName}/list`);
    const view = { list, query: "", sort: "feature", descending: false, scroll: 0 };
    view.update = () => { view.rows = ordered(list, view); };
    view.update();
    return view;
  });

  hearsae.renderList = async (page, scan) => {
    const view = await hearsae.listView(scan.name), { list } = view;
    const search = el("input", { type: "search", placeholder: "number or words", "aria-label": `Search ${scan.noun}s by number or words`, value: view.query,
      oninput: () => { view.query = search.value; refresh(); },
      onkeydown: (event) => { if (event.key === "Enter" && view.rows.length) location.hash = address(view.rows[0]); } });
    const found = el("span", { class: "quiet", role: "status" });
    const headers = COLUMNS.map(({ key, label, hint }) => el("th", { scope: "col", class: key },
      el("button", { type: "button", title: hint, onclick: () => sortBy(key) }, label)));
    const body = el("tbody");
    const table = el("table", { class: "list" },
      el("thead", {}, el("tr", {}, ...headers, el("th", { scope: "col", class: "spark", title: "Histogram of the activations above zero, log counts" }, "Activations"), el("th", { scope: "col", class: "words" }, "Strongest example"))), body);
    page.replaceChildren(
      el("div", { class: "bar" }, el("h1", {}, hearsae.scanTitle(scan)), search, found),
      el("p", { class: "quiet about" }, about(scan, list.feature.length)), table);

    let shownFrom = -1;
    const address = (row) => `#${scan.name}/feature/${list.feature[row]}`;

    function sortBy(key) {
      view.descending = view.sort === key ? !view.descending : key !== "feature";
      view.sort = key;
      refresh();
    }

    function refresh() {
      view.update();
      found.textContent = view.rows.length === list.feature.length ? count(view.rows.length) : `${count(view.rows.length)} of ${count(list.feature.length)}`;
      headers.forEach((header, i) => {
        if (COLUMNS[i].key === view.sort) header.setAttribute("aria-sort", view.descending ? "descending" : "ascending");
        else header.removeAttribute("aria-sort");
      });
      table.setAttribute("aria-rowcount", view.rows.length + 1);
      shownFrom = -1;
      showRows();
    }

    function showRows() {
      if (!table.isConnected) return window.removeEventListener("scroll", showRows);
      view.scroll = window.scrollY;
      const above = -body.getBoundingClientRect().top / ROW_PX;
      const from = Math.max(0, Math.floor(above / SPARE_ROWS) * SPARE_ROWS - SPARE_ROWS);
      if (from === shownFrom) return;
      shownFrom = from;
      const until = Math.min(view.rows.length, from + Math.ceil(window.innerHeight / ROW_PX) + 3 * SPARE_ROWS);
      const rows = [];
      for (let i = from; i < until; i++) rows.push(tableRow(view.rows[i], i));
      body.replaceChildren(gap(from), ...rows, gap(view.rows.length - until));
    }

    const gap = (rows) => {
      const row = el("tr", { "aria-hidden": "true" });
      row.style.height = `${Math.max(0, rows) * ROW_PX}px`;
      return row;
    };

    const tableRow = (row, i) => el("tr", { "aria-rowindex": i + 2, onclick: (event) => { if (!event.target.closest("a")) location.hash = address(row); } },
      el("th", { scope: "row" }, el("a", { href: address(row) }, String(list.feature[row]))),
      ...COLUMNS.slice(1).map(({ key, show }) => el("td", { class: key }, show(list[key][row]))),
      el("td", { class: "spark" }, hearsae.sparkline(list.spark[row])),
      el("td", { class: "words", dir: "auto" }, list.texts[list.text[row]] ?? ""));

    window.addEventListener("scroll", showRows, { passive: true });
    window.addEventListener("resize", showRows, { passive: true });
    const scroll = view.scroll;
    refresh();
    window.scrollTo(0, scroll);
  };

  const about = (scan, shown) => [
    `Whisper ${scan.model}`,
    `${count(scan.rows)} ${scan.axis}s of ${scan.store}` + (scan.axis === "frame" ? ` (${hearsae.shortNumber(scan.rows * scan.frame_s / 60)} min of sound)` : ""),
    shown < scan.count ? `this page holds ${count(shown)} of ${count(scan.count)} ${scan.noun}s` : "",
  ].filter(Boolean).join(" · ");
})();
