"use strict";
// Sound on its way to the server: decoded here where the server can't, recorded, written as WAV.
(function () {
  const RATE = 16000;
  const HEADER_BYTES = 44;

  /** Any sound that the browser can decode -> mono samples at 16 kHz. */
  hearsae.decodeHere = async (bytes) => {
    const buffer = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(bytes);  // resamples
    const mono = new Float32Array(buffer.length);
    for (let channel = 0; channel < buffer.numberOfChannels; channel++) {
      const samples = buffer.getChannelData(channel);
      for (let i = 0; i < mono.length; i++) mono[i] += samples[i] / buffer.numberOfChannels;
    }
    return mono;
  };

  /** Samples in [-1, 1] at 16 kHz -> a WAV file of 16 bits. */
  hearsae.wav = (samples) => {
    const view = new DataView(new ArrayBuffer(HEADER_BYTES + 2 * samples.length));
    const text = (at, letters) => [...letters].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
    text(0, "RIFF");
    view.setUint32(4, view.byteLength - 8, true);
    text(8, "WAVEfmt ");
    view.setUint32(16, 16, true);
    view.setUint16(20, 1, true);
    view.setUint16(22, 1, true);
    view.setUint32(24, RATE, true);
    view.setUint32(28, 2 * RATE, true);
    view.setUint16(32, 2, true);
    view.setUint16(34, 16, true);
    text(36, "data");
    view.setUint32(40, 2 * samples.length, true);
    samples.forEach((sample, i) => view.setInt16(HEADER_BYTES + 2 * i, Math.round(32767 * Math.max(-1, Math.min(1, sample))), true));
    return view.buffer;
  };

  /**
   * Records until `stop()` or until `longest` seconds have passed. Returns {stop, done}: done is the promise of the samples.
   * Throws an Error in words where there is no microphone or it is not allowed.
   */
  hearsae.record = async (longest) => {
    if (!navigator.mediaDevices) throw new Error("browsers give the microphone to pages of this machine (http://127.0.0.1 or localhost) or of https only");
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false } });
    } catch (error) {
      throw new Error(error.name === "NotFoundError" ? "there is no microphone" : `the microphone can't be used (${error.message})`);
    }
    const recorder = new MediaRecorder(stream), parts = [];
    recorder.ondataavailable = (event) => parts.push(event.data);
    const done = new Promise((resolve, reject) => {
      recorder.onerror = (event) => reject(event.error);
      recorder.onstop = () => {
        clearTimeout(limit);
        stream.getTracks().forEach((track) => track.stop());
        new Blob(parts).arrayBuffer().then(hearsae.decodeHere).then(resolve, reject);
      };
    });
    const stop = () => { if (recorder.state !== "inactive") recorder.stop(); };
    const limit = setTimeout(stop, 1000 * longest);
    recorder.start();
    return { stop, done };
  };
})();
