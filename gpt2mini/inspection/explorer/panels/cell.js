// The one attention weight that the page shows: how much a token, the query, reads from another,
// the key. And the words for it.

import { percent } from "../dom.js";

/** {query, key}: under the pointer or the arrow keys, else the chosen one. */
export function shownCell(app) {
  if (app.hover) return app.hover;
  const query = app.token, { key, layer, head } = app.state;
  const usable = key !== null && key <= query;
  return { query, key: usable ? key : strongestKey(app.reading, layer, head, query) };
}

function strongestKey(reading, layer, head, query) {
  let best = 0;
  for (let key = 1; key <= query; key++) {
    const weight = reading.attention(layer, head, query, key);
    if (weight > reading.attention(layer, head, query, best)) best = key;
  }
  return best;
}

/** "␣keeper (9)": a token and its index in the text. */
export function tokenName(app, t) {
  return `${tokenText(app, t)} (${t})`;
}

/** The visible text of a token; of a part of a character, the character and which part. */
export function tokenText(app, t) {
  const { text, tokens } = app.groups.find((group) => group.tokens.at(-1) >= t);
  return tokens.length === 1 ? text : `${text} ${t - tokens[0] + 1}/${tokens.length}`;
}

/** "␣keeper (9) attends to ␣keeper (3) with 41.2 %", and what it was without interventions. */
export function cellInWords(app, { query, key }) {
  const { layer, head } = app.state;
  const weight = (reading) => percent(reading.attention(layer, head, query, key));
  const names = `${tokenName(app, query)} attends to ${tokenName(app, key)}`;
  return `${names} with ${nowAndBefore(app, weight, "; ")}`;
}

/** What `say` says of the reading and, while interventions are in force, of that without them:
 * "0.53, before: 0.71". */
export function nowAndBefore(app, say, separator = ", ") {
  const now = say(app.reading);
  return app.before === app.reading ? now : `${now}${separator}before: ${say(app.before)}`;
}

/** Whether a head is switched off, alone or with its whole attention layer or block. */
export function isHeadOff(state, layer, head) {
  return state.off.some((part) => part.layer === layer &&
    (part.kind === "head" ? part.head === head : part.kind !== "mlp"));
}

/** ", switched off" if the attention ("attn"), the MLP ("mlp") or all ("layer") of a block is. */
export function offSaid({ off }, layer, kind) {
  const isOff = off.some((part) => part.layer === layer && [kind, "layer"].includes(part.kind));
  return isOff ? ", switched off" : "";
}
