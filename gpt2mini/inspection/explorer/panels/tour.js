// A tour of eight cards. Each card sets the real controls, as a reader would by hand, and says what
// to look at. It can be left at any card; undo takes its settings back.

import { announce, at, button, clear, make } from "../dom.js";

const TEXT = "The old keeper lit the lamp. Then the old keeper";

/** `set`: changes of the state; `show`: the id of the part of the page that the card is about. */
const CARDS = [
  {
    title: "Text becomes tokens",
    text: "A model reads tokens: words and parts of words, each a number. Below the text box is " +
      "the text in tokens; \u2423 is a space. The thicker its lower edge, the more a token surprised the model. Choose a " +
      "token with a click or with \u2190 and \u2192: all panels are then about that token.",
    show: "tokens",
    set: () => ({ token: null, off: [], patch: null }),
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
      "the keys of the tokens before it, mix their values, add; then the MLP, and add. Press next.",
    show: "step",
    set: () => ({ middle: "step", step: 0 }),
  },
  {
    title: "Attention moves information between tokens",
    text: "Each small picture is a head. A row is a token that reads, a column a token that is " +
      "read; a stronger color is a higher attention weight. Only earlier tokens can be read. Point " +
      "at a cell of the large picture: its number is computed below it.",
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
      "token that came after it. The text says \u201cold keeper\u201d twice: at the second one this head " +
      "attends to what followed the first. So the model can continue what it has seen.",
    show: "all-heads",
    set: (app) => ({ middle: "heads", ...app.clearestHead, token: null, key: null }),
    text0: TEXT,
  },
  {
    title: "Switch it off, and see what it did",
    text: "The same head gives zeros now. Every panel shows before and after: look at the " +
      "probability of the next token. If it falls, the head mattered. Try others, or " +
      "let the page rank all heads. Undo switches it on again.",
    recorded: "Without this head the next token has another probability: \u201cRank all heads\u201d " +
      "lists it for every head. In a page whose model runs live, heads can be switched off.",
    show: "off",
    set: (app) => ({ right: "off", off: [{ kind: "head", ...app.clearestHead, value: "zero" }] }),
    text0: TEXT,
  },
];

export function tourPanel(app, root) {
  let shown = null; // number of the shown card; null: no tour

  function go(i) {
    shown = i;
    const card = CARDS[i];
    const text = app.live && card.text0 ? { text: card.text0 } : {};
    app.set({ ...text, ...card.set(app) });
    drawCard(i);
    mark(at(card.show));
    announce(`Tour, card ${i + 1} of ${CARDS.length}: ${card.title}. ${words(card)}`);
  }

  function words(card) {
    return app.live ? card.text : card.recorded ?? card.text;
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
    const next = button(last ? "finish" : "next", row, () => (last ? leave() : go(i + 1)));
    button("leave the tour", row, leave);
    next.focus();
  }

  function leave() {
    shown = null;
    root.hidden = true;
    mark(null);
    at("start-tour").focus();
  }

  at("start-tour").addEventListener("click", () => go(0));
  root.addEventListener("keydown", (event) => {
    if (event.key === "Escape") leave();
  });
  return { draw() { if (shown === null) root.hidden = true; } };
}

/** Outline one element, and bring it into view. */
function mark(element) {
  for (const one of document.querySelectorAll(".toured")) one.classList.remove("toured");
  if (!element) return;
  element.classList.add("toured");
  element.scrollIntoView({ block: "nearest" });
}
