"""Direct preference optimization: learn from pairs of answers, without a reward model or sampling.

Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward
Model". The policy implies the reward beta * log (pi(y | x) / pi_ref(y | x)) (equation 5, up to a
term of x alone), and the loss makes that of the chosen answer the higher one (equation 7).

    python examples/dpo.py
    python examples/dpo.py --model runs/finetune_instructions --data pairs.jsonl --beta 0.05

The data are JSONL with prompt, chosen and rejected. Prints the loss (ln 2 = 0.693 at first), the
rewards and how often the chosen answer has the higher one, on pairs held out 100 %; how likely
chosen and rejected answers have become; and an answer before and after.
"""

import argparse
import random
from copy import deepcopy

import torch
from torch import Tensor

from gpt2mini import GPT2, Tokenizer, complete
from gpt2mini.data.samples import sample
from gpt2mini.device import pick_device
from gpt2mini.losses import dpo_loss, sequence_logprobs
from gpt2mini.preferences.pairs import encode_preferences, pad_pairs, read_preferences

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default="gpt2-nano", help="name or folder")
parser.add_argument("--data", default=sample("preferences.jsonl"), help="JSONL of pairs")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--beta", type=float, default=0.1, help="higher: nearer to the reference")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)
random.seed(args.seed)
device = pick_device()
tokenizer = Tokenizer.from_pretrained(args.model)
policy = GPT2.from_pretrained(args.model, device=device)
reference = deepcopy(policy).requires_grad_(False)  # pi_ref: the policy as it begins

preferences = read_preferences(args.data)
random.shuffle(preferences)
encoded = encode_preferences(preferences, tokenizer, longest=policy.config.context_length)
cut = len(encoded) // 5
held_out, training = encoded[:cut], encoded[cut:]


def logprobs(model: GPT2, pairs: list) -> tuple[Tensor, Tensor]:
    """log pi(y_w | x) and log pi(y_l | x), the answers' tokens summed: (pairs) each."""
    batch = pad_pairs(pairs).to(device)  # all chosen answers, then all rejected ones
    rows = (batch.token_ids, batch.attention_mask, batch.response_mask)
    found, _ = sequence_logprobs(model, *rows)  # (2 * pairs); prompts do not count
    return found[: len(pairs)], found[len(pairs) :]


# ---- the loop
optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-5, betas=(0.9, 0.95), weight_decay=0.0)
for step in range(args.steps):
    pairs = random.sample(training, 8)
    with torch.no_grad():
        reference_chosen, reference_rejected = logprobs(reference, pairs)
    optimizer.zero_grad()
    policy_chosen, policy_rejected = logprobs(policy, pairs)
    loss_sum, count = dpo_loss(  # equation 7
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, args.beta
    )
    loss = loss_sum / count
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm=1.0)
    optimizer.step()

    if step % 5 == 0 or step == args.steps - 1:
        chosen = args.beta * (policy_chosen - reference_chosen).detach()  # rewards: equation 5
        rejected = args.beta * (policy_rejected - reference_rejected).detach()
        print(
            f"step {step:3}   loss {loss.item():.3f}   reward of chosen {chosen.mean():+.3f}",
            end="",
        )
        print(f", rejected {rejected.mean():+.3f}   right {(chosen > rejected).float().mean():.0%}")

with torch.no_grad():
    new, old = logprobs(policy, held_out), logprobs(reference, held_out)
margins = args.beta * ((new[0] - old[0]) - (new[1] - old[1]))  # (pairs)
print(f"\nheld out: right {(margins > 0).float().mean():.0%}, margin {margins.mean():.3f}")
for name, before, after in zip(("chosen", "rejected"), old, new, strict=True):
    print(f"log pi(y | x) of the {name} answers {before.mean():.1f} -> {after.mean():.1f}")
for name, model in (("before", reference), ("after", policy)):
    torch.manual_seed(args.seed)
    print(f"\n--- {name}\n{complete(model, tokenizer, preferences[0].prompt, 40, temperature=0.7)}")
