"use strict";
// A log-mel spectrogram, as Whisper hears: 25 ms Hann windows, 80 bands to 8 kHz.
(function () {
  const SIZE = 512, WINDOW = 400, BANDS = 80, FLOOR_DB = 70;
  const HOP_S = 0.005;

  const hann = Float32Array.from({ length: WINDOW }, (_, i) => 0.5 - 0.5 * Math.cos(2 * Math.PI * i / WINDOW));
  const cos = Float32Array.from({ length: SIZE / 2 }, (_, i) => Math.cos(2 * Math.PI * i / SIZE));
  const sin = Float32Array.from({ length: SIZE / 2 }, (_, i) => Math.sin(2 * Math.PI * i / SIZE));

  /** In-place radix-2 FFT (Cooley and Tukey) of SIZE points. */
  function fft(re, im) {
    for (let i = 1, j = 0; i < SIZE; i++) {
      let bit = SIZE >> 1;
      for (; j & bit; bit >>= 1) j ^= bit;
      j ^= bit;
      if (i < j) { [re[i], re[j]] = [re[j], re[i]]; [im[i], im[j]] = [im[j], im[i]]; }
    }
    for (let half = 1; half < SIZE; half *= 2) {
      for (let start = 0; start < SIZE; start += 2 * half) {
        for (let k = 0; k < half; k++) {
          const turn = k * SIZE / (2 * half), a = start + k, b = a + half;
          const r = re[b] * cos[turn] + im[b] * sin[turn], i = im[b] * cos[turn] - re[b] * sin[turn];
          re[b] = re[a] - r; im[b] = im[a] - i;
          re[a] += r; im[a] += i;
        }
      }
    }
  }

  const mel = (hz) => 2595 * Math.log10(1 + hz / 700), hz = (m) => 700 * (10 ** (m / 2595) - 1);

  /** Triangular filters: for each band, its first bin and its weights. */
  function filters(rate) {
    const edges = Array.from({ length: BANDS + 2 }, (_, i) => hz(i * mel(8000) / (BANDS + 1)) * SIZE / rate);
    return Array.from({ length: BANDS }, (_, band) => {
      const [low, mid, high] = edges.slice(band, band + 3);
      const first = Math.max(0, Math.floor(low)), weights = [];
      for (let bin = first; bin <= Math.min(SIZE / 2, Math.ceil(high)); bin++) {
        weights.push(Math.max(0, Math.min((bin - low) / (mid - low), (high - bin) / (high - mid))));
      }
      const sum = weights.reduce((a, b) => a + b, 0);
      return { first, weights: sum ? weights.map((w) => w / sum) : [1] };
    });
  }
  let bank = null;

  /** Level in [0, 1] of each band (low to high) of each column: columns are HOP_S apart from start_s; null outside the audio. */
  hearsae.melSpectrogram = (samples, rate, startS, durationS) => {
    bank ??= filters(rate);
    const columns = Math.round(durationS / HOP_S);
    const levels = [];
    let loudest = -Infinity;
    const re = new Float32Array(SIZE), im = new Float32Array(SIZE);
    for (let column = 0; column < columns; column++) {
      const centre = Math.round((startS + (column + 0.5) * HOP_S) * rate);
      if (centre < 0 || centre >= samples.length) { levels.push(null); continue; }
      re.fill(0); im.fill(0);
      for (let i = 0; i < WINDOW; i++) re[i] = (samples[centre - WINDOW / 2 + i] ?? 0) * hann[i];
      fft(re, im);
      const level = new Float32Array(BANDS);
      for (let band = 0; band < BANDS; band++) {
        const { first, weights } = bank[band];
        let power = 1e-10;
        for (let k = 0; k < weights.length; k++) power += weights[k] * (re[first + k] ** 2 + im[first + k] ** 2);
        level[band] = 10 * Math.log10(power);
        if (level[band] > loudest) loudest = level[band];
      }
      levels.push(level);
    }
    for (const level of levels) level?.forEach((db, band) => { level[band] = Math.max(0, 1 - (loudest - db) / FLOOR_DB); });
    return levels;
  };

  const LIGHT = [[250, 250, 248], [203, 213, 222], [96, 125, 150], [30, 50, 78], [8, 14, 30]];
  const DARK = [[18, 19, 24], [38, 34, 72], [112, 52, 110], [214, 106, 84], [252, 226, 160]];

  /** 256 colours, as bytes r, g, b, a. */
  function palette(stops) {
    const bytes = new Uint8ClampedArray(4 * 256);
    for (let level = 0; level < 256; level++) {
      const at = level / 256 * (stops.length - 1), i = Math.floor(at);
      for (let channel = 0; channel < 3; channel++) bytes[4 * level + channel] = stops[i][channel] + (stops[i + 1][channel] - stops[i][channel]) * (at - i);
      bytes[4 * level + 3] = 255;
    }
    return new Uint32Array(bytes.buffer);
  }
  const palettes = { light: palette(LIGHT), dark: palette(DARK) };

  /** Draws levels (of hearsae.melSpectrogram) into the rectangle. */
  hearsae.drawSpectrogram = (context, { x, y, width, height }, levels, isDark) => {
    const colours = isDark ? palettes.dark : palettes.light;
    const image = new ImageData(levels.length, BANDS), pixels = new Uint32Array(image.data.buffer);
    levels.forEach((level, column) => {
      for (let band = 0; level && band < BANDS; band++) pixels[(BANDS - 1 - band) * levels.length + column] = colours[Math.round(255 * level[band])];
    });
    const small = document.createElement("canvas");
    small.width = levels.length;
    small.height = BANDS;
    small.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingEnabled = true;
    context.drawImage(small, x, y, width, height);
  };
})();
