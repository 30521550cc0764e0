// Starts the page, and draws its panels whenever the reader has changed something.

import { at, rovingGroup } from "./dom.js";
import { startModels } from "./models.js";
import { patchesOf, patchInForce } from "./patches.js";
import { comparePanel } from "./panels/compare.js";
import { diagramPanel } from "./panels/diagram.js";
import { clearestHead } from "./panels/clearest_head.js";
import { headsPanel } from "./panels/heads.js";
import { insidePanel } from "./panels/inside.js";
import { interventionsPanel } from "./panels/interventions.js";
import { nextPanel } from "./panels/next.js";
import { numberPanel } from "./panels/number.js";
import { stepPanel } from "./panels/step.js";
import { textPanel } from "./panels/text.js";
import { tourPanel } from "./panels/tour.js";
import { pythonCode } from "./python_code.js";
import { FIRST, fitting, fromHash, History, toHash } from "./state.js";

/** What the panels see: the state, the readings of the text, and `set` to change the state. */
class App {
  constructor(data, models) {
    this.data = data;
    this.live = models.live;
    this.tokenizer = models.tokenizer;
    this.sources = models.sources; // of each model, for readings without interventions
    this.patched = models.patched; // with interventions
    this.second = models.second; // of a second text
    this.first = Object.freeze({ ...FIRST, text: data.text, ...clearestHead(data.models[0]) });
    this.history = new History();
    this.hover = null;
    this.panels = [];
  }

  // ---- the state

  start() {
    this.show(fromHash(location.hash, this.first));
    addEventListener("hashchange", ({ newURL }) => { // a link, or an address edited by the reader
      this.history.push(this.state, false);
      this.show(fromHash(new URL(newURL).hash, this.first));
    });
  }

  /** Change the state and draw. undo: whether the undo button goes back to before. typing: several
   * such changes in a row are undone together. */
  set(changes, { undo = true, typing = false } = {}) {
    const before = this.state;
    this.show({ ...this.state, ...changes });
    if (undo && toHash(before, this.first) !== toHash(this.state, this.first)) {
      this.history.push(before, typing);
      drawTop(this);
    }
  }

  undo() {
    if (!this.history.isEmpty) this.show(this.history.pop());
  }

  show(state) {
    const fits = fitting(state, this.data.models[0].config, this.sources.length);
    const text = this.live ? fits.text : this.data.recorded_text;
    const none = this.live ? {} : { off: [], patch: null };
    this.state = Object.freeze({ ...fits, ...none, text });
    this.hover = null;
    hideNotice();
    this.read();
    this.draw();
    clearTimeout(this.addressTimer);
    this.addressTimer = setTimeout(() => this.writeAddress(), 0); // when the panels are drawn
  }

  writeAddress() {
    const hash = toHash(this.state, this.first);
    try {
      history.replaceState(null, "", hash || location.pathname + location.search);
    } catch { // Safari allows 100 changes in 30 seconds
      this.addressTimer = setTimeout(() => this.writeAddress(), 1000);
    }
  }

  // ---- readings

  /** Run the models on the text. Each source keeps what its last text has in common with it. */
  read() {
    const ids = this.tokenizer.encode(this.state.text);
    this.tokensLeftOut = Math.max(0, ids.length - this.data.most_tokens);
    this.tokenIds = ids.length ? ids.slice(0, this.data.most_tokens) : [this.tokenizer.eosId];
    this.tokenLabels = this.tokenIds.map((id) => this.label(id));
    this.groups = this.tokenizer.groups(this.tokenIds);
    this.token = Math.min(this.state.token ?? Infinity, this.tokenIds.length - 1);
    const shown = this.state.model;
    this.source = this.sources[shown];
    this.config = this.source.config;
    this.before = this.sources[shown].read(this.tokenIds);
    this.reading = this.withInterventions(shown, this.before);
    this.otherReading = null;
    const [likeliest] = this.before.lens(this.config.n_layers, this.token, 1);
    this.target = this.tokenIds[this.token + 1] ?? likeliest.id;
  }

  /** The reading of the model that is not shown, which only a comparison needs; null if there is
   * one model. */
  get other() {
    if (this.sources.length < 2) return null;
    const model = 1 - this.state.model;
    this.otherReading ??= this.withInterventions(model, this.sources[model].read(this.tokenIds));
    return this.otherReading;
  }

  withInterventions(model, plain) {
    const second = patchInForce(this) && this.readSecond(this.state.patch.text, model);
    const patches = patchesOf(this.state, this.sources[model], second);
    return patches.length ? this.patched[model].read(this.tokenIds, patches) : plain;
  }

  /** The reading of a second text by the shown model, without interventions. */
  readSecond(text, model = this.state.model) {
    const ids = this.tokenizer.encode(text).slice(0, this.data.most_tokens);
    return ids.length ? this.second[model].read(ids) : null;
  }

