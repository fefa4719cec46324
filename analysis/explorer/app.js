"use strict";
// Which page is shown (#scan0?auc=0.8&sort=auc, #scan0/feature/17?...: what follows the question mark is the list's view; #scan0/clip/12,
// #scan0/clip/12/65 from its frame 65 on), and the keys.
(function () {
  const { el, count } = hearsae;
  const page = document.getElementById("page");
  let scans = [], turn = 0;

  hearsae.scanTitle = (scan) => `${hearsae.capital(scan.noun)}s of ${scan.source ? `${scan.source}, ` : ""}${scan.site}`;

  /** {scan, feature, clip, frame, view}: feature and clip are null for the list; frame may be; view is for an address that says nothing of it: then it stays as it is. */
  function route() {
    const [path, ...rest] = location.hash.slice(1).split("?");
    const [name, kind, number, place] = path.split("/");
    const scan = scans.find((one) => one.name === name) ?? scans[0];
    const whole = (text) => /^\d+$/.test(text ?? "") ? Number(text) : null;
    return {
      scan, feature: kind === "feature" ? whole(number) : null, clip: kind === "clip" ? whole(number) : null, frame: whole(place),
      view: rest.length ? rest.join("?") : null,
    };
  }

  /** Puts what is shown into the address bar, without a new page. */
  hearsae.setAddress = (hash) => {
    if (hash !== location.hash && !(hash === `#${scans[0].name}` && location.hash === "")) history.replaceState(null, "", hash);
  };

  async function show() {
    const mine = ++turn, asked = location.hash, { scan, feature, clip, frame, view } = route();
    hearsae.stop();
    document.querySelectorAll("#scans a").forEach((link) => {
      if (link.hash !== `#${scan.name}`) return link.removeAttribute("aria-current");
      link.setAttribute("aria-current", "page");
      link.parentElement.scrollLeft = link.offsetLeft - link.parentElement.offsetLeft;  // where they don't fit side by side
    });
    // What is slow to arrive must not replace what was asked for after it.
    const place = { replaceChildren: (...children) => { if (mine === turn) page.replaceChildren(...children); }, querySelectorAll: (which) => page.querySelectorAll(which) };
    try {
      const list = await hearsae.listView(scan);
      if (mine !== turn) return;
      if (view !== null && `?${view}` !== hearsae.viewAddress(list)) hearsae.readView(list, view, scan);
      if (clip !== null) await hearsae.renderClip(place, scan, clip, frame);
      else if (feature === null) await hearsae.renderList(place, scan);
      else await hearsae.renderFeature(place, scan, feature);
      if (mine !== turn) return;
      if (feature !== null) hearsae.setAddress(`#${scan.name}/feature/${feature}${hearsae.viewAddress(list)}`);
      const what = clip !== null ? `Clip ${clip} · ` : feature === null ? "" : `${hearsae.capital(scan.noun)} ${feature} · `;
      document.title = `${what}${hearsae.scanTitle(scan)} · hearsae`;
    } catch (error) {
      if (mine === turn) page.replaceChildren(el("p", { class: "problem", role: "alert" }, error.message));
    }
    document.documentElement.dataset.shown = asked;
  }

  async function step(by) {
    const { scan, feature } = route();
    if (feature === null) return;
    const view = await hearsae.listView(scan);
    const next = hearsae.neighbour(view, view.list.feature.indexOf(feature), by);
    if (next !== null) location.hash = `#${scan.name}/feature/${next}${hearsae.viewAddress(view)}`;
  }

  function playSelected() {
    if (route().clip !== null) return page.querySelector(".clip")?.hearsaePlay?.();
    const cards = [...page.querySelectorAll(".example")].filter((card) => card.hearsaePlay);
    const card = cards.find((one) => one.classList.contains("selected")) ?? cards[0];
    card?.hearsaePlay();
  }

  const KEYS = [
    ["j", "next feature, in the list's order"], ["k", "previous feature"], ["space", "play the chosen example, or the first"],
    ["/", "search the list"], ["Enter", "in the search: open the first feature found"], ["?", "these keys"], ["Esc", "close"],
  ];

  /** A dialog with the keys; the browser closes it on Esc and gives the focus back. */
  function showKeys() {
    if (document.querySelector("dialog")) return;
    const close = el("button", { type: "button", onclick: () => dialog.close() }, "Close");
    const dialog = el("dialog", { "aria-labelledby": "keys-title", onclose: () => dialog.remove(), onclick: (event) => { if (event.target === dialog) dialog.close(); } },
      el("h2", { id: "keys-title" }, "Keys"),
      el("dl", {}, ...KEYS.flatMap(([key, what]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, what)])), close);
    document.body.append(dialog);
    dialog.showModal();
  }
  document.querySelector("header").append(el("button", { type: "button", class: "help", "aria-label": "Keys", title: "Keys (?)", onclick: showKeys }, "?"));

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { target } = event;
    if (target.closest("input:not([type=checkbox]), select, textarea, dialog")) return;
    if (event.key === "j") step(1);
    else if (event.key === "k") step(-1);
    else if (event.key === "/" && page.querySelector("input[type=search]")) page.querySelector("input[type=search]").focus();
    else if (event.key === "?") showKeys();
    else if (event.key === " " && (route().feature !== null || route().clip !== null) && !target.closest("button, a, input, label, summary")) playSelected();
    else return;
    event.preventDefault();
  });
  window.addEventListener("hashchange", show);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    page.querySelectorAll(".example, .clip").forEach((one) => one.hearsaeDraw());
  });

  hearsae.load("index").then((index) => {
    scans = index.scans;
    document.getElementById("scans").append(...scans.map((scan) => el("a", { href: `#${scan.name}` }, hearsae.scanTitle(scan), " ", el("small", {}, count(scan.count)))));
    return show();
  }).catch((error) => page.replaceChildren(el("p", { class: "problem", role: "alert" }, error.message)));
})();
