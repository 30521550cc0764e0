// The tokens that may come next: how likely each is drawn, and where in the model they come up.

import { AS_THE_MODEL } from "../model/sampling.js";
import { samplingOf } from "./writing.js";

export const RANKED = 200; // a recorded page knows so many of the most likely tokens
const ROWS_SHOWN = 15;
const LOOKED_AT = 5; // the most likely tokens after each layer

export function isUntouched(state) {
  const sampling = samplingOf(state);
  return Object.entries(AS_THE_MODEL).every(([name, value]) => sampling[name] === value);
}

/** [{id, rank, p, isRemoved, plain, before, isActual}]: the most likely tokens, and the one that
 * follows in the text or, at its end, was the most likely one before the interventions. p: after
 * temperature, top-k and top-p; plain: the model's own probability; before: {p, isRemoved}
 * without interventions, null if none is in force. */
export function nextRows(app) {
  const { reading, token } = app, sampling = samplingOf(app.state);
  const actual = app.tokenIds[token + 1];
  const ranked = reading.nextTokens(token, AS_THE_MODEL, RANKED).map(({ id }) => id);
  const ids = ranked.slice(0, ROWS_SHOWN);
  const watched = app.before === reading ? actual : app.target; // with interventions: it may fall
  if (watched !== undefined && !ids.includes(watched)) ids.push(watched);
  return ids.map((id) => ({
    id,
    rank: ranked.includes(id) ? ranked.indexOf(id) + 1 : null,
    ...chanceOf(reading, token, id, sampling),
    plain: reading.probability(token, id),
    before: app.before === reading ? null : chanceOf(app.before, token, id, sampling),
    isActual: id === actual,
  }));
}

/** How likely a token is drawn: {p, isRemoved}. */
function chanceOf(reading, position, id, sampling) {
  const p = reading.chance(position, id, sampling);
  return { p, isRemoved: p === 0 };
}

/** From which layer on a token stays among the most likely ones, and the most likely: {among,
 * first}, null for never. Layer 0 is the embedding, layer l the stream after block l - 1. */
export function layersWithToken(reading, nLayers, position, id) {
  let among = null, first = null;
  for (let layer = nLayers; layer >= 0; layer--) {
    const place = reading.lens(layer, position, LOOKED_AT).findIndex((one) => one.id === id);
    if (place < 0) break;
    among = layer;
    if (place === 0 && (first === null ? layer === nLayers : first === layer + 1)) first = layer;
  }
  return { among, first };
}

/** A sentence about where in the model the most likely next token comes up. */
export function whyLikely(app) {
  const best = app.reading.lens(app.config.n_layers, app.token, 1)[0];
  const { among, first } = layersWithToken(app.reading, app.config.n_layers, app.token, best.id);
  const name = app.label(best.id);
  const after = (layer) => (layer === 0 ? "the embedding" : `block ${layer - 1}`);
  const stays = among === first ? ""
    : `is among the ${LOOKED_AT} most likely from ${after(among)} on, and `;
  return `Where ${name} comes from: if the model stopped after a block (the logit lens), it ` +
    `${stays}is the most likely from ${after(first)} on. Which heads matter for it: ` +
    "\u201crank all heads\u201d under \u201cSwitch off\u201d.";
}
