// Table: a CSV in, a column per adapter out; disagreements marked, accuracy where labels are there.
import * as api from "./api.js";
import { baseName, chooser, welcome } from "./chips.js";
import { parse, write } from "./csv.js";
import { announce, fill, h, labelled, notice, percent } from "./dom.js";
import { curl, python, shell, snippets } from "./snippets.js";
import * as state from "./state.js";

const AT_ONCE = 64, ASKED = 512, SHOWN = 300, LARGEST = 50e6;

export default function view({ main, models, given }) {
  const able = models.filter((one) => one.classifies);
  const wanted = given.get("models")?.split(",") || able.slice(0, 4).map((one) => one.id);
  const choice = chooser(able, wanted, arrange, "Columns");
  const file = h("input", { type: "file", accept: ".csv,.tsv,.txt,text/csv", class: "unseen", id: "file", "aria-label": "CSV file", tabindex: "-1", onchange: () => file.files[0] && take(file.files[0]) });
  const drop = h("div", { class: "drop" }, h("p", {}, h("strong", {}, "Drop a CSV here"), h("br"), h("span", { class: "quiet small" }, "A line of column names, then a row per text. It goes to this server only.")),
    file, h("button", { type: "button", onclick: () => file.click() }, "Choose a file"));
  const text = h("select"), pair = h("select"), label = h("select"), only = h("input", { type: "checkbox", checked: given.get("only") === "1", onchange: () => { arrange(); show(); } });
  const start = h("button", { class: "primary", type: "submit" }, "Fill the table"), bar = h("progress", { max: 1, value: 0, hidden: true, "aria-label": "Rows answered" });
  const save = h("button", { type: "button", hidden: true, onclick: download }, "Download CSV");
  const form = h("form", { class: "card stack", hidden: true, onsubmit: (event) => { event.preventDefault(); fillTable(); } }, h("div", { class: "fields" }, labelled("Text", text), labelled("Second text", pair), labelled("Label, for accuracy", label)), choice.element, h("div", { class: "row" }, start, save, h("label", { class: "chip" }, only, "only disagreements")), bar);
  const problem = h("div"), summary = h("div"), result = h("div"), same = snippets();
  let data = null, name = given.get("file") || "texts.csv", answers = [], asked = [], stop = new AbortController();

  async function take(given) {
    fill(problem);
    try {
      if (given.size > LARGEST) throw new Error(`${given.name} has more than 50 MB; the command line reads files of any size.`);
      data = parse(await given.text());
    } catch (error) { fill(problem, notice(`${given.name}: ${error.message}`, "error")); return; }
    name = given.name;
    answers = []; asked = [];
    const option = (column) => h("option", { value: column }, column);
    fill(text, data.columns.map(option));
    for (const one of [pair, label]) fill(one, h("option", { value: "" }, "none"), data.columns.map(option));
    text.value = data.columns.find((one) => /^(text|sentence|review|content|query|premise)$/i.test(one)) || longest();
    label.value = data.columns.find((one) => /^(label|class|target|gold)$/i.test(one)) || "";
    form.hidden = false;
    save.hidden = true;
    announce(`${name}: ${data.rows.length} rows`);
    arrange(); show();
    start.focus();
  }

  const longest = () => data.columns.map((column, i) => [column, data.rows.slice(0, 50).reduce((sum, row) => sum + row[i].length, 0)]).sort((a, b) => b[1] - a[1])[0][0];
  const at = (column) => data.columns.indexOf(column);
  const said = (found) => (found === undefined ? "" : found.error ?? found.label ?? found.labels?.join(" | ") ?? (typeof found.value === "number" ? found.value.toPrecision(5) : found.spans ? found.spans.map((one) => `${one.text} (${one.label || ""})`).join("; ") : ""));

  async function fillTable() {
    stop.abort();
    stop = new AbortController();
    const mine = stop, ids = choice.chosen().map((one) => one.id);
    if (!ids.length) { fill(problem, notice("Choose at least one adapter.", "error")); return; }
    fill(problem);
    [asked, answers] = [ids, []];
    [bar.hidden, bar.max, bar.value, start.disabled, save.hidden] = [false, data.rows.length, 0, true, true];
    const [t, p] = [at(text.value), pair.value ? at(pair.value) : -1];
    const step = Math.max(1, Math.min(AT_ONCE, Math.floor(ASKED / ids.length))); // a server limits the rows of a request
    try {
      for (let begin = 0; begin < data.rows.length; begin += step) {
        const rows = data.rows.slice(begin, begin + step);
        const found = (await api.post("/v1/classify", { model: ids, input: rows.map((row) => ({ text: row[t], ...(p >= 0 ? { pair: row[p] } : {}) })) }, mine.signal)).data;
        rows.forEach((_, i) => answers.push(ids.map((_, k) => found[i * ids.length + k])));
        bar.value = answers.length;
        show();
      }
      announce(`${answers.length} rows answered by ${ids.length} adapters`);
    } catch (error) {
      if (error.name !== "AbortError") fill(problem, notice(`Stopped at row ${answers.length + 1}: ${error.message}`, "error"));
    }
    [bar.hidden, start.disabled, save.hidden] = [true, false, !answers.length];
  }

  function disagree(row) {
    const groups = new Map(); // only adapters with the same labels can disagree
    for (const [k, found] of (row || []).entries()) {
      const key = able.find((one) => one.id === asked[k])?.labels.join("\n");
      groups.set(key, (groups.get(key) || new Set()).add(said(found)));
    }
    return [...groups.values()].some((group) => group.size > 1);
  }

  function show() {
    if (!data) return;
    const g = label.value ? at(label.value) : -1, t = at(text.value), p = pair.value ? at(pair.value) : -1;
    const differing = answers.filter(disagree).length;
    let kept = data.rows.map((row, i) => [row, i]);
    if (only.checked && answers.length) kept = kept.filter(([, i]) => disagree(answers[i]));
    const tile = (title, value) => h("div", { class: "tile" }, h("dt", {}, title), h("dd", {}, value));
    const right = (k) => answers.filter((found, i) => said(found[k]) === data.rows[i][g]).length / answers.length;
    fill(summary, answers.length ? h("dl", { class: "tiles card" }, tile("rows", `${answers.length} of ${data.rows.length}`), asked.length > 1 ? tile("disagreements", `${differing} (${percent(differing / answers.length)})`) : null, g >= 0 ? asked.map((one, k) => tile(`${one}, right`, percent(right(k)))) : null) : null);
    fill(result, h("p", { class: "quiet small" }, `${name}: ${kept.length} rows${kept.length > SHOWN ? `, the first ${SHOWN} shown; the download has all` : ""}`), h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Rows" }, h("table", {}, h("caption", { class: "unseen" }, `Rows of ${name}`), h("thead", {}, h("tr", {}, [text.value, ...(p >= 0 ? [pair.value] : []), ...(g >= 0 ? [label.value] : []), ...asked].map((one) => h("th", { scope: "col" }, one)))),
      h("tbody", {}, kept.slice(0, SHOWN).map(([row, i]) => h("tr", { class: disagree(answers[i]) ? "differs" : "" }, h("td", { class: "words" }, row[t]), p >= 0 ? h("td", { class: "words" }, row[p]) : null, g >= 0 ? h("td", {}, row[g]) : null,
        asked.map((_, k) => cell(answers[i]?.[k], g >= 0 ? row[g] : null))))))));
  }

  function cell(found, gold) {
    const words = said(found), chance = found?.probability;
    return h("td", { class: found && gold !== null && words !== gold ? "wrong" : "" }, words, typeof chance === "number" ? h("span", { class: "quiet small num" }, ` ${percent(chance, 0)}`) : null, found && gold !== null && words !== gold ? h("span", { class: "unseen" }, " wrong") : null);
  }

  function download() {
    const columns = [...data.columns, ...asked.flatMap((one) => [`${one}.label`, `${one}.probability`]), ...(asked.length > 1 ? ["disagree"] : [])];
    const rows = answers.map((found, i) => [...data.rows[i], ...found.flatMap((one) => [said(one), one.probability ?? ""]), ...(asked.length > 1 ? [disagree(found) ? "yes" : "no"] : [])]);
    const url = URL.createObjectURL(new Blob([write(columns, rows)], { type: "text/csv" }));
    h("a", { href: url, download: name.replace(/\.\w+$/, "") + ".answers.csv" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }

  function arrange() {
    const ids = choice.chosen().map((one) => one.id);
    state.write("table", { models: ids.join(","), file: data ? name : "", only: only.checked ? "1" : "" });
    const shown = data ? data.rows.slice(0, 2).map((row) => row[at(text.value)]) : ["First text.", "Second text."];
    same.update({ curl: curl("POST", "/v1/classify", { model: ids, input: shown }), Python: `import pandas as pd\nimport onebase as ob\n\nbase, table = ob.load_base(${python(baseName(models))}), pd.read_csv(${python(name)})\nfor name in ${python(ids)}:\n    base.load(name)\n    table[name] = [p.label for p in base.predict(list(table[${python(text.value || "text")}]), adapter=name)]\ntable.to_csv("answers.csv", index=False)`,
      "Command line": `onebase predict --file ${shell(name)} --text ${shell(text.value || "text")} -a ${ids.join(",")} --out answers.csv` });
  }

  for (const kind of ["dragenter", "dragover"]) drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => { event.preventDefault(); drop.classList.remove("over"); const one = event.dataTransfer.files[0]; if (one) take(one); });
  [text, pair, label].forEach((one) => one.addEventListener("change", () => { arrange(); show(); }));
  fill(main, h("div", {}, h("h1", {}, "Table"), h("p", { class: "quiet" }, "A file in, a column per adapter out. Rows where adapters disagree are marked.")), able.length ? [drop, problem, form, summary, result] : welcome(), same.section);
  arrange();
  return { leave: () => stop.abort() };
}
