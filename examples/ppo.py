"""Proximal policy optimization: sample responses, rate them, make the good ones likelier.

Schulman et al. 2017, "Proximal Policy Optimization Algorithms"; for language models Ziegler et al.
2019, "Fine-Tuning Language Models from Human Preferences". A token is an action, the text so far a
state, and the reward of a response comes with its last token.

    python examples/ppo.py                                       # reward: the share of glad words
    python examples/ppo.py --reward runs/reward_model            # of train_reward_model.py

Prints the mean reward of each rollout, from 0.07 to 0.37 in the first six, and the KL divergence
from the model it began with; then responses before and after.
"""

import argparse
from copy import deepcopy

import torch

from gpt2mini import GPT2, Tokenizer, complete
from gpt2mini.data.samples import sample
from gpt2mini.device import pick_device
from gpt2mini.losses import ppo_loss, value_loss
from gpt2mini.preferences.named_rewards import find_reward
from gpt2mini.preferences.pairs import read_preferences
from gpt2mini.preferences.ppo import ActorCritic, generalized_advantages, whiten
from gpt2mini.preferences.rollouts import RolloutSettings, response_texts, roll_out

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--model", default="gpt2-nano", help="name or folder")
parser.add_argument("--reward", default="toy", help="toy, a reward model, or module:function")
parser.add_argument("--rollouts", type=int, default=8)
parser.add_argument("--kl", type=float, default=0.03, help="what a nat of KL costs (beta)")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)
device = pick_device()
rows, minibatch_rows, epochs = 32, 16, 2  # responses per rollout, per step; passes over a rollout
settings = RolloutSettings(rows, minibatch_rows, epochs, max_new_tokens=16, precision="fp32")

tokenizer = Tokenizer.from_pretrained(args.model)
policy = GPT2.from_pretrained(args.model, device=device)
reference = deepcopy(policy).requires_grad_(False)
actor_critic = ActorCritic(policy)  # a value head beside the output head, 0 at first
reward = find_reward(args.reward, device)  # (prompts, responses) -> a number for each
prompts = [one.prompt for one in read_preferences(sample("preferences.jsonl"))]
missing = tokenizer.missing_ids(policy.config.vocab_size)  # of a padded vocabulary
optimizer = torch.optim.AdamW(actor_critic.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0)

for number in range(args.rollouts):
    # ---- 1. responses to some prompts, with log pi_old and log pi_ref of each of their tokens
    asked = [prompts[i] for i in torch.randperm(len(prompts))[:rows]]
    ids = [torch.tensor(tokenizer.encode(prompt)) for prompt in asked]
    rollout = roll_out(policy, ids, tokenizer.eos_id, settings, reference, forbidden_ids=missing)
    inputs = (rollout.token_ids, rollout.attention_mask, rollout.response_mask)
    mask = rollout.response_mask  # (batch, tokens): True at the responses' tokens

    # ---- 2. rewards: KL at every token, the response's at its last (Ziegler et al., equation 2)
    responses = response_texts(rollout, tokenizer)
    scores = torch.tensor([float(r) for r in reward(asked, responses)])
    kl = rollout.logprobs - rollout.reference_logprobs  # (batch, tokens), an estimate: "k1"
    rewards = -args.kl * kl  # (batch, tokens)
    last = (mask * torch.arange(mask.shape[1], device=device)).argmax(dim=1)  # (batch)
    rewards[torch.arange(rows), last] += scores.to(device)

    # ---- 3. advantages (Schulman et al. 2016, equation 16): how much better than expected
    values = actor_critic(*inputs)[1].detach()  # (batch, tokens): the rest, as the critic expects
    advantages = generalized_advantages(rewards, values, mask, gamma=1.0, gae_lambda=0.95)
    returns = advantages + values
    advantages = whiten(advantages, mask)  # mean 0, variance 1

    # ---- 4. some steps on the same responses (Schulman et al. 2017, algorithm 1)
    for _ in range(epochs):
        for part in torch.randperm(rows, device=device).split(minibatch_rows):
            optimizer.zero_grad()
            logprobs, new_values = actor_critic(*(tensor[part] for tensor in inputs))
            # ratio = exp(logprobs - old); min(ratio * A, clip(ratio) * A): equation 7
            old = rollout.logprobs[part]
            policy_sum, count = ppo_loss(logprobs, old, advantages[part], mask[part], clip=0.2)
            value_sum = value_loss(new_values, values[part], returns[part], mask[part], clip=0.2)[0]
            loss = (policy_sum + 0.1 * value_sum) / count  # equation 9, without an entropy bonus
            loss.backward()
            torch.nn.utils.clip_grad_norm_(actor_critic.parameters(), max_norm=1.0)
            optimizer.step()
    mean_kl, said = rollout.kl.mean(), responses[0][:50]
    print(f"rollout {number:2}   reward {scores.mean():.3f}   KL {mean_kl:5.2f} nats   {said!r}")

for prompt in prompts[:3]:
    for name, model in (("before", reference), ("after", policy)):
        torch.manual_seed(args.seed)
        print(f"\n--- {name}: {complete(model, tokenizer, prompt, 16)}")
