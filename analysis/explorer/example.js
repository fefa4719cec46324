"use strict";
// One example: spectrogram and activation trace over the same span, its words, its sound.
(function () {
  const { el, number } = hearsae;
  const SPECTROGRAM_SHARE = 0.62;
  const TOKEN_MARGIN_S = 0.25;  // of sound to either side of a token: one alone is hard to recognise
  const CONTEXT = 60;  // characters of a transcript before a token: it must not fall out of the card
  const isDark = window.matchMedia("(prefers-color-scheme: dark)");

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const seconds = (s) => s < 60 ? `${s.toFixed(2)} s` : `${Math.floor(s / 60)}:${(s % 60).toFixed(2).padStart(5, "0")}`;

  // Sounds are decoded one after the other, and not for cards that have left the page meanwhile.
  let queue = Promise.resolve();
  const inTurn = (work) => (queue = queue.then(work, work));

  // Drawing waits until a card comes near the window.
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      entry.target.hearsaeDraw();
    }
  }, { rootMargin: "300px" });

  /**
   * A card. example: {value, clip, frame, first, stop, values: [width], text, token: {token, start, end, start_s, end_s} or null}; view: {scan, clips, scale: [lo, hi], options}.
   * view.options.lift and .common are read when they matter, so that a switch needs no new cards.
   */
  hearsae.exampleCard = (example, view) => {
    const { scan, clips } = view, { clip } = example;
    const onFrames = scan.axis === "frame";
    const width = example.values.length;
    const isTimed = example.token ? example.token.start_s !== null : onFrames;
    const span = onFrames ? frameSpan() : isTimed ? tokenSpan() : null;
    const source = clips.source[clip] ?? "", silent = isTimed ? clips.silent[clip] : null;
    const where = onFrames ? seconds(clips.start_s[clip] + example.frame * scan.frame_s)
      : `token ${example.frame}${isTimed ? ` at ${seconds(example.token.start_s)}` : ""}`;

    const canvas = el("canvas", { class: onFrames ? "" : "short" });
    const cursor = el("span", { class: "cursor" });
    const name = `value ${number(example.value)}, ${where}${source ? `, ${fileName(source)}` : ""}`;
    const box = isTimed && !silent
      ? el("button", { type: "button", class: "player", "aria-label": `Play example: ${name}`, onclick: toggle }, canvas, onFrames ? cursor : null, el("span", { class: "sign", "aria-hidden": "true" }))
      : el("div", { class: "player", role: "img", "aria-label": `Example: ${name}` }, canvas);
    const tiersPlace = el("div", {});
    const note = el("p", { class: "note", hidden: true });
    if (silent) tell(`No audio: ${silent}`);
    const card = el("figure", { class: "example" }, box, tiersPlace,
      el("figcaption", {},
        el("p", { class: "facts" }, el("b", {}, number(example.value)), el("span", {}, where), clips.speaker[clip] === null ? null : el("span", { dir: "auto" }, clips.speaker[clip]),
          onFrames ? el("a", { class: "whole", href: `#${scan.name}/clip/${clip}/${example.frame}`, "aria-label": `Whole clip, from ${where}${source ? `, ${fileName(source)}` : ""}` }, "clip") : null),
        el("p", { class: "words", dir: "auto", title: example.text }, ...inContext(example)),
        el("p", { class: "source", dir: "auto", title: source }, fileName(source)),
        note));
    canvas.hearsaeDraw = draw;
    near.observe(canvas);
    card.hearsaePlay = silent || !isTimed ? null : () => { box.focus({ preventScroll: true }); toggle(); };
    card.hearsaeDraw = () => { if (drawn) draw(); };
    let drawn = false, levels = null, isPlaying = false;
    return card;

    function frameSpan() {
      const start = (example.frame - scan.context) * scan.frame_s;
      return { start, end: start + width * scan.frame_s, peak: (example.frame + 0.5) * scan.frame_s };
    }

    function tokenSpan() {
      const start = example.token.start_s - clips.start_s[clip], end = example.token.end_s - clips.start_s[clip];
      return { start: start - TOKEN_MARGIN_S, end: end + TOKEN_MARGIN_S, peak: (start + end) / 2 };
    }

    function tell(text) {
      note.textContent = text;
      note.hidden = false;
    }

    function draw() {
      if (!drawn && onFrames) say();
      drawn = true;
      paint();
      if (!levels && !silent && onFrames) inTurn(hear);
    }

    async function say() {
      const said = await hearsae.said(clips);
      const tiers = said && hearsae.tiers({ words: said.words(clip), phones: said.phones(clip) }, span, canvas.clientWidth);
      if (tiers) tiersPlace.append(tiers);
    }

    async function hear() {
      if (!canvas.isConnected || levels) return;
      try {
        const audio = await hearsae.clipAudio(clip);
        levels = hearsae.melSpectrogram(audio.getChannelData(0), audio.sampleRate, span.start, span.end - span.start);
        paint();
      } catch (error) {
        tell(`No audio: ${error.message}`);
      }
    }

    function paint() {
      const ratio = Math.min(2, window.devicePixelRatio || 1);
      const w = canvas.width = Math.round(canvas.clientWidth * ratio), h = canvas.height = Math.round(canvas.clientHeight * ratio);
      const split = onFrames ? Math.round(h * SPECTROGRAM_SHARE) : 0, gap = 3 * ratio;
      const context = canvas.getContext("2d");
      if (levels) hearsae.drawSpectrogram(context, { x: 0, y: 0, width: w, height: split }, levels, isDark.matches);
      const [lo, hi] = view.options.common ? view.scale : [Math.min(0, example.lo), example.hi];
      const inside = Array.from(example.values, (value, i) => i >= example.first && i < example.stop ? value : null);
      // The peak's frame is the middle one.
      context.fillStyle = colour("--peak");
      context.globalAlpha = 0.55;
      context.fillRect(w / 2 - ratio / 2, 0, ratio, h);
      context.globalAlpha = 1;
      hearsae.drawTrace(context, { x: 0, y: split + gap, width: w, height: h - split - gap }, inside, lo, hi, colour("--trace"));
    }

    async function toggle() {
      document.querySelector(".example.selected")?.classList.remove("selected");
      card.classList.add("selected");
      if (isPlaying) return hearsae.stop();
      isPlaying = true;
      card.classList.add("playing");
      try {
        await hearsae.play(clip, span, onFrames && view.options.lift, (at) => {
          cursor.style.left = `${100 * (at - span.start) / (span.end - span.start)}%`;
        }, ended);
      } catch (error) {
        ended();
        tell(`No audio: ${error.message}`);
      }
    }

    function ended() {
      isPlaying = false;
      card.classList.remove("playing");
    }
  };

  /** The text; of a token's example the token stands out, and what is far before it is left out. */
  function inContext({ text, token }) {
    if (!token) return [text ?? ""];
    if (token.start === null) return [el("mark", {}, token.token), " ", text ?? ""];
    const letters = Array.from(text);  // places count characters, not UTF-16 units
    const part = (from, to) => letters.slice(from, to).join("");
    const from = Math.max(0, token.start - CONTEXT);
    return [`${from ? "…" : ""}${part(from, token.start)}`, el("mark", {}, part(token.start, token.end)), part(token.end)];
  }

  const fileName = (source) => source.split(/[\\/]/).pop();
})();
