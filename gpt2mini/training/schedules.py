"""Learning-rate schedules: functions of the step that return a share of the peak rate."""

import math


def cosine(step: int, steps: int, warmup_steps: int, final_multiplier: float = 0.1) -> float:
    """Linear warm-up, then half a cosine down to `final_multiplier` (Loshchilov & Hutter 2017;
    GPT-3's schedule)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return final_multiplier + (1 - final_multiplier) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_stable_decay(
    step: int, steps: int, warmup_steps: int, decay_share: float = 0.3
) -> float:
    """Linear warm-up, a long level stretch, and a linear fall to zero over the last `decay_share`
    of all steps (Hu et al. 2024, MiniCPM). Before the fall a run can be prolonged without
    regret."""
    decay_steps = max(1, round(decay_share * steps))
    return max(0.0, min(1.0, (step + 1) / max(1, warmup_steps), (steps - step) / decay_steps))
