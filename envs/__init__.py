"""The generation MDP; knows Gymnasium, not Stable-Baselines3."""
