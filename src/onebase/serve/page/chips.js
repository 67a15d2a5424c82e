// Which models are asked: a checkbox for each, with a filter where there are many.
import { fill, h, percent } from "./dom.js";

const MANY = 12;

export function chooser(models, chosen, changed, title = "Ask") {
  const box = h("div", { class: "chips", ...(models.length > MANY ? { tabindex: "0", role: "group", "aria-label": "Adapters" } : {}) });
  const all = models.map((model) => {
    const input = h("input", { type: "checkbox", value: model.id, checked: chosen.includes(model.id), onchange: changed });
    return { model, input, chip: h("label", { class: "chip" }, input, model.id, model.method ? h("span", { class: "quiet small" }, model.method) : null) };
  });
  fill(box, all.map((one) => one.chip));
  const filter = models.length > MANY ? h("input", { type: "search", placeholder: `Filter ${models.length} adapters`, "aria-label": "Filter adapters",
    oninput: (event) => all.forEach(({ model, chip }) => (chip.hidden = !`${model.id} ${model.method} ${model.task}`.toLowerCase().includes(event.target.value.toLowerCase()))) }) : null;
  const element = h("fieldset", { class: "stack" }, h("legend", {}, title), filter, box);
  return { element, chosen: () => all.filter((one) => one.input.checked).map((one) => one.model) };
}

// What `load_base` takes for the base that is served.
export const baseName = (models) => models.find((one) => one.adapter === null)?.root || "minilm";

// The main metric of an adapter, with the base's own.
export function score(metrics) {
  const mine = metrics?.adapter || {}, own = metrics?.base || {};
  const name = metrics?.metric || ["accuracy", "macro_f1", "entity_f1", "answer_f1", "spearman", "perplexity"].find((one) => one in mine) || Object.keys(mine).find((one) => typeof mine[one] === "number");
  if (!name || typeof mine[name] !== "number") return null;
  const share = !["perplexity", "loss", "mse", "rmse", "mae", "mean_absolute_error"].includes(name);
  const say = (value) => (typeof value !== "number" ? "" : share ? percent(value) : value.toFixed(2));
  return { name: name.replaceAll("_", " "), mine: mine[name], base: own[name], shown: say(mine[name]), noise: noisy(metrics?.test), baseShown: say(own[name]), share };
}

// Whether the paired test of training cannot tell the adapter from the base; undefined where none was made.
const noisy = (test) => (Array.isArray(test?.interval) ? test.interval[0] <= 0 && test.interval[1] >= 0 : undefined);

export const welcome = () => h("section", { class: "card stack" }, h("h2", {}, "No adapter is stored yet"),
  h("p", { class: "quiet" }, "Train one on the customer reviews that come along; it takes about a minute, and then it can be asked here."),
  h("div", {}, h("a", { class: "button primary", href: "#/train" }, "Train one on sample data")));
