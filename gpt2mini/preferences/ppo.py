"""Proximal policy optimization (PPO) for language models.

Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences"; Stiennon et al. 2020;
Ouyang et al. 2022. The clipped objective is Schulman et al. 2017's (`losses.ppo_loss`), the
advantages are Schulman et al. 2016's. A token is an action; the tokens before it are the state:

    reward of token t      -kl_coefficient * (log p_policy - log p_reference), and for the last
                           token of a response also the reward of the response
    value of token t       the critic's output one position to the left
    advantage of token t   generalized advantage estimate: rewards from t on, minus the value
    return of token t      advantage + value, the critic's target
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2mini.checks import check_predicts_tokens, check_response_mask, check_reward_head
from gpt2mini.device import autocast
from gpt2mini.losses.deferred import hidden_states_and_head
from gpt2mini.losses.policy_gradient import kl_from_samples, ppo_loss, value_loss
from gpt2mini.losses.sequence_logprobs import logprobs_from_hidden
from gpt2mini.model import GPT2
from gpt2mini.modes import evaluating
from gpt2mini.preferences.on_policy import OnPolicyBatches
from gpt2mini.preferences.reward_functions import RewardFunction
from gpt2mini.preferences.reward_scale import RewardScale
from gpt2mini.preferences.rollouts import (
    Experience,
    Rollout,
    RolloutSettings,
    clip_fraction,
    in_minibatches,
)
from gpt2mini.tokenizer import Tokenizer
from gpt2mini.training.distributed import sum_over_ranks
from gpt2mini.training.metrics import Figures


@dataclass(frozen=True)
class PPOSettings:
    gamma: float = 1.0  # discount; 1: a reward counts the same for all tokens before it
    gae_lambda: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    value_weight: float = 0.1  # of the value loss in the sum with the policy loss
    whiten_rewards: bool = False
    kl_estimator: str = "k1"  # of the KL penalty: "k1" or "k3", see `token_rewards`

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1 or not 0 <= self.gae_lambda <= 1:
            raise ValueError(
                f"gamma and gae_lambda must lie in [0, 1], not {self.gamma} and {self.gae_lambda}"
            )
        if min(self.clip, self.value_clip) <= 0:
            raise ValueError(
                f"clip and value_clip must be above 0, not {self.clip} and {self.value_clip}"
            )
        if self.kl_estimator not in ("k1", "k3"):
            raise ValueError(f"kl_estimator must be 'k1' or 'k3', not {self.kl_estimator!r}")


class ActorCritic(nn.Module):
    """A policy and its critic: two heads on one GPT-2, or two models."""

    def __init__(self, policy: GPT2, value_model: GPT2 | None = None) -> None:
        """value_model: a GPT-2 with one output, for instance a copy of the reward model; by default
        the critic is a linear layer on the policy's hidden states, with zero weights at first."""
        super().__init__()
        check_predicts_tokens(policy)
        self.policy, self.value_model = policy, value_model
        if value_model is not None:
            check_reward_head(value_model)
            return
        like = policy.tok_emb.weight
        # It learns, as adapters do, also where the policy is frozen in fewer bits.
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.value_head = nn.Linear(policy.config.emb_dim, 1, device=like.device, dtype=dtype)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(
        self,
        token_ids: Int[Tensor, "batch tokens"],
        attention_mask: Bool[Tensor, "batch tokens"],
        response_mask: Bool[Tensor, "batch tokens"],
    ) -> tuple[Float[Tensor, "batch tokens"], Float[Tensor, "batch tokens"]]:
        """(log-probabilities, values) of the response tokens; 0 elsewhere."""
        check_response_mask(token_ids, attention_mask, response_mask)
        hidden, head = hidden_states_and_head(self.policy, token_ids, attention_mask)
        logprobs = logprobs_from_hidden(hidden, head, token_ids, response_mask)
        if self.value_model is None:
            if head is not self.policy.out_head:  # these are logits
                hidden = self.policy.hidden_states(token_ids, attention_mask)
            hidden = hidden.to(self.value_head.weight.dtype)
            outputs = self.value_head(hidden.flatten(0, 1))  # (batch * tokens, 1): no view, of
            outputs = outputs.view(*hidden.shape[:2], 1)  # which FSDP2 warns
        else:
            outputs = self.value_model(token_ids, attention_mask)  # (batch, tokens, 1)
        return logprobs, values_of_tokens(outputs[..., 0].float(), response_mask)


