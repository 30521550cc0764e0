// The text: a box to write in, and its tokens, shaded by how much each one surprised the model.

import { at, button, children, percent, rovingGroup } from "../dom.js";

const MOST_SURPRISE = 10; // nats, from where the shade is full: a probability of 1 in 22,000

export function textPanel(app) {
  const box = at("text"), tokens = at("tokens");
  box.readOnly = !app.live;
  box.addEventListener("input", () => app.set({ text: box.value, token: null }));
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
  for (const text of app.data.examples ?? []) choice.add(new Option(text, text));
  choice.addEventListener("change", () => {
    if (choice.value) app.set({ text: choice.value, token: null, key: null });
    choice.value = "";
  });
}

/** One button for the tokens of one character or word piece. Its shade and the thickness of its
 * lower edge are the surprise, -ln p, of all its tokens. */
function drawToken(app, element, { text, tokens }) {
  const chosen = tokens.includes(app.token);
  const surprises = tokens.map((t) => app.reading.surprise(t)).filter((x) => x !== null);
  const surprise = surprises.reduce((sum, x) => sum + x, 0);
  const known = surprises.length === tokens.length; // nothing comes before the first token
  element.textContent = text;
  element.setAttribute("aria-checked", chosen);
  element.style.setProperty("--share", known ? Math.min(1, surprise / MOST_SURPRISE).toFixed(3) : 0);
  const p = known ? `, probability ${percent(Math.exp(-surprise))}` : "";
  const numbers = tokens.length > 1 ? `tokens ${tokens[0]} to ${tokens.at(-1)}`
    : `token ${tokens[0]}`;
  element.setAttribute("aria-label", `${text}, ${numbers}${p}`);
  element.title = `${numbers}${p}`;
}

function said(app) {
  const { token, tokenIds, tokensLeftOut } = app;
  const surprise = app.reading.surprise(token);
  const left = tokensLeftOut
    ? ` The page reads the first ${tokenIds.length} tokens; ${tokensLeftOut} are left out.` : "";
  const chosen = `Token ${token} of 0 to ${tokenIds.length - 1}: ${app.label(tokenIds[token])}, id ` +
    `${tokenIds[token]}`;
  return chosen + (surprise === null ? "; the first, so nothing predicts it."
    : `; the model gave it ${percent(Math.exp(-surprise))}. The thicker a token's lower edge, the more it surprised the model.`) + left;
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
