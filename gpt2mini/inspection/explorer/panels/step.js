// The chosen token goes through one block in eight steps, beside the lines of source code that
// compute them.

import { tokenName } from "./cell.js";
import { announce, button, children, clear, make, rovingGroup } from "../dom.js";
import { lensSaid, makeBlockChoice, partOf } from "./inside.js";
import { drawSource, makeSource } from "./source_code.js";
import { STEPS } from "./steps.js";

const SECONDS = 3; // for each step while it plays

export function stepPanel(app, root) {
  const choices = make("div", null, root, { class: "row" });
  const block = makeBlockChoice(app, choices);
  const head = makeHeadChoice(app, choices);
  const player = makePlayer(app, root, choices);
  const list = makeStepList(app, root, player);
  const title = make("h3", null, root);
  const text = make("p", null, root);
  const columns = make("div", null, root, { class: "step-columns" });
  const vectors = make("div", null, columns, { class: "vectors" });
  const sources = make("div", null, columns, { class: "sources" });
  const [outer, inner] = [makeSource(sources), makeSource(sources)];

  function draw() {
    const step = STEPS[shownStep(app)];
    block.draw();
    head.draw();
    player.draw();
    list.draw();
    title.textContent = `${shownStep(app) + 1} of ${STEPS.length}: ${step.title}`;
    const now = situation(app);
    text.textContent = step.say(now);
    clear(vectors);
    step.show(now, vectors);
    drawStepSource(app, outer, "block", step.lines.block);
    const part = step.lines.attention ? "attention" : "mlp";
    inner.hidden = !step.lines[part];
    if (!inner.hidden) drawStepSource(app, inner, part, step.lines[part]);
  }

  return { draw };
}

/** Everything that the steps show: numbers of the chosen token in the chosen block and head.
 * without: the same vectors without the interventions. */
function situation(app) {
  const { reading, before, token, config, state: { layer, head } } = app;
  return {
    app, reading, token, config, layer, head, name: tokenName(app, token),
    vectors: reading.step(layer, token),
    ofHead: reading.head(layer, head, token),
    without: before === reading ? null
      : { vectors: before.step(layer, token), ofHead: before.head(layer, head, token) },
    lensAtStart: lensSaid(app, layer),
    lensAtEnd: lensSaid(app, layer + 1),
  };
}

function shownStep(app) {
  return Math.min(Math.trunc(app.state.step), STEPS.length - 1);
}

// ---- controls

function makeHeadChoice(app, parent) {
  const choice = make("select", null, make("label", "head ", parent));
  choice.addEventListener("change", () => app.set({ head: Number(choice.value), key: null }));
  return {
    draw() {
      const { layer, head } = app.state;
      children(choice, app.config.n_heads, (i) => new Option("", i)).forEach((option, i) => {
        option.textContent = `${layer}.${i}`;
      });
      choice.value = head;
    },
  };
}

/** Buttons back, next and play; the arrow keys do the same anywhere in the panel. */
function makePlayer(app, root, parent) {
  let timer = null;
  const buttons = make("span", null, parent, { class: "row" });
  const go = (step) => {
    if (step < 0 || step >= STEPS.length) return stop();
    app.set({ step }, { undo: false });
    announce(`Step ${step + 1} of ${STEPS.length}: ${STEPS[step].title}. ` +
      STEPS[step].say(situation(app)));
  };
  const move = (by) => {
    stop();
    go(shownStep(app) + by);
  };
  const back = button("back", buttons, () => move(-1));
  const next = button("next", buttons, () => move(1));
  const play = button("play", buttons, () => (timer === null ? start() : stop()));

  function start() {
    timer = setInterval(() => (root.checkVisibility() ? go(shownStep(app) + 1) : stop()),
      SECONDS * 1000);
    go(shownStep(app) === STEPS.length - 1 ? 0 : shownStep(app) + 1);
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    draw();
  }

  function draw() {
    back.setAttribute("aria-disabled", shownStep(app) === 0); // really disabled, a button would
    next.setAttribute("aria-disabled", shownStep(app) === STEPS.length - 1); // lose the focus
    play.textContent = timer === null ? "play" : "pause";
  }

  root.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.defaultPrevented || event.target.closest("select, pre")) return;
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    move(by);
  });
  return { draw, stop, go };
}

/** The eight steps as numbered buttons, one tab stop. */
function makeStepList(app, root, player) {
  const list = make("div", null, root,
    { class: "step-list", role: "group", "aria-label": "steps" });
  const choose = (i) => {
    player.stop();
    player.go(i);
  };
  STEPS.forEach(({ short }, i) => button(`${i + 1} ${short}`, list, () => choose(i)));
  const markTabStop = rovingGroup(list, "button", { onMove: choose });
  return {
    draw() {
      const shown = shownStep(app);
      [...list.children].forEach((one, i) => one.setAttribute("aria-pressed", i === shown));
      markTabStop();
    },
  };
}

// ---- source code

/** The code of a part with the lines marked that begin with one of these texts ("key,\n" is a whole
 * line). A part of your own may have none of them: then nothing is marked. */
function drawStepSource(app, element, key, beginnings) {
  const part = partOf(app, key);
  const lines = part.code.split("\n");
  const marked = lines.flatMap((line, i) =>
    (beginnings.some((beginning) => `${line.trim()}\n`.startsWith(beginning)) ? [i] : []));
  drawSource(element, part, marked);
}
