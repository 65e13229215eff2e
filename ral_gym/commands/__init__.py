"""What `ral_gym.cli` is made of: the arguments of its commands, how they end, and all but training."""
