// A tour of eight cards. Each card sets the real controls, as a reader would by hand, and says what
// to look at. It can be left at any card, and everything is as before.

import { announce, at, button, clear, make } from "../dom.js";
import { clearestHead } from "./clearest_head.js";
import { kindOfHead } from "./head_kinds.js";

const TEXT = "The old keeper lit the lamp. Then the old keeper";

const AT_THE_END = { token: null, key: null, off: [], patch: null };

/** `set`: changes of the state; `show`: the id of the part of the page that the card is about;
 * `repeats`: a text that repeats itself, which a live page reads for this card. */
const CARDS = [
  {
    title: "Text becomes tokens",
    text: "A model reads tokens: words and parts of words, each a number. Below the text box is " +
      "the text in tokens; \u2423 is a space. The thicker its lower edge, the more a token " +
      "surprised the model. Choose a token with a click or with \u2190 and \u2192: all panels " +
      "are then about that token.",
    show: "tokens",
    set: () => AT_THE_END,
  },
  {
    title: "Every token becomes a vector",
    text: "The embedding looks up a vector for the token and one for its position and adds them. " +
      "This vector is the start of the residual stream, the line in the diagram. Its shape " +
      "and its lines of code are in the panel beside it.",
    show: "diagram",
    set: () => ({ part: "embedding", middle: "inside" }),
  },
  {
    title: "Each block adds to the stream",
    text: "Attention and the MLP of a block read the stream and add a vector to it. Nothing " +
      "else changes the stream. A thicker branch adds a longer vector. The words on the line " +
      "are what the model would say if it stopped there.",
    show: "diagram",
    set: (app) => ({ part: "block", layer: Math.floor(app.config.n_layers / 2), middle: "inside" }),
  },
  {
    title: "One block, step by step",
    text: "Here the chosen token goes through one block: normalize, compare its query with " +
      "the keys of the tokens before it, mix their values, add; then the MLP, and add. Press " +
      "\u201cnext\u201d above the steps.",
    show: "step",
    set: () => ({ middle: "step", step: 0 }),
  },
  {
    title: "Attention moves information between tokens",
    text: "Each small picture is a head. A row is a token that reads, a column a token that is " +
      "read; a stronger color is a higher attention weight. Only earlier tokens can be read. " +
      "Point at a cell of the large picture: its number is computed below it.",
    show: "all-heads",
    set: () => ({ middle: "heads" }),
  },
  {
    title: "The end of the stream gives the next token",
    text: "The final norm and the output head turn the chosen token's vector into a probability " +
      "for each token of the vocabulary. Move the temperature: a low one makes the " +
      "likeliest token more likely, a high one makes all more alike.",
    show: "next",
    set: () => ({ right: "next", token: null }),
  },
  {
    title: "This head copies",
    text: "An induction head looks for an earlier place with the same token and attends to the " +
      "token that came after it. The text says \u201cold keeper\u201d twice: at the second one " +
      "this head attends to what followed the first. So the model can continue what it has seen.",
    withoutInduction: "An induction head looks for an earlier place with the same token and " +
      "attends to the token that came after it. No head of this model clearly does so; this one " +
      "comes nearest.",
    recorded: "An induction head looks for an earlier place with the same token and attends to " +
      "the token that came after it. This head does so most. Where a text repeats itself, look " +
      "at the second time.",
    show: "all-heads",
    set: (app) => ({ middle: "heads", ...clearestHead(modelShown(app)), ...AT_THE_END }),
    repeats: TEXT,
  },
  {
    title: "Switch it off, and see what it did",
    text: "The same head gives zeros now. Look at the probability of the next token before and " +
      "after: if it falls, the head mattered. Try others, or let the page rank all heads. " +
      "Undo switches it on again.",
    recorded: "Without this head the next token has another probability: \u201cRank all " +
      "heads\u201d lists it for every head. In a page whose model runs live, heads can be " +
      "switched off.",
    show: "off",
    set: (app) => ({ right: "off", ...AT_THE_END,
      off: [{ kind: "head", ...clearestHead(modelShown(app)), value: "zero" }] }),
    repeats: TEXT,
  },
];

function modelShown(app) {
  return app.data.models[app.state.model];
}

export function tourPanel(app, root) {
  let before = null; // the state before the tour; null: there is no tour

  function go(i) {
    before ??= app.state;
    const card = CARDS[i];
    const text = app.live && card.repeats ? { text: card.repeats } : {};
    app.set({ ...text, ...card.set(app) });
    drawCard(i);
    mark(at(card.show));
    announce(`Tour, card ${i + 1} of ${CARDS.length}: ${card.title}. ${words(card)}`);
  }

  function words(card) {
    if (!app.live) return card.recorded ?? card.text;
    const { layer, head } = clearestHead(modelShown(app));
    const found = kindOfHead(modelShown(app), layer, head);
    const isInduction = found?.kind === "induction" && found.clear;
    return isInduction ? card.text : card.withoutInduction ?? card.text;
  }

  function drawCard(i) {
    root.hidden = false;
    clear(root);
    make("h2", `${i + 1} of ${CARDS.length}: ${CARDS[i].title}`, root);
    make("p", words(CARDS[i]), root);
    const row = make("div", null, root, { class: "row" });
    const back = button("back", row, () => go(i - 1));
    back.disabled = i === 0;
    const last = i === CARDS.length - 1;
    const next = button(last ? "finish" : "next card", row, () => (last ? end() : go(i + 1)));
    button("leave the tour", row, leave);
    next.focus();
  }

  /** As it was before the tour. */
  function leave() {
    app.set(before);
    end();
  }

  function end() {
    before = null;
    root.hidden = true;
    mark(null);
    at("start-tour").focus();
  }

  at("start-tour").addEventListener("click", () => go(0));
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && before !== null) leave();
  });
  return { draw() {} };
}

/** Outline one element, and bring it into view. */
function mark(element) {
  for (const one of document.querySelectorAll(".toured")) one.classList.remove("toured");
  if (!element) return;
  element.classList.add("toured");
  element.scrollIntoView({ block: "nearest" });
}