def values_of_tokens(
    outputs: Float[Tensor, "batch tokens"], response_mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """The value of the state in which each token was sampled: the critic's output to its left."""
    to_the_left = torch.cat([outputs[:, :1], outputs[:, :-1]], dim=1)
    return to_the_left * response_mask


# ---- from rewards to advantages


def token_rewards(
    rollout: Rollout,
    rewards: Float[Tensor, " batch"],
    kl_coefficient: float,
    kl_estimator: str = "k1",
) -> Float[Tensor, "batch tokens"]:
    """The KL penalty of each token, plus the reward at the last (Ziegler et al. 2019, equation 2).

    kl_estimator: "k1", the log ratio, is the standard: as a reward it has the gradient of the KL.
    "k3" (`losses.kl_from_samples`) is never negative and has less variance, but belongs in a loss,
    as in GRPO: as a reward its gradient is biased, and nearly 0 near the reference.
    """
    if kl_estimator == "k3":
        kl = kl_from_samples(rollout.logprobs, rollout.reference_logprobs)  # (batch, tokens)
    else:
        kl = rollout.logprobs - rollout.reference_logprobs  # (batch, tokens)
    of_tokens = -kl_coefficient * kl  # (batch, tokens)
    mask = rollout.response_mask
    is_last = mask & ~F.pad(mask, (0, 1))[:, 1:]  # (batch, tokens): no response token follows
    return of_tokens + is_last * rewards[:, None]


def generalized_advantages(
    rewards: Float[Tensor, "batch tokens"],
    values: Float[Tensor, "batch tokens"],
    response_mask: Bool[Tensor, "batch tokens"],
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> Float[Tensor, "batch tokens"]:
    """Schulman et al. 2016, equation 16: the sum over k of (gamma lambda)^k delta_(t+k), where
    delta_t = reward_t + gamma value_(t+1) - value_t; computed from the last token to the first."""
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])  # (batch), 0 after the end
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (batch)
        advantage = (delta + gamma * gae_lambda * advantage) * response_mask[:, t]
        next_value = values[:, t] * response_mask[:, t]
        advantages[:, t] = advantage
    return advantages


def whiten(
    x: Float[Tensor, "batch tokens"],
    response_mask: Bool[Tensor, "batch tokens"],
    keep_mean: bool = False,
) -> Float[Tensor, "batch tokens"]:
    """Scale to variance 1 and, unless keep_mean, shift to mean 0, over the response tokens. Equal
    values become exactly 0 (with keep_mean they stay as they are)."""
    first = x[response_mask][0]
    x = x - first  # equal values are 0; their own mean would be rounded
    chosen = x[response_mask]
    mean, variance = chosen.mean(), chosen.var(correction=0)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened + (mean + first if keep_mean else 0.0)) * response_mask


class KLController:
    """The KL coefficient: fixed, or adapted to keep the KL of a response near a target (Ziegler et
    al. 2019, section 2.2)."""

    def __init__(
        self,
        coefficient: float,
        target: float | None = None,
        gain: float = 0.1,
        floor: float = 0.0,
    ) -> None:
        """target: nats per response; None: the coefficient is fixed. gain: of the proportional
        controller; a rollout changes the coefficient by at most 0.2 * gain of it. The paper's 0.1
        is for thousands of rollouts; a run of dozens needs about 1. floor: the coefficient never
        falls below. With the first coefficient as its floor, the target is a limit: at the start,
        while the KL is small, the penalty is not given up."""
        if coefficient < 0 or (target is not None and not (target > 0 and coefficient > 0)):
            raise ValueError(
                "the KL coefficient must be at least 0; with a target, by whose distance it is "
                f"multiplied, both must be above 0, not {coefficient} and {target}"
            )
        self.coefficient, self.target = coefficient, target
        self.gain, self.floor = gain, floor

    def update(self, kl: float) -> None:
        if self.target is not None:
            error = min(0.2, max(-0.2, kl / self.target - 1))
            self.coefficient = max(self.floor, self.coefficient * (1 + self.gain * error))

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """A fixed coefficient stays what it is here, and an adapted one above its floor here."""
        if self.target is not None:
            self.coefficient = max(self.floor, state["coefficient"])


