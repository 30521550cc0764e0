// Pure functions of the panels of heads, of one number and of the next token, for tests:
// node heads.mjs INPUT.json OUTPUT.json
//
// input: {data, tokenizer, calls: [[name of a function below, ...arguments]]}; output: the results.

import { readFileSync, writeFileSync } from "node:fs";

const folder = new URL("../../gpt2mini/inspection/explorer/", import.meta.url);
const load = (name) => import(new URL(name, folder));
const { attentionArithmetic, fixed, largestTerms } = await load("panels/attention_arithmetic.js");
const { kindInWords, kindOfHead } = await load("panels/head_kinds.js");
const { movedCell } = await load("panels/large_head.js");
const { layersWithToken, nextRows } = await load("panels/next_tokens.js");
const { RecordedSource } = await load("model/recorded.js");
const { distribution, mostLikely } = await load("model/sampling.js");
const { readTokenizer } = await load("model/tokenizer.js");
const { continuedText, writeTokens } = await load("panels/writing.js");

const [inputPath, outputPath] = process.argv.slice(2);
const { data, tokenizer: packed, calls } = JSON.parse(readFileSync(inputPath, "utf8"));
const tokenizer = packed && await readTokenizer(packed);

/** A reading of nothing but logits, as of live.js. */
function readingOf(logits) {
  return {
    probability: (_, id) => distribution(logits)[id],
    nextTokens: (_, sampling, n) => mostLikely(distribution(logits, sampling), n),
    chance: (_, id, sampling) => distribution(logits, sampling)[id],
  };
}

/** An app with a text, of which `token` is the chosen token. */
function appWith(text, token, state = {}) {
  const tokenIds = tokenizer.encode(text);
  return { tokenizer, tokenIds, token: token ?? tokenIds.length - 1, tokensLeftOut: 0,
    state: { text, temperature: 1, topK: 0, topP: 1, seed: 0, ...state } };
}

const functions = {
  fixed, largestTerms, kindInWords, kindOfHead, movedCell,
  arithmetic(layer, head, query) {
    const source = new RecordedSource(data.models[0], data.forbidden_ids);
    const reading = source.read(data.models[0].recorded.token_ids);
    return attentionArithmetic(reading, layer, head, query);
  },
  rows(logits, before, actual, state) {
    const reading = readingOf(logits);
    return nextRows({ reading, before: before ? readingOf(before) : reading, token: 0,
      tokenIds: [0, ...(actual === null ? [] : [actual])], target: actual ?? undefined, state });
  },
  layers(ids, id) {
    const reading = { lens: (layer) => ids[layer].map((one) => ({ id: one })) };
    return layersWithToken(reading, ids.length - 1, 0, id);
  },
  continued: (text, token, newIds) => continuedText(appWith(text, token), newIds),
  /** Write n tokens where the model draws `drawn`; stopAfter: so many texts. */
  async write(text, token, n, drawn, stopAfter) {
    const app = appWith(text, token), shown = [];
    app.source = { async* write(ids, most) { yield* drawn.slice(0, most); } };
    const ending = await writeTokens(app, n, [], (one) => shown.push(one) < stopAfter);
    return { ending, shown };
  },
};

const results = [];
for (const [name, ...args] of calls) results.push(await functions[name](...args));
const plain = (_, x) => (ArrayBuffer.isView(x) ? Array.from(x) : x);
writeFileSync(outputPath, JSON.stringify(results, plain));
