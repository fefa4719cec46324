"use strict";
// Histograms and stacked bars as SVG, activation traces on a canvas.
(function () {
  const { svg, number, shortNumber, count } = hearsae;

  /** A small histogram; heights are one character a bin, 0 to z. */
  hearsae.sparkline = (heights) => {
    const width = 100 / Math.max(16, heights.length);
    let path = "";
    for (let i = 0; i < heights.length; i++) {
      const height = parseInt(heights[i], 36) * 20 / 35;
      if (height) path += `M${(i * width).toFixed(2)} 20v${-Math.max(1, height).toFixed(2)}h${(0.75 * width).toFixed(2)}V20z`;
    }
    return svg("svg", { class: "spark", viewBox: "0 0 100 20", preserveAspectRatio: "none", "aria-hidden": "true" }, svg("path", { d: path }));
  };

  /** The histogram of a feature, log counts. {lo, step, counts: [bins]} */
  hearsae.histogram = ({ lo, step, counts }, noun) => {
    const hi = lo + step * counts.length;
    const width = 640, height = 150, left = 8, bottom = 22, top = 14;
    const most = Math.max(1, ...counts);
    const x = (value) => left + (value - lo) / (hi - lo || 1) * (width - 2 * left);
    const y = (n) => n ? (height - bottom) - Math.max(1.5, Math.log1p(n) / Math.log1p(most) * (height - bottom - top)) : height - bottom;
    const chart = svg("svg", { class: "histogram", viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": `Histogram of activation from ${number(lo)} to ${number(hi)}, log counts, at most ${count(most)} ${noun}s a bin` });
    for (let n = 1; n <= most; n *= 10) {
      const at = y(n);
      chart.append(svg("line", { class: "grid", x1: left, x2: width - left, y1: at, y2: at }));
      chart.append(svg("text", { class: "grid", x: width - left, y: at - 3, "text-anchor": "end" }, n >= 1000 ? n.toLocaleString("en") : String(n)));
    }
    counts.forEach((n, i) => {
      if (!n) return;
      const x0 = x(lo + i * step), x1 = x(lo + (i + 1) * step);
      chart.append(svg("rect", { x: x0, width: Math.max(1, x1 - x0 - 1), y: y(n), height: height - bottom - y(n) },
        svg("title", {}, `${number(lo + i * step)} to ${number(lo + (i + 1) * step)}: ${count(n)}`)));
    });
    for (const value of ticks(lo, hi)) {
      chart.append(svg("text", { x: x(value), y: height - 6, "text-anchor": "middle" }, shortNumber(value)));
      chart.append(svg("line", { class: "axis", x1: x(value), x2: x(value), y1: height - bottom, y2: height - bottom + 4 }));
    }
    chart.append(svg("line", { class: "axis", x1: left, x2: width - left, y1: height - bottom, y2: height - bottom }));
    return chart;
  };

  /**
   * Stacked bars, one above the other. bars: [{name, note, pale, parts: [{name, share, colour, dark, title}]}], null for a gap between them.
   * label: the chart in words. isNarrow: for a telephone's screen.
   */
  hearsae.stackedBars = (bars, label, isNarrow) => {
    const NAMED_FROM = 0.035, PALE = 0.45, LETTER = 7.6;  // of a bar; opacity; widest width of a letter at 11 px
    const width = isNarrow ? 370 : 640, left = isNarrow ? 92 : 104, right = isNarrow ? 46 : 62, bar = 21, row = 24, gap = 10;
    const chart = svg("svg", { class: "stacked", viewBox: `0 0 ${width} ${bars.reduce((all, one) => all + (one ? row : gap), 0)}`, role: "img", "aria-label": label });
    let y = 0;
    for (const one of bars) {
      if (!one) { y += gap; continue; }
      const parts = svg("g", { class: one.pale ? "pale" : null });
      let x = left;
      for (const { name, share, colour, dark, title } of one.parts) {
        const w = share * (width - left - right);
        parts.append(svg("rect", { x, y, width: w, height: bar, fill: colour, "fill-opacity": one.pale ? PALE : null }, svg("title", {}, title)));
        if (share >= NAMED_FROM) {
          const text = [`${name} ${(100 * share).toFixed(0)} %`, name].find((one) => one.length * LETTER < w);
          if (text) parts.append(svg("text", { class: dark ? "on-dark" : "on-light", x: x + w / 2, y: y + 15, "text-anchor": "middle" }, text));
        }
        x += w;
      }
      chart.append(svg("text", { x: left - 8, y: y + 15, "text-anchor": "end" }, one.name), parts,
        svg("text", { x: width - right + 8, y: y + 15 }, one.note));
      y += row;
    }
    return chart;
  };

  /** Round values within [lo, hi], about six. */
  function ticks(lo, hi) {
    if (!(hi > lo)) return [lo];
    const rough = (hi - lo) / 6, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    const found = [];
    for (let k = Math.ceil(lo / step); k * step <= hi; k++) found.push(k * step);
    return found;
  }

  /** Draws values (null outside the clip), one a frame, over the whole width of the rectangle; [lo, hi] is the vertical scale. */
  hearsae.drawTrace = (context, { x, y, width, height }, values, lo, hi, colour) => {
    const step = width / values.length;
    const at = (value) => y + height - 1 - (value - lo) / (hi - lo || 1) * (height - 2);
    const line = new Path2D(), area = new Path2D(), zero = at(Math.max(lo, 0));
    let last = null;
    values.forEach((value, i) => {
      if (value === null) return;
      const px = x + (i + 0.5) * step, py = at(value);
      if (last === null) area.moveTo(px, zero);
      if (last === null) line.moveTo(px, py); else line.lineTo(px, py);
      area.lineTo(px, Math.min(py, zero));
      last = px;
    });
    if (last === null) return;
    area.lineTo(last, zero);
    context.fillStyle = colour;
    context.strokeStyle = colour;
    context.globalAlpha = 0.18;
    context.fill(area);
    context.globalAlpha = 1;
    context.lineWidth = 1.5 * (window.devicePixelRatio > 1 ? 1.5 : 1);
    context.lineJoin = "round";
    context.stroke(line);
  };
})();
