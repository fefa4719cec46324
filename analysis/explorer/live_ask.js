"use strict";
// Questions to the server: analysis/explorer/live_api.py.
(function () {
  async function answer(response) {
    const value = await response.json().catch(() => null);
    if (!response.ok || value === null) throw Object.assign(new Error(value?.error ?? `the server answered ${response.status}`), { status: response.status });
    return value;
  }

  async function ask(what, question, options) {
    const parameters = new URLSearchParams(Object.entries(question).map(([name, value]) => [name, String(value)]));
    try {
      return await fetch(`live/api/${what}?${parameters}`, { cache: "no-store", ...options });
    } catch {
      throw new Error("the server can't be reached: is 'hearsae explore --serve' still running?");
    }
  }

  /** The answer's JSON. Throws an Error that says what the server said. */
  hearsae.ask = async (what, question = {}) => answer(await ask(what, question));

  /** The same, but sends something: bytes, or nothing. */
  hearsae.send = async (what, question = {}, body = null) => answer(await ask(what, question, { method: "POST", body }));

  /** What a sound was heard as, an AudioBuffer at 16 kHz. */
  hearsae.heardAudio = async (audio) => {
    const response = await ask("sound", { audio });
    if (!response.ok) return answer(response);
    return new OfflineAudioContext(1, 1, 16000).decodeAudioData(await response.arrayBuffer());
  };
})();
