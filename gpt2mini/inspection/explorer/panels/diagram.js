// The architecture from top to bottom, with the numbers of the chosen token. The residual stream is
// one line. Attention and the MLP of each block are branches: a thin arrow reads the stream, a
// thick one adds to it. Beside the line is what the model would say after each block (the logit
// lens).

import { tokenText } from "./cell.js";
import { at, button, children, make, number, percent, rovingGroup, svg } from "../dom.js";
import { patchInForce } from "../patches.js";

// A block is drawn in a box of 57 x 40 units; attention in its upper half, the MLP in the lower.
const DRAWING_WIDTH = 57, DRAWING_HEIGHT = 40, LINE_AT = 40; // LINE_AT: x of the residual stream
const MOST_LINE = 18, MOST_BRANCH = 9, LEAST = 1.5; // thickness of the longest and shortest vectors
const NOTE = "\u2193 The line is the residual stream. Attention and the MLP read it and add a " +
  "vector: the number is its length, thicker is longer, up to a limit. On the right: what the " +
  "model would say if it stopped there.";
const BRANCHES = [
  { part: "attention", name: "attention", vector: "attn_out", reads: 4.5, adds: 13.5 },
  { part: "mlp", name: "MLP", vector: "mlp_out", reads: 24.5, adds: 33.5 },
];

export function diagramPanel(app, root) {
  const title = make("span", null, root.querySelector("h2"), { class: "muted" });
  make("p", NOTE, root, { class: "diagram-note muted" });
  const flow = make("div", null, root, {
    class: "flow", role: "group", "aria-label": "parts of the model, first to last" });
  const embedding = makeOnLine(app, flow, "embedding");
  const blocks = make("div", null, flow);
  const finalNorm = makeOnLine(app, flow, "final_norm");
  const outHead = makeOnLine(app, flow, "out_head");
  const markTabStop = rovingGroup(flow, "button");

  function draw() {
    title.textContent = `, for token ${app.token}, ${tokenText(app, app.token)}`;
    flow.style.setProperty("--blocks", app.config.n_layers);
    const scale = thicknesses(app);
    drawEmbedding(app, embedding, scale);
    children(blocks, app.config.n_layers, (layer) => makeBlock(app, layer))
      .forEach((element, layer) => drawBlock(app, element, layer, scale));
    drawOnLine(app, finalNorm, "final_norm", "final norm");
    drawOnLine(app, outHead, "out_head", "output head: logits");
    drawLensLabel(app, outHead.querySelector(".lens"), app.config.n_layers);
    markTabStop();
  }

  return { draw };
}

/** A new text costs the browser time even if it is the same as before. */
function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// ---- thickness

/** Thickness of vectors of the chosen token by their length. A branch more than four times as
 * long as the middle one of all has full thickness, so that it does not make all others thin. */
function thicknesses({ reading, config, token }) {
  const layers = [...Array(config.n_layers).keys()];
  const added = BRANCHES.flatMap(({ vector }) =>
    layers.map((layer) => reading.norm(vector, layer, token))).sort((a, b) => a - b);
  const middle = added[added.length >> 1];
  const longest = Math.min(added.at(-1), 4 * middle || Infinity);
  const stream = Math.max(...layers.map((layer) => reading.norm("stream", layer, token)));
  const share = (length, most) => Math.min(1, length / most || 0);
  return {
    branch: (length) => Math.max(LEAST, MOST_BRANCH * share(length, longest)),
    line: (length) => Math.max(LEAST, MOST_LINE * share(length, stream)),
  };
}

// ---- before and after the blocks

/** The embedding, the final norm or the output head: it stands on the line itself. */
function makeOnLine(app, parent, part) {
  const element = make("div", null, parent, { class: `stage ${part}` });
  button("", element, () => openPart(app, part));
  if (part === "embedding") makeLensLabel(app, element, () => 0);
  if (part === "out_head") makeLensLabel(app, element, () => app.config.n_layers);
  return element;
}

