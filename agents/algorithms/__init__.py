"""REINFORCE and GRPO on whole episodes, as Stable-Baselines3 algorithms."""
