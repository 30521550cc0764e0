// Three kinds of heads that most language models have, told apart by where a head attends on random
// tokens (gpt2mini/inspection/heads.py).

export const HEAD_KINDS = {
  previous_token: {
    letter: "P", article: "a", name: "previous-token head",
    means: "attends to the token before",
  },
  induction: {
    letter: "I", article: "an", name: "induction head",
    means: "attends to the token that came next when the current token occurred before",
  },
  first_token: {
    letter: "F", article: "a", name: "first-token head",
    means: "attends to the first token, where a head rests that has nothing to read",
  },
};

export const TIMES_EVEN = 3; // a head is marked from so many times the score of equal weights on

/** The scores of a head whose weights are equal over all tokens that it may read: 1 / (t + 1) at
 * position t, on `period` random tokens and the same again. */
export function evenScores(period) {
  const mean = (from, to) => {
    let sum = 0;
    for (let t = from; t < to; t++) sum += 1 / (t + 1);
    return sum / (to - from);
  };
  const later = mean(1, 2 * period); // the first token can only read itself
  return { previous_token: later, first_token: later, induction: mean(period, 2 * period) };
}

/** {kind, score} of a head that clearly does one of the three, else null. model: in the data. */
export function kindOfHead(model, layer, head) {
  const even = evenScores(Math.max(2, Math.min(32, Math.floor(model.config.context_length / 2))));
  let best = null;
  for (const kind of Object.keys(HEAD_KINDS)) {
    const score = model.head_scores[kind]?.[layer][head] ?? 0, times = score / even[kind];
    if (times >= TIMES_EVEN && times > (best?.times ?? 0)) best = { kind, score, times };
  }
  return best && { kind: best.kind, score: best.score };
}
