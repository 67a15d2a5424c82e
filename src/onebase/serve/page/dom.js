// Elements without a framework: text is always set as text, so no answer can become markup.

export function h(name, facts = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(facts)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "class") element.className = value;
    else if (key === "value" || key === "checked" || key === "disabled") element[key] = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function fill(place, ...children) {
  place.replaceChildren(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return place;
}

// What a screen reader hears: once per change, and never on every key.
export function announce(text) {
  document.getElementById("said").textContent = text;
}

export function notice(text, kind = "") {
  return h("p", { class: `notice ${kind}`, role: kind === "error" ? "alert" : undefined }, text);
}

let numbers = 0;
export function labelled(text, control, facts = {}) {
  control.id ||= `field-${++numbers}`;
  return h("div", facts, h("label", { for: control.id }, text), control);
}

export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
export const whole = (number) => Math.round(number).toLocaleString("en-US");

export function bytes(count) {
  for (const [unit, step] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (count >= step) return `${(count / step).toFixed(1)} ${unit}`;
  return `${count} B`;
}

export function milliseconds(value) {
  return value >= 1000 ? `${(value / 1000).toFixed(2)} s` : value >= 100 ? `${value.toFixed(0)} ms` : `${value.toFixed(1)} ms`;
}

// A function that runs when nothing has been typed for a while.
export function later(wait, action) {
  let timer;
  return (...given) => { clearTimeout(timer); timer = setTimeout(() => action(...given), wait); };
}
