"use strict";
// Data files are classic scripts that call hearsae.register: unlike fetch and modules, these load from the file system too.
window.hearsae = {};

(function () {
  const arrived = new Map();

  hearsae.register = (name, value) => arrived.set(name, value);

  /** Loads data/NAME.js. The value is handed over, not kept: see hearsae.cache. */
  hearsae.load = (name) => new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = `data/${name}.js`;
    script.onload = () => {
      script.remove();
      if (arrived.has(name)) resolve(arrived.get(name));
      else reject(new Error(`data/${name}.js is damaged`));
      arrived.delete(name);
    };
    script.onerror = () => {
      script.remove();
      reject(new Error(`data/${name}.js can't be loaded: it belongs beside this page`));
    };
    document.head.append(script);
  });

  /** A function that makes each key's promise once and keeps the latest `limit` of them. */
  hearsae.cache = (limit, make) => {
    const kept = new Map();
    return (key) => {
      const promise = kept.get(key) ?? make(key);
      kept.delete(key);
      kept.set(key, promise);
      promise.catch(() => kept.delete(key));
      if (kept.size > limit) kept.delete(kept.keys().next().value);
      return promise;
    };
  };

  /** Base64 -> bytes. */
  hearsae.bytes = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));

  /** Base64 of deflated bytes -> bytes. */
  hearsae.inflate = async (base64) => {
    const stream = new Blob([hearsae.bytes(base64)]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  };
})();
