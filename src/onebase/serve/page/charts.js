// Charts as SVG: lines over an axis, and bars of a mix. Each says in words what it shows.
import { fill, h } from "./dom.js";

const W = 480, H = 170, LEFT = 44, RIGHT = 8, TOP = 8, BOTTOM = 22;
export const color = (i) => `var(--c${i % 8})`;

function s(name, facts, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(facts)) key === "stroke" || key === "fill" ? (element.style[key] = value) : element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function ceiling(value) {
  if (!(value > 0)) return 1;
  const step = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((k) => k * step).find((top) => top >= value * 0.999);
}

const short = (v) => (v >= 1e9 ? `${+(v / 1e9).toFixed(1)}G` : v >= 1e6 ? `${+(v / 1e6).toFixed(1)}M` : v >= 1e4 ? `${+(v / 1e3).toFixed(1)}k` : `${+v.toPrecision(3)}`);

function frame(low, high, format, words) {
  const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": words });
  for (let k = 0; k <= 4; k++) {
    const y = TOP + ((H - TOP - BOTTOM) * k) / 4;
    svg.append(s("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: y, y2: y }));
    if (k % 2 === 0) svg.append(s("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, format(high - ((high - low) * k) / 4)));
  }
  return svg;
}

function legend(names) {
  return h("div", { class: "legend" }, names.map(([name, i]) => {
    const item = h("span", {}, name);
    item.style.setProperty("--swatch", color(i));
    return item;
  }));
}

// series: [{name, points: [[x, y]], dots?, thin?, color?}]; options: low, high, format, start, end (words under the axis)
export function lines(series, { low = 0, high, format = short, start = "", end = "", title, span } = {}) {
  const all = series.flatMap((one) => one.points);
  const top = high ?? ceiling(Math.max(0, ...all.map((p) => p[1])));
  const xs = span || [Math.min(...all.map((p) => p[0])), Math.max(...all.map((p) => p[0]))];
  const x = (v) => LEFT + ((v - xs[0]) / (xs[1] - xs[0] || 1)) * (W - LEFT - RIGHT);
  const y = (v) => TOP + (1 - (Math.min(top, Math.max(low, v)) - low) / (top - low || 1)) * (H - TOP - BOTTOM);
  const latest = series.filter((one) => one.points.length).map((one) => `${one.name} ${format(one.points.at(-1)[1])}`).join(", ");
  const svg = frame(low, top, format, `${title}: ${latest || "nothing yet"}`);
  series.forEach((one, i) => {
    if (!one.points.length) return;
    const stroke = color(one.color ?? i);
    const path = s("path", { stroke, d: one.points.map((p, k) => `${k ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("") });
    if (one.thin) path.setAttribute("class", "thin");
    svg.append(path);
    if (one.dots || one.points.length === 1) for (const p of one.points) svg.append(s("circle", { cx: x(p[0]), cy: y(p[1]), r: 3.5, fill: stroke }));
  });
  svg.append(s("text", { x: LEFT, y: H - 5 }, start), s("text", { x: W - RIGHT, y: H - 5, "text-anchor": "end" }, end));
  return chart(title, latest, svg, series.length > 1 ? legend(series.map((one, i) => [one.name, one.color ?? i])) : null);
}

// columns: [{parts: {name: value}}], one bar each; names fixes colours and order.
export function bars(columns, names, { title, start = "", end = "", slots = 60 } = {}) {
  const total = (column) => Object.values(column.parts).reduce((a, b) => a + b, 0);
  const top = ceiling(Math.max(1, ...columns.map(total)));
  const latest = columns.length ? `${Object.keys(columns.at(-1).parts).length} in the last batch of ${total(columns.at(-1))} rows` : "";
  const svg = frame(0, top, short, `${title}: ${latest || "nothing yet"}`);
  const step = (W - LEFT - RIGHT) / slots;
  columns.forEach((column, k) => {
    let y = H - BOTTOM;
    names.forEach((name, i) => {
      const tall = ((column.parts[name] || 0) / top) * (H - TOP - BOTTOM);
      y -= tall;
      if (tall > 0) svg.append(s("rect", { x: (LEFT + (slots - columns.length + k) * step + 0.5).toFixed(1), y: y.toFixed(1), width: Math.max(1, step - 1).toFixed(1), height: tall.toFixed(1), fill: color(i) }));
    });
  });
  svg.append(s("text", { x: LEFT, y: H - 5 }, start), s("text", { x: W - RIGHT, y: H - 5, "text-anchor": "end" }, end));
  return chart(title, latest, svg, legend(names.map((name, i) => [name, i])));
}

function chart(title, latest, svg, under) {
  return h("section", { class: "card chart" }, h("div", { class: "row between" }, h("h2", {}, title), h("span", { class: "quiet small num" }, latest)), svg, under);
}

export const place = (className) => { const element = h("div", { class: className }); return { element, show: (...charts) => fill(element, charts) }; };
