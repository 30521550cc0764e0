// Calls members of a recorded reading for tests: node read_recorded.mjs INPUT.json OUTPUT.json
//
// input: {data, model, calls: [[member, ...arguments]]}, data as in the page; output: the results.
// Calls of `source.MEMBER` go to the source, `rankHeads` with the reading as its first argument.

import { readFileSync, writeFileSync } from "node:fs";

const folder = new URL("../../gpt2mini/inspection/explorer/", import.meta.url);
const { RecordedSource } = await import(new URL("model/recorded.js", folder));

const [inputPath, outputPath] = process.argv.slice(2);
const { data, model, calls } = JSON.parse(readFileSync(inputPath, "utf8"));
const source = new RecordedSource(data.models[model], data.forbidden_ids);
const reading = source.read(data.models[model].recorded.token_ids);

async function result([member, ...args]) {
  if (member === "source.rankHeads") return source.rankHeads(reading, ...args);
  if (member === "source.read") return refusal(() => source.read(...args));
  const owner = member.startsWith("source.") ? source : reading;
  const found = owner[member.replace("source.", "")];
  return typeof found === "function" ? found.apply(owner, args) : found;
}

function refusal(act) {
  try {
    act();
    return null;
  } catch (error) {
    return error.message;
  }
}

const results = [];
for (const call of calls) results.push(await result(call));
const plain = (_, x) => (x instanceof Float32Array ? Array.from(x) : x);
writeFileSync(outputPath, JSON.stringify(results, plain));
