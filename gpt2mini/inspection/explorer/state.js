// What a reader has chosen: one object that is never changed in place. The address's hash holds it,
// so a link reproduces the view, and undo goes back to an earlier one.

import { withPartOff } from "./patches.js";

export const FIRST = Object.freeze({
  text: "",
  token: null, // index of the chosen token; null: the last one
  layer: 0,
  head: 0,
  key: null, // index of the token whose attention weight is shown in full; null: the largest
  temperature: 1,
  topK: 0, // 0: all
  topP: 1,
  seed: 0,
  off: [], // parts that are switched off: {kind, layer, head, value}
  patch: null, // {text, layer, position, from}: the stream of another text after a block
  model: 0, // 0 or 1
  part: "attention", // the opened part of the architecture
  middle: "heads", // the chosen tab of the middle column, and of the right one
  right: "next",
  step: 0,
});

const NUMBER_FIELDS = ["token", "layer", "head", "key", "temperature", "topK", "topP", "seed",
  "model", "step"];
const MAY_BE_LAST = ["token", "key"]; // null in the state, "last" in the hash
const TEXT_FIELDS = ["text", "part", "middle", "right"];

/** The hash of a state: only what differs from the first one. */
export function toHash(state, first) {
  const fields = new URLSearchParams();
  for (const name of [...TEXT_FIELDS, ...NUMBER_FIELDS]) {
    if (state[name] !== first[name]) fields.set(name, state[name] ?? "last");
  }
  if (state.off.length) fields.set("off", state.off.map(offToText).join(","));
  if (state.patch) {
    const { text, layer, position, from } = state.patch;
    fields.set("patch", `${layer}.${position}.${from}`);
    fields.set("second", text);
  }
  const text = fields.toString();
  return text ? "#" + text : "";
}

/** The state of a hash. What is missing or makes no sense is as in the first state. */
export function fromHash(hash, first) {
  const fields = new URLSearchParams(hash.replace(/^#/, ""));
  const state = { ...first };
  for (const name of TEXT_FIELDS) if (fields.has(name)) state[name] = fields.get(name);
  for (const name of NUMBER_FIELDS) {
    const value = fields.get(name);
    if (value === "last" && MAY_BE_LAST.includes(name)) state[name] = null;
    else if (value !== null && value !== "" && Number(value) >= 0) state[name] = Number(value);
  }
  state.off = (fields.get("off") ?? "").split(",").map(offFromText).filter(Boolean);
  const [layer, position, from] = (fields.get("patch") ?? "").split(".").map(Number);
  if (from >= 0) state.patch = { text: fields.get("second") ?? "", layer, position, from };
  return state;
}

/** "8.2" is head 2 of block 8, "mlp:3" the MLP of block 3; with "mean:" before it, replaced by its
 * mean instead of zero. */
function offToText({ kind, layer, head, value }) {
  const place = kind === "head" ? `${layer}.${head}` : `${kind}:${layer}`;
  return value === "mean" ? "mean:" + place : place;
}

function offFromText(text) {
  const found = /^(mean:)?(?:(mlp|attn|layer):(\d+)|(\d+)\.(\d+))$/.exec(text);
  if (!found) return null;
  const [, mean, kind, layer, ofHead, head] = found;
  const value = mean ? "mean" : "zero";
  return kind ? { kind, layer: Number(layer), value }
    : { kind: "head", layer: Number(ofHead), head: Number(head), value };
}

/** A state that fits the model: layers, heads and parts that it has. */
export function fitting(state, config, models) {
  const below = (x, n) => Math.min(whole(x), n - 1);
  const index = (x) => (x === null ? null : whole(x));
  const exists = ({ layer, head = 0 }) => layer < config.n_layers && head < config.n_heads;
  const isPatch = ({ layer, position, from }) => exists({ layer }) &&
    [layer, position, from].every((x) => Number.isInteger(x) && x >= 0);
  return Object.freeze({
    ...state,
    token: index(state.token),
    key: index(state.key),
    topK: whole(state.topK),
    seed: whole(state.seed),
    step: whole(state.step),
    layer: below(state.layer, config.n_layers),
    head: below(state.head, config.n_heads),
    model: below(state.model, models),
    temperature: Math.min(2, Math.max(0, state.temperature)),
    topP: Math.min(1, Math.max(0.01, state.topP)),
    off: state.off.filter(exists).reduce(withPartOff, []),
    patch: state.patch && isPatch(state.patch) ? state.patch : null,
  });
}

function whole(x) {
  return Math.max(0, Math.min(Math.trunc(x) || 0, Number.MAX_SAFE_INTEGER));
}

/** Earlier states. Letters typed one after another count as one change. */
export class History {
  constructor() {
    this.earlier = [];
    this.lastWasTyping = false;
  }

  push(state, isTyping) {
    if (!(isTyping && this.lastWasTyping)) this.earlier.push(state);
    this.earlier = this.earlier.slice(-200);
    this.lastWasTyping = isTyping;
  }

  pop() {
    this.lastWasTyping = false;
    return this.earlier.pop();
  }

  get isEmpty() {
    return this.earlier.length === 0;
  }
}