# ---- experience, loss, minibatches


@torch.no_grad()
def ppo_experience(
    rollout: Rollout,
    rewards: Float[Tensor, " batch"],
    model: ActorCritic,
    controller: KLController,
    settings: PPOSettings,
    rollouts: RolloutSettings,
    figures: Figures | None = None,
    reward_scale: RewardScale | None = None,
) -> Experience:
    """Advantages and returns of a rollout. Updates the KL coefficient afterwards, for the next."""
    rewards = rewards if reward_scale is None else reward_scale.normalized(rewards)
    mask, coefficient = rollout.response_mask, controller.coefficient
    values = rollout_values(model, rollout, rollouts)  # (batch, tokens)
    of_tokens = token_rewards(rollout, rewards, coefficient, settings.kl_estimator)
    if settings.whiten_rewards:
        of_tokens = whiten(of_tokens, mask, keep_mean=True)
    advantages = generalized_advantages(
        of_tokens, values, mask, settings.gamma, settings.gae_lambda
    )
    returns = advantages + values  # (batch, tokens)
    if figures is not None:
        figures.add(kl_coefficient=torch.tensor(coefficient))
    kl_sum, n = sum_over_ranks([float(rollout.kl.sum()), len(rewards)], rewards.device)
    controller.update(kl_sum / n)
    return Experience(
        **vars(rollout), advantages=whiten(advantages, mask), values=values, returns=returns
    )


def rollout_values(
    model: ActorCritic, rollout: Rollout, settings: RolloutSettings
) -> Float[Tensor, "batch tokens"]:
    """The critic's value of each response token."""
    rows = (rollout.token_ids, rollout.attention_mask, rollout.response_mask)
    with evaluating(model), autocast(rollout.token_ids.device, settings.precision):
        return in_minibatches(lambda model, *part: model(*part)[1], model, rows, settings)


def ppo_step(
    model: ActorCritic, batch: Experience, settings: PPOSettings, figures: Figures | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of a minibatch: (policy loss + value_weight * value loss, summed; number of response
    tokens)."""
    assert batch.values is not None and batch.returns is not None
    mask = batch.response_mask
    logprobs, values = model(batch.token_ids, batch.attention_mask, mask)
    policy_sum, count = ppo_loss(logprobs, batch.logprobs, batch.advantages, mask, settings.clip)
    value_sum, _ = value_loss(values, batch.values, batch.returns, mask, settings.value_clip)
    if figures is not None:
        figures.add(
            policy_loss=policy_sum / count,
            value_loss=value_sum / count,
            clip_fraction=clip_fraction(logprobs, batch, settings.clip),
        )
    return policy_sum + settings.value_weight * value_sum, count


def ppo_batches(
    model: ActorCritic,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    reward: RewardFunction,
    rollouts: RolloutSettings,
    settings: PPOSettings,
    controller: KLController,
    generator: torch.Generator,
    reference: GPT2 | None = None,
    figures: Figures | None = None,
    reward_scale: RewardScale | None = None,
) -> OnPolicyBatches:
    """Minibatches for `training.train(model, batches, ..., partial(ppo_step, ...))`.

    reward_scale: by which rewards are normalized, see `measure_reward_scale`; for a reward model,
    whose outputs may have any size beside the KL penalty. Logged rewards stay as they are.
    """
    experience = partial(
        ppo_experience,
        model=model,
        controller=controller,
        settings=settings,
        rollouts=rollouts,
        figures=figures,
        reward_scale=reward_scale,
    )
    return OnPolicyBatches(
        *(model.policy, tokenizer, prompts, reward, experience, rollouts, generator),
        *(reference, figures, controller),
    )
