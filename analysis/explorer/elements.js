"use strict";
// Elements and text. Every string from data goes in as a text node or an attribute's value, never as HTML.
(function () {
  const SVG = "http://www.w3.org/2000/svg";

  function fill(node, properties, children) {
    for (const [name, value] of Object.entries(properties)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }

  /** el("a", {href: "#", class: "quiet", onclick: f}, "text", child, ...) */
  hearsae.el = (tag, properties = {}, ...children) => fill(document.createElement(tag), properties, children);
  hearsae.svg = (tag, properties = {}, ...children) => fill(document.createElementNS(SVG, tag), properties, children);

  const minus = (text) => text.replace("-", "−");

  /** Three significant digits; very small and very large ones with a power of ten. */
  hearsae.number = (value) => {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    const size = Math.abs(value);
    if (size === 0) return "0";
    if (size < 0.001 || size >= 1e6) return minus(value.toExponential(1));
    return minus(size >= 100 ? value.toFixed(0) : value.toPrecision(3));
  };

  /** The same without zeros at its end. */
  hearsae.shortNumber = (value) => minus(String(Number(value.toPrecision(3))));

  hearsae.capital = (text) => text[0].toUpperCase() + text.slice(1);

  hearsae.percent = (share) => {
    if (share === null) return "–";
    if (share > 0 && share < 0.0001) return "<0.01 %";
    return `${(100 * share).toFixed(share < 0.01 ? 2 : 1)} %`;
  };

  hearsae.count = (value) => value.toLocaleString("en");
})();
