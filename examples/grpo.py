"""Group relative policy optimization: PPO without a critic.

Shao et al. 2024, "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language
Models", section 4.1. Every prompt gets several responses, and a response is as good as it is better
than the others to the same prompt. The KL divergence from the reference stands in the loss.

    python examples/grpo.py                                      # reward: the share of glad words
    python examples/grpo.py --reward my_rewards:politeness       # any Python function

Prints the mean reward of each rollout, from 0.01 to 0.58 in ten, and the KL divergence from the
model it began with; then responses before and after.
"""

import argparse
from copy import deepcopy

import torch

from gpt2mini import GPT2, Tokenizer, complete
from gpt2mini.data.samples import sample
from gpt2mini.device import pick_device
from gpt2mini.losses import kl_from_samples, ppo_loss, token_logprobs
from gpt2mini.preferences.grpo import group_advantages
from gpt2mini.preferences.named_rewards import find_reward
from gpt2mini.preferences.pairs import read_preferences
from gpt2mini.preferences.rollouts import RolloutSettings, response_texts, roll_out

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default="gpt2-nano", help="name or folder")
parser.add_argument("--reward", default="toy", help="toy, a reward model, or module:function")
parser.add_argument("--rollouts", type=int, default=10)
parser.add_argument("--kl", type=float, default=0.04, help="weight of the KL in the loss (beta)")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)
device = pick_device()
rows, minibatch_rows, epochs = 32, 16, 2  # responses per rollout, per step; passes over a rollout
group = 8  # G: responses to each prompt
settings = RolloutSettings(rows, minibatch_rows, epochs, 16, num_samples=group, precision="fp32")

tokenizer = Tokenizer.from_pretrained(args.model)
policy = GPT2.from_pretrained(args.model, device=device)
reference = deepcopy(policy).requires_grad_(False)
reward = find_reward(args.reward, device)  # (prompts, responses) -> a number for each
prompts = [one.prompt for one in read_preferences(sample("preferences.jsonl"))]
missing = tokenizer.missing_ids(policy.config.vocab_size)  # of a padded vocabulary
optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0)

for number in range(args.rollouts):
    # ---- 1. `group` responses to each prompt, in neighboring rows
    chosen = [prompts[i] for i in torch.randperm(len(prompts))[: rows // group]]
    ids = [torch.tensor(tokenizer.encode(prompt)) for prompt in chosen]
    rollout = roll_out(policy, ids, tokenizer.eos_id, settings, reference, forbidden_ids=missing)
    mask = rollout.response_mask  # (batch, tokens): True at the responses' tokens

    # ---- 2. advantages: (reward - mean of the group) / standard deviation (section 4.1.2)
    responses = response_texts(rollout, tokenizer)
    asked = [prompt for prompt in chosen for _ in range(group)]
    scores = torch.tensor([float(r) for r in reward(asked, responses)], device=device)  # (batch)
    advantages = group_advantages(scores, group)[:, None] * mask  # the same for all its tokens

    # ---- 3. some steps on the same responses
    for _ in range(epochs):
        for part in torch.randperm(rows, device=device).split(minibatch_rows):
            optimizer.zero_grad()
            logprobs = token_logprobs(
                policy, rollout.token_ids[part], rollout.attention_mask[part], mask[part]
            )
            # equation 3: the clipped ratio times the advantage, as in PPO, minus beta * KL
            policy_sum, count = ppo_loss(
                logprobs, rollout.logprobs[part], advantages[part], mask[part], clip=0.2
            )
            kl = kl_from_samples(logprobs, rollout.reference_logprobs[part])  # equation 4, "k3"
            # a mean over tokens, as Yu et al. 2025 ("DAPO"); equation 3: over responses first
            loss = (policy_sum + args.kl * kl[mask[part]].sum()) / count
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm=1.0)
            optimizer.step()
    mean_kl, said = rollout.kl.mean(), responses[0][:50]
    print(f"rollout {number:2}   reward {scores.mean():.3f}   KL {mean_kl:5.2f} nats   {said!r}")

for prompt in prompts[:3]:
    for name, model in (("before", reference), ("after", policy)):
        torch.manual_seed(args.seed)
        print(f"\n--- {name}: {complete(model, tokenizer, prompt, 16)}")
