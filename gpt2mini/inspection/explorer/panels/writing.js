// The model continues the text: tokens are drawn, and what they spell is added.

/** How tokens are chosen. */
export function samplingOf({ temperature, topK, topP }) {
  return { temperature, topK, topP };
}

/** The seed of the random numbers with which a text of so many tokens is continued: the same state
 * gives the same text, and adding tokens one by one does not repeat one random number. */
function seedOf(state, nTokens) {
  return (state.seed * 1_000_003 + nTokens) >>> 0;
}

/** The text up to the chosen token, continued by more tokens; null while the tokens end inside a
 * character, which a text cannot hold. What comes after the chosen token is left out. */
export function continuedText(app, newIds) {
  const isAll = app.token === app.tokenIds.length - 1 && !app.tokensLeftOut;
  const text = isAll ? app.state.text + app.tokenizer.decode(newIds)
    : app.tokenizer.decode([...app.tokenIds.slice(0, app.token + 1), ...newIds]);
  const nBroken = (some) => some.split("\ufffd").length;
  return nBroken(text) > nBroken(app.state.text) ? null : text;
}

/** Let the model write n tokens after the chosen one. show(text, nWritten) is called for each whole
 * text, and returns false to stop. Resolves to why it ended: "done", "stopped", "full" (no more
 * tokens fit), "end" (the model ended the text) or "no character" (bytes that spell none). */
export async function writeTokens(app, n, patches, show) {
  const ids = app.tokenIds.slice(0, app.token + 1), written = [];
  const { eosId } = app.tokenizer, textOf = continuation(app);
  const options = { ...samplingOf(app.state), seed: seedOf(app.state, ids.length), patches };
  let isWhole = true;
  for await (const id of app.source.write(ids, n + 3, options)) { // 3: the rest of a character
    if (id === eosId) return "end";
    written.push(id);
    const text = textOf(written);
    isWhole = text !== null;
    if (isWhole && !show(text, written.length)) return "stopped";
    if (isWhole && written.length >= n) return "done";
  }
  return isWhole ? "full" : "no character";
}

/** `continuedText` of the text as it is now, though the page goes on to show longer ones. */
function continuation({ token, tokenIds, tokensLeftOut, tokenizer, state }) {
  return (newIds) => continuedText({ token, tokenIds, tokensLeftOut, tokenizer, state }, newIds);
}
