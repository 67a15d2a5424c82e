// Adapters: every version with its score against the base, where it is, and what can be done with it.
import * as api from "./api.js";
import { score, welcome } from "./chips.js";
import { announce, bytes, fill, h, labelled, notice } from "./dom.js";
import { curl, python, shell, snippets } from "./snippets.js";
import * as state from "./state.js";

const EVERY = 3000, OLDER = 40, MOST = 200;

export default function view({ main, models, given }) {
  const filter = h("input", { type: "search", value: given.get("filter") || "", placeholder: "Name, method, task, alias" });
  const body = h("tbody"), count = h("p", { class: "quiet small", role: "status" }), problem = h("div"), same = snippets();
  const facts = new Map(models.filter((one) => one.ref).map((one) => [one.ref, one]));
  let found = [], timer = null, gone = false;

  async function refresh() {
    clearTimeout(timer);
    try {
      found = (await api.get("/v1/adapters")).data;
      const missing = found.filter((one) => !facts.has(one.ref)).slice(0, OLDER);
      await Promise.all(missing.map(async (one) => { try { facts.set(one.ref, await api.get(`/v1/models/${encodeURIComponent(one.ref)}`)); } catch { facts.set(one.ref, {}); } }));
      if (!gone) show();
    } catch (error) {
      if (!gone) fill(problem, notice(error.message, "error"));
    }
    if (!gone) timer = setTimeout(refresh, EVERY);
  }

  let before = "";
  function show() {
    const asked = filter.value.toLowerCase();
    const chosen = found.filter((one) => `${one.ref} ${one.method} ${one.task} ${one.aliases.join(" ")}`.toLowerCase().includes(asked));
    const now = JSON.stringify([chosen, [...facts.keys()]]);
    if (now === before) return; // the focus stays where it is
    before = now;
    const focus = document.activeElement?.getAttribute?.("aria-label");
    fill(body, chosen.slice(0, MOST).map(row));
    if (focus) [...body.querySelectorAll("button")].find((one) => one.getAttribute("aria-label") === focus)?.focus();
    count.textContent = `${chosen.length} of ${found.length} versions${chosen.length > MOST ? `, the first ${MOST} shown` : ""}`;
  }

  function row(one) {
    const known = facts.get(one.ref) || {}, points = score(known.metrics);
    const gain = points && typeof points.base === "number" ? points.mine - points.base : null;
    const better = gain === null || points.noise !== false ? "" : (points.share ? gain > 0 : gain < 0) ? "good" : gain === 0 ? "" : "bad";
    const act = (word, action) => h("button", { type: "button", class: "small", "aria-label": `${word} ${one.ref}`, onclick: action }, word);
    const loaded = ["device", "memory", "loading"].includes(one.state);
    return h("tr", {}, h("td", {}, h("div", { class: "row" }, h("a", { href: `#/try?models=${encodeURIComponent(one.newest ? one.name : one.ref)},base` }, one.ref), one.aliases.map((alias) => h("span", { class: "tag" }, `@${alias}`)), one.newest ? null : h("span", { class: "quiet small" }, "older"))),
      h("td", {}, one.method, settings(known.method_settings)), h("td", {}, one.task), h("td", { class: "r" }, bytes(one.bytes)),
      h("td", { class: "r" }, points ? [h("strong", {}, points.shown), h("div", { class: `small ${better}` }, gain === null ? "" : `${gain >= 0 ? "+" : "−"}${points.share ? `${Math.abs(100 * gain).toFixed(1)} points` : Math.abs(gain).toFixed(2)}${points.noise ? ", within the noise" : ""}`), h("div", { class: "quiet small" }, `${points.name}${points.baseShown ? `, base ${points.baseShown}` : ""}`)] : "–"),
      h("td", { class: "nowrap" }, h("span", { class: `dot ${one.state}` }, one.state), one.pinned ? h("span", { class: "quiet small" }, " pinned") : null, one.error ? h("div", { class: "bad small" }, one.error) : null),
      h("td", { class: "r" }, String(one.requests)),
      h("td", {}, h("div", { class: "row" }, loaded ? act("Unload", () => run("DELETE", `/v1/adapters/${one.ref}`, undefined, `${one.ref} is no longer served`, shell("onebase", "rm", one.ref) + "    # removes it from the store as well")) : act("Load", () => run("POST", "/v1/adapters", { ref: one.ref }, `${one.ref} is loaded`, `onebase show ${one.ref}`)),
        act(one.pinned ? "Unpin" : "Pin", () => run("POST", "/v1/adapters", { ref: one.ref, pin: !one.pinned }, one.pinned ? `${one.ref} may leave the device` : `${one.ref} stays on the device`, `onebase show ${one.ref}`)),
        act("Promote", () => alias(one, "Promote", "prod")), one.aliases.length ? act("Roll back", () => alias(one, "Roll back", one.aliases[0])) : null)));
  }

  // What was done is what the code to copy shows.
  async function run(method, path, sent, said, line) {
    fill(problem);
    texts(method, path, sent, line);
    try {
      await (method === "DELETE" ? api.remove(path) : api.post(path, sent));
      announce(said);
      fill(problem, notice(said));
    } catch (error) {
      fill(problem, notice(error.message, "error"), [401, 403].includes(error.status) ? h("p", { class: "quiet" }, "This needs a key with the scope admin: set it with the button Key above.") : null);
    }
    before = "";
    await refresh();
  }

  function alias(one, verb, first) {
    const name = h("input", { value: first, required: true, pattern: "[A-Za-z][A-Za-z0-9_\\-]*", maxlength: 64, autocomplete: "off" });
    const dialog = h("dialog", { "aria-labelledby": "alias-title" }, h("form", { method: "dialog", onsubmit: () => {
      const up = verb === "Promote", path = `/v1/adapters/${one.name}/${up ? "promote" : "rollback"}`;
      run("POST", path, up ? { version: one.version, alias: name.value } : { alias: name.value }, up ? `${one.name}@${name.value} is ${one.ref}` : `${one.name}@${name.value} is what it was before`, up ? shell("onebase", "promote", one.ref, name.value) : shell("onebase", "rollback", one.name, name.value));
    } }, h("h2", { id: "alias-title" }, verb === "Promote" ? `Promote ${one.ref}` : `Roll back ${one.name}`),
      h("p", { class: "quiet" }, verb === "Promote" ? "The alias names this version from the next request on." : "The alias names what it named before."), labelled("Alias", name),
      h("div", { class: "row end" }, h("button", { type: "button", class: "plain", onclick: () => dialog.close() }, "Cancel"), h("button", { class: "primary" }, verb))));
    dialog.addEventListener("close", () => dialog.remove());
    main.append(dialog);
    dialog.showModal();
    name.select();
  }

  function texts(method, path, sent, line) {
    const call = sent === undefined ? "" : `, data=json.dumps(${python(sent)}).encode()`;
    const verb = method === "GET" ? "" : `, method="${method}", headers={"Authorization": "Bearer KEY", "Content-Type": "application/json"}`;
    same.update({ curl: curl(method, path, sent), Python: `import json, urllib.request\n\nrequest = urllib.request.Request("${location.origin}${path}"${call}${verb})\nprint(json.load(urllib.request.urlopen(request)))`, "Command line": line });
  }

  filter.addEventListener("input", () => { state.write("adapters", { filter: filter.value }); show(); });
  fill(main, h("div", {}, h("h1", {}, "Adapters"), h("p", { class: "quiet" }, "Every stored version, its score beside the base's own, and where it is now.")),
    models.length < 2 ? welcome() : [labelled("Filter", filter), problem, count, h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Adapters" }, h("table", {}, h("caption", { class: "unseen" }, "Adapters"),
      h("thead", {}, h("tr", {}, [["adapter"], ["method"], ["task"], ["size", "r"], ["score", "r"], ["state"], ["requests", "r"], ["actions"]].map(([name, kind]) => h("th", { scope: "col", class: kind }, name)))), body))], same.section);
  texts("GET", "/v1/adapters", undefined, "onebase ls");
  if (models.length > 1) refresh();
  return { leave: () => { gone = true; clearTimeout(timer); } };
}

function settings(given) {
  const shown = Object.entries(given || {}).filter(([, value]) => ["number", "string"].includes(typeof value)).slice(0, 3);
  return shown.length ? h("div", { class: "quiet small" }, shown.map(([name, value]) => `${name} ${value}`).join(", ")) : null;
}
