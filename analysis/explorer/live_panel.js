"use strict";
// One scan's features over a sound: spectrogram, strips, the strongest at a moment.
(function () {
  const { el, number, shortNumber, capital, percent, count } = hearsae;
  const isDark = window.matchMedia("(prefers-color-scheme: dark)");
  const FASTEST_STEP = 10;

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const seconds = (s) => `${s.toFixed(2)} s`;

  const SCALES = {
    z: { unit: "z", show: (z) => number(z) },
    share: { unit: "of its max", show: percent },
  };
  const onScale = (rows, i, scale) => SCALES[scale].show(rows[scale][i]) + (scale === "z" ? " σ" : "");

  function fit(canvas) {
    const ratio = Math.min(2, window.devicePixelRatio || 1);
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
    canvas.height = Math.max(1, Math.round(canvas.clientHeight * ratio));
    return canvas.getContext("2d");
  }

  /** One row of pixels, one a frame, as wide as the canvas; shades in [0, 1]. */
  function drawStrip(canvas, shades) {
    const context = fit(canvas), image = new ImageData(shades.length, 1);
    const [r, g, b] = colour("--trace").match(/[0-9a-f]{2}/gi).map((byte) => parseInt(byte, 16));
    shades.forEach((shade, i) => image.data.set([r, g, b, Math.round(255 * Math.max(0, Math.min(1, shade)))], 4 * i));
    const small = document.createElement("canvas");
    small.width = shades.length;
    small.height = 1;
    small.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingEnabled = shades.length > canvas.width;
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
  }

  const TICKS_S = [0.1, 0.2, 0.5, 1, 2, 5];
  const MOST_TICKS = 8;

  /** Round times below the picture. */
  function timeAxis(sound, frameS) {
    const whole = sound.n_frames * frameS, step = TICKS_S.find((tick) => whole / tick <= MOST_TICKS) ?? TICKS_S.at(-1);
    const axis = el("div", { class: "live-axis quiet", "aria-hidden": "true" });
    for (let k = 0; k * step <= whole; k++) {
      const tick = el("span", {}, shortNumber(k * step), k === 0 ? " s" : "");
      tick.style.left = `${100 * k * step / whole}%`;
      axis.append(tick);
    }
    return axis;
  }

  /**
   * A panel of `scan` over `sound` {audio, duration_s, n_frames, levels, known: {said}}. view: {scale(), frameS, seek(frame), pinned: [features]}; `pinned` is changed.
   * Returns {node, load(), moment(frame), cursor(share), draw(), scan}.
   */
  hearsae.livePanel = (scan, sound, view) => {
    const { pinned } = view;
    let strips = null, chosen = null, at = null, turn = 0, asked = 0;
    const canvas = el("canvas", { class: "live-picture" });
    const cursor = el("span", { class: "live-cursor", hidden: true });
    const slider = el("div", { class: "live-seek", role: "slider", tabindex: "0", "aria-label": "Moment", "aria-valuemin": "0", "aria-valuemax": sound.duration_s.toFixed(2),
      "aria-valuenow": "0", "aria-valuetext": "none chosen", onpointerdown: point, onkeydown: arrow }, canvas);
    const label = el("span", { class: "quiet" }), tiersPlace = el("div", {});
    const list = el("ol", { class: "live-strips" });
    const facts = el("p", { class: "quiet about" });
    const momentPlace = el("div", { class: "live-moment" }, el("p", { class: "quiet" }, "Click into the picture for the strongest features of a moment."));
    const problem = el("p", { class: "problem", role: "alert", hidden: true });
    const box = el("input", { type: "search", inputmode: "numeric", placeholder: `0 to ${scan.count - 1}`, "aria-label": `Number of a ${scan.noun} to pin` });
    const pin = el("form", { class: "live-pin", onsubmit: addPin }, box, el("button", { type: "submit" }, `Pin ${scan.noun}`));
    const node = el("section", { class: "live-panel", "aria-label": scan.title },
      el("h2", {}, scan.title, " ", el("small", {}, count(scan.count))), facts, problem,
      el("div", { class: "live-tracks" }, el("div", { class: "live-row" }, label, slider, el("span")), el("div", { class: "live-row" }, el("span"), timeAxis(sound, view.frameS)), el("div", { class: "live-row" }, el("span"), tiersPlace), list, cursor),
      pin, momentPlace);
    return { node, load, moment, cursor: moveCursor, draw, scan };

    function tell(error) {
      problem.textContent = error.message;
      problem.hidden = false;
    }

    async function load() {
      const mine = ++turn;
      try {
        const answer = await hearsae.ask("strips", { audio: sound.audio, scan: scan.name, scale: view.scale(), pinned: pinned.join(",") });
        const levels = await hearsae.inflate(answer.levels);
        if (mine !== turn) return;
        strips = { rows: answer.rows, values: unpack(answer.rows, levels) };
        problem.hidden = true;
        facts.textContent = `${shownCount(answer.rows)}${answer.fvu === null ? "" : `; reconstruction error (FVU) on this sound ${number(answer.fvu)}`}`;
      } catch (error) {
        if (mine === turn) tell(error);
        return;
      }
      if (chosen !== null && !strips.rows.feature.includes(chosen)) chosen = null;
      render();
    }

    function shownCount({ feature, pinned: own }) {
      const n = feature.length - own;
      return n ? `The ${n} strongest by ${SCALES[view.scale()].unit === "z" ? "standard deviations above their mean" : "share of their maximum"} in the scan` : "Nothing is active in this sound";
    }

    function unpack(rows, levels) {
      const n = sound.n_frames;
      return rows.feature.map((_, i) => Float32Array.from(levels.subarray(i * n, (i + 1) * n), (level) => rows.lo[i] + (rows.hi[i] - rows.lo[i]) * level / 255));
    }

    function nameOf(rows, i) {
      const text = `${capital(scan.noun)} ${rows.feature[i]}`;
      return rows.linked[i] ? el("a", { href: `./#${scan.name}/feature/${rows.feature[i]}` }, text) : el("span", { title: "The page holds a selection without it" }, text);
    }

    function render() {
      const { rows } = strips;
      list.replaceChildren(...rows.feature.map((feature, i) => {
        const isPinned = i < rows.pinned;
        const words = `${capital(scan.noun)} ${feature}: ${onScale(rows, i, view.scale())} at ${seconds(rows.frame[i] * view.frameS)}`;
        return el("li", { class: `live-row${isPinned ? " pinned" : ""}` },
          el("span", { class: "live-label" },
            isPinned ? el("button", { type: "button", class: "live-unpin", "aria-label": `Unpin ${scan.noun} ${feature}`, title: "Unpin", onclick: () => removePin(feature) }, "×") : null,
            nameOf(rows, i)),
          el("button", { type: "button", class: "live-strip", "aria-label": `Curve of ${words}`, title: words, "aria-pressed": String(feature === chosen), onclick: (event) => choose(feature, event) }, el("canvas")),
          el("span", { class: "live-value" }, onScale(rows, i, view.scale())));
      }));
      draw();
    }

    function choose(feature, event) {
      chosen = chosen === feature && event.detail === 0 ? null : feature;
      list.querySelectorAll(".live-strip").forEach((strip, i) => strip.setAttribute("aria-pressed", String(strips.rows.feature[i] === chosen)));
      paint();
      if (event.detail > 0) view.seek(frameAt(event, event.currentTarget));  // by pointer: where it points
    }

    function draw() {
      paint();
      const said = sound.known?.said, tiers = said && hearsae.tiers(said, { start: 0, end: sound.n_frames * view.frameS }, canvas.clientWidth);
      tiersPlace.replaceChildren(...(tiers ? [tiers] : []));
      if (!strips) return;
      const { rows, values } = strips, scale = view.scale();
      const most = Math.max(...rows.z.map((z) => z ?? 0), 1e-9);
      list.querySelectorAll(".live-strip canvas").forEach((strip, i) => {
        const shade = scale === "z" ? (value) => (value - rows.mean[i]) / rows.std[i] / most : (value) => value / rows.max[i];
        drawStrip(strip, Array.from(values[i], (value) => shade(value) || 0));
      });
    }

    function paint() {
      const context = fit(canvas), { width, height } = canvas;
      hearsae.drawSpectrogram(context, { x: 0, y: 0, width: width * sound.levels.length * 0.005 / (sound.n_frames * view.frameS), height }, sound.levels, isDark.matches);
      const i = strips && chosen !== null ? strips.rows.feature.indexOf(chosen) : -1;
      label.textContent = i < 0 ? "" : `${capital(scan.noun)} ${chosen}`;
      if (i < 0) return;
      const { lo, hi, max } = strips.rows, top = Math.max(hi[i], max[i]);
      label.append(el("br"), `top: ${number(top)}`);
      hearsae.drawTrace(context, { x: 0, y: 0, width, height }, Array.from(strips.values[i]), Math.min(0, lo[i]), top, colour("--trace"));
    }

    function frameAt(event, element) {
      const { left, width } = element.getBoundingClientRect();
      return Math.max(0, Math.min(sound.n_frames - 1, Math.floor((event.clientX - left) / width * sound.n_frames)));
    }

    function point(event) {
      if (event.button === 0) view.seek(frameAt(event, slider));
    }

    function arrow(event) {
      const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageDown: -FASTEST_STEP, PageUp: FASTEST_STEP, Home: -Infinity, End: Infinity };
      if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      view.seek(Math.max(0, Math.min(sound.n_frames - 1, (at ?? 0) + steps[event.key])));
    }

    function moveCursor(share) {
      cursor.hidden = false;
      cursor.style.setProperty("--at", share);
    }

    /** Shows the strongest features of a frame. */
    async function moment(frame) {
      at = frame;
      const mine = ++asked, time = seconds(frame * view.frameS);
      slider.setAttribute("aria-valuenow", (frame * view.frameS).toFixed(2));
      slider.setAttribute("aria-valuetext", time);
      try {
        const { rows } = await hearsae.ask("moment", { audio: sound.audio, scan: scan.name, scale: view.scale(), frame });
        if (mine !== asked) return;
        momentPlace.replaceChildren(el("h3", {}, `At ${time}`), rows.feature.length ? el("div", { class: "live-scroll" }, table(rows)) : el("p", { class: "quiet" }, "Nothing is active."));
      } catch (error) {
        if (mine === asked) tell(error);
      }
    }

    function table(rows) {
      const cell = (text) => el("td", {}, text);
      return el("table", { class: "live-table" },
        el("thead", {}, el("tr", {}, ...[capital(scan.noun), "value", "σ above mean", "share of max", "density"].map((name) => el("th", { scope: "col" }, name)), el("th", { scope: "col" }, "pin"))),
        el("tbody", {}, ...rows.feature.map((feature, i) => el("tr", {}, el("th", { scope: "row" }, nameOf(rows, i)), cell(number(rows.value[i])),
          cell(number(rows.z[i])), cell(percent(rows.share[i])), cell(percent(rows.density[i])),
          el("td", {}, el("button", { type: "button", "aria-label": `Pin ${scan.noun} ${feature}`, onclick: () => putPin(feature) }, "+"))))));
    }

    function addPin(event) {
      event.preventDefault();
      const text = box.value.trim();
      if (!/^\d{1,9}$/.test(text) || Number(text) >= scan.count) return tell(new Error(`There is no ${scan.noun} '${text}': there are 0 to ${scan.count - 1}.`));
      box.value = "";
      putPin(Number(text));
    }

    function putPin(feature) {
      if (!pinned.includes(feature)) pinned.push(feature);
      chosen = feature;
      load();
    }

    function removePin(feature) {
      pinned.splice(pinned.indexOf(feature), 1);
      load();
      box.focus();
    }
  };
})();
