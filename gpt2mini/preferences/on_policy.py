"""Learning from rollouts in a training loop: sample, reward, learn a few epochs, and sample anew.

PPO and GRPO differ in how rewards become advantages (`make_experience`) and in their loss alone.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2mini.model import GPT2
from gpt2mini.preferences.reference import (
    check_reference_does_not_learn,
    warn_if_adapters_are_trained,
)
from gpt2mini.preferences.reward_functions import RewardFunction, call_reward
from gpt2mini.preferences.rollouts import (
    Experience,
    Rollout,
    RolloutSettings,
    encode_prompts,
    response_texts,
    roll_out,
)
from gpt2mini.tokenizer import Tokenizer
from gpt2mini.training.fingerprint import digest
from gpt2mini.training.metrics import Figures

logger = logging.getLogger(__name__)

FAR_AWAY = 1.0  # nats per token: the policy's tokens are e times less likely under the reference

# From a rollout and the reward of each response, (batch), to what a loss function needs.
MakeExperience = Callable[[Rollout, Tensor], Experience]


class OnPolicyBatches:
    """Minibatches for `training.train`. Iterating over them once is one rollout: sample, compute
    rewards, make an `Experience`, give its minibatches for a few epochs; `len` counts these.

    prompts: texts in the model's template; of those too long for the context, the tail is kept.
    make_experience: (rollout, rewards) -> Experience, which is what sets one method apart from
    another. reference: the default is the policy without its adapters; ValueError if more than
    these can be trained. controller: a KL coefficient that changes; it is saved with the state.
    Rollouts depend on the policy at that time, so a run resumes from `state_dict`.
    """

    def __init__(
        self,
        policy: GPT2,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        reward: RewardFunction,
        make_experience: MakeExperience,
        settings: RolloutSettings,
        generator: torch.Generator,
        reference: GPT2 | None = None,
        figures: Figures | None = None,
        controller: Any = None,
    ) -> None:
        check_no_dropout(policy)
        if not prompts:
            raise ValueError("there are no prompts")
        check_reference_does_not_learn(policy, reference)
        warn_if_adapters_are_trained(policy, reference)
        self.policy, self.tokenizer, self.reward = policy, tokenizer, reward
        self.make_experience, self.settings = make_experience, settings
        self.generator, self.reference = generator, reference
        self.figures, self.controller = figures or Figures(), controller
        self.prompts = list(prompts)
        self.encoded = encode_prompts(policy, tokenizer, self.prompts, settings.max_new_tokens)
        self.prompts_left: list[int] = []  # not used yet in this pass over the prompts
        self.experience: Experience | None = None
        self.minibatches_left: list[int] = []  # of the experience
        self.has_warned = False

    def __len__(self) -> int:
        return self.settings.updates

    def __iter__(self) -> Iterator[Experience]:
        """The minibatches left of a rollout that was interrupted; otherwise those of a new one."""
        size, settings = self.settings.minibatch_rows, self.settings
        if self.experience is None or not self.minibatches_left:
            self.experience = self.next_experience()
            for _ in range(settings.epochs):
                self.minibatches_left += self.shuffled(settings.rows // size)
        while self.minibatches_left:
            i = self.minibatches_left.pop(0)
            yield self.experience.rows(i * size, (i + 1) * size)

    def next_experience(self) -> Experience:
        check_reference_does_not_learn(self.policy, self.reference)  # unfrozen since?
        indices, settings = self.next_prompts(), self.settings
        rollout = roll_out(
            self.policy,
            [self.encoded[i] for i in indices],
            self.tokenizer.eos_id,
            settings,
            self.reference,
            self.generator,
            self.tokenizer.missing_ids(self.policy.config.vocab_size),
        )
        prompts = [self.prompts[i] for i in indices for _ in range(settings.num_samples)]
        responses = response_texts(rollout, self.tokenizer)
        rewards = call_reward(self.reward, prompts, responses).to(rollout.logprobs.device)
        self.warn_if_far_away(rollout)
        self.figures.add(
            reward=rewards,
            kl=rollout.kl,
            entropy=-rollout.logprobs[rollout.response_mask],  # estimated from the samples
            response_length=rollout.lengths,
        )
        return self.make_experience(rollout, rewards)

    def warn_if_far_away(self, rollout: Rollout) -> None:
        """Once, if the policy has left the reference so far that a reward cannot be trusted."""
        kl, length = float(rollout.kl.mean()), float(rollout.lengths.float().mean())
        target = getattr(self.controller, "target", None)
        limit = FAR_AWAY * length if target is None else min(3 * target, FAR_AWAY * length)
        if kl > limit and not self.has_warned:
            self.has_warned = True
            logger.warning(
                "the policy has moved %.1f nats (KL) of a response of %.0f tokens away from its "
                "reference: rewards may rise while the text turns to nonsense. Raise the KL "
                "coefficient, or take a lower learning rate or fewer rollouts",
                *(kl, length),
            )

    def next_prompts(self) -> list[int]:
        """Passes over all prompts, each in a new random order."""
        n_prompts = self.settings.rows // self.settings.num_samples
        while len(self.prompts_left) < n_prompts:
            self.prompts_left += self.shuffled(len(self.prompts))
        chosen, self.prompts_left = self.prompts_left[:n_prompts], self.prompts_left[n_prompts:]
        return chosen

    def shuffled(self, n: int) -> list[int]:
        device = self.generator.device
        return torch.randperm(n, generator=self.generator, device=device).tolist()

    def fingerprint(self) -> dict[str, str]:
        """Hashes by which a resumed run recognizes its data."""
        sizes = vars(self.settings) | {"precision": None}
        del sizes["read_again"]  # how they are computed, like the precision
        return {"prompts": digest(self.prompts), "sizes of rollouts": digest(sizes)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "prompts_left": list(self.prompts_left),
            "minibatches_left": list(self.minibatches_left),
            "experience": None if self.experience is None else vars(self.experience),
            "generator": self.generator.get_state(),
            "controller": {} if self.controller is None else self.controller.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.prompts_left = list(state["prompts_left"])
        self.minibatches_left = list(state["minibatches_left"])
        experience, device = state["experience"], self.generator.device
        self.experience = None if experience is None else Experience(**experience).to(device)
        self.generator.set_state(state["generator"])
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])


def check_no_dropout(policy: GPT2) -> None:
    adapters = [m.p for m in policy.modules() if isinstance(m, torch.nn.Dropout)]
    rates = [policy.config.drop_rate, *adapters]
    if any(rates):
        raise ValueError(
            f"with dropout ({max(rates)}) the policy that is trained is not the policy that "
            "sampled, and the first ratio is not 1: load the model with drop_rate 0 and adapters "
            "without dropout"
        )
