// Load: what the server does now, asked once a second.
import * as api from "./api.js";
import { bars, lines, place } from "./charts.js";
import { bytes, fill, h, milliseconds, notice, whole } from "./dom.js";
import { curl, snippets } from "./snippets.js";
import * as state from "./state.js";

const EVERY = 1000, KEPT = 180, NAMED = 7;

export default function view({ main, given }) {
  const past = [], tiles = h("dl", { class: "tiles card" }), charts = place("charts"), problem = h("div"), adapters = h("div");
  const pause = h("button", { type: "button", "aria-pressed": String(given.get("paused") === "1"), onclick: () => {
    const paused = pause.getAttribute("aria-pressed") !== "true";
    pause.setAttribute("aria-pressed", String(paused));
    state.write("load", { paused: paused ? "1" : "" });
    if (!paused) tick();
  } }, "Pause");
  const same = snippets();
  let timer = null, gone = false;
  same.update({ curl: curl("GET", "/v1/stats") + "\n" + curl("GET", "/metrics"), Python: `import json, urllib.request\n\nstats = json.load(urllib.request.urlopen("${location.origin}/v1/stats"))\nprint(stats["rates"], stats["latency_ms"])`, "Command line": `onebase ls    # what is stored; the live figures come from ${location.origin}/metrics` });

  async function tick() {
    clearTimeout(timer);
    try {
      const stats = await api.get("/v1/stats");
      if (gone) return;
      past.push(stats);
      if (past.length > KEPT) past.shift();
      fill(problem);
      show(stats);
    } catch (error) {
      if (gone) return;
      fill(problem, notice(error.message, "error"));
    }
    if (pause.getAttribute("aria-pressed") !== "true") timer = setTimeout(tick, EVERY);
  }

  function show(stats) {
    const tile = (title, value) => h("div", { class: "tile" }, h("dt", {}, title), h("dd", {}, value));
    const latency = stats.latency_ms, has = latency.count > 0;
    fill(tiles, tile("requests", whole(stats.requests.total)), tile("rows per second", stats.rates.rows_per_s.toFixed(1)), tile("median latency", has ? milliseconds(latency.p50) : "–"),
      tile("99 % within", has ? milliseconds(latency.p99) : "–"), tile("waiting rows", whole(stats.queue.rows)), tile("errors", whole(stats.requests.errors)));
    const end = stats.time, span = [end - Math.max(30, end - past[0].time), end], under = { start: `${Math.round(span[1] - span[0])} s ago`, end: "now", span };
    const series = (name, pick) => ({ name, points: past.filter((one) => typeof pick(one) === "number").map((one) => [one.time, pick(one)]) });
    const counts = new Map();
    for (const batch of stats.batches) for (const [name, rows] of Object.entries(batch.adapters)) counts.set(name, (counts.get(name) || 0) + rows);
    const names = [...counts].sort((a, b) => b[1] - a[1]).map((one) => one[0]), kept = names.slice(0, NAMED), more = names.length > NAMED;
    const columns = stats.batches.map((batch) => {
      const parts = {};
      for (const [name, rows] of Object.entries(batch.adapters)) { const key = kept.includes(name) ? name : `${names.length - NAMED} more`; parts[key] = (parts[key] || 0) + rows; }
      return { parts };
    });
    charts.show(
      lines([series("rows per second", (one) => one.rates.rows_per_s), series("waiting", (one) => one.queue.rows)], { title: "Load", ...under }),
      lines([series("median", (one) => (one.latency_ms.count ? one.latency_ms.p50 : null)), series("99 %", (one) => (one.latency_ms.count ? one.latency_ms.p99 : null))], { title: "Latency", format: milliseconds, ...under }),
      bars(columns, more ? [...kept, `${names.length - NAMED} more`] : kept, { title: "Mix of the last batches, in rows", start: "60 batches ago", end: "last" }),
      lines([series("process", (one) => one.process.rss_bytes), series("adapters ready", (one) => one.tiers.device.bytes), series("adapters in memory", (one) => one.tiers.memory.bytes)], { title: "Memory", format: bytes, ...under }));
    const tiers = ["device", "memory", "disk"].map((name) => h("tr", {}, h("th", { scope: "row" }, name), h("td", { class: "r" }, whole(stats.tiers[name].adapters)), h("td", { class: "r" }, stats.tiers[name].bytes === undefined ? "" : bytes(stats.tiers[name].bytes)), h("td", { class: "r" }, stats.tiers[name].limit ? bytes(stats.tiers[name].limit) : "")));
    fill(adapters, h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Adapters by tier" }, h("table", {}, h("caption", { class: "unseen" }, "Adapters by tier"), h("thead", {}, h("tr", {}, ["tier", "adapters", "bytes", "limit"].map((one, i) => h("th", { scope: "col", class: i ? "r" : "" }, one)))), h("tbody", {}, tiers))));
  }

  fill(main, h("div", { class: "row between" }, h("div", {}, h("h1", {}, "Load"), h("p", { class: "quiet" }, "Requests, the mix of adapters in each batch, and memory, once a second.")), pause), problem, tiles, charts.element, adapters, same.section);
  tick();
  return { leave: () => { gone = true; clearTimeout(timer); } };
}
