// The head with which the page begins.

/** The head with the largest induction score: the one that does the clearest thing. */
export function clearestHead({ head_scores: { induction } }) {
  let best = { layer: 0, head: 0 };
  induction.forEach((heads, layer) => heads.forEach((score, head) => {
    if (score > induction[best.layer][best.head]) best = { layer, head };
  }));
  return best;
}

