// Three kinds of heads that most language models have, told apart by where a head attends on random
// tokens (gpt2mini/inspection/heads.py).

import { percent } from "../dom.js";

export const HEAD_KINDS = {
  previous_token: {
    letter: "P", article: "a", name: "previous-token head",
    attendsTo: "the token before",
  },
  induction: {
    letter: "I", article: "an", name: "induction head",
    attendsTo: "the token that came next when the current one occurred before",
  },
  first_token: {
    letter: "F", article: "a", name: "first-token head",
    attendsTo: "the first token",
  },
};

// A head is marked from so many times the score of equal weights on. It is called a head of that
// kind from CLEAR_TIMES or a score of CLEAR_SCORE on; below, it only leans to it.
export const TIMES_EVEN = 3;
export const CLEAR_TIMES = 10;
export const CLEAR_SCORE = 0.3;

/** What a head does most of the three: {kind, score, times, clear}, or null if it does none much
 * more than equal weights would. times: of the score of equal weights. model: in the data. */
export function kindOfHead(model, layer, head) {
  let best = null;
  for (const kind of Object.keys(HEAD_KINDS)) {
    const score = model.head_scores[kind][layer][head], times = score / model.even_scores[kind];
    const clear = times >= CLEAR_TIMES || score >= CLEAR_SCORE;
    const found = { kind, score, times, clear };
    if (times >= TIMES_EVEN && (!best || isMore(found, best))) best = found;
  }
  return best;
}

/** A clear kind comes before one to which the head only leans. */
function isMore(a, b) {
  return a.clear === b.clear ? a.times > b.times : a.clear;
}

/** A sentence about what `kindOfHead` has found: the number, what to compare it with, the name. */
export function kindInWords({ kind, score, times, clear }) {
  const { article, name, attendsTo } = HEAD_KINDS[kind];
  // Rounded down: no number that is shown reaches a limit that the head does not.
  const factor = times < 10 ? (Math.floor(10 * times) / 10).toFixed(1) : Math.floor(times);
  return `On random tokens, ${percent(score)} of its weight is on ${attendsTo}, ${factor} times ` +
    `as much as equal weights would put there: ${clear ? "" : "it leans to "}${article} ${name}.`;
}
