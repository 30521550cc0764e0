// The text: a box to write in, and its tokens, shaded by how much each one surprised the model.

import { at, button, children, percent, rovingGroup } from "../dom.js";
import { groupSurprise } from "./strip.js";

const MOST_SURPRISE = 10; // nats, from where the shade is full: a probability of 1 in 22,000

export function textPanel(app) {
  const box = at("text"), tokens = at("tokens");
  box.readOnly = !app.live;
  box.addEventListener("input", () =>
    app.set({ text: box.value, token: null, key: null }, { typing: true }));
  buildExamples(app);
  const choose = (i) => app.set({ token: app.groups[i].tokens.at(-1), key: null });
  const markTabStop = rovingGroup(tokens, ".token", { onMove: choose });

  let scrolledTo = null; // the chosen token's text and place, when it was last brought into view

  function draw() {
    if (box.value !== app.state.text) box.value = app.state.text;
    const buttons = children(tokens, app.groups.length, (i) =>
      button("", null, () => choose(i), { role: "radio", class: "token" }));
    app.groups.forEach((group, i) => drawToken(app, buttons[i], group));
    markTabStop();
    at("token-said").textContent = said(app);
    const place = `${app.token} ${app.state.text}`;
    // When all panels are drawn: places on the page are then computed once.
    if (place !== scrolledTo) requestAnimationFrame(() => scrollToChosen(tokens));
    scrolledTo = place;
  }

  return { draw };
}

function buildExamples(app) {
  const choice = at("examples");
  at("examples-choice").hidden = !app.live;
  choice.disabled = false;
  for (const text of app.data.examples ?? []) choice.add(new Option(text, text));
  choice.addEventListener("change", () => {
    if (choice.value) app.set({ text: choice.value, token: null, key: null });
    choice.value = "";
  });
}

/** One button for the tokens of one character or word piece. Its shade and the thickness of its
 * lower edge are the surprise, -ln p, of all its tokens. */
function drawToken(app, element, { text, tokens }) {
  const surprise = groupSurprise(app.reading, { tokens });
  const share = surprise === null ? 0 : Math.min(1, surprise / MOST_SURPRISE);
  element.textContent = text;
  element.setAttribute("aria-checked", tokens.includes(app.token));
  element.style.setProperty("--share", share.toFixed(3));
  const p = surprise === null ? "" : `, probability ${percent(Math.exp(-surprise))}`;
  const numbers = tokens.length > 1 ? `tokens ${tokens[0]} to ${tokens.at(-1)}`
    : `token ${tokens[0]}`;
  element.setAttribute("aria-label", `${text}, ${numbers}${p}`);
  element.title = `${numbers}${p}`;
}

function said(app) {
  const { token, tokenIds, tokensLeftOut } = app, last = tokenIds.length - 1;
  if (!app.state.text) {
    return `The text is empty: the page reads ${app.label(tokenIds[0])}, after which texts begin.`;
  }
  const left = tokensLeftOut
    ? ` The page reads the first ${last + 1} tokens; ${tokensLeftOut} are left out.` : "";
  return `Token ${token} (counted from 0, the last is ${last}): ${app.label(tokenIds[token])}, ` +
    `id ${tokenIds[token]}; ${surpriseSaid(app)}${left}`;
}

function surpriseSaid({ token, reading, before }) {
  if (token === 0) return "the first, so nothing predicts it.";
  const p = (one) => percent(Math.exp(-one.surprise(token)));
  const was = reading === before ? "" : `, ${p(before)} before`;
  return `the model gave it ${p(reading)}${was}. The thicker a token's lower edge, the more it ` +
    "surprised the model (surprise: \u2212ln of the probability).";
}

/** Scrolls the group alone, not the page. */
function scrollToChosen(group) {
  const chosen = group.querySelector("[aria-checked=true]");
  if (!chosen) return;
  const [outer, inner] = [group.getBoundingClientRect(), chosen.getBoundingClientRect()];
  if (inner.left < outer.left || inner.right > outer.right) {
    group.scrollLeft += inner.left - outer.left - outer.width / 3;
  }
  if (inner.top < outer.top || inner.bottom > outer.bottom) {
    group.scrollTop += inner.top - outer.top - outer.height / 3;
  }
}
