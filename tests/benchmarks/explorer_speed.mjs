// Run by explorer_speed.py: node explorer_speed.mjs FOLDER_OF_MODULES PAGE.json RUNS

import { readFileSync } from "node:fs";

const [folder, pagePath, runs] = process.argv.slice(2);
const { buildModels, LiveSource } = await import(`${folder}/model/live.js`);
const { readTokenizer } = await import(`${folder}/model/tokenizer.js`);
const page = JSON.parse(readFileSync(pagePath, "utf8"));
const text = "The old keeper lit the lamp. Then the old keeper went down to the boat, and he was " +
  "gone before the sun was up. The boy had seen the light from the window of the house";

// prepare is not measured
async function measure(what, kind, work, prepare = () => {}) {
  const runsOf = { wall: [], cpu: [] };
  for (let run = 0; run < Number(runs); run++) {
    await prepare();
    const [start, before] = [performance.now(), process.cpuUsage()];
    await work();
    const { user, system } = process.cpuUsage(before);
    runsOf.wall.push(performance.now() - start);
    runsOf.cpu.push((user + system) / 1000);
  }
  const [cpu, wall] = [Math.min(...runsOf.cpu), Math.min(...runsOf.wall)].map(shown);
  console.log(`${what.padEnd(40)} ${kind.padEnd(12)} ${cpu} ${wall}`);
}

function shown(time) {
  return time.toFixed(1).padStart(9);
}

async function measureEngine(kind, kernel) {
  let model;
  await measure("load the weights", kind, async () => {
    [{ model }] = await buildModels(page.models, page.blobs, kernel);
  });
  const tokenizer = await readTokenizer(page.tokenizer);
  const all = tokenizer.encode(text);
  const ids = all.slice(0, Math.min(32, all.length));
  const [last, half] = [ids.length - 1, ids.length >> 1];
  const source = new LiveSource(model);
  const other = ids.with(half, ids[half] + 1);
  const forget = () => source.read([ids[0] + 1]);
  const keep = () => source.read(ids);
  await measure(`first reading of ${ids.length} tokens`, kind, () => source.read(ids), forget);
  const keepAllButLast = () => source.read(ids.slice(0, -1));
  await measure("a token more at the end", kind, () => source.read(ids), keepAllButLast);
  await measure("another token in the middle", kind, () => source.read(other), keep);
  const off = [{ name: `blocks.0.head.0`, value: 0, position: null }];
  await measure("a head of block 0 switched off", kind, () => source.read(ids, off), keep);
  await measure("surprise of all tokens", kind, () => {
    const reading = source.read(ids);
    for (let t = 0; t < ids.length; t++) reading.surprise(t);
  }, () => { forget(); keep(); });
  await measure("the lens at one position", kind, () => source.read(ids).lens(0, last),
    () => { forget(); keep(); });
  const rules = { temperature: 0.8, topK: 50, topP: 0.9 };
  const reading = keep();
  const next = () => reading.nextTokens(last, rules, 20);
  await measure("the next tokens, top-k and top-p", kind, next);
  const before = reading.nextTokens(last, {}, 1)[0].id;
  await measure("rank all heads", kind, () => source.rankHeads(keep(), last, before));
  await measure("write 30 tokens", kind, async () => {
    for await (const id of source.write(ids, 30, rules)) void id;
  });
  const long = Array.from({ length: source.mostTokens }, (_, t) => all[t % all.length]);
  await measure(`first reading of ${long.length} tokens`, kind, () => source.read(long), forget);
}

console.log(`${"milliseconds, fastest run".padEnd(53)} ${"cpu".padStart(9)} ${"wall".padStart(9)}`);
await measureEngine("JavaScript", "");
await measureEngine("WebAssembly", page.kernel);
console.log(`memory of the process: ${(process.memoryUsage().rss / 1e6).toFixed(0)} MB`);
