// The same request as curl, Python and command line, to copy.
import { announce, fill, h } from "./dom.js";

const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;
const KINDS = ["curl", "Python", "Command line"];
let chosen = KINDS[0];

export function curl(method, path, body) {
  const parts = [`curl -s ${method === "GET" ? "" : `-X ${method} `}${location.origin}${path}`];
  if (sessionStorage.getItem("onebase-key")) parts.push('  -H "Authorization: Bearer $ONEBASE_KEY"');
  if (body !== undefined) parts.push("  -H 'Content-Type: application/json'", `  -d ${quoted(JSON.stringify(body))}`);
  return parts.join(" \\\n");
}

// The values as Python writes them.
export function python(value) {
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, inner]) => `${JSON.stringify(name)}: ${python(inner)}`).join(", ")}}`;
  return JSON.stringify(value);
}

export const shell = (...words) => words.map((word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : quoted(word))).join(" ");

// A section that shows one of three texts; `texts` is {curl, Python, "Command line"}.
export function snippets() {
  let texts = {};
  const code = h("code"), buttons = KINDS.map((kind) => h("button", { type: "button", class: "small", onclick: () => { chosen = kind; show(); } }, kind));
  const copy = h("button", { type: "button", class: "small", onclick: async () => {
    try { await navigator.clipboard.writeText(code.textContent); copy.textContent = "Copied"; announce("Copied"); }
    catch { getSelection().selectAllChildren(code); copy.textContent = "Selected"; announce("Selected: copy with the keyboard"); }
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  } }, "Copy");
  function show() {
    buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.textContent === chosen)));
    code.textContent = texts[chosen] || "";
  }
  const section = h("section", { class: "card same", "aria-labelledby": "same" },
    h("div", { class: "row between" }, h("h2", { id: "same" }, "The same elsewhere"), h("div", { class: "row" }, buttons)),
    h("div", { class: "code" }, h("pre", { tabindex: "0", "aria-label": "Code to copy" }, code), copy));
  return { section, update: (given) => { texts = given; show(); } };
}
