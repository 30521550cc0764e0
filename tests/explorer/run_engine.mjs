// Runs the page's engine for tests: node run_engine.mjs INPUT.json OUTPUT.json
//
// input: {models, blobs, kernel, tokenizer, calls: [{call, ...arguments}]}; output: one result for
// each call. Arrays of numbers are {float32: base64}.

import { readFileSync, writeFileSync } from "node:fs";

const folder = new URL("../../gpt2mini/inspection/explorer/", import.meta.url);
const load = (name) => import(new URL(name, folder));
const { buildModels, engineTolerance, LiveSource, proveEngine } = await load("model/live.js");
const sampling = await load("model/sampling.js");
const { readTokenizer } = await load("model/tokenizer.js");

const [inputPath, outputPath] = process.argv.slice(2);
const input = JSON.parse(readFileSync(inputPath, "utf8"));
const built = input.models ? await buildModels(input.models, input.blobs, input.kernel) : [];
const tokenizer = input.tokenizer ? await readTokenizer(input.tokenizer) : null;
const sources = new Map();

function encoded(x) {
  if (x instanceof Float64Array) return encoded(Float32Array.from(x));
  if (!(x instanceof Float32Array)) return x;
  return { float32: Buffer.from(x.buffer, x.byteOffset, x.byteLength).toString("base64") };
}

function decoded(x) {
  if (typeof x === "number") return x;
  const bytes = Buffer.from(x.float32, "base64");
  return new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
}

function patchesOf({ patches = [] }) {
  return patches.map(({ name, value, position = null }) =>
    ({ name, value: decoded(value), position }));
}

// A source for each name: readings of one are made one after the other.
function sourceOf({ model = 0, source = "first", forbidden = [] }) {
  const name = `${model} ${source}`;
  if (!sources.has(name)) {
    const { model: engine, means } = built[model];
    sources.set(name, new LiveSource(engine, { means, forbiddenIds: forbidden }));
  }
  return sources.get(name);
}

function readingOf(options) {
  return sourceOf(options).read(options.ids, patchesOf(options));
}

const calls = {
  // all rows of all activations
  activations(options) {
    const { pass, nTokens } = readingOf(options);
    const rows = (x) => encoded(x.slice(0, (nTokens * x.length) / 128));
    const block = ({ attention, ...others }) => ({
      ...Object.fromEntries(Object.entries(others).map(([name, x]) => [name, rows(x)])),
      attention: encoded(attention),
    });
    return { embedding: rows(pass.embedding), blocks: pass.blocks.map(block),
      final_norm: rows(pass.final_norm), logits: rows(pass.logits) };
  },
  logits(options) {
    const { pass, nTokens } = readingOf(options);
    return encoded(pass.logits.slice(0, (nTokens * pass.logits.length) / 128));
  },
  // one method of a reading: {method, arguments}
  reading(options) {
    const found = readingOf(options)[options.method](...options.arguments);
    return JSON.parse(JSON.stringify(found, (_, x) => encoded(x)));
  },
  rankHeads(options) {
    const { position, target } = options;
    return sourceOf(options).rankHeads(readingOf(options), position, target);
  },
  async write(options) {
    const ids = [];
    const how = { ...options, patches: patchesOf(options) };
    for await (const id of sourceOf(options).write(options.ids, options.n, how)) ids.push(id);
    return ids;
  },
  prove({ model = 0, check }) {
    return [proveEngine(built[model].model, check), engineTolerance(check)];
  },
  kind() {
    return built[0].kind;
  },
  distribution({ logits, ...rules }) {
    return encoded(sampling.distribution(decoded(logits), rules));
  },
  draws({ logits, n, seed, ...rules }) {
    const p = sampling.distribution(decoded(logits), rules);
    const random = sampling.seededRandom(seed);
    return Array.from({ length: n }, () => sampling.choose(p, random));
  },
  encode({ texts }) {
    return texts.map((text) => tokenizer.encode(text));
  },
  decode({ texts }) {
    return texts.map((ids) => tokenizer.decode(ids));
  },
  labels({ ids }) {
    return ids.map((id) => tokenizer.label(id));
  },
  groups({ texts }) {
    return texts.map((ids) => tokenizer.groups(ids));
  },
};

const results = [];
for (const { call, ...options } of input.calls) results.push(await calls[call](options));
writeFileSync(outputPath, JSON.stringify(results));
