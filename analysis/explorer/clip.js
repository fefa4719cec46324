"use strict";
// A whole clip: its spectrogram, words and phones, and its strongest features over time.
(function () {
  const { el, capital, number, count } = hearsae;
  const isDark = window.matchMedia("(prefers-color-scheme: dark)");
  const SECOND_PX = 110, WIDE_SECOND_PX = 280;
  const TICK_PX = 60, TICKS_S = [0.1, 0.2, 0.5, 1, 2, 5];
  const STEP_S = 0.1, LONG_STEP_S = 1;
  const clipTable = hearsae.cache(1, (name) => hearsae.load(name));

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const fileName = (source) => source.split(/[\\/]/).pop();
  const seconds = (s) => `${s.toFixed(2)} s`;

  function fit(canvas) {
    const ratio = Math.min(2, window.devicePixelRatio || 1);
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
    canvas.height = Math.max(1, Math.round(canvas.clientHeight * ratio));
    return canvas.getContext("2d");
  }

  let isWide = false;  // kept from clip to clip

  /** Shows clip `clip` of the page; frame: where the cursor stands first, null for the start. */
  hearsae.renderClip = async (page, scan, clip, frame) => {
    const missing = new Error(`This page holds no clip ${clip} of this scan.`);
    const clips = await clipTable("clips");
    if (scan.axis !== "frame" || clip >= clips.source.length) throw missing;
    const [strips, said] = await Promise.all([hearsae.load(`${scan.name}/clip/${clip}`).catch(() => { throw missing; }), hearsae.said(clips)]);
    const levels = await hearsae.inflate(strips.levels);
    const whole = strips.frames * scan.frame_s, silent = clips.silent[clip];
    let at = frame === null ? 0 : Math.min(whole, (frame + 0.5) * scan.frame_s), isPlaying = false, sound = null;

    const picture = el("canvas", { class: "clip-picture" });
    const slider = el("div", { class: "clip-seek", role: "slider", tabindex: "0", "aria-label": "Place in the clip", "aria-valuemin": "0", "aria-valuemax": whole.toFixed(2), onkeydown: arrow }, picture);
    const cursor = el("span", { class: "clip-cursor", "aria-hidden": "true" });
    const tiersPlace = el("div", {});
    const axis = el("div", { class: "clip-axis", "aria-hidden": "true" });
    const rows = strips.feature.map((feature, i) => strip(feature, i));
    const tracks = el("div", { class: "clip-tracks", onpointerdown: point },
      row("", slider), row("", axis), row("", tiersPlace), ...rows.map(({ node }) => node), cursor);
    const widen = el("input", { type: "checkbox", checked: isWide, onchange: () => { isWide = widen.checked; draw(); move(at); } });
    const scroll = el("div", { class: "clip-scroll" }, tracks);
    const button = el("button", { type: "button", class: "clip-play", onclick: toggle, disabled: Boolean(silent) }, "Play");
    const clock = el("span", { class: "quiet" });
    const note = el("p", { class: "note", hidden: !silent }, silent ? `No audio: ${silent}` : "");
    const source = clips.source[clip] ?? "", heading = el("h1", { tabindex: "-1", dir: "auto", title: source }, fileName(source) || `Clip ${clip}`);
    const node = el("div", { class: "clip" },
      el("div", { class: "bar" }, el("a", { href: `#${scan.name}`, class: "back" }, `‹ ${hearsae.scanTitle(scan)}`), heading,
        clips.speaker[clip] === null ? null : el("span", { class: "quiet", dir: "auto" }, clips.speaker[clip])),
      el("p", { class: "clip-words", dir: "auto" }, clips.text[clip] ?? ""),
      el("div", { class: "switches" }, button, clock, el("label", { title: "Room for the names of short phones" }, widen, "Wide"), el("span", { class: "quiet" },
        strips.feature.length ? `The ${strips.feature.length === 1 ? scan.noun : `${count(strips.feature.length)} ${scan.noun}s`} of this page that rise${strips.feature.length === 1 ? "s" : ""} farthest above the scan's mean, in its standard deviations (σ). Full colour: the scan's maximum.` : `No ${scan.noun} of this page is above zero here.`),
        el("span", { class: "quiet keys" }, el("kbd", {}, "space"), " play ", el("kbd", {}, "←"), el("kbd", {}, "→"), " move")),
      note, scroll);
    node.hearsaePlay = silent ? null : toggle;
    node.hearsaeDraw = draw;
    page.replaceChildren(node);
    window.scrollTo(0, 0);
    heading.focus({ preventScroll: true });
    new ResizeObserver(draw).observe(scroll);
    draw();
    move(at);
    if (!silent) hear();

    function row(label, content) {
      return el("div", { class: "clip-row" }, el("div", { class: "clip-label" }, label), el("div", { class: "clip-track" }, content));
    }

    function strip(feature, i) {
      const { frames } = strips, lo = strips.lo[i], hi = strips.hi[i];
      const values = Float32Array.from(levels.subarray(i * frames, (i + 1) * frames), (level) => lo + (hi - lo) * level / 255);
      const name = `${capital(scan.noun)} ${feature}`, peak = `${number(hi)} at ${seconds((strips.peak[i] + 0.5) * scan.frame_s)}, ${number(strips.z[i])} σ`;
      const canvas = el("canvas", { class: "clip-strip", role: "img", "aria-label": `${name} over time: up to ${peak}`, title: `Up to ${peak}; in the scan up to ${number(strips.max[i])}` });
      const label = [el("a", { href: `#${scan.name}/feature/${feature}` }, name), el("span", { class: "quiet" }, `${number(strips.z[i])} σ`)];
      const node = el("div", { class: "clip-row" }, el("div", { class: "clip-label" }, ...label), el("div", { class: "clip-track" }, canvas));
      return { node, paint };

      function paint() {
        const context = fit(canvas), image = new ImageData(frames, 1);
        const [r, g, b] = colour("--trace").match(/[0-9a-f]{2}/gi).map((byte) => parseInt(byte, 16));
        values.forEach((value, k) => image.data.set([r, g, b, Math.round(255 * Math.max(0, Math.min(1, value / strips.max[i])))], 4 * k));
        const small = document.createElement("canvas");
        small.width = frames;
        small.height = 1;
        small.getContext("2d").putImageData(image, 0, 0);
        context.imageSmoothingEnabled = frames > canvas.width;
        context.drawImage(small, 0, 0, canvas.width, canvas.height);
      }
    }

    async function hear() {
      try {
        const audio = await hearsae.clipAudio(clip);
        sound = hearsae.melSpectrogram(audio.getChannelData(0), audio.sampleRate, 0, whole);
        draw();
      } catch (error) {
        tell(error);
      }
    }

    function tell(error) {
      note.textContent = `No audio: ${error.message}`;
      note.hidden = false;
    }

    function draw() {
      if (!node.isConnected) return;
      tracks.style.setProperty("--clip-px", `${Math.round(whole * (isWide ? WIDE_SECOND_PX : SECOND_PX))}px`);
      const context = fit(picture), width = picture.clientWidth;
      if (sound) hearsae.drawSpectrogram(context, { x: 0, y: 0, width: picture.width, height: picture.height }, sound, isDark.matches);
      rows.forEach(({ paint }) => paint());
      const tiers = said && hearsae.tiers({ words: said.words(clip), phones: said.phones(clip) }, { start: 0, end: whole }, width);
      tiersPlace.replaceChildren(...(tiers ? [tiers] : []));
      const step = TICKS_S.find((tick) => tick / whole * width >= TICK_PX) ?? TICKS_S.at(-1);
      axis.replaceChildren(...Array.from({ length: Math.floor(whole / step + 1e-9) + 1 }, (_, k) => {
        const tick = el("span", {}, hearsae.shortNumber(k * step), k === 0 ? " s" : "");
        tick.style.left = `${100 * k * step / whole}%`;
        return tick;
      }));
    }

    function move(to) {
      at = Math.max(0, Math.min(whole, to));
      tracks.style.setProperty("--at", at / whole);
      clock.textContent = `${seconds(at)} of ${seconds(whole)}`;
      slider.setAttribute("aria-valuenow", at.toFixed(2));
      slider.setAttribute("aria-valuetext", seconds(at));
      const x = at / whole * picture.clientWidth, room = scroll.clientWidth - (tracks.clientWidth - picture.clientWidth);
      if (x < scroll.scrollLeft || x > scroll.scrollLeft + room) scroll.scrollLeft = Math.max(0, x - room / 4);
    }

    function seek(to) {
      const wasPlaying = isPlaying;
      if (isPlaying) hearsae.stop();
      move(to);
      if (wasPlaying) toggle();
    }

    function point(event) {
      const track = event.target.closest(".clip-track");
      if (!track || event.button !== 0) return;
      const { left, width } = picture.getBoundingClientRect();
      seek((event.clientX - left) / width * whole);
    }

    function arrow(event) {
      const steps = { ArrowLeft: -STEP_S, ArrowRight: STEP_S, ArrowDown: -STEP_S, ArrowUp: STEP_S, PageDown: -LONG_STEP_S, PageUp: LONG_STEP_S, Home: -Infinity, End: Infinity };
      if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      seek(at + steps[event.key]);
    }

    async function toggle() {
      if (isPlaying) return hearsae.stop();
      isPlaying = true;
      button.textContent = "Stop";
      if (at > whole - 0.05) move(0);  // from the end it begins again
      try {
        await hearsae.play(clip, { start: at, end: whole, peak: at }, false, move, ended);
      } catch (error) {
        ended();
        tell(error);
      }
    }

    function ended() {
      isPlaying = false;
      button.textContent = "Play";
    }
  };
})();