  label(id) {
    return this.tokenizer.label(id);
  }

  // ---- drawing

  setHover(hover) {
    this.hover = hover;
    this.drawPanel(at("one-number"));
  }

  draw() {
    for (const { root } of this.panels) this.drawPanel(root);
  }

  drawPanel(root) {
    const panel = this.panels.find((one) => one.root === root);
    if (panel && !root.closest("[hidden]")) panel.draw();
  }

  add(panel, root) {
    const { draw } = panel(this, root);
    this.panels.push({ root, draw });
  }
}

// ---- the top bar and the tabs

function drawTop(app) {
  const { name, precision, n_parameters: parameters } = app.data.models[app.state.model];
  at("name").textContent = name;
  const size = `${(parameters / 1e6).toFixed(1)}M parameters`;
  at("status").textContent = app.live
    ? `${size}, runs in this page with ${precision} weights; nothing is sent or loaded`
    : `${size}, numbers recorded from the model for this text; nothing is sent or loaded`;
  at("undo").disabled = app.history.isEmpty;
  at("model-choice").hidden = app.sources.length < 2;
  at("model").value = app.state.model;
}

function buildTop(app) {
  for (const id of ["copy-link", "copy-python", "start-tour"]) at(id).disabled = false;
  app.data.models.forEach(({ name }, i) => at("model").add(new Option(name, i)));
  at("model").addEventListener("change", () => app.set({ model: Number(at("model").value) }));
  at("undo").addEventListener("click", () => app.undo());
  at("copy-link").addEventListener("click", () => {
    app.writeAddress();
    copy(location.href, "link");
  });
  at("copy-python").addEventListener("click", () => copy(pythonCode(app), "Python code"));
  addEventListener("keydown", (event) => {
    const writes = event.target.closest?.("textarea, input:not([type=range])");
    if (event.key === "z" && (event.ctrlKey || event.metaKey) && !writes) {
      event.preventDefault();
      app.undo();
    }
  });
}

/** To the clipboard; where the browser does not allow it, to a box to copy from. */
async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    say(`The ${what} was copied.`);
  } catch {
    prompt(`Copy the ${what}:`, text);
  }
}

let lastingNotice = null;

/** A message above the text. One that passes goes with the next change, and lets the lasting one
 * be seen again. */
function say(text, { passes = true } = {}) {
  if (!passes) lastingNotice = text;
  at("notice").textContent = text;
  at("notice").hidden = false;
  at("notice").classList.toggle("passes", passes);
}

function hideNotice() {
  if (!at("notice").classList.contains("passes")) return;
  at("notice").hidden = true;
  if (lastingNotice !== null) say(lastingNotice, { passes: false });
}

/** Tabs of one column; `field` of the state holds the id of the chosen one. */
function buildTabs(app, column, field) {
  const tabs = [...column.querySelectorAll("[role=tab]")];
  const panels = tabs.map((tab) => at(tab.getAttribute("aria-controls")));
  tabs.forEach((tab, i) => tab.addEventListener("click", () => app.set({ [field]: panels[i].id })));
  const markTabStop = rovingGroup(column.querySelector("[role=tablist]"), "[role=tab]",
    { onMove: (i) => app.set({ [field]: panels[i].id }) });
  return function drawTabs() {
    const chosen = Math.max(0, panels.findIndex((panel) => panel.id === app.state[field]));
    tabs.forEach((tab, i) => tab.setAttribute("aria-selected", i === chosen));
    panels.forEach((panel, i) => { panel.hidden = i !== chosen; });
    markTabStop();
  };
}

async function start() {
  const data = JSON.parse(at("data").textContent);
  const models = await startModels(data);
  const app = new App(data, models);
  buildTop(app);
  const drawMiddle = buildTabs(app, at("middle"), "middle");
  const drawRight = buildTabs(app, at("right"), "right");
  const drawFrame = () => [() => drawTop(app), drawMiddle, drawRight].forEach((draw) => draw());
  app.panels.push({ root: document.body, draw: drawFrame });
  app.add(textPanel, at("top"));
  app.add(diagramPanel, at("diagram"));
  app.add(headsPanel, at("all-heads"));
  app.add(numberPanel, at("one-number"));
  app.add(insidePanel, at("inside"));
  app.add(stepPanel, at("step"));
  app.add(nextPanel, at("next"));
  app.add(interventionsPanel, at("off"));
  app.add(comparePanel, at("compare"));
  app.add(tourPanel, at("tour"));
  const above = new ResizeObserver(() => { // the diagram takes the height that is left
    document.documentElement.style.setProperty("--above", `${at("diagram").offsetTop}px`);
  });
  [at("top"), at("token-bar")].forEach((element) => above.observe(element));
  app.start();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => app.draw());
  if (models.refusal) say(models.refusal, { passes: false });
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => {
  at("status").textContent = "";
  say(`The page could not start: ${error.message}`, { passes: false });
  throw error;
});
