"use strict";
// The list of a scan's features: searched, filtered, sorted, and with only the rows on screen in the document.
(function () {
  const { el, number, percent, count } = hearsae;
  const ROW_PX = 36, SPARE_ROWS = 12;
  const WAIT_MS = 150;  // after a key in a filter, before the list follows

  const score = (value) => value === null ? "–" : value.toFixed(2);
  const COLUMNS = [
    { key: "feature", label: "Feature", rises: true },
    { key: "phone", label: "Phone", rises: true, hint: "The phone that it tells best", phones: true, show: (value, scan) => scan.phones.labels[value] ?? "–" },
    { key: "auc", label: "AUC", hint: "The chance that a frame of the phone has a higher value than one of any other", phones: true, show: score },
    { key: "f1", label: "F1", hint: "Of the phone's detection at the best threshold", phones: true, show: score },
    { key: "polysemanticity", label: "Polysemanticity", short: "Polysem.", hint: "How much the phones change with the level of activation, 0 to 1", phones: true, show: score },
    { key: "density", label: "Density", show: percent, hint: "Share of rows in which the feature is above zero" },
    { key: "max", label: "Max", show: number, hint: "Greatest activation" },
    { key: "mean_active", label: "Mean active", show: number, hint: "Mean over the rows in which it is above zero" },
    { key: "spark", label: "Activations", picture: true, hint: "Histogram of the activations above zero, log counts; sorted by its number of bins" },
    { key: "words", label: "Strongest example", rises: true },
  ];
  const FILTERS = {
    low: { label: "density from", unit: "%", step: 0.01 },
    high: { label: "to", name: "density up to", unit: "%", step: 0.01 },
    auc: { label: "AUC from", step: 0.05, phones: true },
    poly: { label: "polysemanticity from", step: 0.05, phones: true },
  };

  // What is shown, as text: #scan0?q=words&phone=M&auc=0.8&sort=-max. What is not there is as it is at first.

  const atFirst = () => ({ query: "", phone: "", low: null, high: null, auc: null, poly: null, sort: "feature", turned: false });

  /** The view's part of an address, with its question mark; "" for the view at first. */
  hearsae.viewAddress = (view) => {
    const parts = new URLSearchParams();
    if (view.query.trim()) parts.set("q", view.query.trim());
    if (view.phone) parts.set("phone", view.phone);
    for (const name of Object.keys(FILTERS)) if (view[name] !== null) parts.set(name, view[name]);
    if (view.sort !== "feature" || view.turned) parts.set("sort", (view.turned ? "-" : "") + view.sort);
    return parts.size ? `?${parts}` : "";
  };

  /** Makes a view what an address says. What can't be read counts as absent. */
  hearsae.readView = (view, address, scan) => {
    const parts = new URLSearchParams(address), sort = (parts.get("sort") ?? "").replace(/^-/, "");
    Object.assign(view, atFirst(), { query: parts.get("q") ?? "", scroll: 0 });
    if (scan.phones?.labels.includes(parts.get("phone"))) view.phone = parts.get("phone");
    for (const [name, { phones }] of Object.entries(FILTERS)) if (!phones || scan.phones) view[name] = amount(parts.get(name));
    if (columnsOf(scan).some(({ key }) => key === sort)) Object.assign(view, { sort, turned: parts.get("sort").startsWith("-") });
    view.update();
  };

  const amount = (text) => text === null || text.trim() === "" || !Number.isFinite(Number(text)) ? null : Number(text);
  const isRising = ({ sort, turned }) => Boolean(COLUMNS.find(({ key }) => key === sort).rises) !== turned;
  const columnsOf = (scan) => COLUMNS.filter(({ phones }) => !phones || scan.phones);

  /** The features in the order in which the list shows them: rows of data/SCAN/list.js. */
  function ordered(list, view, scan) {
    const query = view.query.trim().toLowerCase().replace(/^#/, "");
    let rows = Array.from(list.feature.keys());
    const keep = (fits) => { rows = rows.filter(fits); };
    if (/^\d+$/.test(query)) keep((row) => String(list.feature[row]).startsWith(query));
    else if (query) {
      const matches = list.texts.map((text) => text.toLowerCase().includes(query));
      const phone = scan.phones ? scan.phones.labels.findIndex((label) => label.toLowerCase() === query) : -1;
      keep((row) => matches[list.text[row]] || (phone >= 0 && list.phone[row] === phone));
    }
    if (view.low !== null) keep((row) => 100 * list.density[row] >= view.low);
    if (view.high !== null) keep((row) => 100 * list.density[row] <= view.high);
    if (scan.phones) {
      const phone = scan.phones.labels.indexOf(view.phone);
      if (phone >= 0) keep((row) => list.phone[row] === phone);
      if (view.auc !== null) keep((row) => (list.auc[row] ?? -1) >= view.auc);
      if (view.poly !== null) keep((row) => (list.polysemanticity[row] ?? -1) >= view.poly);
    }
    const sign = isRising(view) ? 1 : -1, rank = ranks(list, view.sort, scan);
    // What has no value comes last, whichever way.
    return rows.sort((a, b) => (rank(a) === null) - (rank(b) === null) || sign * (rank(a) - rank(b)) || a - b);
  }

  /** row -> a number to sort by, or null. */
  function ranks(list, key, scan) {
    if (key === "spark") return (row) => list.spark[row].length;
    if (key !== "words" && key !== "phone") return (row) => list[key][row] ?? null;
    const [of, names] = key === "words" ? [list.text, list.texts] : [list.phone, scan.phones.labels];
    const places = new Float64Array(names.length);
    Array.from(names.keys()).sort((a, b) => names[a].localeCompare(names[b])).forEach((name, place) => { places[name] = place; });
    return (row) => of[row] < 0 ? null : places[of[row]];
  }

  /** What a scan's list shows; kept while the page is open, and walked by j and k. */
  const views = new Map();
  hearsae.listView = async (scan) => {
    if (!views.has(scan.name)) views.set(scan.name, hearsae.load(`${scan.name}/list`).then((list) => {
      const view = { list, ...atFirst(), scroll: 0 };
      view.update = () => { view.rows = ordered(list, view, scan); };
      view.update();
      return view;
    }));
    try {
      return await views.get(scan.name);
    } catch (error) {
      views.delete(scan.name);
      throw error;
    }
  };

  hearsae.renderList = async (page, scan) => {
    const view = await hearsae.listView(scan), { list } = view, columns = columnsOf(scan);
    const what = scan.phones ? "number, words or phone" : "number or words";
    const search = el("input", { type: "search", placeholder: what, "aria-label": `Search ${scan.noun}s by ${what}`, value: view.query,
      oninput: () => { view.query = search.value; refresh(); },
      onkeydown: (event) => { if (event.key === "Enter" && view.rows.length) location.hash = address(view.rows[0]); } });
    const found = el("span", { class: "quiet", role: "status" });
    const headers = columns.map(({ key, label, short, hint }) => el("th", { scope: "col", class: key },
      el("button", { type: "button", title: hint, "aria-label": short && label, onclick: () => sortBy(key) }, short ?? label)));
    const body = el("tbody");
    const table = el("table", { class: scan.phones ? "list with-phones" : "list" }, el("thead", {}, el("tr", {}, ...headers)), body);
    page.replaceChildren(
      el("div", { class: "bar" }, el("h1", {}, hearsae.scanTitle(scan)), search, found),
      el("p", { class: "quiet about" }, about(scan, list.feature.length)), filters(), table);

    let shownFrom = -1;
    const address = (row) => `#${scan.name}/feature/${list.feature[row]}${hearsae.viewAddress(view)}`;

    function sortBy(key) {
      view.turned = view.sort === key && !view.turned;
      view.sort = key;
      refresh();
    }

    function filters() {
      let soon;
      const set = (name, value) => { view[name] = value; clearTimeout(soon); soon = setTimeout(refresh, WAIT_MS); };
      const inputs = Object.entries(FILTERS).filter(([, { phones }]) => !phones || scan.phones).map(([name, { label, name: full, unit, step }]) => {
        const input = el("input", { type: "number", min: 0, step, "aria-label": `${full ?? label}${unit ? `, ${unit}` : ""}`, value: view[name], oninput: () => set(name, amount(input.value)) });
        return el("label", {}, label, " ", input, unit ? ` ${unit}` : null);
      });
      if (scan.phones) {
        const there = new Set(list.phone);
        const choice = el("select", { "aria-label": "best phone", onchange: () => set("phone", choice.value) },
          el("option", { value: "" }, "any"), ...scan.phones.labels.filter((_, i) => there.has(i)).sort().map((label) => el("option", { value: label, selected: label === view.phone }, label)));
        inputs.unshift(el("label", {}, "phone ", choice));
      }
      const clear = el("button", { type: "button", onclick: () => {
        Object.assign(view, atFirst(), { sort: view.sort, turned: view.turned });
        bar.querySelectorAll("input, select").forEach((input) => { input.value = ""; });
        search.value = "";
        refresh();
      } }, "Clear");
      const bar = el("div", { class: "filters", role: "group", "aria-label": "Filters" }, ...inputs, clear);
      return bar;
    }

    function refresh() {
      if (!table.isConnected) return;
      view.update();
      hearsae.setAddress(`#${scan.name}${hearsae.viewAddress(view)}`);
      found.textContent = view.rows.length === list.feature.length ? count(view.rows.length) : `${count(view.rows.length)} of ${count(list.feature.length)}`;
      headers.forEach((header, i) => {
        if (columns[i].key === view.sort) header.setAttribute("aria-sort", isRising(view) ? "ascending" : "descending");
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
      const from = Math.max(0, Math.min(Math.floor(above / SPARE_ROWS) * SPARE_ROWS - SPARE_ROWS, view.rows.length));
      if (from === shownFrom) return;
      shownFrom = from;
      const until = Math.min(view.rows.length, from + Math.ceil(window.innerHeight / ROW_PX) + 3 * SPARE_ROWS);
      const rows = [];
      for (let i = from; i < until; i++) rows.push(tableRow(view.rows[i], i));
      body.replaceChildren(gap(from), ...rows, gap(view.rows.length - until));
    }

    function gap(rows) {
      const row = el("tr", { "aria-hidden": "true" });
      row.style.height = `${Math.max(0, rows) * ROW_PX}px`;
      return row;
    }

    function cell({ key, show }, row) {
      if (key === "feature") return el("th", { scope: "row" }, el("a", { href: address(row) }, String(list.feature[row])));
      if (key === "spark") return el("td", { class: key }, hearsae.sparkline(list.spark[row]));
      if (key === "words") return el("td", { class: key, dir: "auto" }, list.texts[list.text[row]] ?? "");
      return el("td", { class: key }, show(list[key][row], scan));
    }

    const tableRow = (row, i) => el("tr", { "aria-rowindex": i + 2, onclick: (event) => { if (!event.target.closest("a")) location.hash = address(row); } },
      ...columns.map((column) => cell(column, row)));

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
