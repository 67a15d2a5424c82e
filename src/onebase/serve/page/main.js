// Chooses the view by the address, and keeps what all views share: the key and the base.
import * as api from "./api.js";
import { fill, h, notice } from "./dom.js";
import * as state from "./state.js";
import adapters from "./adapters.js";
import load from "./load.js";
import table from "./table.js";
import train from "./train.js";
import tries from "./try.js";

const VIEWS = { try: tries, adapters, table, load, train };
const TITLES = { try: "Try", adapters: "Adapters", table: "Table", load: "Load", train: "Train" };
const main = document.getElementById("main");
let leave = () => {}, shown = 0;

async function show(moved) {
  leave();
  leave = () => {};
  const mine = ++shown, { view, given } = state.read();
  const name = VIEWS[view] ? view : "try";
  document.title = `${TITLES[name]} · onebase`;
  for (const link of document.querySelectorAll("nav a")) link.getAttribute("href") === `#/${name}` ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  if (moved) main.focus({ preventScroll: true });
  try {
    const models = await api.models();
    if (mine !== shown) return;
    if (!view && models.length < 2) { location.replace("#/train"); return; }
    const base = models.find((one) => one.adapter === null);
    document.getElementById("base").textContent = base ? `base ${base.root}` : "";
    const found = VIEWS[name]({ main, models, given });
    leave = found?.leave || (() => {});
  } catch (error) {
    if (mine === shown) fill(main, h("h1", {}, TITLES[name]), notice(error.message, "error"), h("div", {}, h("button", { onclick: () => show(false) }, "Try again")));
  }
}

const dialog = document.getElementById("keys"), value = document.getElementById("key-value");
document.getElementById("key").addEventListener("click", () => { value.value = api.key(); dialog.showModal(); });
dialog.addEventListener("close", () => { if (dialog.returnValue === "keep") { api.setKey(value.value.trim()); show(false); } });
dialog.addEventListener("keydown", (event) => { if (event.key === "Enter" && event.target === value) { event.preventDefault(); dialog.close("keep"); } });
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
window.addEventListener("hashchange", () => show(true));
show(false);
