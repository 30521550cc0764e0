// What the page shows of some states, and the Python that it gives for them:
// node interventions.mjs INPUT.json OUTPUT.json
//
// input: {data, blobs, kernel, tokenizer, hashes}; output for each hash of an address: {code,
// models: for each model {patches, before, after}}.

import { readFileSync, writeFileSync } from "node:fs";

const folder = new URL("../../gpt2mini/inspection/explorer/", import.meta.url);
const load = (name) => import(new URL(name, folder));
const { buildModels, LiveSource } = await load("model/live.js");
const { patchesOf, patchInForce } = await load("patches.js");
const { pythonCode } = await load("python_code.js");
const { FIRST, fitting, fromHash } = await load("state.js");
const { readTokenizer } = await load("model/tokenizer.js");

const [inputPath, outputPath] = process.argv.slice(2);
const input = JSON.parse(readFileSync(inputPath, "utf8"));
const { data, hashes } = input;
const tokenizer = await readTokenizer(input.tokenizer);
const built = await buildModels(data.models, input.blobs, input.kernel);
const newSources = () => built.map(({ model, means }) =>
  new LiveSource(model, { means, forbiddenIds: data.forbidden_ids }));
const [sources, patched, ofSecond] = [newSources(), newSources(), newSources()];

// The parts of view.js's App that need no document.
function appOf(hash) {
  const first = { ...FIRST, text: data.text };
  const state = fitting(fromHash(hash, first), data.models[0].config, built.length);
  const ids = tokenizer.encode(state.text);
  const tokenIds = ids.length ? ids.slice(0, data.most_tokens) : [tokenizer.eosId];
  const token = Math.min(state.token ?? Infinity, tokenIds.length - 1);
  const likeliest = sources[state.model].read(tokenIds).nextTokens(token, {}, 1)[0].id;
  return { data, live: true, tokenizer, state, sources, tokenIds, token,
    tokensLeftOut: ids.length - tokenIds.length, target: tokenIds[token + 1] ?? likeliest,
    label: (id) => tokenizer.label(id) };
}

function shown(app, model) {
  const { tokenIds } = app, patch = patchInForce(app);
  const second = patch &&
    ofSecond[model].read(tokenizer.encode(patch.text).slice(0, data.most_tokens));
  const patches = patchesOf(app.state, sources[model], second);
  const before = numbers(app, sources[model].read(tokenIds));
  const after = numbers(app, patched[model].read(tokenIds, patches));
  return { patches: patches.map(({ name }) => name), before, after };
}

function numbers({ state, token, target }, reading) {
  const { layer, head, temperature, topK, topP } = state;
  const weights = Array.from({ length: token + 1 }, (_, key) =>
    reading.attention(layer, head, token, key));
  const sampling = { temperature, topK, topP };
  return {
    attention: weights.sort((a, b) => b - a).slice(0, 5),
    target: reading.probability(token, target),
    next: reading.nextTokens(token, sampling, 5).map(({ p }) => p),
  };
}

const results = hashes.map((hash) => {
  const app = appOf(hash);
  return { code: pythonCode(app), models: built.map((_, i) => shown(app, i)) };
});
writeFileSync(outputPath, JSON.stringify(results));
