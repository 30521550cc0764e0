// Buttons that let the model write: one token, or thirty, which can be stopped.

import { announce, button, make } from "../dom.js";
import { patchesOf } from "../patches.js";
import { continuedText, writeTokens } from "./writing.js";

const AT_ONCE = 30;
const ENDINGS = {
  done: "", stopped: "",
  end: "The model drew the token that ends a text.",
  "no character": "The model drew bytes that spell no character.",
  full: "No more tokens fit.",
};

export function writingControls(app, parent) {
  const line = make("div", null, parent, { class: "row writing" });
  if (app.live) return new WritingControls(app, parent, line);
  line.textContent = "This page holds recorded numbers of one text: nothing can be added to it.";
  return { draw() {} };
}

class WritingControls {
  constructor(app, parent, line) {
    this.app = app;
    this.one = button("add one", line, () => this.write(1));
    this.many = button(`write ${AT_ONCE}`, line, () => this.write(AT_ONCE));
    this.stop = button("stop", line, () => { this.running = null; });
    this.seed = seedInput(app, line);
    this.said = make("p", null, parent, { class: "muted" });
    this.running = null; // {state, nWritten, n, isShown}: the state that was last shown
    this.ended = null; // {state, text}: how the last writing ended, and where
  }

  async write(n) {
    if (this.running || this.isFull()) return;
    const own = { state: this.app.state, nWritten: 0, n, isShown: false };
    this.running = own;
    this.draw();
    let ending = "stopped";
    try {
      const show = (text, nWritten) => this.show(own, text, nWritten);
      ending = await writeTokens(this.app, n, patchesInForce(this.app), show);
    } finally {
      this.running = null;
      this.ended = { state: this.app.state, text: ENDINGS[ending] };
      if (n > 1) announce(`${own.nWritten} tokens written. ${ENDINGS[ending]}`);
      this.draw();
    }
  }

  /** Add one token, chosen by the reader, after the chosen one. */
  add(id) {
    const { app } = this, text = continuedText(app, [id]);
    if (this.isFull()) return;
    if (text !== null) {
      app.set({ text, token: null, key: null });
      return;
    }
    const why = `${app.label(id)} is only a part of a character; a text needs whole ones.`;
    this.ended = { state: app.state, text: why };
    announce(why);
    this.draw();
  }

  /** Show the text as it is now; false once the reader has stopped it or changed anything. */
  show(own, text, nWritten) {
    const { app } = this;
    if (this.running !== own || app.state !== own.state) return false;
    own.nWritten = nWritten;
    app.set({ text, token: null, key: null }, { undo: !own.isShown });
    Object.assign(own, { state: app.state, isShown: true });
    return true;
  }

  isFull() {
    return this.app.token + 1 >= this.app.data.most_tokens;
  }

  draw() {
    const { app, running, ended } = this, isFull = this.isFull();
    // Not `disabled`: a button that is would lose the keyboard's focus.
    this.one.setAttribute("aria-disabled", isFull || running !== null);
    this.many.setAttribute("aria-disabled", isFull);
    swap(running ? this.many : this.stop, running ? this.stop : this.many);
    this.seed.value = app.state.seed;
    this.said.textContent = running ? `${running.nWritten} of ${running.n}`
      : ended?.state === app.state && ended.text ? ended.text : whatWouldHappen(app, isFull);
  }
}

function whatWouldHappen(app, isFull) {
  if (isFull) return `The page reads ${app.data.most_tokens} tokens; the text is full.`;
  if (!app.state.text) {
    return `What is written follows ${app.label(app.tokenIds[0])}, which is no part of the text ` +
      "and which the page then no longer reads.";
  }
  if (app.token === app.tokenIds.length - 1) return "";
  return "The model would write on from the chosen token: what follows it in the text is then " +
    "removed (undo brings it back).";
}

/** Show one button in the place of another, which may have the focus. */
function swap(away, here) {
  const hasFocus = document.activeElement === away;
  away.hidden = true;
  here.hidden = false;
  if (hasFocus) here.focus();
}

function patchesInForce(app) {
  const { patch } = app.state;
  return patchesOf(app.state, app.source, patch && app.readSecond(patch.text));
}

/** The same text, settings and seed give the same continuation. */
function seedInput(app, parent) {
  const label = make("label", "seed ", parent, {
    title: "the same text, settings and seed give the same continuation" });
  const input = make("input", null, label, { type: "number", min: 0, step: 1, class: "short" });
  input.addEventListener("change", () => {
    app.set({ seed: Math.max(0, Math.trunc(input.value) || 0) });
  });
  return input;
}
