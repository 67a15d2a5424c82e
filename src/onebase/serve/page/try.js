// Try: one text, the answers of several adapters and the base side by side, differences marked.
import * as api from "./api.js";
import { baseName, chooser, welcome } from "./chips.js";
import { announce, fill, h, labelled, later, milliseconds, notice, percent } from "./dom.js";
import { curl, python, shell, snippets } from "./snippets.js";
import * as state from "./state.js";
import { differing } from "./words.js";

const LIVE = 350, SHOWN = 8;

export default function view({ main, models, given }) {
  const wanted = given.get("models")?.split(",").filter(Boolean) || first(models);
  const text = h("textarea", { value: given.get("text") || "", placeholder: "Type or paste a text", rows: 4, spellcheck: "true" });
  const second = h("textarea", { value: given.get("pair") || "", rows: 2 });
  const secondBox = labelled("Second text", second);
  const most = h("input", { type: "number", min: 1, max: 1024, value: given.get("max") || 64 });
  const mostBox = labelled("New tokens, at most", most);
  const choice = chooser(models, wanted, () => { arrange(); ask(); });
  const button = h("button", { class: "primary", type: "submit" }, "Ask");
  const answers = h("section", { class: "answers", "aria-label": "Answers" });
  const problem = h("div"), same = snippets();
  let stop = new AbortController();

  function arrange() {
    const chosen = choice.chosen();
    secondBox.hidden = !chosen.some((one) => one.pair);
    mostBox.hidden = !chosen.some((one) => one.generates && !one.classifies);
    const facts = { text: text.value, pair: secondBox.hidden ? "" : second.value, models: chosen.map((one) => one.id).join(","), max: mostBox.hidden ? "" : most.value };
    state.write("try", facts);
    same.update(texts(baseName(models), chosen, facts, mostBox.hidden));
  }

  async function ask(all = false) {
    stop.abort();
    stop = new AbortController();
    const mine = stop, chosen = choice.chosen();
    fill(problem);
    if (!text.value.trim() || !chosen.length) { fill(answers); return; }
    const writers = chosen.filter((one) => one.generates && !one.classifies), readers = chosen.filter((one) => !writers.includes(one));
    const cards = new Map(chosen.map((one) => [one.id, card(one)]));
    const show = () => fill(answers, [...cards.values()].map((one) => one.element));
    if (writers.length ? all : !answers.childElementCount) show(); // what is read stays until the new answers are there
    button.disabled = true;
    try {
      await Promise.all([
        readers.length ? classify(readers, cards, text.value, secondBox.hidden ? undefined : second.value, mine.signal) : null,
        all ? generate(writers, cards, text.value, Number(most.value), mine.signal) : null,
      ]);
      if (!writers.length) show();
    } catch (error) {
      if (error.name !== "AbortError") fill(problem, notice(error.message, "error"));
    } finally {
      if (mine === stop) button.disabled = false;
    }
  }

  const live = later(LIVE, () => { if (choice.chosen().every((one) => !one.generates || one.classifies)) ask(); });
  const typed = () => { arrange(); live(); };
  [text, second, most].forEach((field) => field.addEventListener("input", typed));
  const form = h("form", { class: "card stack", onsubmit: (event) => { event.preventDefault(); ask(true); },
    onkeydown: (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); ask(true); } } },
    labelled("Text", text), secondBox, choice.element,
    h("div", { class: "row between" }, h("span", { class: "quiet small" }, "Control and Enter asks"), mostBox, button));
  fill(main, h("div", {}, h("h1", {}, "Try"), h("p", { class: "quiet" }, "One text, every chosen adapter and the base, side by side in one batch.")),
    models.length < 2 ? welcome() : null, form, problem, answers, same.section);
  arrange();
  if (text.value) ask(true);
  return { leave: () => stop.abort() };
}

function first(models) {
  const adapters = models.filter((one) => one.adapter !== null).slice(0, 3);
  return [...adapters, ...models.filter((one) => one.adapter === null)].map((one) => one.id);
}

function card(model) {
  const tag = h("span", { class: "tag" }, model.adapter === null ? "frozen" : model.method), body = h("div", {}, h("p", { class: "quiet" }, "…")), foot = h("footer");
  const element = h("article", { class: "card answer", "data-model": model.id }, h("header", {}, h("h3", {}, model.id), tag), body, foot);
  return { model, element, tag, body, foot };
}

async function classify(models, cards, text, pair, signal) {
  const row = { text, ...(pair ? { pair } : {}) };
  const answer = await api.post("/v1/classify", { model: models.map((one) => one.id), input: [row] }, signal);
  const labels = new Map();
  answer.data.forEach((found, i) => {
    const one = cards.get(models[i].id);
    fill(one.body, read(found, one.model));
    fill(one.foot, h("span", { class: "num" }, milliseconds(found.latency_ms)), h("span", {}, found.ref || "no adapter"), h("span", { class: "mono" }, (found.digest || "").replace("sha256:", "").slice(0, 8)),
      found.cut ? h("span", { class: "bad" }, `${found.cut} tokens cut`) : null);
    const said = found.label ?? found.labels?.join(", ");
    if (said !== undefined) labels.set(models[i], said);
  });
  mark([...labels].map(([model, said]) => [cards.get(model.id), model.labels.join("\n"), said]));
  announce([...labels].map(([model, said]) => `${model.id}: ${said}`).join("; "));
}

