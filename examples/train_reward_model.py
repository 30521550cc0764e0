"""Train a reward model: one number for how good an answer is, learned from pairs of answers.

Stiennon et al. 2020, "Learning to summarize from human feedback", section 3.4; Ouyang et al. 2022,
"Training language models to follow instructions with human feedback", equation 1. The output head
is replaced by one output, read at the last token, which has seen the whole answer:

    loss = -log sigmoid(r(prompt, chosen) - r(prompt, rejected))

    python examples/train_reward_model.py
    python examples/train_reward_model.py --model gpt2 --data pairs.jsonl --lr 2e-5

The data are JSONL with prompt, chosen and rejected. Prints how often the better one of two held-out
answers has the higher reward, 75 % before and 100 % after, and some of them. Writes the model to
runs/reward_model.
"""

import argparse
import random

import torch
from torch import Tensor

from gpt2mini import GPT2, Tokenizer
from gpt2mini.classification import last_token_logits
from gpt2mini.data.samples import sample
from gpt2mini.device import pick_device
from gpt2mini.losses import pairwise_reward_loss
from gpt2mini.preferences.pairs import encode_preferences, pad_pairs, read_preferences
from gpt2mini.preferences.reward_model import CLASS_NAMES, give_reward_head

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default="gpt2-nano", help="name or folder")
parser.add_argument("--data", default=sample("preferences.jsonl"), help="JSONL of pairs")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--lr", type=float, default=2e-4, help="learning rate; 2e-5 for gpt2")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)
random.seed(args.seed)
device = pick_device()
tokenizer = Tokenizer.from_pretrained(args.model)
model = GPT2.from_pretrained(args.model, device=device)
give_reward_head(model)  # one output, Normal(0, 1 / (emb + 1)), as Stiennon et al. begin

preferences = read_preferences(args.data)
random.shuffle(preferences)
encoded = encode_preferences(preferences, tokenizer, longest=model.config.context_length)
cut = len(encoded) // 5
held_out, training = encoded[:cut], encoded[cut:]


def rewards(pairs: list) -> tuple[Tensor, Tensor]:
    """(rewards of the chosen answers, rewards of the rejected ones), (pairs) each."""
    batch = pad_pairs(pairs).to(device)  # all chosen answers, then all rejected ones
    logits = last_token_logits(model, batch.token_ids, batch.attention_mask)  # (2 * pairs, 1)
    return logits[: len(pairs), 0], logits[len(pairs) :, 0]


@torch.no_grad()
def accuracy() -> float:
    """How often the better answer has the higher reward, on the pairs held out."""
    chosen, rejected = rewards(held_out)
    return float((chosen > rejected).float().mean())


print(f"{len(training)} pairs, {len(held_out)} held out: accuracy {accuracy():.1%}")

# ---- the loop
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
for step in range(args.steps):
    optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
    optimizer.zero_grad()
    chosen, rejected = rewards(random.sample(training, 8))
    loss_sum, count = pairwise_reward_loss(chosen, rejected)  # Ouyang et al., equation 1
    loss = loss_sum / count
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    if step % 5 == 0 or step == args.steps - 1:
        print(f"step {step:4}   loss {loss.item():.3f}   margin {(chosen - rejected).mean():.2f}")

print(f"held out: accuracy {accuracy():.1%}")
with torch.no_grad():
    chosen, rejected = rewards(held_out[:3])
for pair, better, worse in zip(preferences, chosen, rejected, strict=False):
    print(f"\n{pair.prompt}\n[{better:+.2f}]{pair.chosen}\n[{worse:+.2f}]{pair.rejected}")
model.save_pretrained("runs/reward_model", class_names=CLASS_NAMES)
tokenizer.save_pretrained("runs/reward_model")
print("\nreward model: runs/reward_model   (python examples/ppo.py --reward runs/reward_model)")
