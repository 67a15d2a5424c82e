// Train: an adapter on sample data, in a process beside the server, with live curves.
import * as api from "./api.js";
import { lines, place } from "./charts.js";
import { baseName } from "./chips.js";
import { announce, fill, h, labelled, notice, percent } from "./dom.js";
import { curl, python, shell, snippets } from "./snippets.js";
import * as state from "./state.js";

const METHODS = ["lora", "bottleneck", "prefix(length=8)", "prompt(length=8)", "ia3", "bitfit"], EVERY = 700;

export default function view({ main, models, given }) {
  const name = h("input", { value: given.get("name") || "reviews", required: true, maxlength: 64, pattern: "[A-Za-z0-9][A-Za-z0-9._\\-]*", autocomplete: "off" });
  const method = h("select", {}, METHODS.map((one) => h("option", { value: one }, one)));
  method.value = METHODS.includes(given.get("method")) ? given.get("method") : METHODS[0];
  const button = h("button", { class: "primary", type: "submit" }, "Train"), cancel = h("button", { type: "button", hidden: true }, "Stop");
  const where = h("div", { class: "stack" }), charts = place("charts"), problem = h("div"), same = snippets();
  let id = given.get("run"), timer = null, gone = false;
  const words = { adapters: models.length - 1 };

  function arrange() {
    state.write("train", { name: name.value, method: method.value, run: id });
    same.update({ curl: curl("POST", "/v1/training", { sample: "reviews", method: method.value, name: name.value }),
      Python: `import onebase as ob\n\nbase = ob.load_base(${python(baseName(models))})\nrun = ob.train(base, "reviews.csv", ${python(method.value)}, name=${python(name.value)})\nprint(run.value, run.base_value, run.test.sentence())`,
      "Command line": `onebase train -d reviews.csv -m ${shell(method.value)} --name ${shell(name.value)}\nonebase demo    # the same sample, four methods` });
  }

  async function begin(event) {
    event.preventDefault();
    fill(problem);
    button.disabled = true;
    try {
      id = (await api.post("/v1/training", { sample: "reviews", method: method.value, name: name.value })).id;
      announce("Training has started");
      arrange();
      poll();
    } catch (error) {
      button.disabled = false;
      fill(problem, notice(error.message, "error"), error.status === 403 || error.status === 401 ? h("p", { class: "quiet" }, "Give a key with the scope admin (button Key above), or train with the command below: the server sees the adapter at once.") : null);
    }
  }

  async function poll() {
    try {
      const run = await api.get(`/v1/training/${encodeURIComponent(id)}`);
      if (gone) return;
      show(run);
      if (run.state === "running") timer = setTimeout(poll, EVERY);
    } catch (error) {
      if (gone) return;
      if (error.status === 404) { id = null; arrange(); button.disabled = false; } else fill(problem, notice(error.message, "error"));
    }
  }

  function show(run) {
    const going = run.state === "running";
    button.disabled = going;
    cancel.hidden = !going;
    const losses = run.losses || run.history.filter((one) => typeof one.loss === "number").map((one) => [one.step, one.loss]);
    const validation = run.history.filter((one) => typeof one.validation === "number").map((one) => [one.epoch, one.validation]);
    const steps = run.total_steps || Math.max(1, ...losses.map((one) => one[0])), epochs = run.total_epochs || Math.max(1, ...validation.map((one) => one[0]));
    const left = run.seconds_left > 0 && going ? `, about ${Math.ceil(run.seconds_left)} s left` : "";
    const step = losses.at(-1)?.[0] || 0;
    fill(where, going ? [h("p", {}, step ? `Step ${step} of ${steps}${left}` : `${run.phase || "Starting"} …`), h("progress", { max: steps, value: step, "aria-label": "Training" })] : null,
      run.state === "done" ? result(run) : null,
      run.state === "failed" ? notice(run.error || "Training failed.", "error") : null,
      run.state === "cancelled" ? notice("Stopped. Nothing was stored.") : null);
    charts.show(losses.length ? lines([{ name: "each step", points: losses, color: 7, thin: true }, { name: "smoothed", points: smooth(losses), color: 0 }], { title: "Loss", start: "step 0", end: `step ${steps}`, span: [0, steps] }) : null,
      validation.length ? lines([{ name: "adapter", points: validation, dots: true }],
        { title: "Right on validation rows", format: (v) => percent(v, 0), low: Math.max(0, Math.floor(10 * Math.min(...validation.map((p) => p[1])) - 1) / 10), high: 1, start: "start", end: `epoch ${epochs}`, span: [0, epochs] }) : null);
    if (!going) announce(run.state === "done" ? `Training is done: ${run.ref}` : `Training ${run.state}`);
  }

  cancel.addEventListener("click", async () => { try { show(await api.remove(`/v1/training/${encodeURIComponent(id)}`)); } catch (error) { fill(problem, notice(error.message, "error")); } });
  [name, method].forEach((field) => field.addEventListener("input", arrange));
  fill(main, h("div", {}, h("h1", {}, words.adapters ? "Train on sample data" : "Train your first adapter"),
    h("p", { class: "quiet" }, "About 500 short customer reviews, English and French, come along. Training runs in a process of its own; answers go on meanwhile. The frozen base's own score is shown beside the result.")),
    h("form", { class: "card stack", onsubmit: begin }, h("div", { class: "fields" }, labelled("Name", name), labelled("Method", method)), h("div", { class: "row" }, button, cancel)),
    problem, where, charts.element, same.section);
  arrange();
  if (id) poll();
  return { leave: () => { gone = true; clearTimeout(timer); } };
}

// The mean of a step and those before it, the nearer the heavier.
function smooth(points) {
  let mean = points[0][1];
  return points.map(([step, loss]) => [step, (mean = 0.85 * mean + 0.15 * loss)]);
}

function result(run) {
  const name = run.metric || "accuracy", mine = run.metrics?.[name], own = run.base_metrics?.[name];
  const tile = (title, value) => h("div", { class: "tile" }, h("dt", {}, title), h("dd", {}, value));
  const sample = encodeURIComponent("The product is okay but the delivery was catastrophic.");
  return h("section", { class: "card stack", "aria-label": "Result" }, h("h2", {}, `${run.ref} is stored and can be asked`),
    h("dl", { class: "tiles" }, typeof own === "number" ? tile(`base alone, ${name}`, percent(own)) : null, typeof mine === "number" ? tile(`with ${run.ref}`, percent(mine)) : null),
    run.sentence ? h("p", { class: "quiet" }, run.sentence) : null,
    h("div", {}, h("a", { class: "button primary", href: `#/try?text=${sample}&models=${run.ref.split("@")[0]},base` }, "Try it")));
}
