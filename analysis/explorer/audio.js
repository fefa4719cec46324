"use strict";
// Clips' audio: loaded and decoded when first needed; played with the gain envelope that lifts the peak.
(function () {
  const RATE = 16000;
  const AWAY_GAIN = 0.25, FULL_S = 0.15, RAMP_S = 0.15;
  const FADE_S = 0.01;
  const CURVE_STEP_S = 0.005;
  const KEPT_CLIPS = 48;

  /** The whole clip as an AudioBuffer at 16 kHz. */
  hearsae.clipAudio = hearsae.cache(KEPT_CLIPS, async (clip) => {
    const bytes = hearsae.bytes(await hearsae.load(`audio/${clip}`));
    return new OfflineAudioContext(1, 1, RATE).decodeAudioData(bytes.buffer);
  });

  /** Gain at `distance` seconds from the peak. */
  hearsae.gainAway = (distance) => {
    const ramp = Math.min(1, Math.max(0, (Math.abs(distance) - FULL_S) / RAMP_S));
    return AWAY_GAIN + (1 - AWAY_GAIN) * (0.5 + 0.5 * Math.cos(Math.PI * ramp));
  };

  /** Schedules [start, end) of a clip in an audio context at time `when`; lift: louder around the peak. All times in seconds. */
  hearsae.schedule = (context, buffer, { start, end, peak }, lift, when) => {
    const from = Math.max(0, start), until = Math.min(end, buffer.duration), duration = until - from;
    const steps = Math.max(1, Math.round(duration / CURVE_STEP_S));
    const curve = Float32Array.from({ length: steps + 1 }, (_, i) => {
      const at = i / steps * duration;
      const fade = Math.min(1, at / FADE_S, (duration - at) / FADE_S);
      return fade * (lift ? hearsae.gainAway(from + at - peak) : 1);
    });
    const gain = context.createGain(), source = context.createBufferSource();
    gain.gain.value = 0;
    gain.gain.setValueCurveAtTime(curve, when, duration);
    source.buffer = buffer;
    source.connect(gain).connect(context.destination);
    source.start(when, from, duration);
    return { source, from, duration };
  };

  let output = null, playing = null, asked = 0;

  hearsae.stop = () => {
    asked++;
    if (!playing) return;
    const { source, ended } = playing;
    playing = null;
    source.onended = null;
    source.stop();
    ended();
  };

  /** Plays a span; `moved(seconds within the clip)` is called for every frame on screen, `ended()` once. */
  hearsae.play = async (clip, span, lift, moved, ended) => {
    hearsae.stop();
    const mine = { source: null, ended }, turn = asked;
    output ??= new AudioContext();
    await output.resume();
    const buffer = await hearsae.clipAudio(clip);
    if (turn !== asked) return ended();
    const when = output.currentTime + 0.02;
    const { source, from, duration } = hearsae.schedule(output, buffer, span, lift, when);
    mine.source = source;
    playing = mine;
    source.onended = hearsae.stop;
    const latency = output.outputLatency || 0;
    (function follow() {
      if (playing !== mine) return;
      moved(from + Math.min(duration, Math.max(0, output.currentTime - when - latency)));
      requestAnimationFrame(follow);
    })();
  };
})();
