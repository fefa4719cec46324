"use strict";
// The live page: where the sound comes from, which scans are shown, playing.
(function () {
  const { el, capital } = hearsae;
  const LARGEST_BYTES = 50 * 2 ** 20;
  const SEARCH_PAUSE_MS = 150;
  const place = document.getElementById("page");
  hearsae.clipAudio = async (buffer) => buffer;  // on this page a clip is its sound

  let index = null, sound = null, panels = [], frame = null, recording = null, turn = 0, playing = false;
  let scale = "z", shown = [];
  const pins = {};  // by scan: they stay when the sound changes

  // What is on the page from the start

  const status = el("p", { class: "quiet live-status", role: "status" });
  const problem = el("p", { class: "problem", role: "alert", hidden: true });
  const file = el("input", { type: "file", accept: "audio/*,.flac,.wav,.ogg,.mp3", id: "file", class: "live-file", onclick: () => { file.value = ""; },  // so that the same file can be chosen again
    onchange: () => { if (file.files[0]) hearFile(file.files[0]); } });
  const record = el("button", { type: "button", class: "live-record", "aria-pressed": "false", onclick: toggleRecording }, "Record");
  const clipSearch = el("input", { type: "search", placeholder: "Words or name of a clip", "aria-label": "Search the clips of the store", oninput: searchSoon, onfocus: searchSoon });
  const clipStore = el("select", { "aria-label": "Store", onchange: searchSoon });
  const clipList = el("ul", { class: "live-clips", "aria-label": "Clips", hidden: true });
  const play = el("button", { type: "button", class: "live-play", disabled: true, onclick: togglePlay }, "Play");
  const selects = ["A", "B"].map((name) => el("select", { id: `scan-${name}`, onchange: chooseScans }));
  const words = el("div", { class: "live-words" });
  const where = el("div", { class: "live-panels" });
  const matchesPlace = el("div");

  function switchOf(name, title) {
    const input = el("input", { type: "radio", name: "scale", value: name, checked: name === scale, onchange: () => { scale = name; refresh(); } });
    return el("label", {}, input, title);
  }

  function start() {
    const options = () => index.scans.map((scan, i) => el("option", { value: String(i) }, scan.title));
    selects[0].append(...options());
    selects[1].append(el("option", { value: "" }, "none"), ...options());
    clipStore.append(...index.stores.map((store, i) => el("option", { value: String(i) }, store.name)));
    clipStore.hidden = index.stores.length < 2;
    place.replaceChildren(
      el("h1", {}, "Live"),
      el("p", { class: "quiet about" }, `Whisper hears up to ${index.longest_s} s; what is longer is cut. Nothing leaves this server.`),
      el("div", { class: "live-sources" },
        el("label", { for: "file", class: "live-pick" }, "Sound file "), file, record,
        el("div", { class: "live-search" }, clipStore, clipSearch, clipList)),
      el("div", { class: "live-choice switches" },
        el("label", { for: "scan-A" }, "A ", selects[0]), el("label", { for: "scan-B" }, "B ", selects[1]),
        el("fieldset", { class: "switches" }, el("legend", {}, "Strength "), switchOf("z", "standard deviations"), switchOf("share", "share of maximum")),
        el("span", {}, play), el("span", { class: "quiet keys" }, el("kbd", {}, "space"), " play ", el("kbd", {}, "← →"), " moment")),
      ...index.left_out.map((reason) => el("p", { class: "quiet" }, reason)),
      status, problem, words, where, matchesPlace);
    shown = [index.scans[0]];
    say("Choose a sound file, record, or search a clip of the store.");
    document.documentElement.dataset.shown = "live";
  }

  function say(text) {
    status.textContent = text;
  }

  function fail(error) {
    say("");
    problem.textContent = capital(error.message);
    problem.hidden = false;
  }

  // Sound

  async function hear(what, send) {
    const mine = ++turn, began = performance.now();
    stop();
    problem.hidden = true;
    say(`Hearing ${what} …`);
    try {
      const heard = await send();
      const buffer = await hearsae.heardAudio(heard.audio);
      if (mine !== turn) return;
      sound = { ...heard, buffer, levels: hearsae.melSpectrogram(buffer.getChannelData(0), buffer.sampleRate, 0, heard.duration_s) };
      frame = null;
      showWords();
      await showPanels();
      if (mine !== turn) return;
      play.disabled = false;
      const cut = sound.whole_s > sound.duration_s + 0.01 ? `; the first ${sound.duration_s} s of ${sound.whole_s.toFixed(1)} s` : "";
      say(`${what}: ${sound.duration_s.toFixed(2)} s${cut}. Whisper took ${sound.seconds.whisper.toFixed(2)} s, all of it ${((performance.now() - began) / 1000).toFixed(2)} s.`);
      document.documentElement.dataset.heard = String(mine);
    } catch (error) {
      if (mine === turn) fail(error);
    }
  }

  function hearFile(chosen) {
    if (chosen.size > LARGEST_BYTES) return fail(new Error(`${chosen.name} is larger than 50 MB, of which only the first ${index.longest_s} s would be heard: cut it`));
    return hear(chosen.name, async () => {
      try {
        return await hearsae.send("upload", {}, chosen);
      } catch (error) {
        if (error.status !== 422) throw error;
        // Formats of phones and browsers (m4a, webm) are not libsndfile's.
        const samples = await chosen.arrayBuffer().then(hearsae.decodeHere).catch(() => { throw error; });
        return hearsae.send("upload", {}, hearsae.wav(samples));
      }
    });
  }

  async function toggleRecording() {
    if (recording) return recording.stop();
    try {
      problem.hidden = true;
      stop();
      recording = await hearsae.record(index.longest_s);
      record.setAttribute("aria-pressed", "true");
      record.textContent = "Stop recording";
      say(`Recording … (ends by itself after ${index.longest_s} s)`);
      const samples = await recording.done;
      await hear("your recording", () => hearsae.send("upload", {}, hearsae.wav(samples)));
    } catch (error) {
      fail(error);
    } finally {
      recording = null;
      record.setAttribute("aria-pressed", "false");
      record.textContent = "Record";
    }
  }

  let searching = null;

  function searchSoon() {
    clearTimeout(searching);
    searching = setTimeout(search, SEARCH_PAUSE_MS);
  }

  async function search() {
    const store = clipStore.value, asked = clipSearch.value;
    try {
      const { clips, more } = await hearsae.ask("clips", { store, search: asked });
      if (asked !== clipSearch.value) return;
      clipList.replaceChildren(
        ...clips.map((clip) => el("li", {}, el("button", { type: "button", onclick: () => {
          clipList.hidden = true;
          hear(nameOf(clip.source), () => hearsae.send("clip", { store, clip: clip.clip }));
        } }, el("b", { dir: "auto" }, nameOf(clip.source)), ` ${clip.duration_s.toFixed(1)} s `, el("span", { class: "quiet", dir: "auto" }, clip.text ?? "")))),
        more ? el("li", { class: "quiet" }, "… and more: search to see them") : "",
        clips.length ? "" : el("li", { class: "quiet" }, "No clip has these words."));
      clipList.hidden = false;
    } catch (error) {
      fail(error);
    }
  }

  const nameOf = (source) => source.split(/[\\/]/).pop();

  function showWords() {
    const said = (title, text) => el("p", {}, el("b", {}, `${title} `), el("span", { dir: "auto" }, text));
    words.replaceChildren(
      ...(sound.known?.text ? [said("Text of the clip", sound.known.text)] : []),
      sound.text === null ? el("p", { class: "quiet" }, `${capital(sound.no_text)}.`) : said("Whisper's transcript", sound.text || "(nothing)"));
  }

  // Scans

  function chooseScans() {
    shown = selects.filter((select) => select.value !== "").map((select) => index.scans[Number(select.value)]);
    showPanels();
  }

  async function showPanels() {
    if (!sound) return;
    const mine = sound;
    panels = shown.map((scan) => hearsae.livePanel(scan, sound, { scale: () => scale, frameS: index.frame_s, seek, pinned: (pins[scan.name] ??= []) }));
    where.classList.toggle("two", panels.length === 2);
    where.replaceChildren(...panels.map((panel) => panel.node));
    panels.forEach((panel) => panel.draw());
    await refresh();
    if (mine === sound && frame !== null) cursorAt(frame * index.frame_s);
  }

  /** Asks again for all that depends on the scale. */
  async function refresh() {
    if (!sound) return;
    const mine = panels;
    await Promise.all(mine.map((panel) => panel.load()));
    if (frame !== null) mine.forEach((panel) => panel.moment(frame));
    matchesPlace.replaceChildren();
    if (mine.length < 2 || mine !== panels) return;
    const [a, b] = mine.map((panel) => panel.scan);
    try {
      const answer = await hearsae.ask("compare", { audio: sound.audio, a: a.name, b: b.name, scale });
      if (mine === panels) matchesPlace.replaceChildren(hearsae.liveMatches(a, b, answer));
    } catch (error) {
      fail(error);
    }
  }

  // Moments and playing

  function cursorAt(time) {
    panels.forEach((panel) => panel.cursor(time / (sound.n_frames * index.frame_s)));
  }

  function seek(to) {
    const wasPlaying = playing;
    stop();
    frame = to;
    cursorAt(frame * index.frame_s);
    panels.forEach((panel) => panel.moment(frame));
    if (wasPlaying) togglePlay();
  }

  function stop() {
    hearsae.stop();
  }

  /** From the chosen moment, or from the start; where it stops is the moment then. */
  async function togglePlay() {
    if (!sound) return;
    if (playing) return stop();
    playing = true;
    play.textContent = "Pause";
    const from = frame !== null && frame < sound.n_frames - 2 ? frame * index.frame_s : 0;
    let last = from;
    await hearsae.play(sound.buffer, { start: from, end: sound.duration_s, peak: 0 }, false, (time) => { last = time; cursorAt(time); }, () => {
      playing = false;
      play.textContent = "Play";
      if (sound) frame = Math.min(sound.n_frames - 1, Math.floor(last / index.frame_s));
    });
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") clipList.hidden = true;
    if (event.key !== " " || event.target.closest("button, a, input, select")) return;
    event.preventDefault();
    togglePlay();
  });
  document.addEventListener("click", (event) => {
    if (!event.target.closest(".live-search")) clipList.hidden = true;
  });
  const redraw = () => panels.forEach((panel) => panel.draw());
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  new ResizeObserver(redraw).observe(where);

  hearsae.ask("index").then((found) => { index = found; start(); }).catch((error) => place.replaceChildren(el("p", { class: "problem", role: "alert" }, error.message)));
})();
