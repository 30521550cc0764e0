// The models of the page, ready to read texts: live ones, whose engine has proved itself, or the
// recorded numbers of one text.

import { at } from "./dom.js";
import { buildModels, engineTolerance, LiveSource, proveEngine } from "./model/live.js";
import { RecordedSource } from "./model/recorded.js";
import { readTokenizer } from "./model/tokenizer.js";

/** {live, tokenizer, sources, patched, second, refusal}. Of each model there are three sources,
 * since a reading holds until its source reads again: one for the text as it is, one for the text
 * with interventions, one for a second text. refusal: why a live page is not live after all. */
export async function startModels(data) {
  const tokenizer = await readTokenizer(blob("tokenizer"));
  if (!data.live) return { ...recorded(data, tokenizer), refusal: null };
  const blobs = data.models.map((_, i) => blob(`weights-${i}`));
  const built = await buildModels(data.models, blobs, blob("kernel"));
  const refusal = refusalOf(data, built);
  if (refusal) return { ...recorded(data, tokenizer), refusal };
  const forbiddenIds = data.forbidden_ids;
  const makeSources = () => built.map(({ model, means }) =>
    new LiveSource(model, { means, forbiddenIds }));
  return { live: true, tokenizer, sources: makeSources(), patched: makeSources(),
    second: makeSources(), refusal };
}

function recorded(data, tokenizer) {
  const models = data.models.filter((model) => model.recorded);
  const sources = models.map((model) => new RecordedSource(model, data.forbidden_ids));
  return { live: false, tokenizer, sources, patched: sources, second: sources };
}

/** The text of an element of the page, which is then removed: weights take much memory as text. */
function blob(id) {
  const element = at(id);
  const text = element?.textContent ?? "";
  element?.remove();
  return text;
}

/** engine.js is the architecture written down a second time. So it first computes logits that the
 * Python model computed with the same weights; whoever has changed model.py is told here. */
function refusalOf(data, built) {
  for (const [i, { model }] of built.entries()) {
    const { name, check } = data.models[i];
    const difference = proveEngine(model, check);
    if (difference <= engineTolerance(check)) continue; // so that NaN, too, is refused
    return `The engine in this page does not compute what ${name} computes in Python: their ` +
      `logits differ by up to ${difference.toPrecision(3)}. Shown are numbers that were recorded ` +
      "from the model, for one text.";
  }
  return null;
}
