"""What `ral_gym.commands.cli` is made of: the arguments of its commands, how they end, and all but training."""