// Answers of adapters with the same labels are compared with the first of them.
function mark(found) {
  const firsts = new Map();
  for (const [one, labels, said] of found) {
    if (!firsts.has(labels)) firsts.set(labels, [one, said]);
    const [other, before] = firsts.get(labels);
    const differs = said !== before;
    one.element.classList.toggle("differs", differs);
    one.tag.className = differs ? "tag differs" : "tag";
    one.tag.textContent = differs ? `differs from ${other.model.id}` : one.model.method || "frozen";
  }
}

function read(found, model) {
  if (found.spans) return [h("ul", {}, found.spans.slice(0, 12).map((span) => h("li", {}, h("strong", {}, span.text), ` ${span.label || ""} `, h("span", { class: "quiet num" }, percent(span.probability))))), found.spans.length ? null : h("p", { class: "quiet" }, "Nothing found.")];
  if (typeof found.value === "number") return h("p", { class: "verdict num" }, found.value.toPrecision(4));
  if (found.probabilities) {
    const many = Object.entries(found.probabilities).sort((a, b) => b[1] - a[1]).slice(0, SHOWN), said = found.labels ?? [found.label];
    const ordered = model.labels.length && model.labels.length <= SHOWN ? model.labels.map((label) => [label, found.probabilities[label]]) : many;
    return [h("p", { class: "verdict" }, said.join(", ") || "none of the labels"), ordered.map(([label, chance]) => bar(label, chance, said.includes(label)))];
  }
  if (found.embedding) {
    const norm = Math.hypot(...found.embedding);
    return h("p", { class: "quiet" }, `The plain base has no labels. It gives a vector of ${found.embedding.length} numbers (length ${norm.toPrecision(3)}).`);
  }
  return h("p", { class: "quiet" }, "No answer of a known kind.");
}

function bar(label, chance, best) {
  const inner = h("div", { class: "fill" });
  inner.style.width = `${(100 * chance).toFixed(2)}%`;
  return h("div", { class: best ? "bar best" : "bar" }, h("span", { title: label }, label), h("div", { class: "track", "aria-hidden": "true" }, inner), h("span", { class: "num" }, percent(chance)));
}

async function generate(models, cards, prompt, most, signal) {
  const texts = new Map(), began = performance.now();
  await Promise.all(models.map(async (model) => {
    const one = cards.get(model.id), place = h("p", { class: "text" });
    let text = "", count = 0, start = null, ref = "no adapter";
    fill(one.body, place);
    try {
      const chat = model.task === "chat";
      const body = chat ? { model: model.id, messages: [{ role: "user", content: prompt }], max_tokens: most } : { model: model.id, prompt, max_tokens: most };
      for await (const chunk of api.stream(chat ? "/v1/chat/completions" : "/v1/completions", body, signal)) {
        const piece = chunk.choices?.[0]?.delta?.content ?? chunk.choices?.[0]?.text ?? "";
        if (piece) { start ??= performance.now() - began; count++; text += piece; place.textContent = text; }
        ref = chunk.ref || ref;
        fill(one.foot, start === null ? null : h("span", { class: "num" }, `first token ${milliseconds(start)}`), h("span", { class: "num" }, `total ${milliseconds(performance.now() - began)}`), h("span", {}, ref));
      }
      texts.set(model.id, [text, place, one]);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      fill(one.body, notice(error.message, "error"));
    }
  }));
  const base = models.find((one) => one.adapter === null && texts.has(one.id)) || models.find((one) => texts.has(one.id));
  if (!base) return;
  for (const [id, [text, place, one]] of texts) {
    if (id === base.id) continue;
    const words = differing(text, texts.get(base.id)[0]);
    fill(place, words.map(({ word, marked }) => (marked ? h("mark", {}, word) : word)));
    if (words.some((word) => word.marked)) { one.tag.className = "tag differs"; one.tag.textContent = `differs from ${base.id}`; }
  }
  announce(`${texts.size} texts written`);
}

function texts(base, chosen, { text, pair, max }, reads) {
  const ids = chosen.map((one) => one.id), shown = text || "A text.";
  if (!reads) {
    const body = { model: ids[0] || "base", prompt: shown, max_tokens: Number(max), stream: true };
    return { curl: curl("POST", "/v1/completions", body),
      Python: `from openai import OpenAI\n\nclient = OpenAI(base_url="${location.origin}/v1", api_key="none")\nfor model in ${python(ids)}:\n    answer = client.completions.create(model=model, prompt=${python(shown)}, max_tokens=${max})\n    print(model, answer.choices[0].text)`,
      "Command line": `onebase generate ${shell(shown)} -a ${ids.join(",")} --max-new-tokens ${max}` };
  }
  const labels = chosen.filter((one) => one.adapter !== null).map((one) => one.id);
  return { curl: curl("POST", "/v1/classify", { model: ids, input: [{ text: shown, ...(pair ? { pair } : {}) }] }),
    Python: `import onebase as ob\n\nbase = ob.load_base(${python(base)})\nfor name in ${python(labels)}:\n    base.load(name)\n    print(name, base.predict([${python(shown)}], adapter=name${pair ? `, pairs=[${python(pair)}]` : ""}))`,
    "Command line": `onebase predict ${shell(shown)}${pair ? ` --pair ${shell(pair)}` : ""} -a ${labels.join(",")}` };
}
