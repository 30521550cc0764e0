// What the interventions of a state replace: switched-off parts and a patched position, as
// `patches` of engine.js. The names are those of `gpt2mini.inspection.patched`.

/** The patches of a state. source: of the shown model, for its mean activations. second: a reading
 * of the second text, or null if no position is patched. */
export function patchesOf(state, source, second) {
  const patches = state.off.flatMap((part) => patchesOfPart(part, source));
  if (state.patch && second) patches.push(...patchFromSecond(state.patch, second));
  return lastOfEachName(patches);
}

/** Names of the activations of a part: an entry of state.off. */
export function namesOfPart({ kind, layer, head }) {
  if (kind === "head") return [`blocks.${layer}.head.${head}`];
  if (kind === "mlp") return [`blocks.${layer}.mlp_out`];
  if (kind === "attn") return [`blocks.${layer}.attn_out`];
  return [`blocks.${layer}.attn_out`, `blocks.${layer}.mlp_out`]; // the stream passes unchanged
}

function patchesOfPart(part, source) {
  const value = (name) => (part.value === "mean" ? meanOf(name, source) : 0);
  return namesOfPart(part).map((name) => ({ name, value: value(name), position: null }));
}

/** The mean of an activation over all positions of a bundled text: Float32Array of one row. That of
 * a head is a slice of the mean of all heads' outputs side by side. */
function meanOf(name, source) {
  const [, layer, part, head] = name.split(".");
  if (part !== "head") return source.means[`means.${name}`];
  const all = source.means[`means.blocks.${layer}.context`];
  const size = all.length / source.config.n_heads;
  return all.subarray(Number(head) * size, (Number(head) + 1) * size);
}

/** One position of the stream after a block becomes that of the second text. */
function patchFromSecond({ layer, position, from }, second) {
  if (from >= second.nTokens) return []; // the second text has become shorter
  return [{ name: `blocks.${layer}.stream`, value: second.stream(layer + 1, from), position }];
}

/** The patch of the state, or null if its position or that in its second text is beyond the end:
 * either text may have become shorter. */
export function patchInForce({ state: { patch }, tokenIds, tokenizer, data }) {
  const fits = patch && patch.position < tokenIds.length
    && patch.from < Math.min(tokenizer.encode(patch.text).length, data.most_tokens);
  return fits ? patch : null;
}

/** Two patches of one activation would follow each other: the last one counts. */
function lastOfEachName(patches) {
  return [...new Map(patches.map((patch) => [patch.name, patch])).values()];
}

// ---- parts that are switched off

/** "head 8.2", "MLP of block 3", ... */
export function partLabel({ kind, layer, head }) {
  if (kind === "head") return `head ${layer}.${head}`;
  if (kind === "layer") return `block ${layer}`;
  return `${kind === "mlp" ? "MLP" : "attention"} of block ${layer}`;
}

export function isSamePart(a, b) {
  return a.kind === b.kind && a.layer === b.layer && (a.kind !== "head" || a.head === b.head);
}

/** A list of parts with one of them switched off, or its value changed. */
export function withPartOff(off, part) {
  return [...withPartOn(off, part), part];
}

export function withPartOn(off, part) {
  return off.filter((other) => !isSamePart(other, part));
}