function drawEmbedding(app, element, scale) {
  const length = app.reading.norm("embedding", 0, app.token);
  drawOnLine(app, element, "embedding", "embedding + position", length);
  element.style.setProperty("--line-width", scale.line(length) + "px");
  drawLensLabel(app, element.querySelector(".lens"), 0);
}

function drawOnLine(app, element, part, name, length = null) {
  const control = element.querySelector("button");
  write(control, length === null ? name : `${name} ${number(length)}`);
  const says = length === null ? name : `${name}: a vector of length ${number(length)}`;
  control.setAttribute("aria-label", says);
  control.setAttribute("aria-pressed", app.state.part === part);
}

/** Show a part in the panel "A part and its code". */
function openPart(app, part, layer = app.state.layer) {
  app.set({ part, layer, middle: "inside" });
  const { top } = at("middle").getBoundingClientRect();
  const isBelow = top > 0.7 * innerHeight; // on a narrow screen
  if (isBelow) scrollBy({ top: top - at("top").offsetHeight - 8 });
}

// ---- a block

function makeBlock(app, layer) {
  const element = make("div", null, null, {
    class: "stage block", role: "group", "aria-label": `block ${layer}` });
  button("", element, () => openPart(app, "block", layer), { class: "of-block" });
  for (const { part, name } of BRANCHES) {
    const control = button("", element, () => openPart(app, part, layer), { class: `of-${part}` });
    make("span", name, control);
    make("span", null, control, { class: "length" });
  }
  makeDrawing(element);
  if (layer < app.config.n_layers - 1) makeLensLabel(app, element, () => layer + 1);
  return element;
}

function makeDrawing(parent) {
  const viewBox = `0 0 ${DRAWING_WIDTH} ${DRAWING_HEIGHT}`;
  const drawing = svg("svg", null, parent,
    { viewBox, preserveAspectRatio: "none", "aria-hidden": true });
  for (const { reads } of BRANCHES) {
    svg("path", null, drawing, { class: "reads", d: `M${LINE_AT},${reads} H2 m4,-3 l-4,3 l4,3` });
  }
  svg("path", null, drawing, { class: "stream-line" });
  for (const { part } of BRANCHES) svg("path", null, drawing, { class: `adds ${part}` });
}

function drawBlock(app, element, layer, scale) {
  const { reading, token } = app;
  const length = (vector, l) => reading.norm(vector, l, token);
  const before = layer ? length("stream", layer - 1) : length("embedding", 0);
  const widths = [before, length("middle", layer), length("stream", layer)].map(scale.line);
  element.querySelector(".stream-line").setAttribute("d", streamLine(widths));
  const control = element.querySelector(".of-block");
  const patch = patchInForce(app);
  const isPatched = patch?.layer === layer && patch.position === token;
  write(control, `block ${layer}` + (isPatched ? " patched" : ""));
  control.classList.toggle("changed", isPatched);
  control.setAttribute("aria-pressed", isOpenPart(app, "block", layer));
  BRANCHES.forEach((branch, i) => drawBranch(app, element, layer, branch, widths[i], scale));
  const lens = element.querySelector(".lens");
  if (lens) drawLensLabel(app, lens, layer + 1);
}

/** The outline of the line: it gets a new width where a branch adds to it. */
function streamLine(widths) {
  const ends = [BRANCHES[0].adds, BRANCHES[1].adds, DRAWING_HEIGHT];
  let down = "", up = "", start = 0;
  widths.forEach((width, i) => {
    const [left, right] = [LINE_AT - width / 2, LINE_AT + width / 2];
    down += `L${left},${start} ${left},${ends[i]}`;
    up = `L${right},${ends[i]} ${right},${start}` + up;
    start = ends[i];
  });
  return "M" + down.slice(1) + up + "Z";
}

