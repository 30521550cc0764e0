// Activation patching: the stream of a second text, at one position after one block, takes the
// place of this text's. What changes, changes because of that one vector.

import { button, children, make, rovingGroup } from "../dom.js";

const FIRST_PATCH = { text: "", layer: 0, position: 0, from: 0 };

/** Returns a function that draws. What is chosen here comes into force by the button "patch"; after
 * that every choice does at once. */
export function secondTextPart(app, root) {
  let chosen = null; // as state.patch
  let wasInForce = false;
  const parts = buildSecondText(app, root, choose, () =>
    app.set({ patch: app.state.patch ? null : chosen }));

  function choose(changes, options) {
    const { layer } = app.state;
    const before = chosen ?? { ...FIRST_PATCH, layer, position: app.token };
    chosen = withinTexts(app, { ...before, ...changes });
    if (app.state.patch) app.set({ patch: chosen }, options);
    else draw();
  }

  function draw() {
    const { patch, layer } = app.state;
    // Until something is chosen here the patch is at the chosen token, after the chosen block.
    const first = { ...FIRST_PATCH, layer, position: app.token };
    const shown = patch ?? withinTexts(app, chosen ?? first);
    if (patch !== null && !wasInForce) parts.details.open = true;
    wasInForce = patch !== null;
    if (patch) chosen = patch;
    if (parts.details.open) drawSecondText(app, parts, shown);
  }

  parts.details.addEventListener("toggle", draw);
  return draw;
}

/** Positions beyond the end of a text that has become shorter are its last one. */
function withinTexts(app, patch) {
  const last = (count) => Math.max(0, count - 1);
  return {
    ...patch,
    position: Math.min(patch.position, last(app.tokenIds.length)),
    from: Math.min(patch.from, last(secondIds(app, patch).length)),
  };
}

function secondIds(app, { text }) {
  return app.tokenizer.encode(text).slice(0, app.data.most_tokens);
}

function buildSecondText(app, root, choose, patch) {
  const details = make("details", null, root, { class: "second-text" });
  make("summary", "Patch a position from a second text", details);
  make("p", "The model reads a second text too. At one position, after one block, its stream " +
    "takes the place of this text's: what changes comes from that one vector.", details,
  { class: "muted" });
  const textLabel = make("label", "second text ", details);
  const text = make("input", null, textLabel, { type: "text", spellcheck: "false" });
  text.addEventListener("input", () => choose({ text: text.value }, { undo: false }));
  const fromLabel = make("p", "take this token of it:", details);
  const tokens = make("div", null, details,
    { role: "radiogroup", "aria-label": "token of the second text", class: "row tight" });
  const markTabStop = rovingGroup(tokens, ".token", { onMove: (from) => choose({ from }) });
  const row = make("div", null, details, { class: "row" });
  const layer = numberChoice("after block", row, (value) => choose({ layer: value }));
  const position = numberChoice("in place of", row, (value) => choose({ position: value }));
  const press = button("patch", row, patch);
  return { details, text, fromLabel, tokens, markTabStop, layer, position, press, choose };
}

function numberChoice(name, parent, choose) {
  const select = make("select", null, make("label", name + " ", parent));
  select.addEventListener("change", () => choose(Number(select.value)));
  return select;
}

function drawSecondText(app, parts, chosen) {
  if (parts.text.value !== chosen.text) parts.text.value = chosen.text;
  const ids = secondIds(app, chosen);
  parts.fromLabel.hidden = !ids.length;
  children(parts.tokens, ids.length, (i) => button("", null, () => parts.choose({ from: i }),
    { role: "radio", class: "token" })).forEach((element, i) => {
    element.textContent = app.label(ids[i]);
    element.setAttribute("aria-checked", i === chosen.from);
    element.setAttribute("aria-label", `${app.label(ids[i])}, token ${i}`);
  });
  parts.markTabStop();
  fillOptions(parts.layer, Array.from({ length: app.config.n_layers }, (_, i) => i), chosen.layer);
  fillOptions(parts.position, app.tokenLabels.map((label, i) => `${i} ${label}`), chosen.position);
  parts.press.textContent = app.state.patch ? "remove the patch" : "patch";
  parts.press.disabled = !app.state.patch && !ids.length;
}

/** Options are changed only where they differ, so that an open list stays open. */
function fillOptions(select, texts, chosen) {
  children(select, texts.length, (i) => new Option("", i)).forEach((option, i) => {
    if (option.textContent !== String(texts[i])) option.textContent = texts[i];
  });
  select.value = chosen;
}
