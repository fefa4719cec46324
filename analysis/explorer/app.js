"use strict";
// Which page is shown (#scan0, #scan0/feature/17, #scan0/clip/12, #scan0/clip/12/65 from its frame 65 on), and the keys.
(function () {
  const { el, count } = hearsae;
  const page = document.getElementById("page");
  let scans = [], turn = 0;

  hearsae.scanTitle = (scan) => `${hearsae.capital(scan.noun)}s of ${scan.source ? `${scan.source}, ` : ""}${scan.site}`;

  /** {scan, feature, clip, frame}: feature and clip are null for the list; frame may be. */
  function route() {
    const [name, kind, number, place] = location.hash.slice(1).split("/");
    const scan = scans.find((one) => one.name === name) ?? scans[0];
    const whole = (text) => /^\d+$/.test(text ?? "") ? Number(text) : null;
    return { scan, feature: kind === "feature" ? whole(number) : null, clip: kind === "clip" ? whole(number) : null, frame: whole(place) };
  }

  async function show() {
    const mine = ++turn, { scan, feature, clip, frame } = route();
    hearsae.stop();
    document.querySelectorAll("#scans a").forEach((link) => {
      if (link.hash === `#${scan.name}`) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    });
    // What is slow to arrive must not replace what was asked for after it.
    const place = { replaceChildren: (...children) => { if (mine === turn) page.replaceChildren(...children); }, querySelectorAll: (which) => page.querySelectorAll(which) };
    try {
      if (clip !== null) await hearsae.renderClip(place, scan, clip, frame);
      else if (feature === null) await hearsae.renderList(place, scan);
      else await hearsae.renderFeature(place, scan, feature);
      if (mine !== turn) return;
      document.title = `${clip !== null ? `Clip ${clip} · ` : feature === null ? "" : `${hearsae.capital(scan.noun)} ${feature} · `}${hearsae.scanTitle(scan)} · hearsae`;
    } catch (error) {
      if (mine === turn) page.replaceChildren(el("p", { class: "problem", role: "alert" }, error.message));
    }
    document.documentElement.dataset.shown = location.hash;
  }

  async function step(by) {
    const { scan, feature } = route();
    if (feature === null) return;
    const view = await hearsae.listView(scan.name);
    const next = hearsae.neighbour(view, view.list.feature.indexOf(feature), by);
    if (next !== null) location.hash = `#${scan.name}/feature/${next}`;
  }

  function playSelected() {
    if (route().clip !== null) return page.querySelector(".clip")?.hearsaePlay?.();
    const cards = [...page.querySelectorAll(".example")].filter((card) => card.hearsaePlay);
    const card = cards.find((one) => one.classList.contains("selected")) ?? cards[0];
    card?.hearsaePlay();
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { target } = event;
    if (target.closest("input[type=search]")) return;
    if (event.key === "j") step(1);
    else if (event.key === "k") step(-1);
    else if (event.key === "/" && page.querySelector("input[type=search]")) page.querySelector("input[type=search]").focus();
    else if (event.key === " " && (route().feature !== null || route().clip !== null) && !target.closest("button, a, input, label")) playSelected();
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
