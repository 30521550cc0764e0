// Switching off: replace parts of the model by zero or by their mean, or one position by that of a
// second text, and see what changes. What is in force is part of the state, so all panels show it.

import { beforeAfterPart } from "./before_after.js";
import { button, children, make } from "../dom.js";
import { isSamePart, partLabel, patchInForce, withPartOff, withPartOn } from "../patches.js";
import { rankingPart } from "./rank_heads.js";
import { secondTextPart } from "./second_text.js";

export function interventionsPanel(app, root) {
  make("h2", "Switch parts off", root);
  const parts = app.live
    ? [switchPart(app, root), inForcePart(app, root), beforeAfterPart(app, root),
      rankingPart(app, root), secondTextPart(app, root)]
    : [recordedPart(root), rankingPart(app, root)];
  return { draw: () => parts.forEach((drawPart) => drawPart()) };
}

function recordedPart(root) {
  make("p", "This page shows recorded numbers: only in a live page can parts be switched off. " +
    "The effect of each head was recorded.", root, { class: "muted" });
  return () => {};
}

// ---- what to switch off

const PART_KINDS = [["head", "head"], ["attn", "attention"], ["mlp", "MLP"],
  ["layer", "whole block"]];
const PART_VALUES = [["zero", "by zero"], ["mean", "by its mean"]];

function switchPart(app, root) {
  const form = make("form", null, root, { class: "row switch-off" });
  const kind = labeledSelect("part", form, PART_KINDS);
  const layer = labeledSelect("block", form, numberOptions(app.data.models[0].config.n_layers));
  const head = labeledSelect("head", form, numberOptions(app.data.models[0].config.n_heads));
  const value = labeledSelect("replaced", form, PART_VALUES);
  const press = make("button", "switch off", form, { type: "submit" });
  make("p", "The part runs, but its output is replaced at every position: by zero, or by its " +
    "mean over all positions of a bundled text, which keeps what it adds to any text. A whole " +
    "block is its attention and its MLP: by zero, the stream passes unchanged.", root,
  { class: "muted explanation" });
  const chosen = () => ({
    kind: kind.value,
    layer: Number(layer.value),
    ...(kind.value === "head" ? { head: Number(head.value) } : {}),
    value: value.value,
  });
  const isOff = () => app.state.off.some((part) =>
    isSamePart(part, chosen()) && part.value === value.value);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const change = isOff() ? withPartOn : withPartOff;
    app.set({ off: change(app.state.off, chosen()) });
  });
  const showButton = () => {
    head.parentElement.hidden = kind.value !== "head";
    press.textContent = isOff() ? "switch on" : "switch off";
  };
  form.addEventListener("change", showButton);
  let followed = null; // the controls follow the head chosen elsewhere in the page
  return function draw() {
    const place = `${app.state.layer}.${app.state.head}`;
    if (place !== followed) [layer.value, head.value] = place.split(".");
    followed = place;
    showButton();
  };
}

function labeledSelect(name, parent, options) {
  const label = make("label", name + " ", parent);
  const select = make("select", null, label);
  for (const [value, text] of options) select.add(new Option(text, value));
  return select;
}

function numberOptions(count) {
  return Array.from({ length: count }, (_, i) => [i, i]);
}

// ---- what is in force

function inForcePart(app, root) {
  const said = make("p", null, root);
  const row = make("div", null, root, { class: "row" });
  const list = make("ul", null, row, { class: "row in-force" });
  const focusOn = (element) => (element ?? root.querySelector("select")).focus();
  button("all on again", row, () => {
    app.set({ off: [], patch: null });
    focusOn(null);
  });
  return function draw() {
    const entries = entriesInForce(app);
    said.textContent = entries.length ? "In force:" : "Every part is on.";
    row.hidden = !entries.length;
    children(list, entries.length, () => newEntryInForce(list, focusOn)).forEach((item, i) => {
      const [text, remove] = item.children;
      text.textContent = entries[i].text;
      remove.setAttribute("aria-label", `remove: ${entries[i].text}`);
      remove.act = entries[i].remove;
    });
  };
}

function entriesInForce(app) {
  const { off, patch } = app.state;
  const entries = off.map((part) => ({
    text: `${partLabel(part)} ${part.value === "mean" ? "by its mean" : "off"}`,
    remove: () => app.set({ off: withPartOn(app.state.off, part) }),
  }));
  if (patch) entries.push({ text: patchLabel(app), remove: () => app.set({ patch: null }) });
  return entries;
}

function patchLabel(app) {
  const { text, layer, position, from } = app.state.patch;
  if (!text) return "a patch from an empty second text";
  if (!patchInForce(app)) return "a patch beyond the end of a text";
  const second = app.label(app.tokenizer.encode(text)[from]);
  return `${app.tokenLabels[position]} (${position}) after block ${layer} from ${second} ` +
    `(${from}) of the second text`;
}

function newEntryInForce(list, focusOn) {
  const item = make("li", null, null, { class: "chip" });
  make("span", null, item);
  const remove = button("\u00d7", item, () => {
    remove.act();
    focusOn(list.querySelector("button")); // the pressed one may be gone
  });
  return item;
}