function drawBranch(app, element, layer, { part, name, vector, adds }, lineWidth, scale) {
  const now = app.reading.norm(vector, layer, app.token);
  const before = app.before.norm(vector, layer, app.token);
  const { isOff, short, long } = switchedOff(app.state.off, layer, part);
  const control = element.querySelector(`.of-${part}`);
  const lengthShown = control.lastElementChild;
  write(lengthShown, short || number(now));
  lengthShown.classList.toggle("changed", short !== "" || now !== before);
  control.classList.toggle("is-off", isOff);
  control.setAttribute("aria-pressed", isOpenPart(app, part, layer));
  const was = now === before ? "" : `, ${number(before)} without your changes`;
  const says = `adds a vector of length ${number(now)}${was}${long}`;
  control.setAttribute("aria-label", `block ${layer}, ${name}: ${says}`);
  control.title = long && `${name} of block ${layer} ${says}`;
  const arrow = element.querySelector(`.adds.${part}`);
  arrow.setAttribute("d", arrowPath(adds, scale.branch(now), LINE_AT - lineWidth / 2));
  arrow.classList.toggle("is-off", isOff);
}

function isOpenPart({ state }, part, layer) {
  return state.part === part && state.layer === layer;
}

/** An arrow of this thickness from the left edge at height y, its tip at x = end. */
function arrowPath(y, thickness, end) {
  const [half, wing, neck] = [thickness / 2, thickness / 2 + 2.2, end - 6];
  return `M1,${y - half} L${neck},${y - half} ${neck},${y - wing} ${end},${y} ` +
    `${neck},${y + wing} ${neck},${y + half} 1,${y + half}Z`;
}

/** What is switched off of attention or the MLP of a block: whether all of it, in few words for
 * the diagram, and in a sentence. */
function switchedOff(off, layer, part) {
  const kind = part === "mlp" ? "mlp" : "attn";
  const here = off.filter((one) => one.layer === layer);
  const whole = here.findLast((one) => one.kind === kind || one.kind === "layer");
  if (whole) {
    const mean = whole.value === "mean";
    return { isOff: true, short: mean ? "mean" : "off",
             long: mean ? "; switched off: its mean instead" : "; switched off: zeros instead" };
  }
  const heads = part === "mlp" ? [] : here.filter((one) => one.kind === "head");
  if (!heads.length) return { isOff: false, short: "", long: "" };
  const names = heads.map(({ head }) => `${layer}.${head}`).join(", ");
  return { isOff: false, short: `${heads.length} off`, long: `; head ${names} switched off` };
}

// ---- the lens

function makeLensLabel(app, parent, layer) {
  const element = make("span", null, parent, { class: "lens", role: "img" });
  element.addEventListener("pointerenter", () => {
    const likeliest = app.reading.lens(layer(), app.token, 5).map((one) => tokenSaid(app, one));
    element.title = `${lensPlace(app, layer())}: ${likeliest.join(", ")}`;
  });
  make("span", null, element);
  make("span", null, element);
}

/** What the model would say at this place of the line; before and after the interventions. */
function drawLensLabel(app, element, layer) {
  const [now, before] = [app.reading, app.before].map((one) => one.lens(layer, app.token)[0]);
  const changed = now.id !== before.id || Math.abs(now.p - before.p) > 0.0005;
  const [said, saidBefore] = [tokenSaid(app, now), changed ? tokenSaid(app, before) : ""];
  const [was, is] = element.children;
  was.hidden = !changed;
  write(was, saidBefore);
  write(is, changed ? `\u2192 ${said}` : said);
  is.style.setProperty("--share", (100 * now.p).toFixed(1) + "%");
  element.classList.toggle("changed", changed);
  element.setAttribute("aria-label", `${lensPlace(app, layer)} the model would say ${said}` +
    (changed ? `; before your changes ${saidBefore}` : ""));
}

function tokenSaid(app, { id, p }) {
  return `${app.label(id)} ${percent(p)}`;
}

function lensPlace(app, layer) {
  if (layer === 0) return "after the embedding";
  return layer === app.config.n_layers ? "at the end" : `after block ${layer - 1}`;
}
