"""The Stable-Baselines3 side: policy, episode buffer, algorithms, callbacks."""
