"""Learn from preferences and rewards: reward model, DPO, PPO, GRPO.

Read in this order: rewards, dpo, rollouts, ppo, grpo, evaluate.
"""
