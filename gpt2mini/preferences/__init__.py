"""Learning from preferences and rewards: reward model, DPO, PPO, GRPO.

Read in this order: pairs, reward_model, dpo, reward_functions, rollouts, on_policy, ppo, grpo,
comparison.
"""
